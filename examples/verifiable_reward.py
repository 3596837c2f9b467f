"""A reward that can be verified: the answer must be JSON with the right number in it.

    python examples/verifiable_reward.py --workdir runs/verifiable
    python examples/verifiable_reward.py --workdir runs/verifiable_grpo --config.algorithm=grpo

Two rewards that ship are combined: `json_schema` asks for the form (pip install 'ple_jax[json_schema]'), `numeric` compares
the last number of the response with the record's own answer. A response is right only if both are.
"""

import json
import sys
from pathlib import Path

from ple_jax.configs import default
from ple_jax.main import cli

DATA = Path("runs/verifiable_data")
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
SHOWN = 'Q: 2 + 2\nA: {"sum": 4}\nQ: 8 + 5\nA: {"sum": 13}\nQ: '


def write_records(folder: Path) -> None:
    """Writes sums with their results: `completion` is what `numeric` compares with."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    for name, some in (("train", sums[::2]), ("heldout", sums[1::4])):
        records = [{"prompt": f"{SHOWN}{a} + {b}\nA:", "completion": json.dumps({"sum": a + b})} for a, b in some]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


def get_config():
    c = default.get_config()
    c.task.train, c.task.heldout = str(DATA / "train.jsonl"), str(DATA / "heldout.jsonl")
    c.principles = "sums"
    form = {"name": "json_schema", "kwargs": {"schema": json.dumps(SCHEMA)}}
    c.reward.name = "combine"
    c.reward.kwargs = {"how": "min", "parts": {"form": form, "number": {"name": "numeric"}}}
    c.queries_per_iteration = 32
    c.sampling.max_new_tokens = 10
    c.ple.tau_0 = 0.5  # rewards are 0 or 1
    c.ple.blend_temperature = 0.1  # of a pair with one right answer, that one is learned
    return c


if __name__ == "__main__":
    write_records(DATA)
    sys.argv[1:1] = ["--config", __file__]
    cli()
