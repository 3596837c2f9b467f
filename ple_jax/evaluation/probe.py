"""Measures what principles buy before any training, and what this reward and its scale mean for the threshold.

The start model answers held-out queries under the plain prompt, with all principles, with every rule alone, and with all
rules but one, always with the same noise. The rewards of the answers give the lift of each prompt over the plain one, and
what a threshold would do.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from ml_collections import ConfigDict, FrozenConfigDict

from ple_jax.core.batches import bucket
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json
from ple_jax.core.noise import PROBE
from ple_jax.core.types import Query, Rollout, Slot
from ple_jax.data.queries import digest
from ple_jax.formulas import intervals, texts
from ple_jax.prompts.principles import Principles
from ple_jax.training import ahead, scoring
from ple_jax.training.journal import Journal
from ple_jax.training.prompting import Prompts, check_context
from ple_jax.training.run import Run
from ple_jax.training.sampling import sample
from ple_jax.training.workdir import recorded

FOLDER = "probe"  # of a work directory: the answers
FILE = "probe.json"
PLAIN, ALL = "plain", "all"  # the prompts without principles, and with those that training would have
EVERY = "every"  # the prompt with all rules, where training draws some of them
_GRID = 41  # thresholds of the curve
_EXAMPLES = 6  # queries that the page shows
_CUT = 0.5  # share of plain responses cut off, above which it is said
_FEWEST = 8  # queries in which lengths and rewards differ, below which their correlation says nothing


class Prompt(NamedTuple):
    """A prompt that the probe tries: its name, a description, and how queries are rendered under it."""

    name: str
    about: str
    prompts: Prompts
    principled: bool


class Answers(NamedTuple):
    """The answers of the start model under one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]
    tokens: float  # of a prompt, the mean
    seconds: float  # of sampling; nan where it was sampled before

    @property
    def rewards(self) -> Float64[np.ndarray, "query sample"]:
        return np.array([[r.reward for r in rollout.responses] for rollout in self.rollouts], np.float64)


def prompts_of(run: Run[Any]) -> list[Prompt]:
    """Returns all prompts that are tried.

    Where there are several rules, each of them is tried alone and left out, and all together where training draws some of
    them.
    """
    rules = run.prompts.principles
    whole = ConfigDict(run.config.to_dict())
    whole.principles_per_query = 0
    every = run.prompts._replace(config=FrozenConfigDict(whole))

    def some(kept: Sequence[int]) -> Prompts:
        return every._replace(principles=rules._replace(rules=tuple(rules.rules[i] for i in kept)))

    found = [Prompt(PLAIN, "the plain prompt", run.prompts, False), Prompt(ALL, _about_all(rules, run), run.prompts, True)]
    numbers = range(len(rules.rules)) if len(rules.rules) > 1 else ()
    if numbers and run.config.principles_per_query:
        found.append(Prompt(EVERY, "all rules at once", every, True))
    found += [Prompt(f"only_{i + 1}", f"rule {i + 1} alone: {rules.rules[i].strip()}", some([i]), True) for i in numbers]
    for i in numbers:
        left = some([j for j in numbers if j != i])
        found.append(Prompt(f"without_{i + 1}", f"all but rule {i + 1}: {rules.rules[i].strip()}", left, True))
    return found


def _about_all(rules: Principles, run: Run[Any]) -> str:
    drawn = f", {run.config.principles_per_query} of them a query" if run.config.principles_per_query else ""
    return f"all principles ({rules.name}{drawn})"


# ---------------------------------------------------------------- sampled


def probe(run: Run[Any]) -> dict[str, Any]:
    """Tries all prompts and returns what that shows, as probe.json has it.

    What was sampled before for the same question is read instead.

    Raises:
        UserError: there are no principles to try, or no query has a finite reward under all prompts.
    """
    if not run.prompts.principles.text:
        raise UserError("config.principles is a set without a rule: there is nothing to probe; name another one")
    started, queries = time.monotonic(), _queries(run)
    folder = run.session.workdir / FOLDER
    found = _all_answered(run, queries, folder)
    kept, left = _with_rewards(run, found, folder)
    by_name = {answers.prompt.name: answers for answers in kept}
    pairs = [
        one._replace(responses=one.responses + other.responses)
        for one, other in zip(by_name[PLAIN].rollouts, by_name[ALL].rollouts, strict=True)
    ]
    scored = scoring.transformed(pairs, run.config.reward)
    return {
        "model": run.base.name,
        "principles": run.prompts.principles.name,
        "reward": run.reward.name,
        "transform": run.config.reward.transform,
        "queries": len(kept[0].rollouts),
        "left_out": left,
        "samples": run.config.probe.samples,
        "prompts": _prompts(run, kept),
        "threshold": threshold(
            scored, run.config.probe.samples, tau_0=run.config.ple.tau_0, either=run.config.ple.selection == "symmetric"
        ),
        "selection": run.config.ple.selection if run.config.algorithm.removeprefix("ple_jax.algorithms.") == "ple" else None,
        "candidates": run.config.ple.candidates,
        "reward_noise": _noise(run, by_name[PLAIN].rollouts),
        "length": of_length(by_name[PLAIN].rollouts, seed=run.config.seed),
        "examples": _examples(by_name),
        "seconds": time.monotonic() - started,
    }


def _all_answered(run: Run[Any], queries: Sequence[Query], folder: Path) -> list[Answers]:
    """Returns the answers under all prompts. Two prompts of the same rules are one: of two rules, leaving one out."""
    prompts, question, found = prompts_of(run), _question(run, queries), dict[str, Answers]()

    def first(prompt: Prompt) -> Prompt:
        return next(one for one in prompts if (one.prompts, one.principled) == (prompt.prompts, prompt.principled))

    asked = [prompt for prompt in prompts if first(prompt) is prompt]
    for i, prompt in enumerate(asked, 1):
        _settle(question, prompt, folder / prompt.name)
        run.session.progress.heading(f"probe, prompt {i} of {len(asked)}: {prompt.about}")
        found[prompt.name] = answered(run, prompt, queries, folder)
    return [found[first(prompt).name]._replace(prompt=prompt) for prompt in prompts]


def _with_rewards(run: Run[Any], found: Sequence[Answers], folder: Path) -> tuple[list[Answers], int]:
    """Keeps the answers to the queries that have a finite reward under every prompt, and counts the other queries.

    Raises:
        UserError: there is no such query.
    """
    finite = np.all(np.isfinite([answers.rewards for answers in found]), axis=(0, 2))
    if not finite.any():
        raise UserError(f"no query has a finite reward under every prompt: see {folder}, and mend config.reward")
    if left := int((~finite).sum()):
        run.session.progress.log(f"{left} of {len(finite)} queries are left out: a reward of theirs is not finite")
    kept = [[rollout for rollout, ok in zip(of.rollouts, finite, strict=True) if ok] for of in found]
    return [of._replace(rollouts=rollouts) for of, rollouts in zip(found, kept, strict=True)], left


def _queries(run: Run[Any]) -> Sequence[Query]:
    """Returns the held-out queries, or the first config.probe.queries of them."""
    return run.data.heldout[: run.config.probe.queries or None]


def _question(run: Run[Any], queries: Sequence[Query]) -> dict[str, Any]:
    """Returns what the answers under all prompts depend on: model, sampler and queries."""
    kept = flatten(recorded(run.session.workdir) or {})
    groups = ("backend", "seed", "model.", "task.chat", "task.thinking", "task.date", "sampling.")
    wanted = {key: value for key, value in kept.items() if key.startswith(groups)}
    wanted |= {key: kept[key] for key in ("inputs.model", "inputs.adapter") if key in kept}
    return wanted | {"queries": digest(queries), "samples": run.config.probe.samples}


def _settle(question: Mapping[str, Any], prompt: Prompt, folder: Path) -> None:
    """Prepares the folder of a prompt's answers.

    Answers there to another question, or under another prompt, are removed. The plain prompt's stay where only the
    principles are other ones.
    """
    wanted = dict(question)
    if prompt.principled:
        wanted["rules"] = prompt.prompts.principles.text
        wanted["principles_per_query"] = prompt.prompts.config.principles_per_query
    if read_json(folder / "question.json") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "question.json", wanted)


def answered(run: Run[Any], prompt: Prompt, queries: Sequence[Query], folder: Path) -> Answers:
    """Samples the answers under a prompt, or reads them if they are in the folder, and scores them.

    Rewards are always what the reward gives now.
    """
    prompts, step = prompt.prompts.sharing(queries) if prompt.principled else prompt.prompts, run.config.sampling.bucket
    # the largest bucket that is shared: prompts of about the same length then have one shape, which is compiled once
    shared = 0 if len(prompts.prefix) < step else bucket(len(prompts.prefix) + 1, step) // 2
    run = run._replace(prompts=prompts._replace(prefix=prompts.prefix[:shared]))
    rendered = [run.prompts.render(query, prompt.principled).whole for query in queries]
    longest = max(map(len, rendered)) + run.config.sampling.max_new_tokens
    check_context(longest, len(queries), model=run.base.name, context=run.base.context)
    tokens, seconds = float(np.mean([len(whole) for whole in rendered])), math.nan
    journal = Journal(folder / prompt.name, 0)
    if (rollouts := journal.read()) is None:
        began = time.monotonic()
        slots = [Slot("probe", prompt.principled, number) for number in range(run.config.probe.samples)]
        with ahead.scoring(run.reward, run.session) as ask:
            sampled = sample(run, queries, slots, journal, PROBE, ask)
        seconds, rollouts = time.monotonic() - began, sampled
        journal.complete(rollouts)
    told = [rollout._replace(record=query.record) for rollout, query in zip(rollouts, queries, strict=True)]
    return Answers(prompt, scoring.score(told, run.reward, run.session), tokens, seconds)


# ---------------------------------------------------------------- measured


def _prompts(run: Run[Any], found: Sequence[Answers]) -> list[dict[str, Any]]:
    """Makes a row for each prompt: its reward, its lift over the plain prompt, and what it costs."""
    by_name = {answers.prompt.name: answers for answers in found}
    principles = run.base.tokenizer.encode(run.prompts.principles.text, add_special_tokens=False)
    rows = []
    for answers in found:
        name, values = answers.prompt.name, answers.rewards.mean(1)
        responses = [r for rollout in answers.rollouts for r in rollout.responses]
        second = [] if run.second is None else scoring.values(answers.rollouts, run.second, run.session)
        rows.append(
            {
                "name": name,
                "about": answers.prompt.about,
                "reward": float(values.mean()),
                "lift": _difference(answers, by_name[PLAIN], run.config.seed) if name != PLAIN else None,
                # what the rule that is left out adds to the others
                "adds": _difference(by_name.get(EVERY, by_name[ALL]), answers, run.config.seed)
                if name.startswith("without")
                else None,
                **({"second": texts.mean(list(map(texts.mean, second)))} if second else {}),
                "prompt_tokens": answers.tokens,
                "length": float(np.mean([len(r.tokens) for r in responses])),
                "truncated": float(np.mean([not r.finished for r in responses])),
                "overlap": float(np.mean([texts.ngram_overlap(r.tokens, principles, 3) for r in responses])),
                "seconds": answers.seconds,
            }
        )
    return rows


def _difference(one: Answers, other: Answers, seed: int) -> dict[str, float]:
    """Computes the difference of mean rewards, paired by query, with its 95% interval."""
    each = one.rewards.mean(1) - other.rewards.mean(1)
    low, high = intervals.bootstrap_ci(each, seed=seed)
    return {"mean": float(each.mean()), "low": low, "high": high}


def _distribution(values: np.ndarray) -> dict[str, float]:
    quantiles = {f"q{q}": float(np.quantile(values, q / 100)) for q in (5, 25, 50, 75, 95)}
    return {"mean": float(values.mean()), "sd": float(values.std()), **quantiles}


def threshold(pairs: Sequence[Rollout], samples: int, *, tau_0: float, either: bool = False) -> dict[str, Any]:
    """Computes what thresholds do to margins of scores: a principled response's minus a plain one's to the same query.

    Responses of the same number share their noise, which makes lifts exact. The two that training compares do not, and
    differ by more. So a margin is taken between two responses of different numbers.

    Args:
        pairs: of every query `samples` plain responses and then as many principled ones, with their scores.
        samples: at least 2.
        tau_0: that of the config.
        either: whether a pair is ranked whichever response wins by more than the threshold (selection=symmetric).

    Returns:
        margin: mean, sd and quantiles; negative, ties: shares of the pairs; suggested: by `suggestion`, None if the
        principles win no pair; won_if_suggested: the share above it of the pairs that they win; ranked,
        ranked_if_suggested: the shares of all pairs above tau_0 and above the suggested; curve: a row for each of some
        thresholds, with the share of pairs above it, and that of pairs of two plain responses, which differ by chance alone.
    """
    scores = np.array([[r.score for r in pair.responses] for pair in pairs], np.float64)
    plain_ones, guided = scores[:, :samples], scores[:, samples:]
    margins, chance = _apart(guided, plain_ones), _apart(plain_ones, plain_ones)
    won, suggested = margins[margins > 0], suggestion(margins)
    top = max(float(np.quantile(won, 0.99)) if len(won) else 0.0, tau_0 if math.isfinite(tau_0) else 0.0) or 1.0
    wins, by_chance = (np.abs(margins), np.abs(chance)) if either else (margins, chance)
    return {
        "tau_0": tau_0,
        "suggested": suggested,
        "ranked": float((wins > tau_0).mean()),
        "ranked_if_suggested": None if suggested is None else float((wins > suggested).mean()),
        "won_if_suggested": None if suggested is None else float((won > suggested).mean()),
        "negative": float((margins < 0).mean()),
        "ties": float((margins == 0).mean()),
        "margin": _distribution(margins),
        "curve": [
            {"tau": float(t), "ranked": float((wins > t).mean()), "by_chance": texts.mean((by_chance > t).astype(float))}
            for t in np.linspace(0.0, top, _GRID)
        ],
    }


def suggestion(margins: Float64[np.ndarray, " n"]) -> float | None:
    """Suggests a threshold that ranks about half of the pairs that the principled response wins, and at least half.

    It lies half way between the median of the margins above 0 and the next smaller one there is, or 0: for a reward that is
    just right or wrong the median is 1, and no margin is above that. It is None if no margin is above 0.
    """
    won = np.unique(margins[margins > 0])
    if not len(won):
        return None
    middle = np.quantile(margins[margins > 0], 0.5, method="lower")
    below = won[won < middle].max(initial=0.0)
    rounded = float(f"{(middle + below) / 2:.2g}")
    return rounded if below <= rounded < middle else float((middle + below) / 2)


def _apart(
    one: Float64[np.ndarray, "query sample"], other: Float64[np.ndarray, "query sample"]
) -> Float64[np.ndarray, " n"]:
    """Computes the differences between responses of different numbers to the same query, every one with every other."""
    apart = one[:, :, None] - other[:, None, :]
    return apart[:, ~np.eye(one.shape[1], dtype=bool)].ravel()


def _noise(run: Run[Any], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Asks the reward again about the same responses, and measures how far its values are from the first ones."""
    some = [rollout._replace(responses=rollout.responses[:1]) for rollout in rollouts[: run.config.probe.again]]
    if not some:
        return {"responses": 0}
    before = np.array([rollout.responses[0].reward for rollout in some])
    apart = scoring.given(some, run.reward, None).values - before
    known = apart[np.isfinite(apart)]
    return {
        "responses": len(some),
        "differ": float((known != 0).mean()) if len(known) else math.nan,
        "sd": float(known.std()) if len(known) else math.nan,
        "largest": float(np.abs(known).max()) if len(known) else math.nan,
        "missing": int((~np.isfinite(apart)).sum()),
    }


def of_length(rollouts: Sequence[Rollout], *, seed: int) -> dict[str, float]:
    """Computes Spearman's correlation of reward and length in tokens, within the queries and over all responses.

    The one within is the mean over queries, with its 95% interval; it says whether the reward prefers the longer of two
    answers. Over all responses it may also be that some queries have longer and better ones. Values are nan where nothing
    differs; `queries` says in how many queries something does.
    """
    values = np.array([[r.reward for r in rollout.responses] for rollout in rollouts], np.float64)
    tokens = np.array([[len(r.tokens) for r in rollout.responses] for rollout in rollouts], np.float64)
    each = np.array([texts.rank_correlation(*one) for one in zip(values, tokens, strict=True)])
    within = each[~np.isnan(each)]
    low, high = intervals.bootstrap_ci(within, seed=seed)
    return {
        "within": texts.mean(within), "within_low": low, "within_high": high, "queries": len(within),
        "over_all": texts.rank_correlation(values.ravel(), tokens.ravel()),
    }  # fmt: skip


def _examples(by_name: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Returns the first queries, each with its first response under the plain prompt and with all principles.

    Nothing is selected by its content.
    """
    both = zip(by_name[PLAIN].rollouts[:_EXAMPLES], by_name[ALL].rollouts[:_EXAMPLES], strict=True)
    return [
        {
            "query": one.query_id,
            "prompt": str(one.prompt),
            **{
                name: {"text": r.text, "reward": r.reward, "finished": r.finished}
                for name, r in ((PLAIN, one.responses[0]), (ALL, other.responses[0]))
            },
        }
        for one, other in both
    ]


def said(found: Mapping[str, Any]) -> list[str]:
    """Summarises what the probe found, a sentence each."""
    rows, tau, length = {row["name"]: row for row in found["prompts"]}, found["threshold"], found["length"]
    lines = [f"all principles: {_lift(rows[ALL]['lift'])} reward over the plain prompt's {rows[PLAIN]['reward']:.3f}"]
    alone = [row for row in rows.values() if row["name"].startswith("only")]
    lines += [f"rule {row['name'][5:]} alone: {_lift(row['lift'])}; {row['about'].partition(': ')[2]}" for row in alone]
    lines += [f"rule {row['name'][8:]} adds {_lift(row['adds'])} to the others" for row in rows.values() if row["adds"]]
    if rows[ALL]["lift"]["low"] <= 0:
        lines.append("the principles are not shown to buy anything, so PLE has little to rank: mend them, or the reward")
    if (cut := rows[PLAIN]["truncated"]) > _CUT:
        lines.append(f"{cut:.0%} of the plain responses were cut off at config.sampling.max_new_tokens")
    scale = "" if found["transform"] == "none" else f", on the scale of transform {found['transform']}"
    lines.append(
        f"of {tau['ties']:.0%} of the pairs both responses score alike, of {tau['negative']:.0%} the plain one is"
        f" better, of {1 - tau['ties'] - tau['negative']:.0%} the principled one"
    )
    if found["selection"] in ("threshold", "symmetric"):
        one = " (of one principled response; ple.candidates are more)" if found["candidates"] > 1 else ""
        lines.append(f"at ple.tau_0={tau['tau_0']:g} {tau['ranked']:.0%} of the pairs would be ranked by it{scale}{one}")
        if tau["suggested"] is not None:
            share = "all" if (won := tau["won_if_suggested"]) == 1 else "about half" if won < 0.6 else f"{won:.0%}"
            lines.append(
                f"--config.ple.tau_0={tau['suggested']:g} would rank {share} of the pairs that the principled response wins,"
                f" {tau['ranked_if_suggested']:.0%} of all"
            )
    noise = found["reward_noise"]
    if noise["responses"]:
        same = noise["differ"] == 0 and not noise["missing"]
        apart = f"differ for {noise['differ']:.0%}, by at most {noise['largest']:.3g}; {noise['missing']} had none"
        lines.append(f"rewards of the same {noise['responses']} responses, asked again, {'are the same' if same else apart}")
    if length["queries"] >= _FEWEST:
        lines.append(
            f"rank correlation of reward and length within a query: {length['within']:+.2f} (95% interval"
            f" {length['within_low']:+.2f} to {length['within_high']:+.2f}, over {length['queries']} queries)"
        )
    return lines


def _lift(found: Mapping[str, float]) -> str:
    mean, low, high = (round(found[key], 3) + 0.0 for key in ("mean", "low", "high"))  # + 0.0: no -0.000
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
