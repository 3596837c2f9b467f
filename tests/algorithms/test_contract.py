"""What an algorithm is: the tuple that is made of a file, its defaults, its own knobs, and what it is told."""

import json
import math

import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from test_baselines import config

from ple_jax import algorithms, modes
from ple_jax.algorithms import Algorithm, Context, OfflineAlgorithm
from ple_jax.core.config import names
from ple_jax.core.errors import UserError
from ple_jax.training import loop
from ple_jax.training.journal import read

PLE = "from ple_jax.algorithms.ple import *\n"


def written(tmp_path, code: str) -> str:
    (tmp_path / "mine.py").write_text(code)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize("name", names("algorithms", ".py"))
def test_every_algorithm_says_what_it_is(name):
    found = algorithms.load(name)
    assert isinstance(found, OfflineAlgorithm if name == "reward" else Algorithm)
    assert found.name == name and found.about.endswith((".", ":")) or len(found.about) > 30


def test_what_a_file_does_not_say_has_a_default(tmp_path):
    code = "def collect(config): return ()\ndef label(rollouts, context): return rollouts\n"
    code += "def batch(rollouts, context): return None\ndef make_loss(config): return None\n"
    found = algorithms.load(written(tmp_path, code))
    assert isinstance(found, Algorithm) and found.about == ""
    tau = found.schedule(None)(3)
    assert tau != tau  # nan: it has no threshold
    assert found.needs(None) == (False, False, False, None)
    assert found.prepare("batch", None) == "batch" and found.controller(None) == {}
    assert found.control({"a": 1.0}, {"a": 2.0}, None) == {"a": 1.0}
    assert found.measures({"loss": 1.0}, {}, {}) == {"loss": 1.0}


def test_a_slip_in_a_name_is_told_and_a_helper_is_none(tmp_path):
    """Else the function of what the file begins with would do the work, and the variant would be none."""
    for code, says in (("def lable(rollouts, context): ...\n", "'label'"), ("def make_losss(config): ...\n", "'make_loss'")):
        with pytest.raises(UserError, match=rf"which nothing calls; did you mean {says}\?"):
            algorithms.load(written(tmp_path, PLE + code))
    helpers = "def collect_pairs(x): ...\ndef _lable(x): ...\nfrom math import fsum as lable\n"
    helpers += "def labels(x): ...\ndef schedule(config): return lambda iteration: labels(iteration)\n"
    assert algorithms.load(written(tmp_path, PLE + helpers)).label.__module__ == "ple_jax.algorithms.ple"


KNOBS = "from ple_jax.core import rules\nDEFAULTS = {'gamma': 2.0, 'sides': 3}\nRULES = {'gamma': rules.positive}\n"


def test_knobs_of_its_own_stand_in_its_file(tmp_path):
    found = algorithms.load(written(tmp_path, PLE + KNOBS))
    c = config("ple", algorithm_kwargs=ConfigDict({"gamma": 0.5}))
    filled = algorithms.with_defaults(found, FrozenConfigDict(c))
    assert filled.algorithm_kwargs.to_dict() == {"gamma": 0.5, "sides": 3}
    assert filled.ple.tau_0 == c.ple.tau_0 and c.algorithm_kwargs.to_dict() == {"gamma": 0.5}
    c.algorithm_kwargs = ConfigDict({"gamm": 0.5})
    with pytest.raises(UserError, match="has 'gamm', and mine.py declares gamma, sides; did you mean 'gamma'"):
        algorithms.with_defaults(found, c)
    c.algorithm_kwargs = ConfigDict({"gamma": -1.0})
    with pytest.raises(UserError, match=r"algorithm_kwargs\['gamma'\] is -1.0 but must be a number above 0"):
        algorithms.with_defaults(found, c)


def test_what_an_algorithm_needs_may_depend_on_its_own_knobs(tmp_path):
    """From beginning to end, and where it is exported by its config."""
    needs = "def needs(config):\n    return Needs(reference=config.algorithm_kwargs['anchor'] > 0)\n"
    code = f"from ple_jax.algorithms import Needs\n{PLE}DEFAULTS = {{'anchor': 0.1}}\n{needs}"
    c = FrozenConfigDict(config(written(tmp_path, code), iterations=1))
    assert modes.train(c, tmp_path / "run", "torch") == 0 == modes.export(c, tmp_path / "run", "torch")


def test_without_declared_knobs_they_are_free():
    c = FrozenConfigDict(config("ple", algorithm_kwargs=ConfigDict({"whatever": 1})))
    assert algorithms.with_defaults(algorithms.load("ple"), c) is c


SPY = """
import json, pathlib
from ple_jax.algorithms import ple
KEPT = pathlib.Path({path!r})

def label(rollouts, context):
    line = [context.iteration, context.tau, context.mean_length, dict(context.controller)]
    with KEPT.open("a") as file:
        file.write(json.dumps(line) + "\\n")
    return ple.label(rollouts, context)

def controller(config):
    return {{"count": 0.0}}

def control(carried, metrics, config):
    return {{"count": carried["count"] + (metrics["grad_norm"] > 0)}}
"""


def test_what_an_iteration_is_told(tmp_path):
    """Threshold, mean length of the sample before (of the evaluation, at first), and what the algorithm carries."""
    name = written(tmp_path, PLE + SPY.format(path=str(tmp_path / "seen")))
    c, run = config(name, iterations=3), tmp_path / "run"
    assert modes.train(FrozenConfigDict(c), run, "torch") == 0
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [line[0] for line in seen] == [0, 1, 2]
    assert [line[1] for line in seen] == pytest.approx([c.ple.tau_0 * c.ple.alpha**i for i in range(3)])
    assert [line[3] for line in seen] == [{"count": 0.0}, {"count": 1.0}, {"count": 2.0}]
    before = ["evaluations/iter_0000", "rollouts/iter_0000", "rollouts/iter_0001"]
    for line, file in zip(seen, before, strict=True):
        sampled = [r for rollout in read(run / f"{file}.jsonl") for r in rollout.responses]
        assert {r.kind for r in sampled} == {"plain", "principled"}
        assert line[2] == pytest.approx(sum(len(r.tokens) for r in sampled) / len(sampled))


def test_metrics_of_a_variant_may_be_numpys(tmp_path):
    """They are committed and logged as numbers."""
    code = (
        f"import numpy as np\n{PLE}def measures(means, before, after):\n"
        "    return {**means, 'mine': np.float32(0.5), 'some': after['lp_plain'].mean()}\n"
        "def controller(config):\n    return {'x': np.float64(1.0), 'y': np.float32(1.0)}\n"
        "def control(carried, metrics, config):\n    return {'x': np.float32(carried['x'] / 2), 'y': 0.0}\n"
        "def label(rollouts, context):\n    from ple_jax.algorithms import ple\n"
        "    return [r._replace(margin=np.float32(r.margin)) for r in ple.label(rollouts, context)]\n"
    )
    c = FrozenConfigDict(config(written(tmp_path, code), iterations=2))
    assert modes.train(c, tmp_path / "run", "torch") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine"] for line in lines[1:]] == [0.5, 0.5]


def test_a_variant_of_dpo_may_have_metrics_of_its_own(tmp_path):
    code = (
        "from ple_jax.algorithms.dpo import *\ndef make_loss(config):\n    def loss(outputs, batch):\n"
        "        value = -outputs.logprobs.sum((1, 2))\n        return value, {'mine': value}\n    return loss\n"
    )
    c = FrozenConfigDict(config(written(tmp_path, code), iterations=1, dpo__samples=2))
    assert modes.train(c, tmp_path / "run", "torch") == 0


def test_c_of_the_records_own_answers_is_that_of_all_of_them(tmp_path, monkeypatch):
    seen, whole = [], loop.context_of
    monkeypatch.setattr(loop, "context_of", lambda *given: seen.append(whole(*given)) or seen[-1])
    rows = [{"prompt": f"q {i}", "completion": "a" * (1 + i)} for i in range(24)]  # a token a byte, and the end
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config("sft", iterations=3, task__train=str(tmp_path / "t.jsonl"), task__max_answer_tokens=64)
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    assert [context.mean_length for context in seen] == pytest.approx([sum(i + 2 for i in range(24)) / 24] * 3)


def test_a_context_needs_the_config_alone():
    context = Context(config("ple"))
    assert context.iteration == 0 and math.isnan(context.tau) and math.isnan(context.mean_length) and not context.controller
