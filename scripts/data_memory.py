"""Host memory that a large data set takes: real dialogues, repeated under ids of their own, are read, checked and drawn.

    python scripts/data_memory.py --data harmless_base_train.jsonl.gz [--records 161000] [--streaming] [--folder DIR]

Per line: what is done, seconds, and MiB of resident memory (Linux) above what the process had before the data: what stays,
and the most there was. First as PLE takes the records (prompts), then, in another process, as a reward model does (pairs).
"""

import argparse
import ctypes
import gc
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ple_jax.core import processor

MIB = 2**20


def write(source: Path, target: Path, count: int) -> int:
    """Writes so many records, those of `source` again and again; the characters of their texts."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    characters = 0
    with target.open("w", encoding="utf-8") as file:
        for i in range(count):
            record = {**records[i % len(records)], "id": f"dialogue-{i}"}
            # not the same object again to a reader that would notice, nor the same query
            record |= {key: record[key].replace("\n\nHuman:", f"\n\nHuman: ({i})", 1) for key in ("chosen", "rejected")}
            characters += len(record["chosen"]) + len(record["rejected"])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return characters


def settled() -> int:
    """Resident bytes after what nobody uses was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return processor.resident("VmRSS")


def measured(before: int, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work gives; seconds, and bytes above `before`: what stays and the most there was."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    made = work()
    seconds, peak = time.perf_counter() - start, processor.resident("VmHWM") - before
    return made, {"seconds": seconds, "stays": settled() - before, "peak": peak}


def streamed(source: str, **_: Any) -> Iterator[Any]:
    """The records of a file as `datasets` streams those of a hub."""
    import datasets

    from ple_jax.data.records import Record

    rows = datasets.load_dataset("json", data_files=source, split="train", streaming=True)
    return (Record(f"{source}:{i}", f"train:{i}", row) for i, row in enumerate(rows, 1))


def phases(train: str, heldout: str, kind: str, streaming: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Everything that a run does with its records before the first token is sampled; of a stream: reading."""
    from ple_jax import algorithms
    from ple_jax.data import records
    from ple_jax.data.left_out import fit
    from ple_jax.data.load import load_data
    from ple_jax.data.mixture import draw_queries
    from ple_jax.data.queries import digest
    from ple_jax.main import parse
    from ple_jax.planning.outline import read_source
    from ple_jax.prompts import principles
    from ple_jax.training import prompting

    name = {"prompts": "hh", "pairs": "reward_hh"}[kind]
    flags = ["--config", name, "--workdir", "x", f"--config.task.train={train}", f"--config.task.heldout={heldout}"]
    flags += ["--config.task.subsets=()", "--config.task.max_bad_share=0.5"]
    config = parse(["ple_jax", *flags]).config
    tokenizer = read_source(config.model.path, config.model.revision).tokenizer
    algorithm = algorithms.load(config.algorithm)
    needs = "pair" if kind == "pairs" else "prompt"
    if streaming:
        records.read = streamed
        next(streamed(heldout))  # what `datasets` itself takes
    before = settled()
    data, found = measured(before, lambda: load_data(config, needs=needs))
    yield f"read {len(data.train):,}", found
    if streaming:
        return
    yield "digest", measured(before, lambda: digest(data.train))[1]
    if kind == "pairs":
        yield "encode", measured(before, lambda: fit(data.train, lambda q: algorithm.encode(q, tokenizer, config)))[1]
        return
    rules = prompting.Prompts(config, tokenizer, principles.load(config.principles), (tokenizer.eos_token_id,))
    _, found = measured(before, lambda: prompting.usable(data.train, rules, "train"))
    yield "check", found
    yield "draw", measured(before, lambda: [draw_queries(config, data.train, i) for i in range(8)])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a .jsonl.gz of HH: `chosen` and `rejected`")
    parser.add_argument("--records", type=int, default=161_000)
    parser.add_argument("--streaming", action="store_true", help="read by `datasets` as a stream, and do no more")
    parser.add_argument("--only", nargs=1, choices=("prompts", "pairs"), help="one of the two (default: both)")
    parser.add_argument("--folder", help="where to write the records (default: a temporary folder)")
    parser.add_argument("--measure", nargs=3, metavar=("TRAIN", "HELDOUT", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        for what, found in phases(*options.measure, options.streaming):
            print(json.dumps([what, found]), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        train, heldout = Path(folder, "train.jsonl"), Path(folder, "heldout.jsonl")
        characters = write(Path(options.data), train, options.records)
        write(Path(options.data), heldout, 100)
        heldout.write_text(heldout.read_text(encoding="utf-8").replace("Human: (", "Human: (held out "), encoding="utf-8")
        size = train.stat().st_size
        print(f"{options.records:,} records, {characters:,} characters, {size / MIB:.0f} MiB as a file", flush=True)
        for kind in options.only or ("prompts", "pairs"):
            command = [sys.executable, __file__, "--data", options.data, "--measure", str(train), str(heldout), kind]
            command += ["--streaming"] * options.streaming
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            for what, found in map(json.loads, lines):
                print(
                    f"{kind:<8} {what:<14} {found['seconds']:6.1f} s   stays {found['stays'] / MIB:6.0f} MiB"
                    f"   peak {found['peak'] / MIB:6.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
