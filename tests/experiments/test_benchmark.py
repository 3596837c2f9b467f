"""The benchmark: what is made of seconds, by hand, and some of its measures on the tiny model."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("benchmark")


def test_sides_take_turns_and_the_first_call_does_not_count(benchmark, monkeypatch):
    called, clock = [], iter(range(100))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    seconds = benchmark.turns({"ours": lambda: called.append("ours"), "peer": lambda: called.append("peer")}, 2)
    assert called == ["ours", "peer"] * 3 and seconds == {"ours": [1, 1], "peer": [1, 1]}


def test_ratios_are_of_turns(benchmark, capsys):
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 2.0, 12.0], "roof": [0.5, 0.5, 1.0]}
    line = benchmark.report("step", "rows", 100, seconds)
    assert line["ours_tokens_per_second"] == 50.0 and line["ratio_to_peer"] == [2.0, 1.0, 3.0]
    assert line["share_of_roof"] == 0.25 and json.loads(capsys.readouterr().out)["case"] == "rows"
    assert benchmark.table([line]).splitlines()[-1] == "| step, rows | 50 | peer | 50 | 2.00 (1.00 to 3.00) | 25% |"


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "measures"), [("jax", ["step", "step", "dpo"]), ("torch", ["grpo", "iterative"])])
def test_measures_run(benchmark, monkeypatch, capsys, tmp_path, backend, measures):
    monkeypatch.setattr("sys.argv", [
        "benchmark.py", "--model=tiny", "--repeats=1", f"--backend={backend}", f"--out={tmp_path / 'lines'}",
        f"--only={','.join(dict.fromkeys(measures))}",
    ])  # fmt: skip
    benchmark.main()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["measured"] for line in lines] == measures
    assert all(line["ours_tokens_per_second"] > 0 for line in lines)
    assert capsys.readouterr().out.count("\n| ") > len(lines)


@pytest.mark.slow
def test_parity_is_of_what_bfloat16_rounds(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--model=tiny", "--only=parity", f"--out={tmp_path / 'lines'}"])
    benchmark.main()
    line = json.loads((tmp_path / "lines").read_text())
    for who in ("ours", "peft"):
        mean, largest = line[f"{who}_nats"]
        assert 0 < mean < largest < 0.5 and 0 < line[f"{who}_gradient"] < 0.2
