"""The documentation as a site: docs/, README, CHANGELOG and CONTRIBUTING, and a reference that is made of the sources.

    .venv/bin/python scripts/build_site.py       # build/site/html/index.html

The pages are written to be read in a repository too, so a few things are done to them here. A link to another file of the
repository leads to a page that shows this file; a formula between dollars becomes MathML, which needs no script to be read;
what a block of commands needs is shown above it. Reference pages are made of configs/default.py with its rules, and of
docstrings. Zensical then builds zensical.toml, strictly: a link that leads nowhere ends the build.
"""

import argparse
import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "site"
# a page of the site -> the file that it is made of
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    **{f"{file.stem}.md": f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))},
}
# a page of the reference -> the modules that it shows, whose docstrings say what is in them
REFERENCE = {
    "losses": ["ple_jax.losses"],
    "method": ["ple_jax.formulas.threshold", "ple_jax.formulas.pairing", "ple_jax.formulas.advantages"],
    "algorithms": ["ple_jax.algorithms", "ple_jax.core.types", "ple_jax.core.rules"],
    "rewards": ["ple_jax.rewards", "ple_jax.prompts", "ple_jax.prompts.principles"],
    "model": ["ple_jax.backend.lora", "ple_jax.backend.generate", "ple_jax.backend.train", "ple_jax.backend.sharding",
              "ple_jax.models"],
    "results": ["ple_jax.formulas.intervals", "ple_jax.formulas.texts", "ple_jax.training.journal"],
}  # fmt: skip
_STYLE = """\
.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) td code { word-break: normal; overflow-wrap: normal; }
.md-typeset math[display="block"] { margin: 1em 0; overflow-x: auto; max-width: 100%; }
.md-typeset img { max-width: 100%; height: auto; }
"""
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".ipynb": "json"}
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$([^$\n]+?)\$(?![\w$])", re.DOTALL)


# ---------------------------------------------------------------- pages


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Returns a page with `change`, a function of text to text, done to all that is not code."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def with_links(text: str, source: str, shown: set[str]) -> str:
    """Returns a page whose links lead to pages of the site.

    Args:
      text: the page, as it stands in the file.
      source: that file, from the root of the repository.
      shown: gets every file or folder that a link leads to and that is no page: it needs one.
    """
    made_of = {file: page for page, file in PAGES.items()}  # all of them lie at the top of the site

    def lead(link: re.Match[str]) -> str:
        path, hash_, anchor = link[2].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        file = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT).as_posix()
        if file.startswith("docs/images/"):
            return f"{link[1]}{file.removeprefix('docs/')}{link[3]}"
        if file not in made_of:
            shown.add(file)
        target = made_of.get(file, f"source/{file}.md")
        return f"{link[1]}{target}{hash_}{anchor}{link[3]}"

    return outside_code(text, lambda prose: _LINK.sub(lead, prose))


def with_formulas(text: str) -> str:
    """Returns a page whose formulas, in LaTeX between one dollar or two, are MathML."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        block, inline = found.groups()
        # within a span, as Markdown takes a line that begins with <math> for a paragraph of its own
        drawn = convert(" ".join((block or inline).split()), display="block" if block else "inline")
        return drawn if block else f"<span>{drawn}</span>"

    return outside_code(text, lambda prose: _FORMULA.sub(formula, prose))


def with_needs(text: str) -> str:
    """Returns a page that shows what its blocks of commands need, which stands in a comment above each of them."""
    return re.sub(r"^<!-- needs: (.*?) -->$", r"*This needs \1.*\n", text, flags=re.MULTILINE)


def source_page(file: str) -> str:
    """Returns a page that shows a file of the repository, or the names in a folder."""
    path = ROOT / file
    title = f"---\ntitle: {file}\nsearch:\n  exclude: true\n---\n\n# {file}\n\n".replace("__", r"\_\_")
    if path.is_dir():
        names = sorted(item.name + "/" * item.is_dir() for item in path.iterdir() if item.name != "__pycache__")
        return title + "A folder of the repository:\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    fence = "````"
    language = _LANGUAGES.get(path.suffix, "docker" if path.suffix == ".Dockerfile" else "text")
    return f"{title}{fence}{language}\n{path.read_text(encoding='utf-8').rstrip()}\n{fence}\n"


# ---------------------------------------------------------------- the reference


class Key(NamedTuple):
    """A key of the config: its dotted name, and what the comments at it say."""

    name: str
    about: str


def config_keys(source: str) -> Iterator[tuple[str, str, list[Key]]]:
    """Yields the sections of configs/default.py in their order: name ("" of what stands at the top), comment, keys."""
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)).body
    name, about, keys = "", "", list[Key]()
    for line in body:
        if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Attribute):
            continue
        key, value = ast.unparse(line.targets[0]).removeprefix("c."), ast.unparse(line.value)
        said = " ".join([*_above(comments, line.lineno), comments.get(line.lineno, ("", False))[0]]).strip()
        if value == "ConfigDict()":
            yield name, about, keys
            name, about, keys = key, said, []
        else:
            keys.append(Key(key, said))
    yield name, about, keys


def _above(comments: Mapping[int, tuple[str, bool]], line: int) -> list[str]:
    """Returns the comment lines that stand directly above a line."""
    above: list[str] = []
    while (found := comments.get(line - 1 - len(above))) and found[1]:
        above.insert(0, found[0])
    return above


def config_page() -> str:
    """Returns the page of all config keys: default and meaning from configs/default.py, possible values from the rules."""
    from configs import default
    from ple_jax.core.config import RULES, flatten

    values = flatten(default.get_config().to_dict())
    lines = [
        "# Config keys", "",
        "Made of [configs/default.py](../source/configs/default.py.md), and of the rules that check a config. Override"
        " any of them on the command line: `--config.ple.tau_0=0.1`.", "",
    ]  # fmt: skip
    for section, about, keys in config_keys((ROOT / "configs" / "default.py").read_text(encoding="utf-8")):
        lines += [f"## {section or 'At the top'}", "", *([about[0].upper() + about[1:] + ".", ""] if about else [])]
        lines += ["| key | default | takes | meaning |", "|---|---|---|---|"]
        for key in keys:
            takes = re.sub(r" \(looked in [^)]*\)", "", RULES[key.name](object()))
            shown = "unset" if values[key.name] is None else f"`{values[key.name]!r}`"
            lines.append(f"| `{key.name}` | {shown} | {_cell(takes)} | {_cell(key.about)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def reference_page(title: str, modules: list[str]) -> str:
    """Returns a page for mkdocstrings, with what modules' docstrings say."""
    lines = [f"# API: {title}", ""]
    for module in modules:
        lines += [f"::: {module}", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------- the site


def write(out: Path) -> None:
    """Writes what Zensical builds the site of: all pages, pictures, and the reference."""
    shutil.rmtree(out, ignore_errors=True)
    shown: set[str] = {"configs/default.py"}
    pages = {}
    for page, file in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        pages[page] = with_needs(with_formulas(with_links(text, file, shown)))
    pages["reference/config.md"] = config_page()
    pages |= {f"reference/api/{title}.md": reference_page(title, modules) for title, modules in REFERENCE.items()}
    pages |= {f"source/{file}.md": source_page(file) for file in sorted(shown)}
    for page, text in pages.items():
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        (out / page).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", out / "images")
    (out / "site.css").write_text(_STYLE, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    write(OUT / "pages")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
