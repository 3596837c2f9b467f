"""A comparison's tables, as Markdown and as LaTeX, from what comparison.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ple_jax.evaluation.numbers import CHANGE, TAX
from ple_jax.reports.formats import MISSING, decimals, interval, is_number, p_value

REWARDS = {"reward": "training reward", "reward_second": "second reward"}


class Table(NamedTuple):
    """A table with cells as text, in which every row begins with a method's name."""

    name: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


# heading, measure
_QUALITY = (
    ("KL", "kl"), ("perplexity", "perplexity"), ("length", "length"), ("Distinct-1", "distinct_1"),
    ("Distinct-2", "distinct_2"), ("Distinct-3", "distinct_3"), ("MSTTR", "msttr"), ("BLEU", "bleu"),
    ("ROUGE-L", "rougeL"), ("repetition", "repetition"), ("overlap", "overlap"), ("refusal", "refusal"), ("empty", "empty"),
    ("cut off", "truncated"), ("no reward", "bad_reward"),
)  # fmt: skip
_COSTS = (
    ("generated", "generated_tokens"), ("principles", "principle_tokens"), ("trained on", "training_tokens"),
    ("reward calls", "reward_calls"), ("FLOPs", "flops"), ("sampling s", "generate_seconds"),
    ("scoring s", "score_seconds"), ("update s", "update_seconds"), ("wall s", "wall_seconds"),
    ("peak GiB", "peak_memory_bytes"), ("reward over budget", "heldout_area"),
)  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Lays out the tables of a comparison: each reward with its tests against the baseline, the texts, the tasks, the costs.

    A measure that no method has is left out; where only some methods lack it, "–" stands for it.
    """
    found = [_rewards(result, measure, name) for measure, name in REWARDS.items() if known(result, measure)]
    found.append(
        _means(
            result,
            "texts",
            "Texts",
            _QUALITY,
            "Means over seeds. KL to the start in nats per response; perplexity of the responses under the base model;"
            " length in tokens; Distinct-n, MSTTR and ROUGE-L from 0 to 1, BLEU from 0 to 100; repetition is the share of a"
            " text's 4-grams that are repeats, overlap that of its trigrams that stand in the principles; refusals, empty,"
            " cut-off and unrewarded responses are shares.",
        )
    )
    found.append(_tax(result))
    found.append(
        _means(
            result,
            "costs",
            "Costs of training",
            _COSTS,
            "Means over seeds, evaluation apart (wall time has it). principles: tokens that they added to prompts, counted"
            " apart from those generated. FLOPs are an estimate. reward over budget: mean reward on the dev split over the"
            " generated tokens that all sampling methods have got to.",
        )
    )
    return [table for table in found if len(table.head) > 1]


def _rewards(result: Mapping[str, Any], measure: str, name: str) -> Table:
    methods, baseline = result["methods"], result["baseline"]
    digits = decimals(method["measures"].get(measure) for method in methods)
    won = {row["method"]: row for row in result["wins"] if row["against"] == baseline}
    wins = measure == "reward" and any(row["win_rate"] is not None for row in won.values())
    lengths = any(row["by_length"] for row in result["tests"] if (row["measure"], row["against"]) == (measure, baseline))
    rows = []
    for method in methods:
        label, mean = method["label"], interval(method["measures"].get(measure), method["intervals"].get(measure), digits)
        win, against = won.get(label), against_baseline(result, measure, label, digits)
        rate = interval(win["win_rate"], (win["low"], win["high"]), 3) if win else MISSING
        rows.append([label, str(len(method["seeds"])), mean, *against[: 2 + lengths], *([rate] if wins else [])])
    head = ["method", "seeds", name, "difference", "p", *(["by length"] if lengths else []), *(["win rate"] if wins else [])]
    return Table(measure, name.capitalize(), f"{_note(result, measure, wins, lengths)}.", head, rows)


def against_baseline(result: Mapping[str, Any], measure: str, label: str, digits: int) -> list[str]:
    """Returns as text a method's difference to the baseline, its p adjusted for all such differences, and that by length.

    The latter is what of the difference the lengths of the responses alone would give.
    """
    of = {"measure": measure, "method": label, "against": result["baseline"]}
    test = next((row for row in result["tests"] if of.items() <= row.items() and row["difference"] is not None), None)
    if test is None:
        return ["baseline" if label == result["baseline"] else MISSING, MISSING, MISSING]
    length = MISSING if test["by_length"] is None else f"{test['by_length']:+.{digits}f}"
    return [interval(test["difference"], (test["low"], test["high"]), digits, "+"), p_value(test["p_against"]), length]


def _note(result: Mapping[str, Any], measure: str, wins: bool, lengths: bool) -> str:
    baseline = result["baseline"]
    note = "Mean over seeds with its 95% interval, seeds and queries both draws"
    if n := tested(result, measure):
        note += f"; difference to {baseline} on the same seeds and queries; {adjusted(n)}"
    if lengths:
        note += ". By length: what of the difference the lengths of the responses alone would give"
    if wins:
        asked = f"on {result['judge']['samples']} responses to each of {result['judge']['queries']} queries"
        note += f". Win rate against {baseline}, a tie is half a win; judge: {judge(result)}, {asked}"
    return note


def tested(result: Mapping[str, Any], measure: str) -> int:
    """Returns the number of differences to the baseline that have a p-value."""
    found = [row for row in result["tests"] if (row["measure"], row["against"]) == (measure, result["baseline"])]
    return sum(row["p"] is not None for row in found)


def adjusted(n: int) -> str:
    """Says for how many differences the p-values of a column are adjusted."""
    return f"p adjusted for the {n} differences (Holm)" if n > 1 else "p of the one difference"


def _means(result: Mapping[str, Any], name: str, title: str, columns: Sequence[tuple[str, str]], note: str) -> Table:
    methods = result["methods"]
    kept = [(heading, key) for heading, key in columns if known(result, key)]
    cells = {}
    for _, key in kept:
        digits = decimals(method["measures"].get(key) for method in methods)
        cells[key] = [written(key, method["measures"].get(key), digits) for method in methods]
    rows = [[method["label"], *(cells[key][i] for _, key in kept)] for i, method in enumerate(methods)]
    return Table(name, title, note, ["method", *(heading for heading, _ in kept)], rows)


def _tax(result: Mapping[str, Any]) -> Table:
    """Lays out the tasks of --mode=harness: the value, and behind it its change since before training."""
    methods = result["methods"]
    names = dict.fromkeys(key for method in methods for key in method["measures"] if key.startswith(TAX))
    tasks = [key.removeprefix(TAX) for key in names if not key.startswith(CHANGE)]

    def cell(measures: Mapping[str, Any], task: str) -> str:
        value, change = measures.get(TAX + task), measures.get(CHANGE + task)
        if value is None:
            return MISSING
        return f"{value:.3f}" + ("" if change is None else f" ({change:+.3f})")

    rows = [[method["label"], *(cell(method["measures"], task) for task in tasks)] for method in methods]
    note = (
        "Tasks of lm-evaluation-harness, means over seeds; in brackets the change since before training. A method whose"
        " policy was not asked has none"
    )
    return Table("tax", "Alignment tax", f"{note}.", ["method", *tasks], rows)


def every_seed(result: Mapping[str, Any]) -> Table:
    """Lays out a table with a row for each run."""
    columns = [*((name, key) for key, name in REWARDS.items()), *_QUALITY, *_COSTS]
    kept = [(heading, key) for heading, key in columns if known(result, key)]
    digits = {key: decimals(method["measures"].get(key) for method in result["methods"]) for _, key in kept}
    rows = [
        [
            method["label"],
            str(run["seed"]),
            str(run["iteration"]),
            *(written(key, run["measures"].get(key), digits[key]) for _, key in kept),
            run["folder"],
        ]
        for method in result["methods"]
        for run in method["runs"]
    ]
    return Table("seeds", "Runs", "", ["method", "seed", "iteration", *(heading for heading, _ in kept), "responses"], rows)


def known(result: Mapping[str, Any], measure: str) -> bool:
    return any(is_number(method["measures"].get(measure)) for method in result["methods"])


def written(key: str, value: Any, digits: int = 0) -> str:
    """Writes the value of a measure: tokens and calls whole, FLOPs as a power of ten, memory in GiB, others in `digits`."""
    if not is_number(value):
        return MISSING if value is None else str(value)
    if key in ("generated_tokens", "principle_tokens", "training_tokens", "reward_calls"):
        return f"{value:,.0f}"
    if key == "flops":
        return f"{value:.2e}" if value else "0"
    return f"{value / 2**30:.2f}" if key == "peak_memory_bytes" else f"{value:,.{digits}f}"


def judge(result: Mapping[str, Any]) -> str:
    """Says in words what judged: a model, a reward, or a stored reward."""
    name, kwargs = result["judge"]["name"], result["judge"]["kwargs"]
    if name != "reward":
        return str(kwargs.get("model") or kwargs.get("path") or name)
    if "name" in kwargs:
        return f"reward {kwargs['name']}"
    measure, own = ("reward_second", "second_reward") if kwargs.get("which") == "second" else ("reward", "reward")
    return f"the stored {REWARDS[measure]}, {result['settings'][own]}"


def markdown(result: Mapping[str, Any], found: Sequence[Table]) -> str:
    """Writes the tables as Markdown, with columns padded so that they read well as they are."""
    parts = [f"{described(result)}\n"]
    for table in found:
        cells = [[_md(cell) for cell in row] for row in (table.head, *table.rows)]
        widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]  # a rule needs a dash beside its colon
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in cells
        ]
        lines.insert(1, rule)
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"**{table.title}.** {_md(table.note)}\n\n{body}")
    return "\n".join(parts)


def described(result: Mapping[str, Any]) -> str:
    own = result["settings"]
    return f"{own['queries']} queries of {own['data']}, {own['samples']} responses each; model {', '.join(own['models'])}."


def _md(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") if set(text) & set("\\|<") else text


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def latex(result: Mapping[str, Any], found: Sequence[Table]) -> str:
    r"""Writes the tables as LaTeX for a paper; they need \usepackage{booktabs}."""
    parts = ["% \\usepackage{booktabs}\n"]
    for table in found:
        lines = ["".join(f"{' & '.join(map(_tex, row))} \\\\\n" for row in rows) for rows in ([table.head], table.rows)]
        parts.append(
            "\\begin{table}\n\\centering\\small\n"
            f"\\caption{{{_tex(f'{table.title}. {described(result)} {table.note}')}}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}\n"
            f"\\toprule\n{lines[0]}\\midrule\n{lines[1]}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)
