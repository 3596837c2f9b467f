"""Host memory that loading a model takes: a synthetic Llama checkpoint is written, and read by a process of its own.

    python scripts/load_memory.py [--gb 1.0] [--folder DIR]

Per line: dtype on disk and in memory, layers unrolled or scanned, seconds, the process's peak of resident memory above what
it had before the load (VmHWM of Linux; the weights themselves are in it where the device is the CPU), and that over the
model's size in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, fill
from ple_jax.core import processor
from ple_jax.models import weights
from ple_jax.models.families import read
from ple_jax.models.layout import expected_shapes
from ple_jax.models.tokenizer import byte_tokenizer

_RAW = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_SHARDS = 4
_COMBINATIONS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"))


def write(folder: Path, dtype: str, gigabytes: float) -> None:
    """A checkpoint of about that size in `dtype`, in shards, with its tokenizer."""
    itemsize = np.dtype(_DTYPES[dtype]).itemsize
    one, two = (
        sum(int(np.prod(shape)) for shape in expected_shapes(read(_RAW | {"num_hidden_layers": n}, "")).values())
        for n in (1, 2)
    )
    layers = max(1, 1 + round((gigabytes * 1e9 / itemsize - one) / (two - one)))
    raw = _RAW | {"num_hidden_layers": layers}
    shapes = list(expected_shapes(read(raw, "")).items())
    rng, places = np.random.default_rng(0), {}
    folder.mkdir()
    for i in range(_SHARDS):
        part = {k: rng.standard_normal(s, np.float32).astype(_DTYPES[dtype]) for k, s in shapes[i::_SHARDS]}
        save_file(part, folder / f"model-{i}.safetensors")
        places |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().save_pretrained(folder)


def measure(folder: str, dtype: str, scan: bool) -> dict[str, float]:
    """Loads the model in this process; seconds, and bytes at the peak."""
    place = sharding.replicated(sharding.make_mesh())
    jnp.zeros(8).block_until_ready()  # starts the backend
    before, start = processor.resident("VmRSS"), time.perf_counter()
    loaded = weights.load(folder)
    model = Model.create(loaded.config, dtype=jnp.dtype(dtype), scan=scan)
    base = fill(model, loaded.weights, lambda _, array: jax.device_put(array, place))
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    return {"seconds": time.perf_counter() - start, "peak": processor.resident("VmHWM") - before, "size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--folder", help="where to write it (default: a temporary folder)")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "DTYPE", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, dtype, layers = options.measure
        print(json.dumps(measure(folder, dtype, layers == "scan")))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        for stored in _DTYPES:
            write(Path(root, stored), stored, options.gb)
        for stored, dtype in _COMBINATIONS:
            for layers in ("unroll", "scan"):
                command = [sys.executable, __file__, "--measure", str(Path(root, stored)), dtype, layers]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{stored:>8} -> {dtype:<8}  {layers:<6}  {found['seconds']:5.1f} s  peak {found['peak'] / 1e9:5.2f} GB"
                    f"  {found['peak'] / found['size']:.2f} x {found['size'] / 1e9:.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
