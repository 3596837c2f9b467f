"""The query sets that ship with the project: enough, varied, short, and no held-out opening known from training."""

import itertools
import json

import pytest

from ple_jax.core.config import PACKAGE
from ple_jax.data.queries import load_queries


def words(prompt):
    return prompt.lower().replace(",", "").replace(";", "").split()


def grams(prompt, n):
    return {tuple(words(prompt)[i : i + n]) for i in range(len(words(prompt)) - n + 1)}


@pytest.fixture(scope="module")
def quickstart():
    return tuple([q.prompt for q in load_queries(f"quickstart_{part}").queries] for part in ("train", "heldout"))


@pytest.mark.parametrize(
    ("name", "prefix", "count"),
    [
        ("quickstart_train", "train", 160),
        ("quickstart_heldout", "heldout", 64),
        ("tiny_train", "train", 16),
        ("tiny_heldout", "heldout", 8),
    ],
)
def test_counts_and_ids(name, prefix, count):
    lines = (PACKAGE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{prefix}-{i:03d}" for i in range(count)]
    assert all(list(json.loads(line)) == ["id", "prompt"] for line in lines)


def test_openings_are_short_and_stop_in_mid_sentence(quickstart):
    for prompt in itertools.chain(*quickstart):
        assert 5 <= len(prompt.split()) <= 12 and len(prompt) <= 60, prompt
        assert prompt == " ".join(prompt.split()) and prompt[-1] not in ".!?", prompt


def test_no_near_duplicates(quickstart):
    for one, other in itertools.combinations(itertools.chain(*quickstart), 2):
        a, b = set(words(one)), set(words(other))
        assert len(a & b) / len(a | b) < 0.5, (one, other)


def test_heldout_shares_no_phrase_with_train(quickstart):
    train, heldout = quickstart
    assert not {tuple(words(p)[:3]) for p in train} & {tuple(words(p)[:3]) for p in heldout}
    assert not set().union(*(grams(p, 4) for p in train)) & set().union(*(grams(p, 4) for p in heldout))


def test_openings_are_near_neutral(quickstart):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    for prompts in quickstart:
        assert abs(sum(analyzer.polarity_scores(p)["compound"] for p in prompts) / len(prompts)) < 0.05


def test_tiny_prompts_fit_twelve_bytes_and_do_not_overlap():
    train, heldout = ({q.prompt for q in load_queries(f"tiny_{part}").queries} for part in ("train", "heldout"))
    assert len(train) == 16 and len(heldout) == 8 and not train & heldout
    assert max(len(p.encode()) for p in train | heldout) <= 12
