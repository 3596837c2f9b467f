"""What is written down or shown of a config holds no key and no path of this machine."""

import csv
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import tiny
from ple_jax import main, rewards
from ple_jax.core import identity
from ple_jax.core.config import flatten, validate
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_csv
from ple_jax.core.secrets import from_environment, portable, redacted, shown

KEY = "s3cret-key"
URLS = {
    f"https://host:80/score?key={KEY}": "https://host:80/score",
    f"http://me:{KEY}@host/v1": "http://host/v1",
    f"http://{KEY}@host": "http://host",
    f"https://host/a#{KEY}": "https://host/a",
    f"HTTPS://me@example.org:8443/a/b?x=1&key={KEY}#y": "HTTPS://example.org:8443/a/b",
    "http://localhost:5000/get_reward": "http://localhost:5000/get_reward",
}


@pytest.mark.parametrize("url", URLS)
def test_addresses_keep_server_and_path_alone(url):
    assert redacted(url) == URLS[url]
    assert redacted(f"error at {url!r}: refused") == f"error at {URLS[url]!r}: refused"
    tree = {"kwargs": {"parts": {"a": {"kwargs": {"url": url}}}, "more": [url, (url,), 3, None]}}
    assert KEY not in repr(redacted(tree)) and redacted(tree)["kwargs"]["more"] == [URLS[url], (URLS[url],), 3, None]


def with_reward(url):
    config = tiny.get_config()
    config.reward.name, config.reward.kwargs = "remote", ConfigDict({"url": url})
    return config


def test_a_runs_config_and_a_rewards_version_hold_no_query():
    urls = [f"http://host/score?model={model}&key={KEY}" for model in "ab"]
    configs = [with_reward(url) for url in urls]
    kept = [json.dumps(identity.run_keys(config, "jax", {})) for config in configs]
    assert KEY not in kept[0] and "http://host/score" in kept[0]
    versions = [rewards.load("remote", {"url": url}).version for url in urls]
    assert len(set(versions)) == 2 and not any(KEY in version for version in versions)  # another model, another value
    assert rewards.load("remote", {"url": "http://host/score"}).version == "2 http://host/score"


def test_no_error_shows_a_key(monkeypatch, capsys):
    config = tiny.get_config()
    config.sampling.server = f"http://me:{KEY}@host"
    with pytest.raises(UserError) as error:
        validate(config)
    assert KEY not in str(error.value) and "without a user name" in str(error.value)
    with pytest.raises(SystemExit), main.one_line_errors():
        raise UserError(f"http://host/a?key={KEY} is busy")
    assert capsys.readouterr().err == "error: http://host/a is busy\n"


@pytest.mark.parametrize("value", [f"{KEY}\nmore", f"a\r{KEY}", f"{KEY}\x00", f"{KEY}é"])
def test_a_key_that_no_header_takes_is_not_shown(monkeypatch, value):
    monkeypatch.setattr("os.environ", {"REWARD_KEY": value})
    for load in (
        lambda: rewards.load("remote", {"url": "http://host", "api_key_env": "REWARD_KEY"}),
        lambda: rewards.load("remote", {"url": "http://host", "headers": {"X-Key": "REWARD_KEY"}}),
        lambda: from_environment("REWARD_KEY", "config.sampling.server_key_env"),
    ):
        with pytest.raises(UserError, match="'REWARD_KEY' holds a line break, or another character") as error:
            load()
        assert KEY not in str(error.value)


def test_paths_of_this_machine():
    here = Path.cwd()
    assert portable({"path": f"{here}/data/a.jsonl", "own": "/home/me/rules.txt", "n": 1, "some": ["/a/b", "a/b"]}) == {
        "path": "data/a.jsonl", "own": "rules.txt", "n": 1, "some": ["b", "a/b"],
    }  # fmt: skip
    assert portable("/home/me/mine.py:score") == "mine.py:score" and portable("user/name") == "user/name"


def test_what_is_too_long_to_be_shown():
    assert shown("x" * 1000, 10) == "'xxxxxxxxx ..." and "too large" in shown(10**5000)


def test_cells_that_a_spreadsheet_would_compute(tmp_path):
    texts = ["=1+1", "+a", "-b", "@c", "\td", "\re", "plain", "-0.5", "+3", "1e-3"]
    write_csv(tmp_path / "a.csv", ["=x", "n"], [{"=x": text, "n": -0.5, "other": 1} for text in texts])
    with (tmp_path / "a.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    expected = ["'=1+1", "'+a", "'-b", "'@c", "'\td", "'\ne", "plain", "-0.5", "+3", "1e-3"]
    assert head == ["'=x", "n"] and rows == [[text, "-0.5"] for text in expected]


def test_every_text_of_the_default_config_stays_as_it_is():
    flat = flatten(tiny.get_config().to_dict())
    assert redacted(flat) == flat
