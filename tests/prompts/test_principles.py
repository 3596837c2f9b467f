"""Principle sets: files, compositions, versions, and the rules drawn for a query."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.config import PACKAGE
from ple_jax.core.errors import UserError
from ple_jax.prompts import principles
from ple_jax.prompts.principles import Principles

FOLDER = PACKAGE / "prompts" / "principles"
NAMES = [
    "concise", "faithful_summary", "helpful_harmless", "honest", "irrelevant", "negative_review", "none", "positive_review",
    "sums",
]  # fmt: skip
FIVE = Principles("five", "five 1", "Heed:", ("one", "two", "three", "four", "five"), "Now:")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_named_sets_are_these():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_a_named_set_is_its_file_without_the_version_line(name):
    first, _, rest = (FOLDER / f"{name}.txt").read_text().partition("\n")
    found = principles.load(name)
    assert found.text + "\n" == rest
    assert first == "# version: 1" and found.version == f"{name} 1" and found.name == name
    assert len(found.rules) == len(re.findall(r"\n\d\. ", rest)) >= (2 if name == "sums" else 4)  # that set has examples
    assert found.heading and "\n" not in found.heading


def test_the_parts_of_a_set():
    assert principles.load("positive_review") == Principles(
        "positive_review",
        "positive_review 1",
        "Rules for the review below.",
        (
            "It is full of love, joy and praise.",
            "It finds the film wonderful, funny, beautiful and great.",
            "It has nothing bad to say.",
            "The reviewer is happy and enjoyed every minute!",
        ),
        "Review (5 stars, excellent):",
    )


def test_a_file_of_ones_own(tmp_path):
    path = write(tmp_path / "mine.txt", "# version: 7\n\nBe brief.\n# a heading stays\n")
    assert principles.load(path) == Principles(path, "mine.txt 7", "Be brief.\n# a heading stays", (), "")
    assert principles.load(path).text == "Be brief.\n# a heading stays"


def test_a_file_without_a_version_has_a_digest_of_its_text(tmp_path):
    path = tmp_path / "mine.txt"
    versions = [principles.load(write(path, text)).version for text in ("Be brief.\n", "Be brief", "\nBe brief.")]
    assert versions[0] == "mine.txt 213c22ed"  # printf 'Be brief.' | sha256sum
    assert versions[1] != versions[0] == versions[2]
    assert principles.load(write(path, "# version:\nBe brief.")).version == versions[0]


def test_continuation_lines_belong_to_their_rule(tmp_path):
    text = "Heed:\n\n1. Be kind,\n   also to\n  2. cats.\n\n2. Be brief.\n3. Be\n10 x 2.5 brief.\n\nNow:\n\nThe end."
    found = principles.load(write(tmp_path / "mine.txt", text))
    assert found.heading.strip() == "Heed:"
    assert [rule.strip() for rule in found.rules] == ["Be kind,\n   also to\n  2. cats.", "Be brief.", "Be\n10 x 2.5 brief."]
    assert found.ending == "Now:\n\nThe end."
    assert found.text == text


def test_numbers_are_given_anew(tmp_path):
    assert principles.load(write(tmp_path / "lazy.txt", "1. Be kind.\n1. Be brief.")).text == "1. Be kind.\n2. Be brief."


LINES = st.lists(st.sampled_from(["Heed:", "", "#", "rule", "see\n 2. x", "be 3. kind"]), max_size=4)


@given(heading=LINES, rules=st.lists(st.tuples(st.sampled_from(["a", "b "]), LINES), max_size=4), ending=LINES)
def test_one_file_is_its_text(tmp_path_factory, heading, rules, ending):
    lines = [*heading]
    for number, (rule, more) in enumerate(rules, 1):
        lines += [f"{number}. {rule}", *more]
    text = "\n".join([*lines, "", *ending]).strip()
    path = tmp_path_factory.getbasetemp() / "any.txt"
    if text:
        found = principles.load(write(path, text))
        assert found.text == text
        assert len(found.rules) == len(rules)


def test_several_sets(tmp_path):
    first = write(tmp_path / "first.txt", "# version: 2\nBe so.\n1. Be kind.\n2. Be brief.\n\nAnswer:")
    mine = write(tmp_path / "mine.txt", "# version: b\nOther heading.\n1. Be brief.\n2. Be fair,\n   always.\n3. Be fair.")
    review = write(tmp_path / "review.txt", "# version: 3\n1. Be kind.\n\nReview:")
    found = principles.load(f"{first}+{mine}")
    assert found.version == "first.txt 2 + mine.txt b"
    assert found.name == f"{first}+{mine}"
    assert found.text == "Be so.\n1. Be kind.\n2. Be brief.\n3. Be fair,\n   always.\n4. Be fair.\n\nAnswer:"
    assert principles.load(f"{mine}+{first}+{review}").text == (
        "Other heading.\n1. Be brief.\n2. Be fair,\n   always.\n3. Be fair.\n4. Be kind.\n\nReview:"
    )


def test_named_sets_together():
    both, one, other = (principles.load(name) for name in ("helpful_harmless+concise", "helpful_harmless", "concise"))
    assert both.rules == one.rules + other.rules
    assert both.heading == one.heading and both.version == "helpful_harmless 1 + concise 1"
    assert "\n6. " in both.text


def test_a_set_without_blank_lines_after_one_with(tmp_path):
    wide = write(tmp_path / "wide.txt", "Heed:\n\n1. Be kind.\n\n2. Be brief.\n\nNow:")
    narrow = write(tmp_path / "narrow.txt", "1. Be kind.\n2. Be fair.")
    found = principles.load(f"{wide}+{narrow}")
    assert found.text == "Heed:\n\n1. Be kind.\n\n2. Be brief.\n3. Be fair.\n\nNow:"
    assert found._replace(rules=found.rules[:1]).text == "Heed:\n\n1. Be kind.\n\nNow:"


def test_a_file_whose_name_has_a_plus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "helpful_harmless+concise", "Be brief.")
    assert principles.load("helpful_harmless+concise").text == "Be brief."


def test_bad_principles(tmp_path):
    empty = write(tmp_path / "empty.txt", "# version: 7\n")
    words = write(tmp_path / "words.txt", "Be brief.")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"1. caf\xe9")
    for source, says in [
        (empty, r"empty\.txt is empty"),
        (f"concise+{empty}", r"empty\.txt is empty"),
        ("positive_reviews", "'positive_reviews': neither .* did you mean 'positive_review'"),
        ("concise+positive_reviews", "'positive_reviews': neither .* did you mean 'positive_review'"),
        ("concise+", "principles '': neither a file nor one of concise, "),
        (str(bad), r"bad\.txt is not UTF-8 .* byte 6"),
        (f"{bad}+concise", r"bad\.txt is not UTF-8"),
        (f"concise+{words}", r"words\.txt' have no numbered rules to add to 'concise'"),
    ]:
        with pytest.raises(UserError, match=says):
            principles.load(source)
    assert principles.load(f"{words}+concise").text.startswith("Be brief.\n1. Answer first")


def test_all_rules_unless_fewer_are_asked_for():
    for k in (0, 5):
        assert principles.choose(FIVE, k, seed=3, query_id="q") == FIVE.text


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.text(max_size=5))
def test_chosen_rules_keep_their_order_and_are_numbered_anew(k, seed, query_id):
    text = principles.choose(FIVE, k, seed=seed, query_id=query_id)
    options = (
        "Heed:\n" + "\n".join(f"{i}. {rule}" for i, rule in enumerate(rules, 1)) + "\n\nNow:"
        for rules in combinations(FIVE.rules, k)
    )
    assert text in options
    assert text == principles.choose(FIVE, k, seed=seed, query_id=query_id)


def test_every_choice_is_equally_likely_by_query_and_by_seed():
    for drawn in (
        [principles.choose(FIVE, 2, seed=0, query_id=str(i)) for i in range(2000)],
        [principles.choose(FIVE, 2, seed=i, query_id="q") for i in range(2000)],
    ):
        counts = np.array(list(Counter(drawn).values()))
        assert len(counts) == 10
        assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi squared, 9 degrees of freedom, p = 0.001


def test_more_rules_than_there_are():
    with pytest.raises(UserError, match=r"'five' have 5 numbered rules; set --config\.principles_per_query=5$"):
        principles.choose(FIVE, 6, seed=0, query_id="q")
    with pytest.raises(UserError, match=r"have 0 numbered rules; set --config\.principles_per_query=0$"):
        principles.choose(FIVE._replace(rules=()), 1, seed=0, query_id="q")
