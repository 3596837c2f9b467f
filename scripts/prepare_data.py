"""Raw data as clean train.jsonl and test.jsonl, with counts of what was left out.

    python scripts/prepare_data.py --format hh --train Anthropic/hh-rlhf --test Anthropic/hh-rlhf \\
        --subsets harmless-base,helpful-base --needs pair --out data/hh
    python scripts/prepare_data.py --train faq.csv --columns prompt=question,completion=answer --out data/faq

The two files are read by --config.task.train=DIR/train.jsonl --config.task.heldout=DIR/test.jsonl (with the default
--config.task.format=records), and by TRL. bad.jsonl lists what cannot be used, summary.json has the counts. Without --test a
share of the records is set apart by a hash of the prompt, so that no prompt is in both files.
"""

import argparse
import re
import sys
from pathlib import Path

from ple_jax.core.errors import UserError
from ple_jax.data import formats, prepare


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must read like prompt=question,completion=answer")
    return {ours: theirs for ours, _, theirs in pairs}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _words(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high)


def _share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return float(text)


def _number(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def _in_its_words(error: str) -> str:
    """Names the options of this script where an error names keys of a config."""
    error = re.sub(r"""--config\.task\.columns="\{'(\w+)': '(\w+)'\}\"""", r"--columns \1=\2", error)
    error = re.sub(r"""--config\.task\.subsets="\('([^']*)',\)\"""", r"--subsets \1", error)
    error = re.sub(r"--config\.task\.words='\((\d+), (\d+)\)'", r"--words \1-\2", error)
    error = error.replace("set --config.task.train=DIR or --config.task.heldout=DIR", "give --train DIR or --test DIR")
    error = error.replace("--config.task.train_split and --config.task.heldout_split", "--train-split and --test-split")
    return re.sub(r"(?:--)?config\.task\.(subsets|columns|words|format)", r"--\1", error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--format", choices=formats.FORMATS, default="records", help="of the data (default: records)")
    add("--train", required=True, metavar="SOURCE", help="a file, a folder, or the user/name of a data set on a hub")
    add("--test", default="", metavar="SOURCE", help="likewise; may be the same folder or data set, its split --test-split")
    add("--out", required=True, type=Path, metavar="DIR", help="where the files go")
    add("--train-split", default="train", dest="split", help="of a folder or a data set on a hub (default: train)")
    add("--test-split", default="test", help="likewise, of --test (default: test)")
    add("--subsets", default=(), type=_names, metavar="A,B", help="configurations or sub-folders (default: all of it)")
    add("--columns", default={}, type=_columns, metavar="OURS=THEIRS,...", help="what the data call our columns")
    add("--words", default=(2, 8), type=_words, metavar="LOW-HIGH", help="of format imdb: words of the query (default: 2-8)")
    add("--needs", choices=formats.NEEDS, default="prompt", help="what a record must have to be of use (default: prompt)")
    add("--keep", default=(), dest="reads", type=_names, metavar="A,B", help="columns that rewards read; all must have them")
    add("--test-share", default=0.05, type=_share, help="without --test: how much is set apart (default: 0.05)")
    add("--max-words", default=0, type=int, metavar="N", help="leave longer prompts out")
    add("--limit", default=0, type=_number, metavar="N", help="use so many records, drawn by --seed")
    add("--seed", default=0, type=_number)
    options = vars(parser.parse_args())
    try:
        summary = prepare.prepare(options.pop("train"), options.pop("out"), **options)
    except (UserError, OSError) as error:
        print(f"error: {_in_its_words(str(error))}", file=sys.stderr)
        return 2
    print(prepare.table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
