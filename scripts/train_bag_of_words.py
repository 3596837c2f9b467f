"""Trains the weights of the reward `bag_of_words` on labelled texts, and says how good they are on others.

    python scripts/train_bag_of_words.py --train imdb/train.jsonl.gz --test imdb/test.jsonl.gz --out words.json

Both files are JSONL, gzipped or not, with `text` and `label` (1 is good, 0 is not). A logistic regression with an L2 penalty
on which words are in a text. It is trained on pieces of --piece words, as long as the responses it will score: weights that
were trained on whole reviews rest on all their hundreds of words, and say little of twenty. The penalty is the one with the
smallest log loss in a cross-validation over texts, all pieces of a text on one side.

Prints one JSON line; the output has the same numbers. The same data and versions give the same bytes. Needs scikit-learn.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ple_jax.core.files import read_jsonl, write_text
from ple_jax.rewards.bag_of_words import features, log_odds

_BREAK = re.compile(r"<br ?/?>")
_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # sklearn's C: the inverse of the penalty
_FOLDS, _DIGITS = 5, 4


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Texts, without line breaks of HTML, and labels, bool."""
    rows = read_jsonl(path)
    return [_BREAK.sub(" ", row["text"]) for row in rows], np.array([row["label"] == 1 for row in rows])


def pieces(texts: Sequence[str], size: int) -> tuple[list[str], list[int]]:
    """Consecutive pieces of `size` words, a shorter rest left out unless it is all there is; and whose text each is."""
    found: list[str] = []
    owner: list[int] = []
    for i, text in enumerate(texts):
        words = text.split()
        starts = range(0, max(len(words) - size, 0) + 1, size)
        found += [" ".join(words[start : start + size]) for start in starts]
        owner += [i] * len(starts)
    return found, owner


def train(texts: Sequence[str], labels: np.ndarray, *, piece: int, longest: int, min_count: int) -> dict:
    """Bias, weights by word and how they were found; words of fewer than `min_count` texts have no weight."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    # sorted: a set of texts comes in another order in every process
    counts = CountVectorizer(analyzer=lambda text: sorted(features(text, longest)), min_df=min_count).fit(texts)
    parts, owner = pieces(texts, piece)
    x, y = counts.transform(parts).astype(np.float64), labels[owner]

    def model(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=10_000, tol=1e-8)

    folds = GroupKFold(_FOLDS)
    losses = {c: -cross_val_score(model(c), x, y, groups=owner, cv=folds, scoring="neg_log_loss").mean() for c in _PENALTIES}
    best = min(_PENALTIES, key=lambda c: losses[c])
    fitted = model(best).fit(x, y)
    rounded = {
        word: round(float(w), _DIGITS) for word, w in zip(counts.get_feature_names_out(), fitted.coef_[0], strict=True)
    }
    return {
        "texts": len(texts),
        "pieces": len(parts),
        "piece_words": piece,
        "min_count": min_count,
        "inverse_penalty": best,
        "cross_validated_log_loss": round(float(losses[best]), _DIGITS),
        "bias": round(float(fitted.intercept_[0]), _DIGITS),
        "weights": {word: weight for word, weight in sorted(rounded.items()) if weight},
    }


def accuracy(found: dict, texts: Sequence[str], labels: np.ndarray) -> float:
    """The share of texts whose log-odds have the sign of their label."""
    positive = np.array(log_odds(texts, found["bias"], found["weights"])) > 0
    return round(float(np.mean(positive == labels)), _DIGITS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="never trained on")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--about", default="", help="what the texts are, for the reader of the file")
    parser.add_argument("--piece", type=int, default=25, help="words of a piece (default: 25)")
    parser.add_argument("--longest", type=int, default=1, help="2: weights of word pairs too (default: 1)")
    parser.add_argument("--min-count", type=int, default=5, help="texts that a word must be in (default: 5)")
    options = parser.parse_args()

    (texts, labels), (unseen, unseen_labels) = read(options.train), read(options.test)
    found = train(texts, labels, piece=options.piece, longest=options.longest, min_count=options.min_count)
    parts, owner = pieces(unseen, options.piece)
    report = {
        **{name: value for name, value in found.items() if name not in ("bias", "weights")},
        "words": len(found["weights"]),
        "test_texts": len(unseen),
        "test_accuracy": accuracy(found, unseen, unseen_labels),
        "test_pieces": len(parts),
        "test_accuracy_pieces": accuracy(found, parts, unseen_labels[owner]),
    }
    whole = {"about": options.about, **report, "bias": found["bias"], "weights": found["weights"]}
    write_text(options.out, json.dumps(whole, indent=0, ensure_ascii=False) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
