"""A reward of your own: reviews that name what the record asks for, without repeating it.

    python examples/own_reward.py --workdir runs/own_reward

A reward is a function of prompts and responses. It may have options of its own (`bonus`, from config.reward.kwargs) and ask
for columns of the record by name (`about`). The same file can hold the config, so that one file is the whole experiment.
"""

import json
import sys
from pathlib import Path

from ple_jax.configs import default
from ple_jax.main import cli

DATA = Path("runs/own_reward_data")
FILMS = ["music", "the actors", "the ending", "the landscape", "the dialogue", "the costumes", "the pace", "the children"]
OPENINGS = ["I saw this film last night and", "My sister took me to this film because", "About this film I can say that"]


def score(prompts: list[str], responses: list[str], about: list[str], bonus: float = 1.0) -> list[float]:
    """Returns `bonus` for a response that names the record's topic once, half of it for more often, and 0 for never."""
    counts = [response.lower().count(topic) for response, topic in zip(responses, about, strict=True)]
    return [bonus * (1.0 if count == 1 else 0.5 if count else 0.0) for count in counts]


def write_records(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl; the column `about` is what the reward reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, topics in (("train", FILMS[:6]), ("heldout", FILMS[6:])):
        records = [{"prompt": f"A review of {topic}. {opening}", "about": topic} for topic in topics for opening in OPENINGS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


def get_config():
    c = default.get_config()
    c.task.train, c.task.heldout = str(DATA / "train.jsonl"), str(DATA / "heldout.jsonl")
    c.reward.name, c.reward.kwargs = f"{__file__}:score", {"bonus": 1.0}
    c.iterations, c.queries_per_iteration = 3, 16
    return c


if __name__ == "__main__":
    write_records(DATA)
    sys.argv[1:1] = ["--config", __file__]
    cli()
