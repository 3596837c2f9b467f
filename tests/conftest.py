"""The environment of every test, and of every subprocess a test starts; it must be set before jax is imported."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import settings

_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):  # beside what is given, such as --xla_cpu_max_isa=AVX2
    os.environ["XLA_FLAGS"] = f"{_DEVICES} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# many tests, and the processes they start, compile the same functions
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache" / "user")  # not the developer's own
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# for matrices this small torch's other threads only wait for each other, which takes as much time again
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])

# how long an example takes says something of the machine and of what else it does, nothing of the code
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

UNAVAILABLE = {
    "gpu": "" if os.environ["JAX_PLATFORMS"] != "cpu" else "needs a GPU: set JAX_PLATFORMS=cuda",
    "npu": "" if importlib.util.find_spec("torch_npu") else "needs an Ascend NPU and torch-npu",
    "network": "" if os.environ["HF_HUB_OFFLINE"] == "0" else "needs the network: set HF_HUB_OFFLINE=0",
}


def pytest_configure(config: pytest.Config) -> None:
    """A quick run compiles twice as fast what it runs once or twice; the slow tests run what users run."""
    if config.option.markexpr == "not slow":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


QUICK = pytest.StashKey[dict[str, bool]]()  # test file -> whether any of its tests is quick


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are taken out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = config.stash.setdefault(QUICK, {})
    for item in items:
        file = item.nodeid.split("::")[0]
        files[file] = files.get(file, False) or not item.get_closest_marker("slow")
        for marker, reason in UNAVAILABLE.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
