"""`scripts/benchmark.py --gpu`: what one card of whatever kind does, as shares of what the card itself was measured to do.

A random Llama of 1.24B in bfloat16 with an adapter on all linear modules (a tiny one on a CPU, where it only shows that all
of it runs). In turns, a line of JSON each:

limits     bytes read and copied a second, and operations a second of square dots and of 64 rows by a layer's kernel.
decode     64 rows x (64 + 128 tokens), no EOS: ours in JAX, with low-rank products and with the adapter folded in; ours in
           torch, whose steps are recorded as a CUDA graph; generate and generate_batch; vLLM. `bytes_roof` is the share of
           the time that reading weights and cache once a step takes.
step       a LoRA step on pairs, 16 x (64 + 2 x 128): ours in JAX and in torch, PEFT. `mfu` is the share of the square dots.
chat       as `benchmark.py` has it, of --prompts prompts; EOS is one of every 128 tokens, as weights are random.

XLA's own switches are the environment's: run it again with XLA_FLAGS=--xla_gpu_enable_command_buffer=... and compare. A peer
that is not installed, or fails, is named with the reason; a measure that would begin after --minutes is left out and named.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import benchmark
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ple_jax.core.types import Sampling
from ple_jax.models import adapters, families, weights
from ple_jax.models.config import ModelConfig
from ple_jax.models.layout import active_weights, expected_shapes
from ple_jax.planning.flops import forward_parts, gradient_flops
from ple_jax.planning.outline import read_source

MODEL = "llama-3.2-1b"
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip
_EOS = 128  # one of so many tokens ends a response


class RandomWeights(Mapping[str, np.ndarray]):
    """Weights of a model by name, in bfloat16: made once, norms of 1."""

    def __init__(self, config: ModelConfig):
        self.shapes, self.made, self.rng = expected_shapes(config), dict[str, np.ndarray](), np.random.default_rng(0)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.made:
            shape = self.shapes[name]
            values = np.ones(shape) if len(shape) == 1 else 0.02 * self.rng.standard_normal(shape, np.float32)
            self.made[name] = values.astype(ml_dtypes.bfloat16)
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def loaded(small: bool) -> weights.Loaded:
    """The model; the tokenizer is another one's, whose ids it has."""
    raw = {**read_source(MODEL).raw, **(SMALL if small else {})}
    config = families.read(raw, MODEL)
    eos = tuple(range(_EOS // 2, config.vocab_size, _EOS))
    return weights.Loaded(config, RandomWeights(config), weights.load("smollm2-135m").tokenizer, eos, MODEL, dict(raw), None)


def lines(here: benchmark.Here) -> Iterator[dict[str, Any]]:
    """Every measure's."""
    started, found = time.monotonic(), limits(small=jax.default_backend() == "cpu")
    yield said("limits", found)
    for measure in (decode, step, chat):
        if (gone := (time.monotonic() - started) / 60) > here.options.minutes:
            yield said(measure.__name__, {"left_out": f"{gone:.1f} minutes were gone"})
            continue
        yield from measure(here, found)


def said(what: str, found: Mapping[str, Any]) -> dict[str, Any]:
    line = {"measured": what, "xla_flags": os.environ.get("XLA_FLAGS", ""), **found}
    print(json.dumps(line), flush=True)
    return line


# ---------------------------------------------------------------- the card


def limits(small: bool) -> dict[str, Any]:
    """What the card does, in GB/s and TFLOP/s, the best of ten."""
    size, n, rows = (2**22, 512, 64) if small else (2**30, 8192, 64)
    big, square = jnp.ones(size, jnp.bfloat16), jnp.ones((n, n), jnp.bfloat16)
    few, kernel = jnp.ones((rows, n), jnp.bfloat16), jnp.ones((n, 4 * n), jnp.bfloat16)
    dot = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    seconds = {
        "read": best(jax.jit(lambda x: x.astype(jnp.float32).sum()), big),
        "copy": best(jax.jit(lambda x: x + jnp.bfloat16(1)), big),
        "dots": best(dot, square, square),
        "few_rows": best(dot, few, kernel),
    }
    return {
        "read_gb_s": round(2 * size / seconds["read"] / 1e9, 1),
        "copy_gb_s": round(4 * size / seconds["copy"] / 1e9, 1),
        "dots_tflop_s": round(2 * n**3 / seconds["dots"] / 1e12, 3),
        "few_rows_tflop_s": round(8 * rows * n**2 / seconds["few_rows"] / 1e12, 3),
    }


def best(call: Callable[..., Any], *arguments: Any) -> float:
    """The shortest of ten calls, in seconds, after one that compiles."""
    jax.block_until_ready(call(*arguments))
    found = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        found.append(time.perf_counter() - started)
    return min(found)


# ---------------------------------------------------------------- measures


def decode(
    here: benchmark.Here, card: Mapping[str, Any], rows: int = 64, length: int = 64, new: int = 128
) -> Iterator[dict[str, Any]]:
    """Rows without EOS, beside whatever can sample."""
    c, rng = here.loaded.config, np.random.default_rng(0)
    prompts, noise = rng.integers(*here.ids, (rows, length)).tolist(), rng.random((rows, new), dtype=np.float32)

    def ours(**how: Any) -> benchmark.Side:
        made = here.backend(rows, **how)
        return functools.partial(made.generate, prompts, noise, sampling=Sampling(new, ()))

    makers: dict[str, Callable[[], benchmark.Side]] = {
        "ours": ours,
        "folded": functools.partial(ours, fold=True),
        "torch": functools.partial(ours, backend="torch"),
    }
    with benchmark.sampling_peers(here, prompts, new, eos=(), width=rows) as peers:
        sides, _, failed = benchmark.tried({**makers, **peers})
        seconds = benchmark.turns(sides, here.options.repeats, warm=True)
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * rows * (length + new / 2)
    least = 2 * (active_weights(c) + c.vocab_size * c.hidden_size + cache) * new / (card["read_gb_s"] * 1e9)
    more = {"bytes_roof": {name: round(least / statistics.median(own), 3) for name, own in seconds.items()}, **failed}
    yield benchmark.report("decode", f"{rows} x ({length} + {new})", rows * new, seconds, **more)


def step(
    here: benchmark.Here, card: Mapping[str, Any], queries: int = 16, length: int = 64, k: int = 2, new: int = 128
) -> Iterator[dict[str, Any]]:
    """A LoRA step on pairs."""
    c, batch = here.loaded.config, benchmark.whole_rows(here, np.random.default_rng(0), queries, length, k, new)

    def ours(**how: Any) -> benchmark.Side:
        return functools.partial(here.backend(queries, **how).update, [batch], benchmark.negative_likelihood, lr=1e-4)

    makers: dict[str, Callable[[], benchmark.Side]] = {"ours": ours, "torch": functools.partial(ours, backend="torch")}
    if benchmark.peers is not None:
        makers["peft"] = lambda: benchmark.peers.lora_step(here.peer().train(), batch)
    sides, _, failed = benchmark.tried(makers)
    seconds, time_ = benchmark.turns(sides, here.options.repeats, warm=True), length + k * new
    counts = {"rows": queries, "tokens": time_, "source": time_, "predicted": k * new}
    parts = forward_parts(c, **counts, adapter=adapters.count(adapters.init(c, benchmark.LORA, seed=0)))
    flops = gradient_flops(parts, "none") / (card["dots_tflop_s"] * 1e12)
    more = {"mfu": {name: round(flops / statistics.median(own), 3) for name, own in seconds.items()}, **failed}
    case, tokens = f"pairs, {queries} x ({length} + {k} x {new})", queries * k * (length + new)
    yield benchmark.report("step", case, tokens, seconds, **more)


def chat(here: benchmark.Here, card: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Responses of very different lengths."""
    yield from benchmark.measure_chat(here, new=64 if jax.default_backend() == "cpu" else 256)
