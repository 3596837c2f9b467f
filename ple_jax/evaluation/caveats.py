"""Warnings and notes about a comparison, in sentences: what weakens it, and what a reader should know."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.evaluation.methods import Entry, Method, method_keys
from ple_jax.evaluation.numbers import spent

_PATHS = {"task.train": "inputs.train", "task.heldout": "inputs.heldout"}  # a path -> the digest of what it holds
_TOLERANCE = 0.1  # of generated tokens, within which budgets are called equal


def warnings(methods: Sequence[Method], *, equal_tokens: bool = True) -> list[str]:
    """Collects what makes the comparison weaker than it looks, a sentence each.

    Args:
        equal_tokens: whether the methods should have generated the same number of tokens; at equal KL they cannot.
    """
    found = []
    trained = [method for method in methods if method.trained]
    seeds = sorted({run.seed for method in trained for run in method.runs})
    for method in methods:
        configs = [method_keys(run) for run in method.runs]
        everything = sorted({key for config in configs for key in config})
        keys = [key for key in everything if any(config.get(key) != configs[0].get(key) for config in configs)]
        # the same records elsewhere are no other ones
        keys = [key for key in keys if key not in _PATHS or _PATHS[key] in keys or configs[0].get(_PATHS[key]) is None]
        if keys:
            found.append(f"the runs of {method.label} differ in more than their seeds: {', '.join(keys)}")
        for run in method.runs if method.trained else ():
            name, iteration = f"{method.label}, seed {run.seed}", run.generated.settings["iteration"]
            if not run.summary:
                found.append(f"{name}: training is not finished; the responses are of iteration {iteration}")
            elif run.point is not None and run.point["step"] == 0:
                found.append(f"{name}: no evaluation after the first one was chosen: these are the start model's answers")
            elif run.point is None and run.summary["iterations"] != iteration:
                all_ = run.summary["iterations"]
                found.append(f"{name}: the responses are of iteration {iteration}, the costs of all {all_}")
    for method in trained:
        missing = [seed for seed in seeds if seed not in [run.seed for run in method.runs]]
        if len(method.runs) == 1:
            found.append(f"{method.label} has one seed: its intervals and tests say nothing of how another would have gone")
        if missing:
            found.append(
                f"{method.label} lacks seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}: it is tested on"
                " the seeds that both methods have, its mean is over its own"
            )
    if len({run.generated.settings["model"] for method in methods for run in method.runs}) > 1:
        found.append("the base models differ: so do those under which perplexity and KL are measured")
    return found + _starts(trained) + (_unequal(trained) if equal_tokens else []) + _missing(methods)


def _starts(trained: Sequence[Method]) -> list[str]:
    """Says where KLs are to different policies."""
    def start(run: Entry) -> tuple[str | None, ...]:
        return run.config.get("inputs.adapter"), run.config.get("inputs.warm_up")

    runs = [(method.label, run) for method in trained for run in method.runs]
    found = []
    if len({start(run) for _, run in runs}) > 1:
        found.append("the runs start from different policies (model.adapter, warm_up.data): each KL is to its own start")
    for label, run in runs:
        if any(start(run)) and run.generated.settings.get("kl") != "start":
            says = "KL is to the base, by an earlier version; delete these responses and give --mode=generate again"
            found.append(f"{label}, seed {run.seed}: {says}")
    return found


def unreached(curves: Mapping[str, Any], view: str) -> list[str]:
    """Says, a sentence for each method, how many of its runs never reach the KL budget of a view.

    Args:
        curves: what `frontier.of` returns.
        view: the view, such as "kl_4".
    """
    short = [row for row in curves["budgets"] if row["view"] == view and row["reached"] < row["runs"]]
    return [
        f"{row['method']}: {row['runs'] - row['reached']} of {row['runs']} runs never get to {row['budget']:g} nats a"
        " response, and stand with less"
        for row in short
    ]


def _unequal(methods: Sequence[Method]) -> list[str]:
    """Says which methods that sample while they train generated less than the one that generated most."""
    spent_by = {
        method.label: float(np.mean([spent(run).get("generated_tokens", 0) for run in method.runs])) for method in methods
    }
    most = max(spent_by.values(), default=0.0)
    less = {label: n for label, n in spent_by.items() if 0 < n < (1 - _TOLERANCE) * most}
    if not less:
        return []
    largest = max(spent_by, key=spent_by.__getitem__)
    listed = "; ".join(f"{label} {n:,.0f} ({n / most:.0%})" for label, n in less.items())
    upto = " up to the checkpoint that answered" if any(map(_earlier, methods)) else ""
    return [f"unequal budgets: {largest} generated {most:,.0f} tokens while it trained{upto}, and {listed}"]


def _earlier(method: Method) -> bool:
    return any(run.earlier for run in method.runs)


def _missing(methods: Sequence[Method]) -> list[str]:
    found = []
    without = [method.label for method in methods if np.isnan(method.values["reward_second"]).all((1, 2)).any()]
    asked = {run.generated.settings["second_reward"] for method in methods for run in method.runs} - {None}
    if len(without) == len(methods) and not asked:
        found.append(
            "no second reward: over-optimisation of the training reward would not show (--config.generate.second_reward)"
        )
    elif without:
        found.append(f"no second reward of {', '.join(without)}")
    for key, name in (("reward", "training reward"), ("reward_second", "second reward")):
        for method in methods:
            share = float(np.isnan(method.values[key]).mean())
            if 0 < share and (key == "reward" or method.label not in without):
                found.append(f"{share:.1%} of the responses of {method.label} have no {name} and are left out of it")
    return found


def _where(run: Entry) -> str:
    done, all_ = run.generated.settings["iteration"], run.summary["iterations"]
    within = f" and a part ({run.point['step']} steps)" if run.point is not None and run.point["within"] else ""
    return f"{done}{within} of {all_}"


def undecided(wins: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how many pairs of responses the judge gave no verdict on."""
    failed, judged = (sum(row[key] for row in wins) / 2 for key in ("failed", "judged"))  # each pair is there twice
    return [f"the judge gave no verdict on {failed:,.0f} of {failed + judged:,.0f} pairs"] if failed else []


def notes(methods: Sequence[Method]) -> list[str]:
    """Collects what a reader should know although nothing is wrong with it, a sentence each."""
    found = []
    few = sorted({len(method.runs) for method in methods if method.trained and 1 < len(method.runs) < 5})
    if few:
        found.append(
            f"{' or '.join(map(str, few))} seeds show only roughly what another would do, so look at every seed"
        )
    if early := [method for method in methods if _earlier(method)]:
        of = {method.label: [_where(run) for run in method.runs if run.earlier] for method in early}
        listed = "; ".join(f"{label} {', '.join(places)}" for label, places in of.items())
        found.append(f"not the last checkpoint answered but the best within the budget, of iteration {listed}")
    if start := [method.label for method in methods if not method.trained and len(method.runs) == 1]:
        found.append(f"{', '.join(start)}: one run, which stands beside every seed of the others")
    total = {
        method.label: sum(run.summary.get("generated_tokens", spent(run).get("generated_tokens", 1)) for run in method.runs)
        for method in methods
    }
    if offline := [method.label for method in methods if method.trained and not total[method.label]]:
        found.append(f"{', '.join(offline)}: nothing is sampled while it trains; compare the tokens that it was trained on")
    drawn, plain = methods[0].runs[0].generated.settings["sampling"], {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    if other := [f"{key} {drawn[key]:g}" for key, value in plain.items() if drawn.get(key, value) != value]:
        found.append(f"responses were sampled with {', '.join(other)}; KL is of the untouched probabilities")
    return found
