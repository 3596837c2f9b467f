"""Numbers of "auto": fitted to a memory, chosen by what a run samples, recorded, and taken from there when a run goes on."""

import json
from collections import Counter

import pytest
from ml_collections import FrozenConfigDict

from ple_jax import algorithms
from ple_jax.configs import tiny
from ple_jax.core import backends, processor
from ple_jax.core.config import AUTO, flatten, validate
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_json
from ple_jax.core.identity import run_keys
from ple_jax.main import parse
from ple_jax.modes import train
from ple_jax.planning import fit, outline
from ple_jax.planning.outline import with_numbers
from ple_jax.training.opening import read_inputs
from ple_jax.training.workdir import begun

BOTH = ["jax", "torch"]


def config(**changed):
    made = tiny.get_config()
    made.update_from_flattened_dict({"model.dtype": "float32", "task.date": "2026-11-28", **dict.fromkeys(AUTO, "auto")})
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in changed.items()})
    return FrozenConfigDict(made)


def needs(memory, row=10, base=100, reading=16):
    """A device of so many bytes, and what is counted of it, in a list."""
    asked = []

    def need(rows):
        asked.append(rows)
        return base + row * rows

    return backends.Needs(memory, reading, need, need), asked


def numbers(found):
    return {key: flatten(found.config.to_dict())[key] for key in AUTO}


# ---------------------------------------------------------------- the choice


def test_the_largest_pass_that_fits():
    c = config(optimizer__batch_queries=24, queries_per_iteration=24)
    for memory, most in ((None, 24), (10_000, 24), (340, 24), (339, 12), (220, 12), (219, 8), (110, 1)):
        assert fit.micro_queries(c, None, 0, needs(memory)[0]) == most


def test_few_sizes_are_counted():
    device, asked = needs(100 + 10 * 37)
    c = config(optimizer__batch_queries=2**12, queries_per_iteration=2**12)
    assert fit.micro_queries(c, None, 0, device) == 32
    assert len(asked) <= 2 + 4 and asked[:2] == [2**12, 1]


def test_a_pass_is_shared_by_the_devices():
    c = config(optimizer__batch_queries=24, queries_per_iteration=24, mesh__data=2, mesh__fsdp=2)
    assert fit.micro_queries(c, None, 0, needs(250)[0]) == 12
    assert fit.micro_queries(c, None, 0, needs(219)[0]) == 8  # 12 do not fit, 6 are no multiple of 4


def test_what_does_not_fit_at_all_is_told():
    with pytest.raises(
        UserError, match=r"micro_queries is 'auto', and 1, the least, needs 110 B of a device, of which 109 B"
    ):
        fit.micro_queries(config(optimizer__batch_queries=4), None, 0, needs(109)[0])


@pytest.mark.parametrize(
    ("queries", "heldout", "reading", "expected"),
    [
        (48, 48, 16, 48),  # an iteration is two of them, and an evaluation one
        (48, 64, 16, 96),  # the quickstart's: an iteration is one of them, and an evaluation leaves 32 rows idle
        (48, 500, 16, 128),  # evaluations are most of the run: 4 of them, of which the last is nearly whole
        (33, 33, 256, 72),
        (1000, 8, 256, 672),  # small evaluations would be mostly idle
    ],
)
def test_the_width_with_which_all_samples_cost_least(queries, heldout, reading, expected):
    c = config(queries_per_iteration=queries, optimizer__batch_queries=1, iterations=5, eval__every=1, eval__samples=1)
    ple = algorithms.load("ple")
    found = fit.width(c, ple, heldout, needs(None, reading=reading)[0])
    times = Counter({2 * queries: 5})
    times.update({heldout: 5})
    times.update({2 * heldout: 1})

    def cost(width):
        return sum(n * -(-rows // width) * (width + reading) for rows, n in times.items())

    assert found == expected
    assert cost(found) == min(cost(width) for width in range(8, 2048, 8))


def test_the_width_fits_too():
    c = config(queries_per_iteration=48, optimizer__batch_queries=1)
    ple = algorithms.load("ple")
    assert fit.width(c, ple, 48, needs(100 + 10 * 30)[0]) == 24
    with pytest.raises(UserError, match=r"config.sampling.width is 'auto', and 8, the least"):
        fit.width(c, ple, 48, needs(179)[0])


def test_the_memory_of_a_server_is_not_ours():
    c = config(queries_per_iteration=48, optimizer__batch_queries=1, sampling__server="http://localhost:1")
    device, asked = needs(1)
    assert fit.width(c, algorithms.load("ple"), 48, device) == 48 and not asked


# ---------------------------------------------------------------- what is counted


def counted(c, backend, inputs, principles=""):
    """`TopologyModule.needs` of this machine."""
    source = outline.read_source(c.model.path)
    sizes = outline.lengths_of(c, source, inputs.algorithm, inputs.data.train, inputs.data.heldout, principles)
    return backends.load_topology(backend).needs(c, None, algorithm=inputs.algorithm, source=source, sizes=sizes)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BOTH)
def test_more_rows_need_more_memory_and_as_much_as_a_plan_says(backend):
    c = config()
    inputs = read_inputs(c, backend)
    given = {"train_set": inputs.data.train, "heldout": inputs.data.heldout, "principles": inputs.principles.text}
    ple, module = algorithms.load("ple"), backends.load_topology(backend)
    found = counted(c, backend, inputs, inputs.principles.text)
    assert found.training(1) < found.training(2) < found.training(4)
    assert found.sampling(8) < found.sampling(16)
    planned = module.report(
        with_numbers(c, dict(zip(AUTO, (16, 2), strict=True))), "cpu:1", algorithm=ple, write=lambda line: None, **given
    )
    if backend == "jax":
        totals = {name: measured.peak for name, measured in planned.items()}
        most = max(totals["prefill"], totals["decode step"])
        held = {"gradients": found.training(2) - totals["gradients"], "sampling": found.sampling(16) - most}
        assert all(0 < extra < totals["gradients"] for extra in held.values())  # reference and moments
    else:
        totals = {phase.name: measured.total for phase, measured in planned.phases}
        assert (found.training(2), found.sampling(16)) == (totals["gradients"], totals["generate"])


@pytest.mark.slow
def test_what_other_devices_hold_of_the_base_is_not_counted():
    of = {"model__path": "llama-3-8b", "model__dtype": "bfloat16", "optimizer__batch_queries": 4, "model__remat": "full"}
    inputs = read_inputs(config(), "torch")
    whole, spread = (
        counted(config(**of, **mesh), "torch", inputs).training(4) for mesh in ({"mesh__data": 4}, {"mesh__fsdp": 4})
    )
    layers = 8_030_261_248 - 2 * 128_256 * 4096  # embedding and head are whole everywhere
    assert whole - spread == pytest.approx((1 - 1 / 4) * (1 - 2 / 32) * 2 * layers, rel=1e-9)


@pytest.mark.parametrize("backend", BOTH)
def test_the_memory_is_what_the_machine_has_free(backend, monkeypatch):
    c = config()
    inputs = read_inputs(c, backend)
    for free, room in ((10**9, int(outline.FULL * 10**9)), (None, None)):
        monkeypatch.setattr(processor, "free_memory", lambda free=free: free)
        assert counted(c, backend, inputs).memory == room


def test_processes_of_other_hosts_take_none_of_this_ones_memory(monkeypatch):
    """As torchrun says how many processes it has started here."""
    c = config()
    inputs = read_inputs(c, "torch")
    monkeypatch.setattr(processor, "free_memory", lambda: 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert counted(c, "torch", inputs).memory == int(outline.FULL * 10**9 / 4)


def test_a_topology_has_a_memory_of_its_own(capsys):
    c = config(mesh__data=2)
    found = fit.fitted(read_inputs(c, "torch"), "torch", "910b:2")
    assert numbers(found)["optimizer.micro_queries"] == c.optimizer.batch_queries
    assert "fitted to memory: config.sampling.width = " in capsys.readouterr().out


@pytest.mark.parametrize("key", AUTO)
def test_numbers_that_are_given_stay(key):
    found = fit.fitted(read_inputs(config(**{key.replace(".", "__"): 4}), "torch"), "torch")
    assert numbers(found)[key] == 4 and "auto" not in numbers(found).values()


def test_nothing_is_counted_where_all_is_given():
    inputs = read_inputs(FrozenConfigDict(tiny.get_config()), "jax")
    assert fit.fitted(inputs, "none") is inputs


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_a_run_records_them_and_goes_on_with_them(tmp_path, backend, monkeypatch):
    train(config(iterations=1), tmp_path, backend)
    kept = flatten(json.loads((tmp_path / "config.json").read_text()))
    assert {key: kept[key] for key in AUTO} == {"sampling.width": 16, "optimizer.micro_queries": 4}
    monkeypatch.setattr(processor, "free_memory", lambda: 1)  # on a smaller machine
    assert numbers(type("Inputs", (), {"config": begun(config(), tmp_path, backend)})) == {key: kept[key] for key in AUTO}
    train(config(iterations=2), tmp_path, backend)
    with pytest.raises(UserError, match="config.sampling.width is 'auto', and 8, the least, needs"):
        train(config(), tmp_path / "new", backend)


def test_what_another_mode_left_is_no_decision_of_another_config(tmp_path):
    """A probe writes a config.json; given again it must find its answers, and what then trains there is another run."""
    left_open = {"task__date": None, "model__dtype": "auto"}
    fresh = begun(config(**left_open), tmp_path / "new", "torch")
    dtype = "float32" if fresh.model.dtype == "bfloat16" else "bfloat16"
    decided = {"task.date": "2020-02-29", "model.dtype": dtype, "sampling.width": 8, "optimizer.micro_queries": 2}

    def found(backend="torch", **changed):
        flat = flatten(begun(config(**left_open, **changed), tmp_path, backend).to_dict())
        return {key: flat[key] for key in decided}

    probed = config(**{key.replace(".", "__"): value for key, value in decided.items()})
    write_json(tmp_path / "config.json", run_keys(probed, "torch", {"train": "a"}), sealed=True)
    assert found() == decided
    for other in ({"seed": 1}, {"model__quantize": "int8"}, {"backend": "jax"}, {"sampling__width": 16}):
        anew = found(**other)
        assert not [key for key, value in anew.items() if value == decided[key] and key != "model.dtype"]
    assert found(seed=1)["model.dtype"] == fresh.model.dtype
    (tmp_path / "rollouts").mkdir()  # of a run
    assert found(seed=1) == decided


def test_what_is_not_counted_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is 'auto', and what algorithm 'sft'.*|what config.trainer='trl' needs"):
        fit.fitted(read_inputs(config(), "torch")._replace(config=config(trainer="trl")), "torch")
    reward = read_inputs(config(), "jax")._replace(algorithm=algorithms.load("reward"), config=config(algorithm="reward"))
    with pytest.raises(UserError, match="config.sampling.width is 'auto', and what algorithm 'reward' needs of memory"):
        fit.fitted(reward, "jax")


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize("key", AUTO)
def test_on_the_command_line(key):
    for value, expected in (("auto", "auto"), ("4", 4)):
        found = parse(["ple_jax", "--config=tiny", "--workdir=w", f"--config.{key}={value}"]).config
        assert flatten(found.to_dict())[key] == expected
    for value in ("autp", "0", "1.5", "True", "None"):
        with pytest.raises(UserError, match=rf"config.{key} is .* but must be auto or a whole number, at least 1"):
            parse(["ple_jax", "--config=tiny", "--workdir=w", f"--config.{key}={value}"])


def test_what_is_fitted_can_be_shared_by_the_devices():
    validate(config(mesh__data=4, optimizer__batch_queries=4))
    with pytest.raises(UserError, match=r"config.optimizer.batch_queries is 4 but must be a multiple of config.mesh.data"):
        validate(config(mesh__data=3))
