"""The comparison of methods: the responses of several runs to one set of queries, under one evaluation, whatever made them.

What is estimated. A method's mean is the mean over its seeds of means over queries of means over samples; responses without
a finite reward are left out and counted. Intervals and tests take seeds and queries as draws (`formulas.intervals`): what is
shared by a seed or a query does not pass for evidence. Methods are tested against each other on the same queries and the
same seeds; where one has fewer seeds, on those that both have. A start model was not trained and has no seed in that sense:
its one run stands beside every seed of the others, whose spread it then does not add to. p-values are adjusted for all pairs
of methods of one measure, also those that nobody had asked about (Holm 1979).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core.conversation import Conversation, render
from ple_jax.core.errors import UserError, suggestion
from ple_jax.evaluation import caveats, entries, frontier
from ple_jax.evaluation.caveats import notes, undecided, warnings
from ple_jax.evaluation.methods import SAME, Method, check, group, labelled, read
from ple_jax.evaluation.numbers import TESTED, described, tests
from ple_jax.evaluation.win_rates import Stored, about, judged, open_judge


def results(named: Sequence[str], out: Path, *, config: Any, backend: str) -> Iterator[dict[str, Any]]:
    """The comparison of runs, as `reports.comparison_files` writes it: one or several views, and the frontier.

    A view is a comparison of checkpoints that were chosen alike: each run's best under one budget, or its last one. Where a
    judge must be asked, which may take hours, all come first without the verdicts, and then whole.

    Args:
        named: entries as `evaluation.entries` has them. Methods keep the order in which they are named.
        out: an existing folder, where a judge's answers are kept.
        config: its `seed` (of resampling and of what is judged) and `compare`.
        backend: what a judge computes with, if it is a model.

    Raises:
        UserError: there is nothing to read, or what is there cannot be compared.
    """
    if (out / "config.json").exists():
        raise UserError(f"--workdir={out} holds a run; give a folder of its own to the comparison")
    found, left_out = entries.expand(named)
    views = _by_view(found)
    curves = frontier.of(found, views, config.seed)
    baseline = _baseline([method.label for methods in views.values() for method in methods], config)
    judge = open_judge(next(iter(views.values())), config, backend)
    said = {view: [*left_out, *caveats.unreached(curves, view)] for view in views}
    each = [_of_view(view, methods, baseline, judge, said[view], out, config) for view, methods in views.items()]
    for some in zip(*each, strict=True):
        yield {"views": list(some), "frontier": curves}


def _by_view(found: Sequence[entries.Found]) -> dict[str, list[Method]]:
    """The methods of every view; a run has one label in all of them."""
    answers = [one for one in found if one.view != entries.POINTS]
    runs = labelled([read(one) for one in answers])
    check(runs)
    views: dict[str, list[Method]] = {}
    for view in entries.views(found):
        views[view] = group([run for one, run in zip(answers, runs, strict=True) if one.view in ("", view)])
    return views


def _of_view(
    view: str, methods: Sequence[Method], wanted: str, judge: Any, said: Sequence[str], out: Path, config: Any
) -> Iterator[dict[str, Any]]:
    """The comparison of one view; `said` comes first of its warnings."""
    labels = [method.label for method in methods]
    baseline = wanted if wanted in labels else labels[0]
    if baseline != wanted:
        said = [*said, f"{wanted}, the baseline, has no answers here: the differences are to {baseline}"]
    # the baseline comes first: every difference to it is "method - baseline"
    ordered = sorted(methods, key=lambda method: method.label != baseline)
    pairs = [(method, against) for against, method in itertools.combinations(ordered, 2)]
    result: dict[str, Any] = {
        "view": view,
        "baseline": baseline,
        "settings": settings(methods),
        "judge": about(judge, config, methods),
        "warnings": [*said, *warnings(methods, equal_tokens=math.isnan(entries.budget(view)))],
        "notes": notes(methods),
        "methods": described(methods, config.seed),
        "tests": tests(pairs, config.seed),
        "examples": examples(methods, config.compare.examples),
    }
    if not isinstance(judge, Stored):
        yield {**result, "wins": []}
    wins = judged(pairs, judge, config, out)
    yield {**result, "wins": wins, "warnings": [*result["warnings"], *undecided(wins)]}


def _baseline(labels: Sequence[str], config: Any) -> str:
    """The method that others are tested against: the one that is asked for, or the first."""
    baseline = labels[0] if config.compare.baseline is None else config.compare.baseline
    if baseline not in labels:
        raise UserError(
            f"config.compare.baseline is {baseline!r} but must be one of {', '.join(map(repr, labels))}"
            f"{suggestion(baseline, labels)}"
        )
    return baseline


def settings(methods: Sequence[Method]) -> dict[str, Any]:
    """What all runs have in common."""
    runs = [run.generated for method in methods for run in method.runs]
    own = runs[0].settings
    return {
        "data": own["data"],
        "queries": len(runs[0].rollouts),
        **{key: own[key] for key in SAME if key != "second_reward"},
        "second_reward": next((s for run in runs if (s := run.settings["second_reward"]) is not None), None),
        "models": list(dict.fromkeys(run.settings["model"] for run in runs)),
    }


def examples(methods: Sequence[Method], count: int) -> list[dict[str, Any]]:
    """The first queries in file order, with the first response of every method's first seed: nothing is selected."""
    rows = []
    for q, rollout in enumerate(methods[0].runs[0].generated.rollouts[:count]):
        prompt = rollout.prompt
        text = render(prompt.messages) if isinstance(prompt, Conversation) else prompt
        responses = []
        for method in methods:
            response = method.runs[0].generated.rollouts[q].responses[0]
            values = {key: float(method.values[key][0, q, 0]) for key in TESTED}
            responses.append({"method": method.label, "text": response.text, "finished": response.finished, **values})
        rows.append({"query_id": rollout.query_id, "prompt": text.strip(), "responses": responses})
    return rows
