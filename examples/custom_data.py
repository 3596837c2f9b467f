"""Custom data: two sources of different forms, in one run, with metrics for each.

    python examples/custom_data.py --workdir runs/custom_data

A CSV file with columns of other names (`columns` says which is which) and conversations as lists of turns are mixed 3 to 1
by weight. metrics.jsonl, the report and summary.json then have the rewards and the KL of each set beside those of both.
"""

import csv
import json
import sys
from pathlib import Path

from ple_jax.configs import default
from ple_jax.main import cli

DATA = Path("runs/custom_data_files")
TICKETS = ["My parcel has not arrived.", "The lamp was broken.", "Can I change my order?", "I was charged twice.",
           "Where is my refund?", "The shoes are too small.", "How do I cancel?", "The app logs me out."]  # fmt: skip
QUESTIONS = ["What is tea?", "Why is the sky blue?", "How do I boil an egg?", "What is a bridge?", "Who bakes bread?",
             "What is snow?", "How does a clock work?", "What is honey?"]  # fmt: skip


def write_sources(folder: Path) -> None:
    """Writes a CSV file with a column `ticket`, and JSON lines with turns as `prompt`, each for training and held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", slice(0, 6)), ("heldout", slice(6, 8))):
        with (folder / f"tickets_{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["number", "ticket"], *enumerate(TICKETS[part])])
        turns = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS[part]]
        (folder / f"questions_{name}.jsonl").write_text("\n".join(map(json.dumps, turns)) + "\n", encoding="utf-8")


def get_config():
    c = default.get_config()
    tickets = {name: str(DATA / f"tickets_{name}.csv") for name in ("train", "heldout")}
    questions = {name: str(DATA / f"questions_{name}.jsonl") for name in ("train", "heldout")}
    c.task.sets = {"tickets": {**tickets, "columns": {"prompt": "ticket"}, "weight": 3.0}, "questions": questions}
    c.task.chat = True  # a text becomes the first turn of a conversation
    c.principles = "helpful_harmless+concise"
    c.reward.name, c.reward.kwargs = "length", {"target": 20}
    c.iterations, c.queries_per_iteration = 3, 8
    return c


if __name__ == "__main__":
    write_sources(DATA)
    sys.argv[1:1] = ["--config", __file__]
    cli()
