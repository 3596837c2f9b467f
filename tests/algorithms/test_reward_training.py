"""Reward models from preference pairs: pairs in tokens, batches, the loss, its measures, and whole runs on a tiny model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from configs import tiny as tiny_config
from ple_jax import losses, modes, prompts, rewards
from ple_jax.algorithms import reward
from ple_jax.backend import backend as jax_backend
from ple_jax.backend import lora
from ple_jax.core.config import validate
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import Unusable, UserError
from ple_jax.core.types import Outputs, Query
from ple_jax.formulas import calibration
from ple_jax.models import adapters, peft, weights
from ple_jax.models.tokenizer import byte_tokenizer
from ple_jax.training import opening

TOKENIZER = byte_tokenizer()


def config(**changes):
    c = tiny_config.get_config()
    c.algorithm, c.sinks, c.task.format = "reward", (), "hh"
    c.reward_model.max_tokens, c.offline.eval_every = 128, 4
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def pair(chosen="Yes.", rejected="No!", prompt="Well?", **changes):
    query = Query("q", Conversation([{"role": "user", "content": prompt}]), chosen, rejected)
    return reward.encode(query, TOKENIZER, config(**changes))


# ---------------------------------------------------------------- pairs


@given(st.text("ab. ", min_size=1, max_size=12), st.text("ab. ", min_size=1, max_size=12))
def test_a_pair_is_both_conversations(chosen, rejected):
    prompt = Conversation([{"role": "user", "content": "Well?"}])
    whole = [prompts.dialogue(prompt, text, TOKENIZER) for text in (chosen, rejected)]
    if whole[0] == whole[1]:
        with pytest.raises(Unusable, match="two responses that are the same"):
            pair(chosen, rejected)
        return
    found = pair(chosen, rejected)
    assert [[*found.shared, *end] for end in (found.chosen, found.rejected)] == whole
    assert found.chosen and found.rejected
    # nothing that both have is computed twice, but for a token that every row needs of its own
    assert found.chosen[0] != found.rejected[0] or 1 in (len(found.chosen), len(found.rejected))


def test_the_oldest_tokens_are_cut_off():
    whole, cut = pair(prompt="x" * 50 + "Well?"), pair(prompt="x" * 50 + "Well?", reward_model__max_tokens=30)
    assert max(len(cut.chosen), len(cut.rejected)) + len(cut.shared) == 30
    assert cut.shared == whole.shared[-len(cut.shared) :] and cut.chosen == whole.chosen


def test_a_bos_keeps_its_place():
    class WithBos:
        """A byte tokenizer whose template begins with a BOS."""

        bos_token_id, pad_token_id, chat_template = 256, 257, "yes"

        def apply_chat_template(self, turns, **options):
            return "".join(turn["content"] for turn in turns)

        def encode(self, text, *, add_special_tokens):
            return [256, *text.encode()]

    query = Query("q", "abcdefgh", "yes", "no")
    found = reward.encode(query, WithBos(), config(reward_model__max_tokens=8))
    assert bytes(found.shared[1:]) == b"efgh" and found.shared[0] == 256 and bytes(found.chosen) == b"yes"


def test_pairs_that_cannot_be_used():
    with pytest.raises(Unusable, match="two responses that are the same"):
        pair("same", "same")
    with pytest.raises(Unusable, match="more than the 20 tokens of config.reward_model.max_tokens"):
        pair("y" * 20, reward_model__max_tokens=20)


def test_the_end_is_read_before_the_padding_token():
    assert reward.without_end([5, 257, 6, 257, 257], 257) == [5, 257, 6]
    assert reward.without_end([257, 257], 257) == [257]
    assert reward.without_end([5, 257], None) == [5, 257]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=40),
       st.integers(1, 8), st.integers(0, 3))  # fmt: skip
def test_every_pair_once_an_epoch_and_shapes_together(lengths, size, epoch):
    pairs = [reward.Pair(str(i), (1,) * p, (1,) * a, (2,) * b) for i, (p, a, b) in enumerate(lengths)]
    drawn = reward.batches(pairs, size, seed=3, epoch=epoch)
    assert sorted(i for some in drawn for i in some) == list(range(len(pairs)))
    assert drawn == reward.batches(pairs, size, seed=3, epoch=epoch)
    assert all(len(some) == size for some in drawn[:-1])
    mixed = [some for some in drawn if len({pairs[i].shape for i in some}) > 1]
    shapes = {pair.shape for pair in pairs}
    assert len(mixed) <= len(shapes)  # what is left of every shape


def test_another_epoch_is_another_order():
    pairs = [reward.Pair(str(i), (1,), (1,), (2,)) for i in range(64)]
    orders = [reward.batches(pairs, 8, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_batch_is_padded_rows():
    found = reward.batch([pair(), pair("A longer answer.", "Another.")])
    assert found.prompt.shape == (2, 64) and found.response.shape == (2, 2, 64)
    whole = prompts.dialogue(Conversation([{"role": "user", "content": "Well?"}]), "Another.", TOKENIZER)
    assert [*found.prompt[1][found.prompt_mask[1]], *found.response[1, 1][found.response_mask[1, 1]]] == whole


# ---------------------------------------------------------------- loss and measures


@pytest.mark.parametrize("fn", [losses.bradley_terry, jax.jit(losses.bradley_terry)])
def test_the_loss_is_trls(fn):
    """RewardTrainer's: -logsigmoid(rewards_chosen - rewards_rejected)."""
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32) * 8
    wanted = -torch.nn.functional.logsigmoid(torch.tensor(chosen) - torch.tensor(rejected))
    np.testing.assert_allclose(fn(chosen, rejected), wanted, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda c: losses.bradley_terry(c, jnp.asarray(rejected)).sum())(jnp.asarray(chosen))
    np.testing.assert_allclose(gradient, -1 / (1 + np.exp(chosen - rejected)), rtol=1e-4, atol=1e-6)
    own = torch.tensor(chosen, requires_grad=True)
    losses.bradley_terry(own, torch.tensor(rejected)).sum().backward()
    np.testing.assert_allclose(own.grad, gradient, rtol=1e-5, atol=1e-6)


def test_metrics_of_a_step():
    scores = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]], np.float32)
    value, metrics = reward.make_loss(None)(Outputs(None, scores=scores), None)
    np.testing.assert_allclose(value, np.log1p(np.exp([-2.0, 1.0, 0.0])), rtol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], [1, 0, 0.5])
    np.testing.assert_array_equal(metrics["margin"], [2, -1, 0])


def test_measures_by_hand():
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    # probability of the preferred response: 0.92, 0.94, 0.08, 0.6
    found = calibration.measures(np.array([logit(0.92), logit(0.94), logit(0.08), logit(0.6)]), seed=0)
    assert found["accuracy"] == 0.75
    assert found["log_loss"] == pytest.approx(-np.log([0.92, 0.94, 0.08, 0.6]).mean())
    assert found["brier"] == pytest.approx((np.array([0.08, 0.06, 0.92, 0.4]) ** 2).mean())
    # one bin from 0.6 to 0.65 with 1 pair; one from 0.9 to 0.95 with 3, of which 2 are right
    assert found["calibration"] == [
        {"pairs": 1, "confidence": pytest.approx(0.6), "accuracy": 1.0},
        {"pairs": 3, "confidence": pytest.approx((0.92 + 0.94 + 0.92) / 3), "accuracy": pytest.approx(2 / 3)},
    ]
    error = (1 * 0.4 + 3 * abs((0.92 + 0.94 + 0.92) / 3 - 2 / 3)) / 4
    assert found["calibration_error"] == pytest.approx(error)
    low, high = found["accuracy_ci95"]
    assert low < 0.75 < high


def test_measures_of_ties_and_of_certainty():
    assert calibration.measures(np.zeros(3), seed=0)["accuracy"] == 0.5
    sure = calibration.measures(np.array([1e4, 1e4, -1e4]), seed=0)
    assert sure["calibration"] == [{"pairs": 3, "confidence": 1.0, "accuracy": pytest.approx(2 / 3)}]
    assert sure["log_loss"] == pytest.approx(1e4 / 3)


# ---------------------------------------------------------------- the head in the backend


@pytest.mark.slow
def test_scores_of_packed_rows_are_those_of_single_ones():
    """A batch of pairs on the backend against the hidden state of each conversation by itself."""
    c = config(model__path="tiny")
    loaded = jax_backend.load(c)
    backend = jax_backend.build(c, loaded, head="score")
    adapter = tiny.random_adapter(loaded.config, rank=8)
    weight = np.random.default_rng(5).normal(size=(32, 1)).astype(np.float32)
    backend.policy = jax.tree.map(jnp.asarray, adapter | {adapters.SCORE: {"w": weight}})
    pairs = [pair(), pair("A longer answer.", "Another one!"), pair("a", "b", prompt="Long prompt " * 5)]
    found = backend.scores(reward.batch(pairs))
    settings = adapters.settings(c)
    for i, one in enumerate(pairs):
        for j, end in enumerate((one.chosen, one.rejected)):
            ids = jnp.array([[*one.shared, *end]])
            fused = lora.fuse(backend.model, backend.policy, settings, base=backend.base)
            mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
            hidden, _ = backend.model.apply(backend.base, fused, ids, positions=jnp.arange(ids.shape[1])[None], mask=mask)
            assert found[i, j] == pytest.approx(float(hidden[0, -1] @ weight[:, 0]), abs=1e-4)


@pytest.mark.slow
def test_the_gradient_reaches_head_and_adapter():
    c = config(optimizer__lr=1e-2)
    backend = jax_backend.build(c, jax_backend.load(c), head="score")
    batch = reward.batch([pair(), pair("Good.", "Bad.")])
    loss, before = reward.make_loss(c), backend.adapter()
    first = backend.update([batch], loss, lr=1e-2)
    assert first["loss"] == pytest.approx(np.log(2)) and first["accuracy"] == 0.5
    for _ in range(8):
        last = backend.update([batch], loss, lr=1e-2)
    assert last["loss"] < 0.5 and last["accuracy"] == 1
    moved = {name for name, value in backend.adapter().items() if np.abs(value - before[name]).max() > 1e-4}
    assert "base_model.model.score.weight" in moved and len(moved) > 10


# ---------------------------------------------------------------- whole runs


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def write_pairs(path: Path, n: int, begin: int) -> str:
    """What is preferred ends in an exclamation mark, and a tiny model can see that."""
    with path.open("w") as file:
        for i in range(begin, begin + n):
            query = ("Hi", "Hello", f"Question {i}?")
            chosen, rejected = transcript(*query, f"So {i}!"), transcript(*query, f"No {i}.")
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "task__train": write_pairs(folder / "train.jsonl", 40, 0),
        "task__heldout": write_pairs(folder / "heldout.jsonl", 12, 100),
    }


def run(workdir: Path, mode=modes.train, **changes) -> ConfigDict:
    c = config(**changes)
    validate(c)
    assert mode(FrozenConfigDict(c), workdir, "jax") == 0
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory, files):
    workdir = tmp_path_factory.mktemp("runs") / "reward"
    return workdir, run(workdir, **files, offline__epochs=3)


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def test_it_learns_and_reports(trained):
    workdir, _ = trained
    done = summary(workdir)
    assert done["heldout_accuracy"] > 0.9 and done["heldout_log_loss"] < 0.6 and done["steps"] == 30
    assert done["train_examples"] == 40 and done["heldout_examples"] == 12
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert lines[0]["heldout_log_loss"] == pytest.approx(np.log(2)) and "train_loss" not in lines[0]
    assert lines[-1]["heldout_accuracy"] == done["heldout_accuracy"]
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    page = (workdir / "report.html").read_text()
    assert "Pair accuracy" in page and "Calibration" in page
    assert "vader" not in page.partition("</header>")[0].partition("<h1")[2]  # a reward that it does not read
    for folder in ("adapter", "reward_model"):
        assert "Accuracy on 12 held-out pairs" in (workdir / folder / "README.md").read_text(), folder


def conversations(path: str) -> list[tuple[Conversation, str, str]]:
    found = []
    for line in Path(path).read_text().splitlines():
        *query, chosen = json.loads(line)["chosen"].split("\n\n")[1:]
        rejected = json.loads(line)["rejected"].split("\n\n")[-1]
        turns = [{"role": "user" if t.startswith("Human") else "assistant", "content": t.split(": ", 1)[1]} for t in query]
        found.append((Conversation(turns), chosen.split(": ")[1], rejected.split(": ")[1]))
    return found


def margins(model, tokenizer, path: str) -> np.ndarray:
    """By transformers alone."""
    found = []
    for prompt, *ends in conversations(path):
        scores = []
        for end in ends:
            turns = [*prompt.messages, {"role": "assistant", "content": end}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(model(ids).logits[0, 0].item())
        found.append(scores[0] - scores[1])
    return np.array(found)


def test_transformers_says_the_same_of_the_exported_model(trained, files):
    workdir, _ = trained
    folder = workdir / "reward_model"
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.id2label == {0: "reward"}
    found = margins(model.eval(), AutoTokenizer.from_pretrained(folder), files["task__heldout"])
    done = summary(workdir)
    assert found.mean() == pytest.approx(done["heldout_margin"], abs=1e-4)
    assert np.logaddexp(0, -found).mean() == pytest.approx(done["heldout_log_loss"], abs=1e-4)


def test_peft_says_the_same_of_the_adapter(trained, files, tmp_path):
    workdir, _ = trained
    loaded = weights.load("tiny")
    raw = {**loaded.raw, "pad_token_id": 257, "num_labels": 1}
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**raw))
    state = {name: torch.tensor(value) for name, value in loaded.weights.items()}
    assert base.load_state_dict(state, strict=False).missing_keys == ["score.weight"]
    model = PeftModel.from_pretrained(base, workdir / "adapter").eval()
    found = margins(model, AutoTokenizer.from_pretrained(workdir / "reward_model"), files["task__heldout"])
    assert found.mean() == pytest.approx(summary(workdir)["heldout_margin"], abs=1e-4)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_it_is_a_reward(trained, files, framework):
    workdir, _ = trained
    own = rewards.load("model", {"path": str(workdir / "reward_model"), "framework": framework})
    rows = conversations(files["task__heldout"])
    chosen, rejected = (
        rewards.score(own, [row[0] for row in rows], [row[i] for row in rows]).values for i in (1, 2)
    )
    assert (chosen - rejected).mean() == pytest.approx(summary(workdir)["heldout_margin"], abs=1e-4)


def test_such_an_adapter_is_no_policys(trained):
    workdir, _ = trained
    with pytest.raises(UserError, match="it is a reward model's"):
        peft.read(workdir / "adapter")
    with pytest.raises(UserError, match="no module trained whole.*score is needed"):
        lora_only = workdir.parent / "plain"
        tensors = {k: v for k, v in load_file(workdir / "adapter" / peft.WEIGHTS).items() if "score" not in k}
        peft.write(lora_only, tensors, rank=8, alpha=16, targets=["q_proj"], base_model="b")
        peft.read(lora_only, head="score")


def test_the_other_modes(trained, files, capsys):
    workdir, c = trained
    frozen = FrozenConfigDict(c)
    assert modes.evaluate(frozen, workdir, "jax") == 0
    assert f"accuracy {summary(workdir)['heldout_accuracy']:.4f}" in capsys.readouterr().out
    before = (workdir / "reward_model" / "model.safetensors").read_bytes()
    assert modes.export(frozen, workdir, "jax") == 0
    assert "--config.reward.name=model" in capsys.readouterr().out
    assert (workdir / "reward_model" / "model.safetensors").read_bytes() == before
    assert modes.train(frozen, workdir, "jax") == 0
    assert "is finished: held-out accuracy" in capsys.readouterr().out
    assert modes.plan(frozen, workdir, "jax") == 0
    said = capsys.readouterr().out
    assert "40 of" in said and "30 of 4 examples, 3 epochs" in said and "Question 0?" in said and "So 0!" in said
    for mode in (modes.generate, modes.chat):
        with pytest.raises(UserError, match="needs an algorithm that samples"):
            mode(frozen, workdir, "jax")
    with pytest.raises(UserError, match="--topology goes with an algorithm that samples"):
        modes.plan(frozen, workdir, "jax", "cpu:1")


def test_the_head_alone(tmp_path, files):
    run(tmp_path, **files, reward_model__train="head", offline__epochs=3, optimizer__lr=5e-2)
    tensors = load_file(tmp_path / "adapter" / peft.WEIGHTS)
    assert list(tensors) == ["base_model.model.score.weight"]
    assert summary(tmp_path)["heldout_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    found = margins(model, AutoTokenizer.from_pretrained(tmp_path / "reward_model"), files["task__heldout"])
    assert found.mean() == pytest.approx(summary(tmp_path)["heldout_margin"], abs=1e-4)


def test_an_interrupted_run_goes_on_from_its_last_evaluation(trained, files, tmp_path, monkeypatch):
    workdir, _ = trained
    update, calls = jax_backend.JaxBackend.update, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(jax_backend.JaxBackend, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **files, offline__epochs=3)
    run(tmp_path, **files, offline__epochs=3)
    assert len(calls) == 11 + 30 - 8  # steps 9 and 10 are done again
    for file in ("adapter/adapter_model.safetensors", "metrics.jsonl", "reward_model/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (workdir / file).read_bytes()


def test_pairs_that_are_none_stop_the_run(tmp_path, files):
    bad = tmp_path / "bad.jsonl"
    long = json.dumps({"chosen": transcript("Well?", "y" * 200), "rejected": transcript("Well?", "No.")})
    bad.write_text(Path(files["task__train"]).read_text() + long + "\n")
    changed = files | {"task__train": str(bad)}
    run(tmp_path / "few", **changed, offline__eval_every=100)
    listed = [json.loads(line) for line in (tmp_path / "few" / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["set"], line["kind"]) for line in listed] == [("train", "over-long")]
    assert "more than the 128 tokens of config.reward_model.max_tokens" in listed[0]["reason"]
    assert summary(tmp_path / "few")["train_examples"] == 40
    with pytest.raises(UserError, match="128 tokens of .*1 of 41 records.*config.task.max_bad_share=0.01"):
        run(tmp_path / "none", **changed, task__max_bad_share=0.01)


def test_a_pair_is_no_longer_than_the_base_takes(tmp_path, files):
    """Later tokens would have the last position; a plan says so as well, and a run that was begun goes on."""
    c = FrozenConfigDict(config(**files, reward_model__max_tokens=4096))
    for mode in (modes.train, modes.plan):
        with pytest.raises(UserError, match="config.reward_model.max_tokens is 4096, and tiny takes 2048"):
            mode(c, tmp_path / "run", "torch")
    run(tmp_path / "begun", **files, reward_model__max_tokens=2048)


@pytest.mark.parametrize(
    ("key", "value"),
    [("warm_up.data", "tiny_train"), ("eval.second_reward", "letters"), ("eval.best", "none"), ("eval.max_kl", (4.0,)),
     ("eval.patience", 3)],
)  # fmt: skip
def test_what_only_sampling_reads_is_refused(files, key, value):
    c = config(**files)
    assert opening.read_inputs(FrozenConfigDict(c), "torch").data.train
    c.update_from_flattened_dict({key: value})
    validate(c)
    with pytest.raises(UserError, match=f"config.{key} is .*, and algorithm 'reward', which samples nothing, does not read"):
        opening.read_inputs(FrozenConfigDict(c), "torch")


def test_a_head_alone_takes_no_adapter(tmp_path):
    start = adapters.to_peft(tiny.random_adapter(weights.load("tiny").config))
    peft.write(tmp_path, start, rank=4, alpha=6.0, targets=["q_proj"], base_model="tiny")
    c = config(model__adapter=str(tmp_path), reward_model__train="head")
    with pytest.raises(UserError, match="config.reward_model.train is 'head', which trains a head on the base alone"):
        validate(c)
