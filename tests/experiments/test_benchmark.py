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


def test_tokens_are_each_sides_own(benchmark, monkeypatch):
    """Where sides make different numbers of tokens seconds are for the same number."""
    clock = iter([0, 0, 1, 3, 3, 7])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    seconds = benchmark.turns({"ours": lambda: 50, "peer": lambda: 200}, 1, tokens=100)
    assert seconds == {"ours": [4.0], "peer": [2.0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "measures"),
    [
        ("jax", ["step", "step", "dpo"]),
        ("torch", ["grpo", "iterative"]),
        ("jax", ["chat", "samples", *["growth"] * 4]),
    ],
)
def test_measures_run(benchmark, monkeypatch, capsys, tmp_path, backend, measures):
    monkeypatch.setattr("sys.argv", [
        "benchmark.py", "--model=tiny", "--repeats=1", f"--backend={backend}", f"--out={tmp_path / 'lines'}",
        f"--only={','.join(dict.fromkeys(measures))}", "--prompts=9", "--new=64", "--without=generate_batch",
    ])  # fmt: skip
    benchmark.main()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["measured"] for line in lines] == measures
    assert all(line["ours_tokens_per_second"] > 0 for line in lines)
    compared = [line for line in lines if line["measured"] != "growth"]
    assert capsys.readouterr().out.count("\n| ") > len(compared)
    assert all(line["ms_a_step"] > 0 and line["cache_mib"] > 0 for line in lines if line["measured"] == "growth")


@pytest.mark.slow
def test_what_a_card_does_runs_here_at_a_small_size(benchmark, monkeypatch, tmp_path):
    """All of it, the peers that are installed here too; a peer that fails is named with the reason."""
    peers = importlib.import_module("peers")

    def fails(*_, **__):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(peers, "generate_batch", fails)
    # as long as it takes, whatever runs beside it
    few = ["--minutes=60", "--repeats=1", "--prompts=9", f"--out={tmp_path / 'lines'}"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--gpu", *few])
    benchmark.main()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    limits, decode, step, chat = lines
    assert [line["measured"] for line in lines] == ["limits", "decode", "step", "chat"]
    assert all(limits[key] > 0 for key in ("read_gb_s", "copy_gb_s", "dots_tflop_s", "few_rows_tflop_s"))
    assert set(decode["bytes_roof"]) == {"ours", "folded", "torch", "generate_sorted"}
    assert all(0 < share < 1 for share in (*decode["bytes_roof"].values(), *step["mfu"].values()))
    assert decode["failed"] == {"generate_batch": "RuntimeError: no kernel for this card"}
    assert set(step["mfu"]) == {"ours", "torch", "peft"} and chat["ratio_to_generate_sorted"][0] > 0


@pytest.mark.slow
def test_what_would_begin_too_late_is_named(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--gpu", "--minutes=0", f"--out={tmp_path / 'lines'}"])
    benchmark.main()
    _, *lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["measured"] for line in lines if "minutes were gone" in line["left_out"]] == ["decode", "step", "chat"]


@pytest.mark.slow
def test_parity_is_of_what_bfloat16_rounds(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--model=tiny", "--only=parity", f"--out={tmp_path / 'lines'}"])
    benchmark.main()
    line = json.loads((tmp_path / "lines").read_text())
    for who in ("ours", "peft"):
        mean, largest = line[f"{who}_nats"]
        assert 0 < mean < largest < 0.5 and 0 < line[f"{who}_gradient"] < 0.2
