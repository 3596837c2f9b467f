"""Compares methods: the responses of several runs to one set of queries, measured in the same way whatever produced them.

A method's mean is the mean over its seeds of the means over queries of the means over samples; responses without a finite
reward are left out and counted. Intervals and tests treat seeds and queries as random draws (`formulas.intervals`), so that
what one seed or one query has in common does not pass for evidence. Methods are tested against each other on the same
queries and the same seeds; where one has fewer seeds, on those that both have. A start model was not trained and has no seed
in that sense: its one run is paired with every seed of the others, and does not add to their spread. p-values are adjusted
(Holm 1979) for the differences to one method of one measure, which is what a column of differences to the baseline asks, and
for all pairs of methods, including those that nobody had asked about, where all are shown.
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
    """Yields the comparison of runs, in the form that `reports.comparison_files` writes: views, and the frontier.

    A view compares checkpoints that were chosen alike: each run's best under one budget, or its last one. Where a judge must
    be asked, which may take hours, the comparison is yielded twice: first without the verdicts, and then with them.

    Args:
        named: entries in the syntax of `evaluation.entries`. Methods keep the order in which they are named.
        out: an existing folder, where a judge's answers are kept.
        config: the config, of which `seed` (for resampling and for the choice of queries to judge) and `compare` are read.
        backend: jax or torch: what a judge that is a model runs on.

    Raises:
        UserError: there is nothing to read, what is there cannot be compared, or `out` holds a run.
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
    """Groups the runs of every view into methods. A run has the same label in all views."""
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
    """Yields the comparison of one view: without the verdicts if a judge must be asked, and then complete.

    The sentences in `said` come first among its warnings.
    """
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
        "notes": [*filter(None, [config.compare.note]), *notes(methods)],
        "methods": described(methods, config.seed),
        "tests": tests(pairs, config.seed),
        "examples": examples(methods, config.compare.examples),
    }
    if not isinstance(judge, Stored):
        yield {**result, "wins": []}
    wins = judged(pairs, judge, config, out)
    yield {**result, "wins": wins, "warnings": [*result["warnings"], *undecided(wins)]}


def _baseline(labels: Sequence[str], config: Any) -> str:
    """Returns the label of the method that the others are tested against: config.compare.baseline, or the first label.

    Raises:
        UserError: no method has the label in config.compare.baseline.
    """
    baseline = labels[0] if config.compare.baseline is None else config.compare.baseline
    if baseline not in labels:
        raise UserError(
            f"config.compare.baseline is {baseline!r} but must be one of {', '.join(map(repr, labels))}"
            f"{suggestion(baseline, labels)}"
        )
    return baseline


def settings(methods: Sequence[Method]) -> dict[str, Any]:
    """Returns the data, the sampling options and the rewards that all runs share, and the base models that they have."""
    runs = [run.generated for method in methods for run in method.runs]
    own = runs[0].settings
    return {
        "data": own["data"],
        "queries": len(runs[0].rollouts),
        **{key: own[key] for key in SAME if not key.startswith("second_reward")},
        "second_reward": next((s for run in runs if (s := run.settings["second_reward"]) is not None), None),
        "models": list(dict.fromkeys(run.settings["model"] for run in runs)),
    }


def examples(methods: Sequence[Method], count: int) -> list[dict[str, Any]]:
    """Returns the first `count` queries in file order, each with the first response of every method's first seed.

    Nothing is selected by its content.
    """
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
