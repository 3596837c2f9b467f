"""What is measured of a policy on its own samples, what a forward pass costs, and the temperature of a ratio."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file
from test_baselines import config

from ple_jax import algorithms, modes
from ple_jax.algorithms import Context
from ple_jax.core.errors import UserError
from ple_jax.core.types import Outputs, Response, Rollout
from ple_jax.training import points, steps
from ple_jax.training.journal import read

pytest_plugins = ["servers"]

POLICY, REFERENCE = np.array([0.1, 0.15, 0.2, 0.25, 0.3]), np.array([0.5, 0.2, 0.1, 0.1, 0.1])
TRUE_KL = float((POLICY * np.log(POLICY / REFERENCE)).sum())
TRUE_ENTROPY = float(-(POLICY * np.log(POLICY)).sum())


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1, *((1 + math.cos(math.pi * i / 5)) / 2 for i in range(1, 5))]),
    ],
)
def test_the_rate_warms_up_and_falls(schedule, shares):
    options = SimpleNamespace(warmup_steps=3, schedule=schedule)
    assert [steps.share_of_rate(options, i, 7) for i in range(7)] == pytest.approx(shares)
    assert steps.share_of_rate(options, 7, 7) == pytest.approx(float(schedule == "constant"))  # the step after the last
    assert steps.share_of_rate(SimpleNamespace(warmup_steps=0, schedule="linear"), 0, 4) == 1
    assert steps.planned(config("ple", queries_per_iteration=8, optimizer__epochs=2), 3) == 3 * 2 * 2


def test_a_falling_rate_falls_over_the_whole_run(tmp_path):
    c = config("ple", iterations=2, optimizer__schedule="linear", optimizer__warmup_steps=0)  # two steps an iteration
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines[1:]] == pytest.approx([c.optimizer.lr * 3 / 4, c.optimizer.lr / 4])


class Table:
    """A backend whose policy and reference say one token each time, with these probabilities."""

    def __init__(self):
        self.asked: list[float] = []

    def logprobs(self, batch, *, reference=False, base=False, temperature=1.0, entropy=False):
        self.asked.append(temperature)
        found = np.log(REFERENCE if reference else POLICY)[batch.response]
        return Outputs(np.where(batch.response_mask, found, 0.0), np.full(batch.response.shape, TRUE_ENTROPY))


def stand_in(algorithm: str, **options) -> SimpleNamespace:
    progress = SimpleNamespace(phase=lambda *_: None, advance=lambda *_: None)
    c = config(algorithm, **options)
    return SimpleNamespace(
        algorithm=algorithms.load(algorithm), config=c, backend=Table(), session=SimpleNamespace(progress=progress)
    )


def sampled(count: int, queries: int = 3000) -> list[Rollout]:
    """Responses of one token from the policy; the lower the token the better."""
    drawn = np.random.default_rng(0).choice(5, size=(queries, count), p=POLICY)

    def response(token: int, sample: int) -> Response:
        return Response((token,), True, "plain", sample, "", -float(token), -float(token))

    return [
        Rollout(str(i), "x", (1,), tuple(response(token, j) for j, token in enumerate(row)))
        for i, row in enumerate(drawn.tolist())
    ]


@pytest.mark.parametrize(
    ("algorithm", "options", "count"),
    [
        ("raft", {}, 4),
        ("raft", {"raft__samples": 16}, 16),
        ("dpo", {"dpo__samples": 8}, 8),
        ("ple", {"ple__selection": "percentile", "ple__rank": "dpo"}, 4),
        ("grpo", {}, 4),
    ],
)
def test_kl_is_of_all_that_the_policy_said_and_not_of_the_best(algorithm, options, count):
    """On the best of 16 it would read more than three times as much."""
    run, rollouts = stand_in(algorithm, **options), sampled(count)
    found = steps.diagnose(run, rollouts)
    spread = 1.5 / math.sqrt(count * len(rollouts))  # of the estimate: ratios to the reference are up to 5
    assert found["kl"] == pytest.approx(TRUE_KL, abs=5 * spread) and found["entropy"] == pytest.approx(TRUE_ENTROPY)
    best = [rollout._replace(responses=(max(rollout.responses, key=lambda r: r.reward),)) for rollout in rollouts]
    assert steps.diagnose(run, best)["kl"] > TRUE_KL + 10 * spread  # which is what is not measured


def test_only_the_policys_own_plain_responses_are_measured():
    run, rollouts = stand_in("ple"), sampled(2)
    guided = [r._replace(responses=(r.responses[0], r.responses[1]._replace(principled=True))) for r in rollouts]
    alone = [r._replace(responses=r.responses[:1]) for r in rollouts]
    assert steps.diagnose(run, guided) == steps.diagnose(run, alone)
    given = [r._replace(responses=tuple(x._replace(source="completion") for x in r.responses)) for r in rollouts]
    assert steps.diagnose(run, given) == {}


@pytest.mark.parametrize(
    ("algorithm", "options", "samples", "passes"),
    [
        ("ple", {}, 2, 2),  # the policy's, whose batch has all that it said, and the reference's
        ("grpo", {"sampling__temperature": 0.7}, 4, 2),
        ("grpo", {"grpo__beta": 0.1}, 4, 2),  # its loss compares with the reference
        ("dpo", {"dpo__samples": 2, "dpo__loss": "ipo"}, 2, 2),
        ("raft", {}, 4, 3),  # the best is no sample of the policy
        ("ple", {"sampling__temperature": 0.7}, 2, 3),  # a likelihood is of the model, at 1
    ],
)
def test_one_pass_of_the_policy_serves_the_loss_and_what_is_diagnosed(algorithm, options, samples, passes):
    run, rollouts = stand_in(algorithm, **options), sampled(samples, queries=40)
    if algorithm == "ple":
        rollouts = [r._replace(responses=(r.responses[0], r.responses[1]._replace(principled=True))) for r in rollouts]
    context = Context(run.config, 0, 0.2, 1.0, {})
    rollouts = run.algorithm.label(rollouts, context)
    expected = steps.diagnose(run, rollouts)
    run.loss, run.backend.asked = run.algorithm.make_loss(run.config), []
    few, found, metrics = steps.at_the_start(run, rollouts, context)
    assert found == pytest.approx(expected, abs=1e-12) and found["kl"] > 0
    assert len(run.backend.asked) == passes
    assert all(np.isfinite(value).all() for value in metrics.values())
    # and the first optimiser batch, where it is of the same queries, is that one
    run.config = run.config.copy_and_resolve_references()
    run.config.optimizer.batch_queries, run.session.stop = 40, SimpleNamespace(check=lambda: None)
    assert steps.prepare(run, rollouts, context, few) == [few] and len(run.backend.asked) == passes


def test_a_response_that_was_said_twice_counts_twice():
    run, rollouts = stand_in("grpo"), sampled(4, queries=4)
    same = [r._replace(responses=(r.responses[0], r.responses[0]._replace(sample=1), *r.responses[2:])) for r in rollouts]
    context = Context(run.config, 0, 0.2, 1.0, {})
    batch = run.algorithm.batch(run.algorithm.label(same, context), context)
    assert (steps.own_responses(run, batch, same) >= 0).all()
    longer = [r._replace(responses=(r.responses[0]._replace(tokens=(1, 2)), *r.responses[1:])) for r in same]
    assert steps.own_responses(run, batch, longer) is None
    asked = [r._replace(prompt_tokens=(2,)) for r in same]  # after another prompt
    assert steps.own_responses(run, batch, asked) is None


@pytest.mark.parametrize("whole", [False, True])
def test_the_sampler_may_say_something_else_than_the_trainer(whole):
    """The mean and the largest difference, of the policy's own plain responses that have log-probabilities alone."""
    run, rollouts = stand_in("ple"), sampled(2, queries=8)
    off = iter([0.5, -0.25, *[0.0] * 5])

    def said(response: Response, principled: bool) -> Response:
        logprobs = (math.log(POLICY[response.tokens[0]]) + (9.0 if principled else next(off)),)
        return response._replace(principled=principled, logprobs=logprobs)

    known = [r._replace(responses=(said(r.responses[0], False), said(r.responses[1], True))) for r in rollouts[:7]]
    without = rollouts[7]._replace(responses=(rollouts[7].responses[0], rollouts[7].responses[1]._replace(principled=True)))
    if whole:
        run.loss, context = run.algorithm.make_loss(run.config), Context(run.config, 0, 0.2, 1.0, {})
        _, found, _ = steps.at_the_start(run, run.algorithm.label([*known, without], context), context)
    else:
        found = steps.diagnose(run, [*known, without])
    assert found["sampler_gap"] == pytest.approx(0.75 / 7) and found["sampler_gap_max"] == pytest.approx(0.5)
    assert found["sampler_ratio_max"] == pytest.approx(math.exp(0.25))  # the trainer's share over the sampler's
    assert found["sampler_kl"] == pytest.approx((math.expm1(-0.5) + 0.5 + math.expm1(0.25) - 0.25) / 7)
    assert "sampler_gap" not in steps.diagnose(run, [without])


@pytest.mark.parametrize(("temperature", "asked"), [(0.6, 0.6), (1.0, 1.0), (0.0, 1.0)])
def test_kl_is_of_the_policy_that_sampled(temperature, asked):
    run = stand_in("ple", sampling__temperature=temperature)
    steps.diagnose(run, sampled(2, queries=4))
    assert run.backend.asked == [asked, asked]


def test_the_kl_of_an_evaluation_is_at_the_temperature_of_sampling():
    run = stand_in("ple", sampling__temperature=0.7)
    run.session.stop = SimpleNamespace(check=lambda: None)
    bare = sampled(1, queries=8)
    told = [
        r._replace(responses=tuple(x._replace(logprobs=(math.log(POLICY[x.tokens[0]]),)) for x in r.responses)) for r in bare
    ]
    # two chunks; of the policy if the sampler said nothing, or a server said it, which may be at another temperature
    for rollouts, server, passes in ((told, None, 2), (bare, None, 4), (told, "http://127.0.0.1:9", 4)):
        run.config.sampling.server = server
        run.backend.asked.clear()
        points.divergences(run, rollouts)
        assert run.backend.asked == [0.7] * passes


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "ple", "raft", "dpo"])
def test_a_ratio_is_of_the_policy_that_sampled_and_a_likelihood_of_the_model(algorithm):
    expected = 0.7 if algorithm in ("grpo", "rloo", "ppo") else 1.0
    assert steps.temperature(stand_in(algorithm, sampling__temperature=0.7)) == expected


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "self_distillation"])
def test_dropout_would_move_a_ratio_and_is_refused(algorithm, tmp_path):
    c = FrozenConfigDict(config(algorithm, lora__dropout=0.3))
    with pytest.raises(UserError, match=rf"lora.dropout is 0.3, and algorithm '{algorithm}' .* set it to 0"):
        modes.train(c, tmp_path / "run", "torch")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_nothing_is_clipped_in_the_first_step_at_any_temperature(algorithm, tmp_path):
    """The policy has not moved: log-probabilities at another temperature than that of before would."""
    c = config(algorithm, iterations=1, sampling__temperature=0.5)
    c.optimizer.batch_queries = c.queries_per_iteration
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert line["clipped"] == 0 and line["grad_norm"] > 0


def test_a_teachers_pass_costs_what_its_own_prompts_have(tmp_path):
    """2 operations a parameter and token: sampled, of the policy before, of the teacher, and 4 for forth and back."""
    c = config("self_distillation", iterations=1)
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    rollouts = read(tmp_path / "run" / "rollouts" / "iter_0000.jsonl")
    responses = sum(len(r.tokens) for rollout in rollouts for r in rollout.responses)
    prompts = sum(len(rollout.prompt_tokens) for rollout in rollouts)
    # tokens of the tiny model are bytes; the principles stand before the query, an empty line between
    from ple_jax.prompts import principles

    guided = prompts + len(rollouts) * len((principles.load(c.principles).text + "\n\n").encode())
    assert c.principles_per_query == 0  # all of them for every query
    passes = (prompts + responses) + (prompts + responses) + (guided + responses) + 2 * (prompts + responses)
    parameters = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 258 * 32
    assert said["flops"] == 2 * parameters * passes


def test_metrics_of_batches_of_unequal_size_are_means_over_queries():
    """Of 3 + 2 queries, after one was quarantined, the mean of the two means would be 2.5."""
    found = steps.over_queries([{"loss": 2.0, "lr": 0.5}, {"loss": 3.0, "lr": 0.5}], [3, 2])
    assert found == {"loss": 2.4, "lr": 0.5}


# ---------------------------------------------------------------- what is to blame


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ple__tau_0": math.inf, "ple__blend_weight": 1e39}, r"the loss is .* blend_weight = 1e\+39"),
        ({"ple__rank": "sigmoid", "ple__rank_beta": 1e38}, r"the first optimiser step gave .*rank_beta = 1e\+38"),
        ({}, r"log-probabilities are not finite: to blame are config.lora.alpha \(16\)"),
    ],
    ids=["loss", "gradient", "policy"],
)
def test_a_learning_rate_is_not_blamed_before_any_step(options, says, tmp_path):
    """The rules refuse such values; whatever gets past them is told of by what is not finite, and when."""
    adapter = {}
    if not options:  # a fresh adapter is 0, whatever it is multiplied with
        first = FrozenConfigDict(config("ple", iterations=1))
        assert modes.train(first, tmp_path / "start", "torch") == 0
        adapter = {"model__adapter": str(huge(tmp_path / "start" / "adapter"))}
    c = config("ple", **{"ple__tau_0": 0.0, **options, **adapter})
    with pytest.raises(UserError, match=says) as refused:
        modes.train(FrozenConfigDict(c), tmp_path / "run", "torch")
    assert "lr" not in str(refused.value)


@pytest.mark.parametrize(
    ("algorithm", "named", "others"),
    [
        ("reward", "max_tokens = ", "max_bad_share"), ("sft", "config.model.dtype", "an option"),
        ("ple_jax.algorithms.ple", "tau_0", "config.model.dtype"), ("mine.trainer", "config.model.dtype", "an option"),
    ],
)
def test_what_a_first_step_is_blamed_on_is_what_it_reads(algorithm, named, others):
    c = config("ple")
    c.algorithm = algorithm
    with pytest.raises(UserError) as error:
        steps.check_finite({"loss": math.nan, "grad_norm": 1.0}, "step 0", 1e-3, "optimizer.lr", c, steps.blamed(c))
    assert named in str(error.value) and others not in str(error.value)


def huge(adapter: Path) -> Path:
    """The adapter with numbers whose products overflow."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: 1e30 * x for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    return adapter


def test_a_policy_that_the_last_step_ruined_is_not_committed(tmp_path):
    """One step, whose loss and gradient are fine; what they left is not."""
    c = config("ple", iterations=1, optimizer__lr=1e30, optimizer__warmup_steps=0)
    c.optimizer.batch_queries = c.queries_per_iteration
    with pytest.raises(UserError, match="the policy's log-probabilities are not finite; .*lower --config.optimizer.lr"):
        modes.train(FrozenConfigDict(c), tmp_path / "run", "torch")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda *_: (500, "CUDA error", {}), "status 500: CUDA error"),
        (lambda *_: (200, "<html>", {}), "JSONDecodeError"),
        (lambda *_: (200, "{}", {}), "the answer has no .*rewards"),
        (None, "[Rr]efused"),
    ],
    ids=["500", "HTML", "malformed", "refused"],
)
def test_a_failing_server_is_said_to_fail(serve, answer, says, tmp_path):
    """And not that a reward is not finite, whose remedy is another."""
    url = serve(answer).url if answer else "http://127.0.0.1:9/get_reward"
    c = config("ple", iterations=1, reward__name="remote")
    c.reward.kwargs = {"url": url, "batch": 64, "retries": 0}
    with pytest.raises(UserError, match=f"{url}: .*{says}.*mend th") as refused:
        modes.train(FrozenConfigDict(c), tmp_path / "run", "torch")
    assert "not finite" not in str(refused.value)
