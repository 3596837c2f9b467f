"""Files of a work directory that are JSON, and not what a run writes."""

import pytest

from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json
from ple_jax.evaluation import methods
from ple_jax.evaluation.entries import Found
from ple_jax.evaluation.responses import Generated
from ple_jax.training import workdir as workdirs

ODD = ("{}", "[]", "3", "null", '"a"', "[" * 200_000, '{"task": 3}', '{"inputs": []}', '{"format": []}', "", "{")


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:12])
def test_a_summary_that_is_none_is_not_there(tmp_path, text):
    """Training makes it again."""
    (tmp_path / "summary.json").write_text(text)
    assert workdirs.summary(tmp_path) == {}


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:12])
def test_a_config_that_is_none_is_said_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="config.json is damaged|belongs to another config|holds a run of format") as error:
        workdirs.check_config(tmp_path, {"format": 2, "task": {"date": "2026-01-01"}, "inputs": {}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 200_000])
def test_json_of_another_kind(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(UserError, match="environment.json is damaged"):
        read_json(tmp_path / "environment.json")


def test_a_comparison_of_a_run_whose_config_is_none(tmp_path, monkeypatch):
    folder = tmp_path / "responses" / "trained"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"format": []}')
    monkeypatch.setattr(methods.responses, "read", lambda folder, iteration: Generated({"policy": "start"}, [], []))
    with pytest.raises(UserError, match="config.json is damaged, or no config of a run"):
        methods.read(Found("", folder, None, ""))
