"""A logistic regression on the words of a response: bias + the weights of the distinct words (or word pairs) it knows.

The weights that come with the package say how positive a film review is. They were trained on labelled reviews
(scripts/train_bag_of_words.py), so this is a second opinion beside VADER's lexicon: a reward that training never sees, on
which over-optimisation shows. The option `path` names a file with weights of your own.

The log-odds are the default because they do not saturate: two texts full of praise both have a probability of about 1, and
which is better would be lost. A word counts once however often it is repeated, so repeating it earns nothing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax import prompts
from ple_jax.core.answers import digest
from ple_jax.core.config import PACKAGE
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE

VERSION = "1"  # another one with every change of the values
WEIGHTS = PACKAGE / "data" / "imdb_words.json"
_WORD = re.compile(r"\w+(?:'\w+)*")  # part of what the weights mean: not the words that the measures of texts count


def make(path: str | None = None, *, output: str = "log_odds", with_prompt: bool = False) -> Reward:
    """Returns a reward that is the regression's output for the words of a response.

    Args:
        path: a JSON file {"bias": number, "weights": {word: number}}, whose other keys are ignored; the weights for film
            reviews if it is None. A weight's key is a word, or several with a space between, in lower case and with straight
            apostrophes.
        output: log_odds (nats, unbounded) or probability (0 to 1).
        with_prompt: score prompt and response together, not the response alone.

    Raises:
        UserError: if there is no such file, it holds something else, or there is no such output.
    """
    if output not in ("log_odds", "probability"):
        raise UserError(f"{WHERE} output = {output!r}: choose log_odds or probability")
    bias, weights = read(WEIGHTS if path is None else Path(path))

    def reward(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = responses
        if with_prompt:
            texts = [q + prompts.completion(q, r, chat=False) for q, r in zip(queries, responses, strict=True)]
        values = log_odds(texts, bias, weights)
        return values if output == "log_odds" else [_sigmoid(value) for value in values]

    version = f"{VERSION} {digest(bias, weights)[:16]} {output=} {with_prompt=}"
    scale = (-math.inf, math.inf) if output == "log_odds" else (0.0, 1.0)
    return Reward("bag_of_words", reward, version=version, scale=scale)


def log_odds(texts: Sequence[str], bias: float, weights: Mapping[str, float]) -> list[float]:
    """Returns the regression's log-odds for every text, in nats."""
    longest = max(len(key.split()) for key in weights)
    known = [features(text, longest) & weights.keys() for text in texts]
    # summed exactly, in whatever order a set gives them
    return [math.fsum([bias, *(weights[key] for key in keys)]) for keys in known]


def features(text: str, longest: int = 1) -> set[str]:
    """Returns the distinct words of a text, and all runs of up to `longest` words, joined by spaces."""
    words = _words(text)
    return {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def read(path: Path) -> tuple[float, dict[str, float]]:
    """Reads the bias and the weights in a file.

    Raises:
        UserError: if it cannot be read, has another layout, or has a key that no text can match.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bias, weights = content["bias"], content["weights"]
        wrong = next((k for k, v in {"bias": bias, **weights}.items() if not _is_number(v)), None)
    except (ArithmeticError, OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    if wrong is not None or not weights:
        raise _refused(path, f"{wrong!r} has no finite number" if weights else "no weights")
    for key in weights:
        if key not in features(key, len(key.split())):
            raise _refused(path, f"no text has the word {key!r}: write {' '.join(_words(key))!r}")
    return float(bias), {key: float(weight) for key, weight in weights.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f"{WHERE} path: {path} holds no weights of words ({why}); it must read like"
        ' {"bias": 0.1, "weights": {"good": 0.9}}, as scripts/train_bag_of_words.py writes it'
    )


def _sigmoid(x: float) -> float:
    return math.exp(-math.log1p(math.exp(-x))) if x > 0 else math.exp(x - math.log1p(math.exp(x)))
