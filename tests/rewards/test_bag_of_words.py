"""The reward that counts words: against sums by hand, scikit-learn, and reviews; its file, and the script that trains it."""

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from ple_jax import rewards
from ple_jax.core.config import PACKAGE, names
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.rewards import bag_of_words

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import train_bag_of_words  # noqa: E402

WEIGHTS = {"good": 1.0, "bad": -2.0, "not good": -1.5, "it's": 0.25, "été": 4.0, "δέλτα": 8.0}

# written for this test; the labels are what a reader would say
REVIEWS = {
    "A wonderful film with a great cast, and one of the best I have seen.": True,
    "The music is beautiful, the acting is excellent and I loved each minute.": True,
    "It is a perfect story about life and love that I enjoyed very much.": True,
    "Great fun, with a fantastic lead and a lot of heart.": True,
    "I was surprised how well this works; the whole family loved it.": True,
    "Both actors are superb and the ending is very moving.": True,
    "A true classic, beautiful and well told.": True,
    "One of the worst films ever, boring and badly written.": False,
    "The script is terrible and the acting is even worse.": False,
    "A complete waste of time, with no plot and awful effects.": False,
    "I expected something better, but it was just a stupid mess.": False,
    "Unfortunately the jokes are poor and the story makes no sense.": False,
    "Dull, annoying and far too long; I could not finish it.": False,
    "There is nothing in this bad movie that is worth your money.": False,
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"bias": 0.5, "weights": WEIGHTS, "about": "by hand"}), encoding="utf-8")
    return str(file)


def values(kwargs, responses, prompts=None):
    found = rewards.score(rewards.load("bag_of_words", kwargs), prompts or ["good "] * len(responses), responses)
    return found.values.tolist()


def test_it_is_a_reward_by_name():
    assert "bag_of_words" in names("rewards", ".py")


@pytest.mark.parametrize(
    ("text", "log_odds"),
    [
        ("", 0.5),
        (" \n", 0.5),
        ("nothing known", 0.5),
        ("good", 1.5),
        ("GOOD, good!", 1.5),  # once, in any case
        ("good and bad", -0.5),
        ("goodness badly", 0.5),  # whole words
        ("not good", 0.0),  # the pair beside its words
        ("good not", 1.5),
        ("not, good", 0.0),  # signs are no words
        ("not very good", 1.5),
        ("It's", 0.75),
        ("it’s", 0.75),  # as phones write it
        ("its", 0.5),
        ("ÉTÉ été", 4.5),
        ("ΔΈΛΤΑ 好 \U0001f600", 8.5),
        ("good" * 3, 0.5),
    ],
)
def test_log_odds_are_the_bias_and_the_weights_of_the_distinct_words(path, text, log_odds):
    assert values({"path": path}, [text]) == [log_odds]
    probability = values({"path": path, "output": "probability"}, [text])
    assert probability == pytest.approx([1 / (1 + math.exp(-log_odds))], rel=1e-15)


def test_log_odds_do_not_saturate_and_probabilities_do(tmp_path):
    file = tmp_path / "steep.json"
    file.write_text(json.dumps({"bias": 0, "weights": {"up": 800.0, "more": 1.0, "down": -800.0}}))
    texts = ["up", "up more", "down"]
    assert values({"path": str(file)}, texts) == [800.0, 801.0, -800.0]
    assert values({"path": str(file), "output": "probability"}, texts) == [1.0, 1.0, 0.0]


def test_only_the_response_counts_unless_the_prompt_is_asked_for(path):
    prompts = ["Is it ba", "It is not ", "good "]
    responses = ["d", "good", ""]
    assert values({"path": path}, responses, prompts) == [0.5, 1.5, 0.5]
    assert values({"path": path, "with_prompt": True}, responses, prompts) == [-1.5, 0.0, 1.5]
    # "Assistant:good" would be one word elsewhere; a transcript ends without a space
    talk = Conversation([{"role": "user", "content": "So?"}])
    assert values({"path": path, "with_prompt": True}, ["good"], [talk]) == [1.5]


def test_stored_values_go_by_the_weights_and_the_options(path, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"bias": 0.5, "weights": WEIGHTS | {"good": 1.5}}), encoding="utf-8")
    same = tmp_path / "same.json"
    same.write_text(json.dumps({"weights": WEIGHTS, "bias": 0.5}), encoding="utf-8")
    kwargs = [
        {"path": path},
        {"path": str(other)},
        {"path": path, "output": "probability"},
        {"path": path, "with_prompt": True},
    ]
    found = [rewards.load("bag_of_words", k) for k in kwargs]
    assert len({reward.version for reward in found}) == 4
    assert rewards.load("bag_of_words", {"path": str(same)}).version == found[0].version
    assert [reward.scale for reward in found[::2]] == [(-math.inf, math.inf), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"weights": {"good": 1}}', "KeyError: 'bias'"),
        ('{"bias": 1}', "KeyError: 'weights'"),
        ('{"bias": 1, "weights": ["good"]}', "TypeError"),
        ('{"bias": 1, "weights": {}}', "no weights"),
        ('{"bias": "1", "weights": {"good": 1}}', "'bias' has no finite number"),
        ('{"bias": 1, "weights": {"good": true}}', "'good' has no finite number"),
        ('{"bias": 1, "weights": {"good": NaN}}', "'good' has no finite number"),
        ('{"bias": 1, "weights": {"bad": 1, "good": null}}', "'good' has no finite number"),
        ('{"bias": 1, "weights": {"Not Good": 1}}', "no text has the word 'Not Good': write 'not good'"),
        ('{"bias": 1, "weights": {"it’s": 1}}', "no text has the word 'it’s': write \"it's\""),
        ('{"bias": 1, "weights": {"!": 1}}', "no text has the word '!'"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, content, says):
    file = tmp_path / "words.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        rewards.load("bag_of_words", {"path": str(file)})
    assert says in str(error.value) and str(file) in str(error.value)
    assert '{"bias": 0.1, "weights": {"good": 0.9}}' in str(error.value)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="nowhere.json holds no weights of words.*FileNotFoundError"):
        rewards.load("bag_of_words", {"path": str(tmp_path / "nowhere.json")})
    with pytest.raises(UserError, match="output = 'odds': choose log_odds or probability"):
        rewards.load("bag_of_words", {"output": "odds"})
    with pytest.raises(UserError, match="config.reward.kwargs.*words"):
        rewards.load("bag_of_words", {"words": 3})


# ---------------------------------------------------------------- the weights of the package


def test_the_weights_of_the_package_tell_reviews_apart():
    file = PACKAGE / "data" / "imdb_words.json"
    assert file.stat().st_size < 150_000
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["words"] == len(content["weights"]) and content["test_accuracy"] > 0.8
    # its own sum, of sentences whose words need no rule
    by_hand = [
        content["bias"] + sum(content["weights"].get(word.strip(".,;"), 0) for word in set(text.lower().split()))
        for text in REVIEWS
    ]
    found = values({}, list(REVIEWS))
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-12)
    right = np.mean([(value > 0) == label for value, label in zip(found, REVIEWS.values(), strict=True)])
    assert right >= 13 / 14
    positive = [value for value, label in zip(found, REVIEWS.values(), strict=True) if label]
    negative = [value for value, label in zip(found, REVIEWS.values(), strict=True) if not label]
    assert np.mean(positive) > 1 and np.mean(negative) < -1


# ---------------------------------------------------------------- training them


NEUTRAL = tuple(f"word{i}" for i in range(20))


def reviews(seed: int, n: int) -> list[dict]:
    """Texts of which a word in five says the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = int(rng.integers(2))
        own = ("joy", "delight") if label else ("gloom", "dread")
        words = [str(rng.choice(own)) if rng.random() < 0.2 else str(rng.choice(NEUTRAL)) for _ in range(60)]
        if i < 3:  # in three texts, but in nine pieces of 20 words
            words[5::20] = ["rare"] * 3
        rows.append({"text": "Shot<br />" + " ".join(words), "label": label})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_pieces():
    found, owner = train_bag_of_words.pieces(["a b c d e", "f", "g h", ""], 2)
    assert found == ["a b", "c d", "f", "g h", ""] and owner == [0, 0, 1, 2, 3]


def test_the_script_trains_what_scikit_learn_says(tmp_path, monkeypatch, capsys):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    rows, unseen = reviews(0, 60), reviews(1, 40)
    train, test = write(tmp_path / "train.jsonl.gz", rows), write(tmp_path / "test.jsonl", unseen)
    contents = []
    for name in ("first.json", "second.json"):
        out = tmp_path / name
        flags = ["--train", str(train), "--test", str(test), "--out", str(out), "--piece", "20", "--about", "made up"]
        monkeypatch.setattr(sys, "argv", ["train_bag_of_words.py", *flags])
        assert train_bag_of_words.main() == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    found = json.loads(contents[0])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: found[key] for key in report} == report and found["about"] == "made up"
    assert (found["texts"], found["pieces"], found["test_texts"], found["test_pieces"]) == (60, 180, 40, 120)
    assert set(found["weights"]) == {*NEUTRAL, "shot", "joy", "delight", "gloom", "dread"}  # not "rare"

    # the same regression by another way to count words
    parts = [" ".join(row["text"].replace("<br />", " ").split()[i : i + 20]) for row in rows for i in (0, 20, 40)]
    labels, owner = (np.repeat(of_texts, 3) for of_texts in ([row["label"] for row in rows], range(60)))
    counts = CountVectorizer(binary=True, vocabulary=sorted(found["weights"]))
    x = counts.transform(parts)
    model = LogisticRegression(C=found["inverse_penalty"], max_iter=1000, tol=1e-10).fit(x, labels)
    tried = {}
    for c in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        held_out = []
        for seen, other in GroupKFold(5).split(x, labels, owner):
            assert not set(owner[seen]) & set(owner[other])
            says = LogisticRegression(C=c, max_iter=1000, tol=1e-10).fit(x[seen], labels[seen]).predict_proba(x[other])
            held_out.append(-np.log(says[np.arange(len(other)), labels[other]]).mean())
        tried[c] = np.mean(held_out)
    assert found["inverse_penalty"] == min(tried, key=tried.get)
    assert found["cross_validated_log_loss"] == pytest.approx(min(tried.values()), abs=2e-4)
    expected = model.decision_function(counts.transform([row["text"] for row in unseen]))
    scored = values({"path": str(tmp_path / "first.json")}, [row["text"] for row in unseen])
    np.testing.assert_allclose(scored, expected, rtol=0, atol=2e-3)
    assert found["test_accuracy"] == pytest.approx(np.mean((expected > 0) == [row["label"] for row in unseen]), abs=1e-4)
    assert found["test_accuracy"] > 0.9


def test_features():
    assert bag_of_words.features("So, so good") == {"so", "good"}
    assert bag_of_words.features("So, so good", 2) == {"so", "good", "so so", "so good"}
