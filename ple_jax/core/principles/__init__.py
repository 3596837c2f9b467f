"""Named principle sets: the text that guides the principled response. The first line of each file is its version."""

from pathlib import Path

from ple_jax.core.config import UserError, names, suggestion


def load(source: str) -> str:
    """The text of a named set, or of a text file of your own (without its first line, if that is `# version: ...`).

    Raises:
        UserError: neither, or an empty file.
    """
    built_in = Path(__file__).parent / f"{source}.txt"
    path = built_in if built_in.is_file() else Path(source)
    if not path.is_file():
        known = names("core/principles", ".txt")
        raise UserError(f"principles {source!r}: neither a file nor one of {', '.join(known)}{suggestion(source, known)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"principles file {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    text = "\n".join(lines[1:] if lines and lines[0].startswith("# version:") else lines).strip()
    if not text:
        raise UserError(f"principles file {path} is empty; write a few rules into it")
    return text
