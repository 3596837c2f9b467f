"""What the processor can do, and the dtype that `model.dtype=auto` becomes: where nothing is recorded, and where it is."""

import pytest
from ml_collections import FrozenConfigDict

from configs import tiny
from ple_jax.core import backends, processor
from ple_jax.core.files import write_json
from ple_jax.core.identity import run_keys
from ple_jax.training import workdir


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """A machine whose /proc/cpuinfo is given."""

    def of(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")

    return of


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fpu avx2 avx512f avx512_bf16", False),
        ("fpu avx2 amx_bf16 amx_tile amx_int8", True),
        ("fpu avx2 avx512f", False),
        ("fpu avx2 amx_tile amx_int8", False),
        ("fpu not_amx_bf16", False),
    ],
)
def test_who_multiplies_bfloat16(cpuinfo, flags, fast):
    cpuinfo(f"processor\t: 0\nmodel name\t: A Processor\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n")
    assert processor.bfloat16() is fast


def test_a_run_on_the_cpu_names_its_processor(cpuinfo):
    cpuinfo("processor\t: 0\nmodel name\t: A Processor\nflags\t\t: avx2\n")
    said = processor.environment("cpu")
    assert said == {"processor": f"A Processor ({processor.digest()})", "cores": processor.cores()}
    assert processor.environment("gpu") == {"cores": said["cores"]}  # where it computes nothing that is reported
    cpuinfo("processor\t: 0\nmodel name\t: A Processor\nflags\t\t: avx2 amx_bf16\n")  # as virtual machines have it
    assert processor.environment("cpu")["processor"] != said["processor"]


def test_another_processor_has_another_digest(cpuinfo):
    digests = []
    for text in ("flags: a b", "flags: a c", "Features: a b", "model name: x\nflags: a b"):
        cpuinfo(f"{text}\ncpu MHz: 1\n")
        digests.append(processor.digest())
        cpuinfo(f"{text}\n{text}\ncpu MHz: 2\n")  # another core, at another moment
        assert processor.digest() == digests[-1]
    assert len(set(digests)) == 4


def test_where_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert not processor.bfloat16() and len(processor.digest()) == 12


@pytest.mark.parametrize(
    ("available", "limit", "used", "free"),
    [
        ("20 kB", None, None, 20 * 1024),
        ("20 kB", "max", "512", 20 * 1024),
        ("20 kB", "4096", "1024", 3072),
        ("20 kB", "40960", "1024", 20 * 1024),
        ("20 kB", "1024", "4096", 0),
        (None, "4096", "1024", 3072),
        (None, None, None, None),
    ],
)
def test_the_memory_that_is_free(tmp_path, monkeypatch, available, limit, used, free):
    monkeypatch.setattr(processor, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(processor, "CGROUP", tmp_path)
    if available:
        (tmp_path / "meminfo").write_text(f"MemTotal:  99 kB\nMemFree:  1 kB\nMemAvailable:  {available}\n")
    for name, text in (("max", limit), ("current", used)):
        if text:
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert processor.free_memory() == free
    if limit and limit.isdigit() and used:  # what was read of files makes room
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {used}\nactive_file 3\n")
        found = [int(limit)] + ([1024 * int(available.split()[0])] if available else [])
        assert processor.free_memory() == min(found)


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize(("units", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_is_faster_in(monkeypatch, backend, units, dtype):
    monkeypatch.setattr(processor, "bfloat16", lambda: units)
    assert backends.load(backend).fast_dtype(FrozenConfigDict(tiny.get_config())) == dtype


def test_a_run_keeps_the_dtype_that_it_began_with(tmp_path, monkeypatch):
    config = tiny.get_config()
    config.model.dtype = "auto"
    config = FrozenConfigDict(config)

    def at(units: bool) -> str:
        monkeypatch.setattr(processor, "bfloat16", lambda: units)
        return workdir.begun(config, tmp_path, "torch")

    assert at(False).model.dtype == "float32" and at(True).model.dtype == "bfloat16"  # nothing has begun yet
    keys = run_keys(at(True), "torch", {})
    assert keys["model"]["dtype"] == "bfloat16"
    write_json(tmp_path / "config.json", keys, sealed=True)
    (tmp_path / "metrics.jsonl").write_text("")
    assert at(False).model.dtype == "bfloat16"
    workdir.check_config(tmp_path, run_keys(at(False), "torch", {}))
