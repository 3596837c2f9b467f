"""Perplexity of real texts by the decoder here and by transformers, each reading the same GGUF file by itself.

    python scripts/parity.py --texts reviews.jsonl.gz --column text [--limit 200] [--model smollm2-135m]

The first 256 tokens of every text count; a text of one token says nothing and is left out. Prints one JSON line. Exit
code 1 if the two perplexities differ by more than 1e-3, relatively. Needs the extra `dev` (torch) and a model in GGUF.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ple_jax.backend import backend, forward
from ple_jax.backend.model import Model, fill
from ple_jax.core.files import read_jsonl
from ple_jax.core.packing import pack
from ple_jax.core.types import Batch
from ple_jax.models import weights

_TOKENS, _ROWS, _TOLERANCE = 256, 8, 1e-3


def read_texts(path: Path, column: str, limit: int) -> list[str]:
    """The column of the first `limit` lines of a JSONL file, gzipped or not."""
    return [row[column] for row in read_jsonl(path)[:limit]]


def batches(rows: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Right-padded tokens and their mask, all of one shape."""
    for start in range(0, len(rows), _ROWS):
        tokens, mask = np.zeros((_ROWS, _TOKENS), np.int32), np.zeros((_ROWS, _TOKENS), bool)
        for i, row in enumerate(rows[start : start + _ROWS]):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        yield tokens, mask


def ours(loaded: weights.Loaded, rows: list[list[int]]) -> float:
    """Negative log-likelihood in nats of every token but each text's first, summed."""
    model = Model.create(loaded.config, dtype=jnp.float32, scan=backend.use_scan("auto"))
    base = fill(model, loaded.weights, lambda _, array: jnp.asarray(array))
    # a text is a prompt of one token and a response
    call = jax.jit(lambda base, packed: forward.outputs(model, base, {}, packed).logprobs.sum((1, 2)))
    total = 0.0
    for tokens, mask in batches(rows):
        batch = Batch(tokens[:, :1], mask[:, :1], tokens[:, None, 1:], mask[:, None, 1:], {})
        total -= np.asarray(call(base, pack(batch)), np.float64).sum()
    return total


def theirs(file: Path, rows: list[list[int]]) -> float:
    """The same, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    total = 0.0
    for tokens, mask in batches(rows):
        ids, attention = torch.tensor(tokens).long(), torch.tensor(mask)
        with torch.no_grad():
            logits = model(ids, attention_mask=attention.long()).logits[:, :-1]
        chosen = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        total -= chosen[attention[:, 1:]].double().sum().item()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a JSONL file, which may be gzipped")
    parser.add_argument("--column", required=True, help="the field that holds the text")
    parser.add_argument("--limit", type=int, default=200, help="how many texts")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or a .gguf file")
    options = parser.parse_args()

    loaded = weights.load(options.model)
    texts = read_texts(options.texts, options.column, options.limit)
    rows = [ids for text in texts if len(ids := loaded.tokenizer.encode(text)[:_TOKENS]) > 1]
    tokens = sum(len(row) - 1 for row in rows)
    started = time.perf_counter()
    mine = float(np.exp(ours(loaded, rows) / tokens))
    between = time.perf_counter()
    file = weights.gguf_file(options.model) or Path(options.model)
    reference = float(np.exp(theirs(file, rows) / tokens))
    difference = abs(mine - reference) / reference
    report = {
        "texts": len(rows),
        "tokens": tokens,
        "ours": mine,
        "transformers": reference,
        "relative_difference": difference,
        "seconds": {"ours": round(between - started, 1), "transformers": round(time.perf_counter() - between, 1)},
    }
    print(json.dumps(report))
    return int(not difference <= _TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
