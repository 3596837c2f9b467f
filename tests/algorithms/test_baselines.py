"""The methods that PLE is compared with: what each collects, decides and trains on; each runs through the same loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from speed import quick

from configs import tiny as tiny_config
from ple_jax import algorithms, modes
from ple_jax.algorithms import Context
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Outputs, Response, Rollout
from ple_jax.training import opening, prompting, steps
from ple_jax.training.measures import mean_length

ONLINE = ("context_distillation", "self_distillation", "raft", "grpo", "rloo")
ALL = ("sft", *ONLINE, "dpo")
LENGTHS = ((3, 8, 5, 1), (2, 2, 2, 2), (1, 7, 4, 6))
SCORES = ((0.1, 0.9, 0.4, 0.2), (0.5, 0.5, 0.5, 0.5), (1.0, -1.0, 0.0, 2.0))


def config(algorithm: str, **options):
    c = tiny_config.get_config()
    c.algorithm, c.sinks = algorithm, ()
    for key, value in options.items():
        *section, name = key.split("__")
        (c[section[0]] if section else c)[name] = value
    return c


def rollouts(count: int = 4, kind: str = "plain") -> list[Rollout]:
    def response(i: int, j: int) -> Response:
        return Response(tuple(range(10 + j, 10 + j + LENGTHS[i][j])), True, kind, j, "", SCORES[i][j], SCORES[i][j])

    return [Rollout(str(i), "", (1, 2, 3)[: i + 1], tuple(response(i, j) for j in range(count))) for i in range(3)]


def labelled(algorithm: str, c, given):
    module = algorithms.load(algorithm)
    return module, module.label(given, Context(c, tau=module.schedule(c)(0)))


def outputs(batch, seed: int = 0) -> Outputs:
    noise = np.random.default_rng(seed).normal(size=batch.response.shape)
    return Outputs(np.where(batch.response_mask, -1 - np.abs(noise), 0.0))


def test_what_is_sampled_and_what_is_the_records():
    collected = {name: algorithms.load(name).collect(config(name)) for name in ALL}
    sources = {name: [slot.source for slot in slots] for name, slots in collected.items()}
    assert sources["sft"] == ["completion"] and sources["dpo"] == ["rejected", "completion"]
    assert all(set(sources[name]) == {"policy"} for name in ONLINE)
    assert [len(collected[name]) for name in ONLINE] == [1, 1, 4, 4, 4]
    assert [slot.principled for slot in collected["context_distillation"]] == [True]
    assert not any(slot.principled for name in ("self_distillation", "raft", "grpo", "rloo") for slot in collected[name])
    assert len(algorithms.load("dpo").collect(config("dpo", dpo__samples=3))) == 3
    with pytest.raises(UserError, match="a pair needs two responses"):
        algorithms.load("dpo").collect(config("dpo", dpo__samples=1))


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        ("ple", {}, (3 + 8 + 2 + 2 + 1 + 7) / 6),  # both kinds
        ("ple", {"ple__selection": "percentile"}, (3 + 8 + 2 + 2 + 7 + 6) / 6),  # worst and best of the plain ones
        ("raft", {}, (8 + 2 + 6) / 3),  # the best
        ("context_distillation", {}, (8 + 2 + 7) / 3),
        ("self_distillation", {}, (3 + 2 + 1) / 3),
        ("sft", {}, (3 + 2 + 1) / 3),
        ("grpo", {}, 0.0),  # its loss says what divides it
    ],
)
def test_the_mean_length_is_that_of_what_would_be_learned(algorithm, options, expected):
    c, given = config(algorithm, **options), rollouts()
    if options or algorithm == "raft":  # as an evaluation has them: rewards, and no scores
        given = [r._replace(responses=tuple(x._replace(score=math.nan) for x in r.responses)) for r in given]
    else:
        kinds = {"ple": (0, 1), "context_distillation": (0, 1)}.get(algorithm, (0,))
        given = [r._replace(responses=tuple(r.responses[i]._replace(principled=i == 1) for i in kinds)) for r in given]
    if not any(x.principled for r in given for x in r.responses):  # nothing learns from one then, not even from the best
        best = Response((1,) * 9, True, "principled", 0, "", 9.0, 9.0, principled=True)
        given = [r._replace(responses=(*r.responses, best)) for r in given]
    run = type("Stand", (), {"algorithm": algorithms.load(algorithm), "config": c})()
    assert mean_length(given, run) == pytest.approx(expected)


def test_raft_learns_from_the_best_by_score():
    (first, *_) = rollouts()
    own = first._replace(responses=tuple(r._replace(reward=-r.score) for r in first.responses))  # a transform turned them
    (learned,) = algorithms.load("raft").learned(own, config("raft"))
    assert learned.score == max(r.score for r in own.responses) and learned.reward == min(r.reward for r in own.responses)


def test_raft_imitates_the_best():
    c = config("raft")
    module, rows = labelled("raft", c, rollouts())
    assert [[r.weight for r in row.responses] for row in rows] == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose([row.margin for row in rows], [0.5, 0.0, 1.5])
    batch = module.batch(rows, Context(c, mean_length=4.0))
    assert batch.response.shape == (3, 1, 8) and batch.response_mask.sum(-1)[:, 0].tolist() == [8, 2, 6]
    found = outputs(batch)
    value, metrics = module.make_loss(c)(found, batch)
    np.testing.assert_allclose(value, -found.logprobs[:, 0].sum(-1) / 4)  # of an earlier sample, and not the 16 / 3 of this
    np.testing.assert_allclose(metrics["lp"], found.logprobs[:, 0].sum(-1) / [8, 2, 6])


def test_dpo_ranks_best_over_worst_and_drops_ties():
    c = config("dpo", dpo__samples=4)
    module, rows = labelled("dpo", c, rollouts())
    assert [row.decision for row in rows] == ["ranked", "dropped", "ranked"]
    assert [row.margin for row in rows] == [0.8, 0.0, 3.0]
    batch = module.batch(rows, Context(c))
    assert batch.response_mask.sum(-1).tolist() == [[3, 8], [2, 2], [7, 6]]  # loser, winner
    batch.data["reference_logprobs"] = outputs(batch, 1).logprobs
    found = outputs(batch)
    value, metrics = module.make_loss(c)(found, batch)
    gain = (found.logprobs - batch.data["reference_logprobs"]).sum(-1)
    margin = 0.1 * (gain[:, 1] - gain[:, 0])
    expected = np.log1p(np.exp(-margin))[[0, 2]].mean()
    assert value.mean() == pytest.approx(expected)  # of the kept ones
    assert metrics["ranked"].tolist() == [1, 0, 1] and metrics["reward_margin"][1] == metrics["reward_accuracy"][1] == 0
    means = {name: float(values.mean()) for name, values in metrics.items()}
    said = module.measures(means, metrics, metrics)  # of the kept ones too
    assert said["reward_margin"] == pytest.approx(margin[[0, 2]].mean(), rel=1e-6)
    assert said["reward_accuracy"] == pytest.approx((margin[[0, 2]] > 0).mean(), rel=1e-6)
    assert module.measures({**means, "ranked": 0.0, "reward_accuracy": 0.0}, metrics, metrics)["reward_accuracy"] == 0


def test_offline_dpo_takes_the_records_word():
    c = config("dpo")
    module, rows = labelled("dpo", c, rollouts(2))  # the third one's chosen answer has the lower reward
    assert {row.decision for row in rows} == {"ranked"} and rows[2].margin == -2.0
    assert module.batch(rows, Context(c)).response_mask.sum(-1).tolist() == [[3, 8], [2, 2], [1, 7]]


def test_labels_are_smoothed():
    c = config("dpo", dpo__label_smoothing=0.2)
    module, rows = labelled("dpo", c, rollouts(2))
    batch = module.batch(rows, Context(c))
    batch.data["reference_logprobs"], found = outputs(batch, 1).logprobs, outputs(batch)
    gain = np.where(batch.response_mask, found.logprobs - batch.data["reference_logprobs"], 0.0).sum(-1)
    z = c.dpo.beta * (gain[:, 1] - gain[:, 0])
    np.testing.assert_allclose(module.make_loss(c)(found, batch)[0], np.log1p(np.exp(-z)) + 0.2 * z, rtol=1e-6)


def test_ipo_regresses_the_margin_per_token():
    c = config("dpo", dpo__loss="ipo", dpo__beta=0.2)
    module, rows = labelled("dpo", c, rollouts(2))
    batch = module.batch(rows, Context(c))
    batch.data["reference_logprobs"] = outputs(batch, 1).logprobs
    found = outputs(batch)
    gain = (found.logprobs - batch.data["reference_logprobs"]).sum(-1) / batch.response_mask.sum(-1)
    value, _ = module.make_loss(c)(found, batch)
    np.testing.assert_allclose(value, (gain[:, 1] - gain[:, 0] - 1 / 0.4) ** 2)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_grpo_at_the_first_step_is_reinforce_with_the_groups_advantages(kind):
    c = config("grpo", grpo__loss=kind)
    module, rows = labelled("grpo", c, rollouts())
    assert [row.decision for row in rows] == ["compared", "dropped", "compared"]
    scores = np.array(SCORES)
    centred = scores - scores.mean(1, keepdims=True)
    deviation = 1 if kind == "dr_grpo" else scores.std(1, ddof=1, keepdims=True) + 1e-4
    batch = module.batch(rows, Context(c))
    np.testing.assert_allclose(batch.data["advantages"], centred / deviation, rtol=1e-5, atol=1e-6)
    assert batch.response.shape == (3, 4, 8)
    lengths = np.array(LENGTHS)
    divisor = {"grpo": lengths, "dr_grpo": np.full((3, 4), 8), "dapo": np.full((3, 4), lengths.mean())}[kind]
    np.testing.assert_allclose(batch.data["normaliser"], divisor, rtol=1e-6)
    found = outputs(batch)
    batch.data["old_logprobs"] = found.logprobs
    value, metrics = module.make_loss(c)(found, batch)
    np.testing.assert_allclose(value, (-(centred / deviation) * lengths / divisor).mean(1), rtol=1e-5, atol=1e-6)
    assert metrics["clipped"].tolist() == [0, 0, 0]
    moved = found._replace(logprobs=found.logprobs + np.where(batch.response_mask, 1.0, 0.0))
    assert module.make_loss(c)(moved, batch)[1]["clipped"][0] > 0


def test_rloo_pays_for_leaving_the_reference():
    c = config("rloo", rloo__beta=0.5)
    module, rows = labelled("rloo", c, rollouts())
    batch = module.batch(rows, Context(c))
    batch.data["old_logprobs"], batch.data["reference_logprobs"] = outputs(batch).logprobs, outputs(batch, 1).logprobs
    ready = module.prepare(batch, Context(c))
    ratio = (batch.data["old_logprobs"] - batch.data["reference_logprobs"]).sum(-1)
    net = np.array(SCORES) - 0.5 * ratio
    expected = net - (net.sum(1, keepdims=True) - net) / 3
    np.testing.assert_allclose(ready.data["advantages"], expected, rtol=1e-5, atol=1e-5)
    value, _ = module.make_loss(c)(outputs(batch), ready)
    np.testing.assert_allclose(value, -expected.mean(1), rtol=1e-4, atol=1e-5)


def test_self_distillation_needs_principles_for_its_teacher():
    c = FrozenConfigDict(config("self_distillation", principles="none"))
    with pytest.raises(UserError, match="config.principles is 'none', and the teacher of .* nothing is learned; name some"):
        opening.read_inputs(c, "torch")


def test_self_distillation_pulls_to_the_policy_with_the_principles():
    c = config("self_distillation")
    module, rows = labelled("self_distillation", c, rollouts(1))
    batch = module.batch(rows, Context(c, mean_length=4.0))
    policy, teacher = outputs(batch).logprobs, outputs(batch, 1).logprobs
    batch.data.update(old_logprobs=policy, teacher_logprobs=teacher)
    value, metrics = module.make_loss(c)(outputs(batch), batch)
    lengths = batch.response_mask.sum((1, 2))
    np.testing.assert_allclose(value, -(teacher - policy).sum((1, 2)) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["teacher_gap"], (teacher - policy).sum((1, 2)) / lengths, rtol=1e-6)
    # the gradient of the loss raises tokens that the teacher likes better
    up = outputs(batch)._replace(logprobs=policy + 1e-4 * np.where(batch.response_mask, np.sign(teacher - policy), 0.0))
    assert (module.make_loss(c)(up, batch)[0] < value).all()


def test_the_teacher_reads_the_principles_and_the_same_tokens(tmp_path, monkeypatch):
    seen = []
    whole = prompting.Prompts.after_principles

    def watched(self, batch, queries):
        seen.append((self.tokenizer, batch, whole(self, batch, queries), queries))
        return seen[-1][2]

    monkeypatch.setattr(prompting.Prompts, "after_principles", watched)
    c = config("self_distillation", iterations=1)
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    tokenizer, plain, principled, queries = seen[-1]
    np.testing.assert_array_equal(plain.response, principled.response)
    text = tokenizer.decode(principled.prompt[0][principled.prompt_mask[0]].tolist(), skip_special_tokens=False)
    query = queries[0]
    assert text.endswith(query.prompt) and "love, joy and praise" in text
    assert tokenizer.decode(plain.prompt[0][plain.prompt_mask[0]].tolist(), skip_special_tokens=False) == query.prompt


def test_the_teacher_is_the_policy_of_now_at_the_temperature_that_sampled():
    asked = []

    class Backend:
        def logprobs(self, batch, *, reference=False, base=False, temperature=1.0, entropy=False):
            asked.append((batch.prompt.shape[1], reference, base, temperature))
            return outputs(batch)

    c = config("self_distillation", sampling__temperature=0.7)
    module, rows = labelled("self_distillation", c, rollouts(1))
    batch = module.batch(rows, Context(c, mean_length=4.0))
    width, left = batch.prompt.shape[1], ((0, 0), (16, 0))
    wide = batch._replace(prompt=np.pad(batch.prompt, left), prompt_mask=np.pad(batch.prompt_mask, left))
    run = type("Stand", (), {"algorithm": module, "config": c, "backend": Backend()})()
    steps.compared(batch, run, wide)
    assert asked == [(width, False, False, 0.7), (width + 16, False, False, 0.7)]


def test_the_ratio_of_self_distillation_is_clipped():
    c = config("self_distillation", self_distillation__clip=0.1)
    module, rows = labelled("self_distillation", c, rollouts(1))
    batch = module.batch(rows, Context(c, mean_length=4.0))
    policy, one = outputs(batch).logprobs, np.where(batch.response_mask, 1.0, 0.0)
    batch.data.update(old_logprobs=policy, teacher_logprobs=policy + one)
    value, metrics = module.make_loss(c)(outputs(batch)._replace(logprobs=policy + one), batch)
    np.testing.assert_allclose(value, -1.1 * batch.response_mask.sum((1, 2)) / 4, rtol=1e-5)
    assert metrics["clipped"].tolist() == [1.0, 1.0, 1.0]


def test_what_is_needed_is_there_before_the_first_step():
    class Backend:
        def logprobs(self, batch, *, reference=False, base=False, temperature=1.0, entropy=False):
            return outputs(batch, seed=1 if reference else 0)

    for name, needed in (("rloo", {"old_logprobs", "reference_logprobs", "advantages"}), ("grpo", {"old_logprobs"})):
        c = config(name)
        module, rows = labelled(name, c, rollouts())
        stand = type("Stand", (), {"algorithm": module, "config": c, "backend": Backend()})()
        batch, tokens, _ = steps.optimiser_batch(stand, module.batch(rows, Context(c)), rows, Context(c))
        assert needed <= set(batch.data)
        assert tokens == (1 + (name == "rloo")) * (1 + 2 + 3 + np.sum(LENGTHS))  # of prompts and responses, each pass
        np.testing.assert_array_equal(batch.data["old_logprobs"], outputs(batch).logprobs)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "self_distillation"])
def test_a_sampler_that_says_something_else_is_corrected_for(algorithm):
    """Tokens that are likelier to the trainer count for more, up to the cap; what agrees changes nothing."""
    plain, capped = (config(algorithm, sampling__importance_cap=cap) for cap in (0.0, 2.0))
    module = algorithms.load(algorithm)
    rng = np.random.default_rng(0)
    mask = np.arange(6) < np.array([[3, 6], [2, 5]])[..., None]
    mask = mask[:, :1] if algorithm == "self_distillation" else mask
    old = np.where(mask, -rng.exponential(1, mask.shape), 0).astype(np.float32)
    shape = mask.shape[:2]
    data = {
        "old_logprobs": old, "reference_logprobs": old - 0.1 * mask, "teacher_logprobs": old + 0.3 * mask,
        "advantages": rng.normal(size=mask.shape if algorithm == "ppo" else shape).astype(np.float32),
        "normaliser": np.float32(3), "old_values": 0 * old, "returns": 0 * old,
        "kl_response": np.zeros(shape, np.float32), "kl_coefficient": np.zeros(2, np.float32),
    }  # fmt: skip
    tokens = np.zeros(mask.shape, np.int32)
    batch = Batch(np.zeros((2, 3), np.int32), np.ones((2, 3), bool), tokens, mask, data)
    said = Outputs(old + np.float32(0.05) * mask, None, 0 * old)
    base, _ = module.make_loss(plain)(said, batch)
    agreeing = batch._replace(data=data | {"sampler_logprobs": old})
    np.testing.assert_allclose(module.make_loss(capped)(said, agreeing)[0], base, rtol=1e-6, atol=1e-6)
    rarer = batch._replace(data=data | {"sampler_logprobs": old - np.float32(math.log(1.5)) * mask})
    found, _ = module.make_loss(capped)(said, rarer)
    if algorithm == "rloo":  # a response has one ratio, 1.5 for each of its tokens, which is cut off at 2
        np.testing.assert_allclose(found, 2 * base, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(found, 1.5 * base, rtol=1e-5, atol=1e-6)
    rarest = batch._replace(data=data | {"sampler_logprobs": old - 3 * mask})
    np.testing.assert_allclose(module.make_loss(capped)(said, rarest)[0], 2 * base, rtol=1e-5, atol=1e-6)


def test_what_the_sampler_said_goes_with_the_tokens_that_it_drew():
    class Backend:
        def logprobs(self, batch, *, reference=False, base=False, temperature=1.0, entropy=False):
            return outputs(batch)

    c = config("grpo", sampling__importance_cap=2.0)
    module, rows = labelled("grpo", c, rollouts())
    first = rows[0].responses[1]
    told = first._replace(logprobs=tuple(-0.25 * (i + 1) for i in range(len(first.tokens))))
    rows[0] = rows[0]._replace(responses=(rows[0].responses[0], told, *rows[0].responses[2:]))
    stand = type("Stand", (), {"algorithm": module, "config": c, "backend": Backend()})()
    batch, *_ = steps.optimiser_batch(stand, module.batch(rows, Context(c)), rows, Context(c))
    found, old = batch.data["sampler_logprobs"], batch.data["old_logprobs"]
    n = len(first.tokens)
    np.testing.assert_allclose(found[0, 1, :n], told.logprobs)
    found[0, 1, :n] = old[0, 1, :n]
    np.testing.assert_allclose(found, old, rtol=1e-6)  # of the others nothing is known: their weight is 1


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, str]:
    folder, source = tmp_path_factory.mktemp("pairs"), Path(modes.__file__).parent / "data"
    found = {}
    for which, count in (("train", 24), ("heldout", 8)):
        lines = [json.loads(line) for line in (source / f"tiny_{which}.jsonl").read_text().splitlines()[:count]]
        pairs = [line | {"chosen": " a long answer, cut", "rejected": " 12"} for line in lines]
        file = folder / f"{which}.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        found[which] = str(file)
    return found


@pytest.mark.parametrize("algorithm", quick(ALL, "self_distillation", "grpo"))
def test_each_runs_through_the_loop(algorithm, records, tmp_path):
    c = config(algorithm, iterations=1, task__train=records["train"], task__heldout=records["heldout"])
    c.optimizer.epochs = 2
    c.task.max_answer_tokens = 8
    validate(c)
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    before, after = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert after["grad_norm"] > 0 and np.isfinite(after["loss"])
    assert "tau" not in after
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "iter_0000.jsonl").read_text().splitlines()]
    sampled = [r for line in lines for r in line["responses"] if r["kind"] in ("plain", "principled")]
    assert after["generated_tokens"] == sum(len(r["tokens"]) for r in sampled)
    assert (after["generated_tokens"] == 0) == (algorithm in ("sft", "dpo"))
    assert ("kl" in after) == (
        algorithm in ("self_distillation", "raft", "grpo", "rloo")
    )  # of the policy's own answers to the plain prompt
    assert before["heldout_kl"] == 0 and after["heldout_kl"] > 0
    if algorithm == "dpo":
        kinds = [[(r["kind"], r["finished"], len(r["tokens"])) for r in line["responses"]] for line in lines]
        # " 12" and EOS; the other one is cut to 8 tokens, and has no EOS
        assert all(pair == [("rejected", True, 4), ("chosen", False, 8)] for pair in kinds)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("algorithm", quick(["sft", "dpo"], "sft"))
def test_held_out_queries_need_no_answer(algorithm, records, tmp_path):
    """They are answered by the policy, whatever it is trained on."""
    c = config(algorithm, iterations=1, task__train=records["train"])  # held out: prompts alone
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0


def test_a_record_without_an_answer_is_named(tmp_path):
    c = config("sft")
    with pytest.raises(UserError, match="completion"):
        modes.train(FrozenConfigDict(c), tmp_path / "run", "torch")
