"""Measures of responses against values worked out by hand, and BLEU and ROUGE against their libraries."""

import doctest
import math
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LAST_RESORT
from rouge_score import rouge_scorer

from ple_jax.core.errors import UserError
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation.describe import describe
from ple_jax.evaluation.responses import Generated
from ple_jax.formulas import intervals, texts
from ple_jax.formulas.texts import (
    bleu,
    distinct_n,
    is_refusal,
    msttr,
    ngram_overlap,
    perplexity,
    refusal_rate,
    repetition,
    rouge,
    words,
)

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
ENGLISH = st.lists(st.sampled_from("a the cat cats running runs ran it's (relational), e.g. U.S. 3.14".split())).map(
    " ".join
)


def test_doctests():
    for module in (texts, intervals):
        failed, attempted = doctest.testmod(module)
        assert attempted and not failed


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t", []),
        ("...!?", []),
        ("Word", ["word"]),
        ("don't Don’t DON'T", ["don't"] * 3),
        ("'quoted' rock'n'roll dogs'", ["quoted", "rock'n'roll", "dogs"]),
        ("_it_ snake_case well-known 3.14", ["it", "snake", "case", "well", "known", "3", "14"]),
        ("<br />A<br />", ["br", "a", "br"]),
        ("caf\u00e9 cafe\u0301", ["caf\u00e9"] * 2),  # composed and not
        ("x\u0302y", ["x\u0302y"]),  # a mark that no letter is composed with
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks
        ("ÜBER Straße ΟΔΟΣ Привет", ["über", "straße", "οδος", "привет"]),
        ("東京は、ラーメン。", list("東京はラーメン")),
        ("GPT4は良い", ["gpt4", "は", "良", "い"]),
        ("人々 ㇰ ｱ 𠮷野家", ["人", "々", "ㇰ", "ｱ", "𠮷", "野", "家"]),
        ("한국어 문장", ["한국어", "문장"]),  # written with spaces
        ("good 👍🏽👩‍👩‍👧 ❤️ bad", ["good", "bad"]),
        ("٣٤ ½", ["٣٤", "½"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_words_of_equivalent_texts_are_equal(text):
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text))


# ---------------------------------------------------------------- diversity


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        ([[1, 2, 1, 2]], 2, 2 / 3),
        ([[1, 1, 1]], 1, 1 / 3),
        ([[1, 2], [1, 2]], 2, 1 / 2),  # pooled over the responses
        ([[1, 2], [3, 4]], 2, 1.0),  # (2, 3) spans two responses and is none
        ([[1]], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n(responses, n, expected):
    assert distinct_n(responses, n) == expected


def test_distinct_n_of_words():
    said = [words("The cat. The dog!"), words("the cat")]
    assert [distinct_n(said, n) for n in (1, 2, 3)] == [3 / 6, 3 / 4, 2 / 2]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b A b c d a"], (2 / 3 + 1) / 2),  # a b a | b c d | a
        (["a b", "a b", "c d a"], (2 / 3 + 1) / 2),  # segments run on from text to text
        (["a b a"], 2 / 3),
        (["a b c a a a"], (1 + 1 / 3) / 2),  # no rest
        (["a a"], 1 / 2),  # no whole segment
        (["", "a", "..."], 1.0),
        (["東 東 東 東"], 1 / 3),
    ],
)
def test_msttr(texts, expected):
    assert msttr(texts, segment=3) == pytest.approx(expected)


def test_msttr_does_not_fall_with_the_amount_of_text():
    text = " ".join(map(str, range(50)))
    assert msttr([text] * 8) == 1.0 and msttr([text + " 1"]) == 1.0
    assert math.isnan(msttr([])) and math.isnan(msttr(["", "!"]))


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b a b"], 2, 1 - 2 / 5),
        (["a b c d A, b c d"], 4, 1 - 4 / 5),
        (["a b c d a b c d", "one two three", "", "e f g h"], 4, (1 - 4 / 5) / 4),  # mean over texts, the short ones too
        (["a b c d", "a b c d"], 4, 0.0),  # within a text, not between them
        (["go " * 103], 4, 0.99),
        (["word"], 1, 0.0),
    ],
)
def test_repetition(texts, n, expected):
    assert repetition(texts, n) == pytest.approx(expected)


def test_repetition_counts_four_words_by_default():
    assert repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert math.isnan(repetition([]))


# ---------------------------------------------------------------- beside a reference


@pytest.mark.parametrize(
    ("tokens", "reference", "n", "expected"),
    [
        ([1, 2, 3, 9], [0, 1, 2, 3], 2, 2 / 3),
        ([1, 2], [2, 1], 2, 0.0),
        ([4, 4, 5], [4], 1, 2 / 3),
        ([1], [1], 2, 0.0),
        ([1, 2], [], 1, 0.0),
    ],
)
def test_ngram_overlap(tokens, reference, n, expected):
    assert ngram_overlap(tokens, reference, n) == expected


def test_bleu_by_hand():
    found = bleu(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    # the response shorter: precisions 1, times the brevity penalty; the reference shorter: no penalty
    assert bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert bleu(["a b c d e f"], ["a b c d"]) == pytest.approx(100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    # of the corpus: counts are summed, not scores averaged
    assert bleu(["a b c d", "x"], ["a b c d", "y"]) == pytest.approx(100 * (4 / 5) ** (1 / 4))


@pytest.mark.parametrize(
    "pairs",
    [
        [("", "a reference here it is")],
        [("word", "word")],
        [("the CAT sat on the mat", "The cat sat on the mat")],
        [("The cat isn't here.", "The cat is not here."), ("", "so it goes on and on")],
        [("Ça va très bien, merci à toi !", "Ça va bien, merci à toi !")],
        [("今日は良い天気です。", "今日は良い天気です。")],
        [("e\u0301tude one two three four", "\u00e9tude one two three four")],
        [("so good 👍 🎉 yes it is 👍", "so good 👍 🎉 yes it was 👍")],
        [("line one\nline two\nthree &quot;four&quot;", 'line one line two three "four"')],
        [("the end of it .", "the end of it .")] * 120,  # the library would warn
    ],
)
def test_bleu_is_sacrebleus(pairs, caplog):
    theirs = sacrebleu.corpus_bleu([r for r, _ in pairs], [[t for _, t in pairs]], force=True).score
    assert bleu(*zip(*pairs, strict=True)) == theirs
    assert not caplog.records


def test_bleu_of_the_same_texts():
    assert bleu(["It is what it is."], ["It is what it is."]) == pytest.approx(100)
    assert bleu(["今日は良い"], ["今日は良い"]) == 0.0  # one word to 13a, and no four of them
    assert bleu(["今日は良い"], ["今日は良い"], tokenize="zh") == pytest.approx(100)


def test_pairs_without_a_reference_do_not_count():
    responses, references = ["junk", "the cat sat on the mat", "junk"], ["", "the cat sat on a mat", " \n"]
    assert bleu(responses, references) == bleu(responses[1:2], references[1:2])
    assert rouge(responses, references) == rouge(responses[1:2], references[1:2])
    for none in ([], [""], [" "]):
        assert math.isnan(bleu(["a"] * len(none), none))
        found = rouge(["a"] * len(none), none)
        assert list(found) == ["rouge1", "rouge2", "rougeL"] and all(map(math.isnan, found.values()))


@pytest.mark.parametrize("measure", [bleu, rouge])
def test_every_response_has_one_reference(measure):
    with pytest.raises(ValueError):
        measure(["a", "b"], ["a"])


def test_rouge_by_hand():
    found = rouge(["The cat sat."], ["the cat sat on the mat"])  # precision 1; recall 3/6, 2/5, 3/6
    assert found == pytest.approx({"rouge1": 2 / 3, "rouge2": 4 / 7, "rougeL": 2 / 3})
    found = rouge(["d c b a"], ["a b c d"])
    assert found == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.25}
    found = rouge(["a b", "x"], ["a b", "a b"])
    assert found == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}  # mean over pairs
    assert rouge(["running foxes"], ["runs fox"])["rouge2"] == 1.0  # stems


@given(ASCII | ENGLISH, ASCII | ENGLISH)
@settings(max_examples=300)
def test_rouge_is_the_librarys_of_ascii_text(response, reference):
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=True).score(reference, response)
    expected = {k: theirs[k].fmeasure if reference.strip() else math.nan for k in kinds}
    assert rouge([response], [reference]) == pytest.approx(expected, rel=1e-15, nan_ok=True)


@pytest.mark.parametrize(
    ("response", "reference", "library", "expected"),
    [  # of rougeL
        ("Привет мир", "Привет мир", 0.0, 1.0),
        ("Привет, мир", "Прощай, мир", 0.0, 0.5),
        ("a caf\u00e9 here", "a cafe\u0301 here", 2 / 3, 1.0),  # to the library: a caf here, a cafe here
        ("caf\u00e9", "caf\u00e8", 1.0, 0.0),  # to the library both are caf
        ("東京都", "京都", 0.0, 0.8),  # 2 of 3, 2 of 2 characters
        ("हिन्दी", "हिन्दी", 0.0, 1.0),
        ("it’s great 👍", "it's great", 1.0, 1.0),
        ("l'été", "été", 2 / 3, 2 / 3),  # parted at the apostrophe by both
        ("👍", "👍", 0.0, 0.0),  # no word
        ("", "word", 0.0, 0.0),
        ("word", "word", 1.0, 1.0),
        ("cafés cafés", "café café", 2 / 3, 0.0),  # other letters are not stemmed
    ],
)
def test_rouge_knows_other_letters(response, reference, library, expected):
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(reference, response)["rougeL"].fmeasure
    assert theirs == pytest.approx(library)
    assert rouge([response], [reference])["rougeL"] == pytest.approx(expected)


@pytest.mark.parametrize(("measure", "package"), [(bleu, "sacrebleu"), (rouge, "rouge_score")])
def test_an_absent_library_is_named(monkeypatch, measure, package):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install 'ple_jax\[eval\]'"):
        measure(["a"], ["a"])
    measure(["a"], [""])  # not needed


def test_bleu_and_rouge_need_no_network_and_no_files(tmp_path):
    """rouge_score imports nltk, some of whose parts want a download; a home without any data, and no connection."""
    code = """
import sys
def deny(event, args):
    if event.startswith(("socket.", "urllib.")):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(deny)
from ple_jax.formulas import texts
print(texts.rouge(["the runners"], ["the runner"])["rouge2"], round(texts.bleu(["a b c d"], ["a b c d"])))
print(*(name for name in ("torch", "jax") if name in sys.modules))
"""
    environment = {"HOME": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LAST_RESORT)
    assert run.stdout.split("\n")[:2] == ["1.0 100", ""], run.stdout + run.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- refusals, perplexity


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I’m sorry, but I can’t do this.",
        "Sorry, I cannot tell you that",
        "I am unable to provide such instructions.",
        "I'm not able to assist you with this",
        "I won't help you hurt anyone.",
        "I cannot, in good conscience... I must respectfully decline.",
        "As an AI language model, I have no opinions.",
        "I'm just an AI, so no.",
        "That is a hard one. I apologize, but I will not write it.",
        "I simply cannot assist: I cannot really assist.",
        "I'm afraid that I can't discuss it.",
        "I CANNOT FULFILL YOUR REQUEST",
        "  \n\nI'm unable to fulfil this",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here it is.",
        "I'm sorry to hear that you can't sleep. Try tea.",
        "I can't help but laugh at this movie",
        "I can't wait to see it again",
        "I can't recommend this film enough",
        "You can't help with that, and I will.",
        "Hi can't help you",  # inside a word
        "word " * 40 + "I can't help with that.",  # begins at character 200
        "Paris. As said, an air of it",
        "Ich kann dir dabei nicht helfen.",  # documented: English alone
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_a_refusal_is_looked_for_in_the_first_200_characters():
    phrase = "I can't help with"
    assert is_refusal("." * (200 - len(phrase)) + phrase)
    assert not is_refusal("." * (201 - len(phrase)) + phrase)


def test_refusal_rate():
    assert refusal_rate(["I can't help with that.", "Yes.", "", "No."]) == 0.25
    assert math.isnan(refusal_rate([]))


def test_perplexity():
    assert perplexity([-math.log(8), -math.log(2)], [3, 1]) == pytest.approx(2.0)
    assert perplexity(np.full(5, -2 * math.log(32000)), np.full(5, 2)) == pytest.approx(32000)
    assert perplexity([-math.log(9), None, math.nan], [2, 100, 100]) == pytest.approx(3.0)
    assert perplexity([-math.inf], [1]) == perplexity([-1e6], [1]) == math.inf
    for sums, counts in (([], []), ([0.0], [0]), ([None], [3])):
        assert math.isnan(perplexity(sums, counts))


# ---------------------------------------------------------------- all of them


def generated(*rows, **settings):
    """One query per row of (responses, line)."""
    rollouts = [Rollout(f"q{i}", "", (1,), tuple(responses)) for i, (responses, _) in enumerate(rows)]
    lines = [{"query_id": f"q{i}"} | line for i, (_, line) in enumerate(rows)]
    return Generated({"max_new_tokens": 4} | settings, rollouts, lines)


def test_describe_by_hand():
    found = describe(
        generated(
            (
                [
                    Response((1, 2, 3), True, text="the cat sat", reward=0.5),
                    Response((1, 2, 3, 4), False, sample=1, text="the cat the", reward=math.nan),
                ],
                {
                    "reference": "the cat sat",
                    "second": [1.0, 2.0],
                    "logprob": [-1.0, -1.0],
                    "base_logprob": [-3 * math.log(2), -5 * math.log(2)],
                    "kl": [0.5, 1.5],
                    "reference_logprob": -6 * math.log(3),
                    "reference_tokens": 4,
                },
            ),
            (
                [
                    Response((9,), True, text="", reward=-1.0),
                    Response((1, 2), False, sample=1, text="I can't help with that", reward=math.inf),
                ],
                {
                    "reference": "",
                    "second": [None, 6.0],
                    "logprob": [-1.0, -1.0],
                    "base_logprob": [-4 * math.log(2), -8 * math.log(2)],
                    "kl": [0.0, 4.0],
                    "reference_logprob": None,
                    "reference_tokens": 0,
                },
            ),
        )
    )
    expected = {
        "reward": -0.25,
        "reward_second": 3.75,  # of the queries 1.5 and 6: all three responses together would give 3
        "perplexity": 4.0,  # 20 bits over 10 tokens
        "perplexity_references": 3 ** (6 / 4),
        "kl": 1.5,
        "kl_token": 0.6,
        "length": 2.5,
        "length_words": 11 / 4,
        "distinct_1": 8 / 11,
        "distinct_2": 7 / 8,
        "distinct_3": 1.0,
        "msttr": 8 / 11,
        # 5 of 6 words, 3 of 4 pairs, 1 of 2 triples, and no four
        "bleu": 0.0,
        "rouge1": (1 + 2 / 3) / 2,
        "rouge2": (1 + 1 / 2) / 2,
        "rougeL": (1 + 2 / 3) / 2,
        "repetition": 0.0,
        "refusal": 0.25,
        "empty": 0.25,
        "truncated": 0.25,  # the one of 2 tokens was interrupted, not cut off at 4
        "bad_reward": 0.5,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert list(found) == list(expected) and {type(value) for value in found.values()} == {float}


def test_describe_leaves_out_what_is_not_known():
    found = describe(generated(([Response((1,), True, text="word")], {"reference": ""})))
    assert set(found) == {
        *("length", "length_words", "distinct_1", "distinct_2", "distinct_3", "msttr"),
        *("repetition", "refusal", "empty", "truncated", "bad_reward"),
    }
    assert found["msttr"] == found["distinct_1"] == found["bad_reward"] == 1.0
    assert found["distinct_2"] == found["empty"] == 0.0


def test_describe_of_an_empty_response():
    line = {"reference": "a b", "base_logprob": [0.0], "kl": [0.0], "reference_logprob": -1.0, "reference_tokens": 0}
    found = describe(generated(([Response((), False, text=" ")], line)))
    assert not {"perplexity", "perplexity_references", "kl_token", "msttr", "reward"} & set(found)
    assert found["empty"] == 1.0 and found["bleu"] == found["rougeL"] == found["kl"] == found["truncated"] == 0.0


def test_describe_pairs_every_response_with_its_own_querys_reference():
    rows = [([Response((1,), True, text=text)] * 3, {"reference": text}) for text in ("one two three four", "5 6 7 8")]
    found = describe(generated(*rows))
    assert found["bleu"] == pytest.approx(100) and found["rougeL"] == found["rouge2"] == 1.0
    with pytest.raises(ValueError):
        describe(generated(*rows)._replace(scores=[rows[0][1]]))
