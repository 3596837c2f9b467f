"""What a probe finds, against rewards that are known; that it goes on where it stood; its page."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes, rewards
from ple_jax.configs import tiny
from ple_jax.core.errors import UserError
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation import probe
from ple_jax.formulas.texts import rank_correlation
from ple_jax.training import journal


def config(**changes: Any) -> FrozenConfigDict:
    c = tiny.get_config()
    c.sinks = ()
    c.probe.samples = 2
    c.update_from_flattened_dict(changes)
    return FrozenConfigDict(c)


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("probe") / "w"
    assert modes.probe(config(), workdir, "jax") == 0
    return workdir


def result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "probe.json").read_text())


def values(workdir: Path, name: str) -> np.ndarray:
    """The rewards [query, sample] of the answers under one prompt."""
    reward = rewards.load("letters", tiny.get_config().reward.kwargs.to_dict())
    rollouts = answers(workdir, name)
    texts = [r.text for rollout in rollouts for r in rollout.responses]
    return rewards.score(reward, [""] * len(texts), texts).values.reshape(len(rollouts), -1)


def answers(workdir: Path, name: str) -> list[Rollout]:
    return journal.read(workdir / "probe" / name / "iter_0000.jsonl")


def test_every_rule_is_tried_alone_and_left_out(probed):
    found = result(probed)
    names = ["plain", "all", *(f"only_{i}" for i in range(1, 5)), *(f"without_{i}" for i in range(1, 5))]
    assert [row["name"] for row in found["prompts"]] == names
    assert found["queries"] == 8 and found["samples"] == 2 and found["left_out"] == 0
    means = {name: values(probed, name).mean(1) for name in names}
    for row in found["prompts"]:
        own = means[row["name"]]
        assert row["reward"] == pytest.approx(own.mean())
        if row["name"] == "plain":
            assert row["lift"] is None
        else:
            assert row["lift"]["mean"] == pytest.approx((own - means["plain"]).mean())
            assert row["lift"]["low"] <= row["lift"]["mean"] <= row["lift"]["high"]
        adds = row["adds"] and row["adds"]["mean"]
        assert adds == (pytest.approx((means["all"] - own).mean()) if row["name"].startswith("without") else None)
    tokens = {row["name"]: row["prompt_tokens"] for row in found["prompts"]}
    assert tokens["plain"] < tokens["only_3"] < tokens["without_3"] < tokens["all"]


def test_prompts_hold_the_rules_that_they_are_of(probed, monkeypatch):
    seen = {}

    def stub(run, prompt, queries, folder):
        seen[prompt.name] = prompt.prompts.render(queries[0], prompt.principled).text
        responses = (Response((1,), True, text="a", reward=0.0),) * 2
        return probe.Answers(prompt, [Rollout(q.id, q.prompt, (1,), responses) for q in queries], 1.0, 0.0)

    monkeypatch.setattr(probe, "answered", stub)
    with modes.on_run(config(), probed, "jax", trained=False) as (run, _):
        rules = run.prompts.principles.rules
        probe.probe(run)
    for i, rule in enumerate(rules, 1):
        assert rule in seen["all"] and rule not in seen["plain"]
        assert [other in seen[f"only_{i}"] for other in rules] == [other == rule for other in rules]
        assert [other in seen[f"without_{i}"] for other in rules] == [other != rule for other in rules]
    assert all("Rules for the review" in text for name, text in seen.items() if name != "plain")


def test_noise_is_the_same_under_every_prompt(probed):
    noise = [[r.noise for x in answers(probed, name) for r in x.responses] for name in ("plain", "all", "only_2")]
    assert noise[0] == noise[1] == noise[2] and len(set(noise[0])) == 16


def test_what_was_sampled_is_not_sampled_again(probed, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "w"
    shutil.copytree(probed, copy)
    shutil.rmtree(copy / "probe" / "only_2")
    before, sampled = result(probed), []
    real = probe.sample
    monkeypatch.setattr(probe, "sample", lambda *args: sampled.append(args[3].path.parent.name) or real(*args))
    modes.probe(config(), copy, "jax")
    assert sampled == ["only_2"]
    for row, was in zip(result(copy)["prompts"], before["prompts"], strict=True):
        assert {**row, "seconds": 0} == {**was, "seconds": 0}  # bit by bit
    sampled.clear()
    other = tmp_path / "rules.txt"
    other.write_text("Write.\n1. Be kind.\n2. Be brief.\n")
    capsys.readouterr()
    modes.probe(config(principles=str(other)), copy, "jax")
    assert sampled == [
        "all",
        "only_1",
        "only_2",
    ]  # the plain prompt is as it was; of two rules each is tried once
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("probe, ")]
    numbered = [f"probe, prompt {i} of 4" for i in range(1, 5)]
    assert [line.partition(":")[0] for line in headings] == numbered and "rule 2 alone: Be brief." in headings[3]
    sampled.clear()
    modes.probe(config(**{"probe.queries": 3}), copy, "jax")  # another question
    assert len(sampled) == 10 and result(copy)["queries"] == 3


def test_training_may_begin_where_a_probe_was(probed, tmp_path):
    copy = tmp_path / "w"
    shutil.copytree(probed, copy)
    modes.train(config(iterations=1, **{"ple.tau_0": 0.1}), copy, "jax")  # though the config is another one
    assert (copy / "summary.json").exists()


def test_the_page(probed):
    page = (probed / "probe.html").read_text()
    found = result(probed)
    assert page.count("<tr>") == 1 + 10 and "rule 3 alone" in page and "all but rule 3" in page
    assert f"{found['threshold']['suggested']:g}" in page and "<script" not in page


def test_what_it_comes_to_is_said(probed):
    found = result(probed)
    lines = probe.said(found)
    assert sum(line.startswith("rule ") and line.endswith(" to the others") for line in lines) == 4
    every, plain = (next(row for row in found["prompts"] if row["name"] == name) for name in ("all", "plain"))
    for lift, cut in (((-0.5, 0.5), 0.75), ((0.25, 0.5), 0.5)):
        every["lift"] |= dict(zip(("low", "high"), lift, strict=True))
        plain["truncated"] = cut
        said = " ".join(probe.said(found))
        assert ("not shown to buy anything" in said) == (lift[0] <= 0)
        assert ("75% of the plain responses were cut off" in said) == (cut > 0.5)
    found["threshold"] |= {"ties": 0.5, "negative": 0.125, "suggested": 0.25}
    for won, share in ((1.0, "all"), (0.55, "about half"), (0.75, "75%")):
        found["threshold"]["won_if_suggested"] = won
        assert f"would rank {share} of the pairs that the principled response wins" in " ".join(probe.said(found))


def test_of_two_rules_leaving_one_out_is_the_other_alone(tmp_path):
    (tmp_path / "two.txt").write_text("Rules.\n1. Be kind.\n2. Be brief.\n")
    modes.probe(config(principles=str(tmp_path / "two.txt"), **{"probe.queries": 2}), tmp_path / "w", "jax")
    rows = {row["name"]: row for row in result(tmp_path / "w")["prompts"]}
    assert list(rows) == ["plain", "all", "only_1", "only_2", "without_1", "without_2"]
    for left, alone in (("without_1", "only_2"), ("without_2", "only_1")):
        assert rows[left]["reward"] == rows[alone]["reward"] and rows[left]["adds"] and not rows[alone]["adds"]
    sampled = {path.parent.name for path in (tmp_path / "w" / "probe").glob("*/iter_*.jsonl")}
    assert sampled == {"plain", "all", "only_1", "only_2"}


def test_one_rule_and_none(tmp_path):
    (tmp_path / "one.txt").write_text("Rules.\n1. Be kind.\n")
    modes.probe(config(principles=str(tmp_path / "one.txt"), **{"probe.queries": 2}), tmp_path / "w", "jax")
    assert [row["name"] for row in result(tmp_path / "w")["prompts"]] == ["plain", "all"]
    with pytest.raises(UserError, match="a set without a rule: there is nothing to probe"):
        modes.probe(config(principles="none"), tmp_path / "v", "jax")
    with pytest.raises(UserError, match="--mode=probe needs an algorithm that samples"):
        modes.probe(config(algorithm="reward"), tmp_path / "u", "jax")


calls = {"n": 0}


def shaky(prompts, responses):
    """Another value at every call, and none for a query of its own."""
    calls["n"] += 1
    return [math.nan if p == prompts[0] and "bad" in p else 1.0 * calls["n"] for p in prompts]


def test_a_threshold_of_infinity_has_a_page(probed, tmp_path):
    copy = tmp_path / "w"
    shutil.copytree(probed, copy)
    modes.probe(config(**{"ple.tau_0": math.inf}), copy, "jax")
    assert (
        result(copy)["threshold"]["tau_0"] == "inf" and "ple.tau_0=inf 0% of the pairs" in (copy / "probe.html").read_text()
    )


def test_another_reward_is_asked_of_the_same_answers(probed, tmp_path, monkeypatch):
    copy = tmp_path / "w"
    shutil.copytree(probed, copy)
    monkeypatch.setattr(probe, "sample", lambda *args: pytest.fail("sampled again"))
    modes.probe(config(**{"reward.name": "length", "reward.kwargs": {"target": 3}, "eval.second_reward": "numeric",
                          "eval.second_kwargs": {"column": "id"}}), copy, "jax")  # fmt: skip
    rows = result(copy)["prompts"]
    assert all(-1 <= row["reward"] <= 0 for row in rows) and all("second" in row for row in rows)


def test_other_data_under_the_same_ids_are_another_question(tmp_path, monkeypatch):
    data = tmp_path / "heldout.jsonl"
    data.write_text('{"prompt": "a red fox"}\n{"prompt": "blue"}\n')
    c = config(principles="concise", **{"task.heldout": str(data)})
    modes.probe(c, tmp_path / "w", "jax")
    before = [r.text for x in answers(tmp_path / "w", "plain") for r in x.responses]
    data.write_text('{"prompt": "another fox"}\n{"prompt": "blue"}\n')
    modes.probe(c, tmp_path / "w", "jax")
    assert [x.prompt for x in answers(tmp_path / "w", "plain")] == ["another fox", "blue"]
    assert before != [r.text for x in answers(tmp_path / "w", "plain") for r in x.responses]


def test_rules_that_training_draws_are_left_out_of_all_of_them(tmp_path):
    modes.probe(config(principles_per_query=1, **{"probe.queries": 2}), tmp_path / "w", "jax")
    rows = {row["name"]: row for row in result(tmp_path / "w")["prompts"]}
    assert "every" in rows and "1 of them a query" in rows["all"]["about"]
    means = {name: values(tmp_path / "w", name).mean() for name in rows}
    assert rows["without_2"]["adds"]["mean"] == pytest.approx(means["every"] - means["without_2"])


def test_methods_without_a_threshold_are_told_of_none(probed, tmp_path):
    copy = tmp_path / "w"
    shutil.copytree(probed, copy)
    modes.probe(config(algorithm="grpo"), copy, "jax")
    assert "tau_0" not in (copy / "probe.html").read_text()


def test_a_noisy_reward_is_told(tmp_path):
    calls["n"] = 0
    modes.probe(config(**{"reward.name": f"{__file__}:shaky", "reward.kwargs": {}, "probe.again": 4}), tmp_path / "w", "jax")
    found = result(tmp_path / "w")
    noise = found["reward_noise"]
    assert noise["responses"] == 4 and noise["differ"] == 1.0 and noise["largest"] >= 1 and noise["missing"] == 0
    assert "differ for 100%, by at most" in (tmp_path / "w" / "probe.html").read_text()


def some(prompts, responses):
    return [math.nan if hash(p) % 2 else 0.5 for p in map(len, prompts)]


def test_queries_without_a_reward_are_left_out_of_all(tmp_path, capsys):
    modes.probe(config(**{"reward.name": f"{__file__}:some", "reward.kwargs": {}}), tmp_path / "w", "jax")
    found = result(tmp_path / "w")
    assert 0 < found["left_out"] < 8 and found["queries"] + found["left_out"] == 8
    assert all(row["reward"] == 0.5 for row in found["prompts"])


# ---------------------------------------------------------------- measures


def pair(*scores: float) -> Rollout:
    return Rollout("q", "p", (1,), tuple(Response((1,), True, reward=s, score=s) for s in scores))


def test_thresholds():
    # plain, plain, principled, principled: a margin is of responses of different numbers
    found = probe.threshold([pair(1.0, 0.0, 0.5, 1.0), pair(0.0, 0.0, 2.0, -1.0)], 2, tau_0=0.4)
    assert found["margin"]["mean"] == pytest.approx((0.5 + 0.0 + 2.0 - 1.0) / 4)
    assert found["ties"] == 0.25 and found["negative"] == 0.25 and found["ranked"] == 0.5
    assert found["suggested"] == 0.25 and found["ranked_if_suggested"] == 0.5  # half way from 0.5 to 0
    assert found["won_if_suggested"] == 1
    curve = {round(row["tau"], 6): row for row in found["curve"]}
    assert curve[0.0] == {"tau": 0.0, "ranked": 0.5, "by_chance": 0.25}  # of 0-1, 1-0, 0-0, 0-0 one is above
    assert found["curve"][-1]["ranked"] <= found["curve"][0]["ranked"]
    either = probe.threshold([pair(1.0, 0.0, 0.5, 1.0), pair(0.0, 0.0, 2.0, -1.0)], 2, tau_0=0.4, either=True)
    assert either["ranked"] == 0.75 and either["curve"][0] == {"tau": 0.0, "ranked": 0.75, "by_chance": 0.5}
    assert either["suggested"] == 0.25 and either["negative"] == 0.25
    lost = probe.threshold([pair(1.0, 1.0, 0.0, 0.0)], 2, tau_0=math.inf)
    assert lost["suggested"] is None and lost["curve"][0]["by_chance"] == 0 and lost["ranked"] == 0
    # a policy that does not read its prompt ranks as many pairs as chance does, though its noise is the same
    same = probe.threshold([pair(0.3, 0.9, 0.5, 0.3, 0.9, 0.5)], 3, tau_0=0.1)
    assert same["ranked"] == 0.5 and all(row["ranked"] == row["by_chance"] for row in same["curve"])


@pytest.mark.parametrize(
    ("margins", "tau"),
    [([1, 1, 0, -1], 0.5), ([0.2, 0.4, 0.6], 0.3), ([0.2, 0.4, 0.6, 0.8], 0.3), ([0.5, 0.5, 1, 1, 1], 0.75), ([0, -1], None),
     ([1.0, 1.001], 0.5), ([1.0, 1.001, 1.002], 1.0)],
)  # fmt: skip
def test_a_suggested_threshold_ranks_half_of_what_is_won(margins, tau):
    margins = np.array(margins, np.float64)
    found = probe.suggestion(margins)
    assert found == (tau if tau is None else pytest.approx(tau))
    if found is not None:
        assert (margins > found).sum() >= (margins > 0).sum() / 2


def test_length():
    def rollout(*of: tuple[int, float]) -> Rollout:
        return Rollout("q", "p", (1,), tuple(Response((1,) * n, True, reward=r) for n, r in of))

    found = probe.of_length([rollout((1, 0.1), (2, 0.2), (3, 9.0)), rollout((1, 5.0), (2, 4.0), (3, 6.0))], seed=0)
    assert found["within"] == pytest.approx((1 + 0.5) / 2)
    assert found["within_low"] < found["within"] < found["within_high"]
    flat = probe.of_length([rollout((2, 0.1), (2, 0.2))], seed=0)
    assert math.isnan(flat["within"]) and math.isnan(flat["over_all"]) and flat["queries"] == 0 and found["queries"] == 2


def test_rank_correlation_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12), rng.integers(0, 6, 12) / 3
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation([1.0], [2.0])) and math.isnan(rank_correlation([1, 1], [2, 3]))
