"""Speed beside the peers at their best: the same weights, shapes, samples and rewards, in turns, in one run.

    python scripts/benchmark.py [--only generate,chat,samples,growth,step,dpo,grpo,iterative,memory,parity] [--repeats 5]
                                [--backend jax|torch] [--model smollm2-135m] [--data FILE] [--prompts 64] [--vllm PYTHON]
                                [--without generate_batch,...] [--out FILE]
    python scripts/benchmark.py --gpu    # what one card does, in under 8 minutes: see scripts/card.py

Ours has the config's defaults: model.dtype=auto, an adapter on all linear modules. So have the peers (`scripts/peers.py`),
in the dtype that multiplies faster here. All sides of a measure take turns, so that a slow machine slows all; what
is said is the median over the turns of seconds and of pairwise ratios, and their range. The first call of a side, which
compiles or warms up, is not measured.

generate   64 new tokens after prompts of 16, at 16 and 64 rows, no EOS: transformers' generate and generate_batch, and vLLM
           with --vllm=PYTHON, an interpreter that has it.
chat       one response to each of --prompts prompts of --data (HH's records; the quickstart's openings without one), in the
           chat template, of up to 256 tokens with EOS, 64 rows at once: beside generate in batches sorted by length,
           generate_batch and vLLM. Tokens are those of responses; each side counts its own.
samples    as GRPO has it: 8 samples of 64 tokens, no EOS, of each of 32 prompts of 256 tokens.
growth     of ours alone, 16 rows: --new tokens (64 to 2,048), and of 64 tokens --times as many queries as rows (2 to 16).
step       a LoRA step: "rows", 8 x 128, labels on the last 64, and "pairs", 8 x (16 + 2 x 24), beside PEFT.
dpo        a step on 8 pairs, prompts of up to 256 tokens and responses of up to 48, with the reference's log-probabilities,
           beside TRL's DPO; real tokens are counted.
grpo       an iteration: 16 prompts x 4 samples of 24 tokens, VADER's rewards, 2 optimiser steps, beside TRL's GRPO.
iterative  an iteration of DPO on two samples of 48 prompts, 6 optimiser steps, beside TRL's online DPO.
memory     temporary memory of the compiled step, log-probabilities chunked over time and whole. Nothing is run. (JAX alone.)
parity     how far log-probabilities and the adapter's gradient in bfloat16 are from PEFT's in float32: ours and PEFT's.

The roof of `generate` and `step` is the same shapes' matmuls of frozen weights alone, in our dtype, as a side of its own.
Every measure is a line of JSON; a table ends the output. Needs the extra `dev`.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import save_file

from ple_jax import rewards
from ple_jax.backend import backend as jax_backend
from ple_jax.backend import dots, forward, lora, sharding
from ple_jax.backend.model import Model, fill
from ple_jax.configs import default
from ple_jax.core import processor
from ple_jax.core.packing import pack
from ple_jax.core.types import Array, Backend, Batch, Packed, Sampling
from ple_jax.data.queries import load_queries
from ple_jax.losses import dpo
from ple_jax.models import adapters, weights
from ple_jax.prompts import render
from ple_jax.training import loop, opening, workdir

try:
    import peers
except ImportError:  # on a card `--gpu` measures what is installed
    peers = None  # type: ignore[assignment]
LORA = adapters.Lora(rank=8, alpha=16.0)  # as the peers have it
Side = Callable[[], Any]  # what it returns is how many tokens it made, where each side makes its own number
MEASURES = ("generate", "chat", "samples", "growth", "step", "dpo", "grpo", "iterative", "memory", "parity")


class Here:
    """What all measures share: the weights, both sides' dtypes, how often."""

    def __init__(self, options: argparse.Namespace, loaded: weights.Loaded | None = None):
        self.options, self.loaded = options, loaded or weights.load(options.model)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.theirs = peers.dtype(self.device) if peers else None
        vocab = self.loaded.config.vocab_size
        self.ids = min(1000, vocab // 2), vocab  # of ordinary tokens: special ones are the first
        self.ours = "bfloat16" if self.device != "cpu" or processor.bfloat16() else "float32"

    def backend(self, width: int, *, backend: str | None = None, fold: bool = False) -> Backend:
        """Ours, with a fresh adapter.

        Args:
            backend: that of the options, if it is not given.
            fold: whether JAX samples with the adapter folded in.
        """
        adapter = adapters.init(self.loaded.config, LORA, seed=0)
        shared = {"width": width, "bucket": 16, "clip_norm": 1.0, "weight_decay": 0.0}
        if (backend or self.options.backend) == "torch":
            import torch

            from torch_ascend import model, ops
            from torch_ascend.backend import TorchBackend

            place = {"dtype": getattr(torch, self.ours), "device": torch.device(self.device), "ops": ops.REFERENCE}
            made = model.create(self.loaded.config, self.loaded.raw, **place)
            model.adapt(made, LORA, adapters.resolve(self.loaded.config, LORA.targets))
            model.fill(made, self.loaded.weights)
            return TorchBackend(made, adapter, **shared)
        mesh = sharding.make_mesh()
        made = Model.create(self.loaded.config, dtype=jnp.dtype(self.ours), scan=jax_backend.use_scan("auto"))
        base = fill(made, self.loaded.weights, lambda _, array: jax.device_put(array, sharding.replicated(mesh)))
        return jax_backend.JaxBackend(made, base, adapter, mesh, settings=LORA, fold=fold, **shared)

    @property
    def their_dtype(self) -> str:
        return str(self.theirs).removeprefix("torch.") if self.theirs else self.ours

    def peer(self) -> Any:
        return peers.model(self.loaded, self.theirs, self.device)

    def said(self) -> dict[str, Any]:
        names = ("jax", "jaxlib", "torch", "transformers", "peft", "trl", "vllm", "numpy")
        return {
            "backend": self.options.backend, "dtype": self.ours, "peers_dtype": self.their_dtype,
            "processor": platform.processor() or platform.machine(), "bfloat16_units": processor.bfloat16(),
            "cores": len(os.sched_getaffinity(0)), "device": jax.devices()[0].device_kind, "model": self.options.model,
            **{name: version(name) for name in names if importlib.util.find_spec(name)},
        }  # fmt: skip


# ---------------------------------------------------------------- turns


def tried(makers: Mapping[str, Callable[[], Side]]) -> tuple[dict[str, Side], Any, dict[str, Any]]:
    """The sides that can be made and called once, what ours returned, and why the others cannot: peers, or ours on a card
    nobody has tried.
    """
    sides, returned, failed = {}, {}, {}
    for name, make in makers.items():
        try:
            side = make()
            returned[name] = side()
            sides[name] = side
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if "ours" not in sides:
        raise SystemExit(f"ours: {failed['ours']}")
    return sides, returned["ours"], {"failed": failed} if failed else {}


def turns(
    sides: Mapping[str, Side], repeats: int, *, tokens: int | None = None, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times, one after the other; one unmeasured call of each first.

    Args:
        tokens: seconds are for so many, of a side that made another number.
        warm: all have been called already.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm, repeats + 1):
        for name, call in sides.items():
            started = time.perf_counter()
            made = call()
            if turn:
                seconds[name].append((time.perf_counter() - started) * (tokens / made if tokens else 1))
    return seconds


def report(what: str, case: str, tokens: int, seconds: Mapping[str, Sequence[float]], **more: Any) -> dict[str, Any]:
    """One line: tokens/s of every side, and ours over each peer's, turn by turn; and what is known besides."""
    line: dict[str, Any] = {"measured": what, "case": case, "tokens": tokens, **more}
    ours = seconds["ours"]
    for name, own in seconds.items():
        line[f"{name}_tokens_per_second"] = round(tokens / statistics.median(own), 1)
        if name == "roof":
            line["share_of_roof"] = round(statistics.median(r / o for r, o in zip(own, ours, strict=True)), 3)
        elif name != "ours":
            ratios = sorted(theirs / o for theirs, o in zip(own, ours, strict=True))
            line[f"ratio_to_{name}"] = [round(x, 2) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
    line["process_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(line), flush=True)
    return line


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, a row for each peer."""
    header = ("what", "ours, tokens/s", "peer", "its tokens/s", "ratio (range)", "share of the roof")
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for line in lines:
        share = f"{line['share_of_roof']:.0%}" if "share_of_roof" in line else ""
        for key in (key for key in line if key.startswith("ratio_to_")):
            name, (ratio, low, high) = key.removeprefix("ratio_to_"), line[key]
            mine, theirs = (f"{line[f'{side}_tokens_per_second']:,.0f}" for side in ("ours", name))
            case = f"{line['measured']}, {line['case']}"
            rows.append(f"| {case} | {mine} | {name} | {theirs} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {share} |")
    return "\n".join(rows)


# ---------------------------------------------------------------- the roof


def roof(here: Here, rows: int, *, said: int, times: int, backward: bool) -> Side:
    """The matmuls of frozen weights alone: of `rows` tokens through all layers, of `said` through the head, `times` over.

    Args:
        backward: and as many for the gradient of their inputs.
    """
    model = Model.create(here.loaded.config, dtype=jnp.dtype(here.ours), scan=False)
    place = sharding.replicated(sharding.make_mesh())
    base = fill(model, here.loaded.weights, lambda _, array: jax.device_put(array, place))
    layers = base["layers"].values()
    kernels = [part["kernel"] for layer in layers for part in layer.values() if "kernel" in part]
    kernels = [kernel.reshape(kernel.shape[0], -1) for kernel in kernels]
    head, kind = model.head(base), jnp.dtype(here.ours)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = dots.project(x, kernel)
        if not backward:
            return y[0, 0]
        return y[0, 0] + dots.contract("ro,io->ri", y.astype(kind), kernel, frozen=True)[0, 0]

    @jax.jit
    def run(kernels: list[jax.Array], head: jax.Array) -> jax.Array:
        def once(_: int, total: jax.Array) -> jax.Array:
            # of the total: what does not change from turn to turn would be computed once
            inputs = {size: jnp.full((rows, size), 1e-3, kind) + (total * 1e-9).astype(kind) for size in widths}
            for kernel in kernels:
                total += product(inputs[kernel.shape[0]], kernel)
            return total + product(inputs[head.shape[1]][:said], head.T)

        return jax.lax.fori_loop(0, times, once, jnp.float32(0))

    widths = {kernel.shape[0] for kernel in kernels} | {head.shape[1]}
    return lambda: jax.block_until_ready(run(kernels, head))


# ---------------------------------------------------------------- measures


def measure_generate(here: Here, new: int = 64, length: int = 16) -> Iterator[dict[str, Any]]:
    rng, peer = np.random.default_rng(0), here.peer().eval()
    with contextlib.ExitStack() as stack:
        vllm = stack.enter_context(_vllm(here, 2 * (length + new))) if here.options.vllm else None
        for width in (16, 64):
            ours = here.backend(width)
            prompts = rng.integers(*here.ids, (width, length))
            noise = rng.random((width, new), dtype=np.float32)
            sides: dict[str, Side] = {
                "ours": functools.partial(ours.generate, prompts.tolist(), noise, sampling=Sampling(new, ())),
                "generate_sorted": peers.generate_sorted(peer, prompts.tolist(), new, eos=(), width=width),
                "generate_batch": peers.generate_batch(peer, prompts.tolist(), new, eos=(), width=width),
                "roof": roof(here, width, said=width, times=new, backward=False),
            }
            if vllm:
                sides["vllm"] = vllm(prompts.tolist(), new, ())
            sides = {name: side for name, side in sides.items() if name not in here.options.without}
            yield report("generate", f"{width} x {new}", width * new, turns(sides, here.options.repeats))


def measure_chat(here: Here, new: int = 256, width: int = 64) -> Iterator[dict[str, Any]]:
    """Responses that end at EOS: of a static batch the rows that have ended wait for the others."""
    prompts, noise = chat_prompts(here), np.random.default_rng(0).random((here.options.prompts, new), dtype=np.float32)
    ours, how = here.backend(width), {"eos": here.loaded.eos, "width": width}

    def call() -> int:
        return sum(len(r.tokens) for r in ours.generate(prompts, noise, sampling=Sampling(new, here.loaded.eos)))

    longest = max(map(len, prompts))
    with sampling_peers(here, prompts, new, **how) as made:
        sides, tokens, failed = tried({"ours": lambda: call, **made})
        case = f"{len(prompts)} prompts of up to {longest}, up to {new} new (mean {tokens / len(prompts):.0f})"
        yield report("chat", case, tokens, turns(sides, here.options.repeats, tokens=tokens, warm=True), **failed)


def measure_samples(
    here: Here, count: int = 32, length: int = 256, samples: int = 8, new: int = 64, width: int = 64
) -> Iterator[dict[str, Any]]:
    """Several responses to each prompt, which is read once."""
    rng, ours, how = np.random.default_rng(0), here.backend(width), {"eos": (), "width": width}
    prompts = np.repeat(rng.integers(*here.ids, (count, length)), samples, 0).tolist()
    noise, tokens = rng.random((len(prompts), new), dtype=np.float32), len(prompts) * new
    call = functools.partial(ours.generate, prompts, noise, sampling=Sampling(new, ()))
    with sampling_peers(here, prompts, new, **how) as made:
        sides, _, failed = tried({"ours": lambda: call, **made})
        seconds = turns(sides, here.options.repeats, warm=True)
        yield report("samples", f"{count} x {samples} x ({length} + {new})", tokens, seconds, **failed)


def measure_growth(here: Here, width: int = 16, length: int = 16) -> Iterator[dict[str, Any]]:
    """Seconds a step as responses get longer, and a query as there are more; ours alone."""
    rng, ours = np.random.default_rng(0), here.backend(width)
    for times, new in [*((1, new) for new in here.options.new), *((times, 64) for times in here.options.times)]:
        prompts = rng.integers(*here.ids, (width * times, length)).tolist()
        noise = rng.random((len(prompts), new), dtype=np.float32)
        call = functools.partial(ours.generate, prompts, noise, sampling=Sampling(new, ()))
        # more queries are of the same programs
        seconds = turns({"ours": call}, here.options.repeats, warm=times > 1)
        c, mean = here.loaded.config, length + new / 2
        cache = 2 * c.num_layers * width * c.num_kv_heads * c.head_dim * mean * jnp.dtype(here.ours).itemsize
        more = {
            "ms_a_step": round(1e3 * statistics.median(seconds["ours"]) / (times * new), 2),
            "cache_mib": round(cache / 2**20, 1),  # that a step reads, on the average
        }
        yield report("growth", f"{times} x {width} x {new}", len(prompts) * new, seconds, **more)


def chat_prompts(here: Here) -> list[list[int]]:
    """Token ids of the first prompts, as the chat template has them, or as they are where there is none."""
    data, count, tokenizer = here.options.data, here.options.prompts, here.loaded.tokenizer
    queries = load_queries(data or "quickstart_train", format="hh" if data else "records").queries[:count]
    if len(queries) < count:
        raise SystemExit(f"--prompts {count}: there are {len(queries)}")
    return [render(query, None, tokenizer, chat=tokenizer.chat_template is not None)[1] for query in queries]


@contextlib.contextmanager
def sampling_peers(
    here: Here, prompts: Sequence[Sequence[int]], new: int, **how: Any
) -> Iterator[dict[str, Callable[[], Side]]]:
    """What makes the peers that are installed and that --without does not name.

    Args:
        how: `eos` and `width` of the peers.
    """
    with contextlib.ExitStack() as stack:
        model = functools.cache(lambda: here.peer().eval())

        def vllm() -> Side:
            return stack.enter_context(_vllm(here, max(map(len, prompts)) + new))(prompts, new, list(how["eos"]))

        made: dict[str, Callable[[], Side]] = {}
        if peers is not None:
            made["generate_sorted"] = lambda: peers.generate_sorted(model(), prompts, new, **how)
            made["generate_batch"] = lambda: peers.generate_batch(model(), prompts, new, **how)
        if here.options.vllm:
            made["vllm"] = vllm
        yield {name: make for name, make in made.items() if name not in here.options.without.split(",")}


def whole_rows(here: Here, rng: np.random.Generator, queries: int, length: int, k: int, new: int) -> Batch:
    """Random tokens without padding."""
    prompt = rng.integers(*here.ids, (queries, length)).astype(np.int32)
    response = rng.integers(*here.ids, (queries, k, new)).astype(np.int32)
    valid = {"valid": np.ones(queries, np.float32)}
    return Batch(prompt, np.ones(prompt.shape, bool), response, np.ones(response.shape, bool), valid)


def negative_likelihood(outputs: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
    return -outputs.logprobs.sum((1, 2)), {}


def measure_step(here: Here) -> Iterator[dict[str, Any]]:
    rng, ours, peer = np.random.default_rng(0), here.backend(16), here.peer().train()
    for name, (queries, length, k, new) in {"rows": (8, 64, 1, 64), "pairs": (8, 16, 2, 24)}.items():
        batch = whole_rows(here, rng, queries, length, k, new)
        tokens = queries * k * (length + new)  # as a row for every response has them
        sides = {
            "ours": functools.partial(ours.update, [batch], negative_likelihood, lr=1e-4),
            "peft": peers.lora_step(peer, batch),
            "roof": roof(here, queries * (length + k * new), said=queries * k * new, times=1, backward=True),
        }
        case = f"{name}, {queries} x ({length} + {k} x {new})"
        yield report("step", case, tokens, turns(sides, here.options.repeats))


def measure_dpo(here: Here, queries: int = 8, longest: int = 256, new: int = 48) -> Iterator[dict[str, Any]]:
    rng, ours, beta = np.random.default_rng(0), here.backend(16), 0.1
    lengths = np.sort(rng.integers(longest // 4, longest + 1, queries))
    sizes = rng.integers(new // 3, new + 1, (queries, 2))
    prompt_mask = np.arange(longest)[None] >= longest - lengths[:, None]
    mask = np.arange(new)[None, None] < sizes[..., None]
    prompt = np.where(prompt_mask, rng.integers(*here.ids, prompt_mask.shape), 0).astype(np.int32)
    response = np.where(mask, rng.integers(*here.ids, mask.shape), 0).astype(np.int32)
    batch = Batch(prompt, prompt_mask, response, mask, {"valid": np.ones(queries, np.float32)})
    pairs = [
        {
            "prompt_ids": prompt[i][prompt_mask[i]].tolist(),
            "rejected_ids": response[i, 0][mask[i, 0]].tolist(),
            "chosen_ids": response[i, 1][mask[i, 1]].tolist(),
        }
        for i in range(queries)
    ]

    def loss(outputs: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
        said, reference = outputs.logprobs.sum(-1), batch.data["reference_logprobs"].sum(-1)
        return dpo(said[:, 0], said[:, 1], reference[:, 0], reference[:, 1], beta=beta), {}

    def step() -> None:
        batch.data["reference_logprobs"] = ours.logprobs(batch, reference=True).logprobs
        ours.update([batch], loss, lr=1e-4)

    with peers.dpo_step(here.peer(), here.loaded.tokenizer, pairs, beta) as theirs:
        tokens = int(prompt_mask.sum() + mask.sum())  # each once
        seconds = turns({"ours": step, "trl": theirs}, here.options.repeats)
        yield report("dpo", f"{queries} x (up to {longest} + 2 x up to {new})", tokens, seconds)


def measure_grpo(here: Here, samples: int = 4, prompts: int = 16, new: int = 24) -> Iterator[dict[str, Any]]:
    own = {"algorithm": "grpo", "grpo.samples": samples, "grpo.beta": 0.0, "queries_per_iteration": prompts}
    how = {"samples": samples, "new": new, "micro": 8, "steps": prompts // 8}
    yield from _iteration(here, "grpo", own, peers.grpo_iteration, how, prompts, samples)


def measure_iterative(here: Here, prompts: int = 48, new: int = 24) -> Iterator[dict[str, Any]]:
    own = {"algorithm": "dpo", "dpo.samples": 2, "queries_per_iteration": prompts}
    how = {"new": new, "micro": 8, "steps": prompts // 8}
    yield from _iteration(here, "iterative", own, peers.online_dpo_iteration, how, prompts, 2)


def _iteration(
    here: Here, what: str, own: Mapping[str, Any], theirs: Any, how: Mapping[str, Any], prompts: int, samples: int
) -> Iterator[dict[str, Any]]:
    """A whole iteration of ours, as `loop.one_iteration` does it, its commit included, beside a trainer's."""
    with our_iteration(here, own) as (call, texts, reward):
        with theirs(here.peer(), here.loaded.tokenizer, texts[:prompts], reward, **how) as peer:
            seconds = turns({"ours": call, "trl": peer}, here.options.repeats)
    new = how["new"]  # not reported before what a run prints is shown again
    yield report(what, f"{prompts} prompts x {samples} samples of up to {new}", prompts * samples * new, seconds)


@contextlib.contextmanager
def our_iteration(here: Here, own: Mapping[str, Any]) -> Iterator[tuple[Side, list[str], "peers.Reward"]]:
    config = importlib.import_module("ple_jax.configs.quickstart").get_config()
    config.update_from_flattened_dict(
        {"iterations": 1000, "eval.every": 1000, "task.max_heldout": 8, "sinks": (), "model.path": here.options.model, **own}
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        where, which = Path(folder), here.options.backend
        inputs = opening.read_inputs(workdir.begun(FrozenConfigDict(config), where, which), which)
        with opening.open_run(where, which, inputs) as run:
            state, schedule = loop.begin(run), run.algorithm.schedule(run.config)

            def learn(state: Any) -> Any:
                return loop.learn_from_samples(run, state, loop.context_of(run, state, float(schedule(state.iteration))))

            def call() -> None:
                nonlocal state
                state = loop.one_iteration(run, state, learn)

            texts = [query.prompt for query in inputs.data.train]

            def reward(asked: Sequence[str], said: Sequence[str]) -> Sequence[float]:
                return rewards.score(inputs.reward, asked, said).values.tolist()

            yield call, texts, reward


_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":  # its engine is a process of its own, which imports this file
    settings = json.loads(sys.stdin.readline())
    policy = LoRARequest("policy", 1, settings.pop("adapter"))
    llm = LLM(**settings, skip_tokenizer_init=True, enable_lora=True, enable_prefix_caching=True)
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        prompts, new, eos = json.loads(line)
        how = SamplingParams(max_tokens=new, ignore_eos=True, stop_token_ids=eos, temperature=1.0, detokenize=False)
        llm.reset_prefix_cache()  # several samples share their prompt, and turns do not
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, lora_request=policy, use_tqdm=False)
        print("made", sum(len(one.outputs[0].token_ids) for one in found), file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def _vllm(here: Here, longest: int) -> Iterator[Callable[..., Side]]:
    """vLLM in a process of its own: it reads weights and a fresh adapter from folders, and samples what it is sent."""
    with tempfile.TemporaryDirectory() as folder:
        base, script = Path(folder, "model"), Path(folder, "sample.py")
        base.mkdir()
        script.write_text(_VLLM)
        (base / "config.json").write_text(json.dumps({**here.loaded.raw, "architectures": ["LlamaForCausalLM"]}))
        arrays = {name: np.asarray(array, np.float32) for name, array in here.loaded.weights.items()}
        save_file(arrays, base / "model.safetensors", metadata={"format": "pt"})
        lora, tensors = default.get_config().lora, adapters.to_peft(adapters.init(here.loaded.config, LORA, seed=0))
        adapters.write_peft(Path(folder, "adapter"), tensors, lora=lora, base_model=str(base), transposed=False)
        # on a CPU: GiB for its cache, of which it would ask for nearly all there are; and all cores, where it keeps one free
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        pipe = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        with subprocess.Popen([here.options.vllm, script], env=env, **pipe) as child:

            def send(what: Any, answer: str) -> int:
                child.stdin.write(json.dumps(what) + "\n")
                child.stdin.flush()
                said = []
                for line in child.stderr:
                    if line.split()[:1] == [answer]:
                        return int(line.split()[-1]) if answer == "made" else 0
                    said.append(line)
                raise RuntimeError(f"vLLM ended: {''.join(said[-20:])}")

            settings = {"model": str(base), "adapter": str(Path(folder, "adapter")), "max_lora_rank": LORA.rank}
            send({**settings, "dtype": here.their_dtype, "max_model_len": longest}, "ready")
            yield lambda *asked: functools.partial(send, asked, "made")
            child.stdin.close()


def measure_memory(here: Here) -> Iterator[dict[str, Any]]:
    """Temporary memory of the compiled training step, as the compiler reports it; nothing is run."""
    if here.options.backend != "jax":
        return
    c = here.loaded.config
    model, adapter = Model.create(c, scan=jax_backend.use_scan("auto")), adapters.init(c, LORA, seed=0)
    queries, length, k, new = 8, 64, 2, 128

    def all_logits(base: Any, adapter: Any, packed: Packed) -> jax.Array:
        """Logits of every token, prompts included, in fp32, kept for the backward pass."""
        hidden = forward.hidden_states(model, base, lora.fuse(model, adapter, LORA), packed)
        hidden = hidden.reshape(*packed.tokens.shape, -1)
        logp = jax.nn.log_softmax(model.logits(base, hidden))
        return jnp.take_along_axis(logp[:, :-1], packed.tokens[:, 1:, None], -1)[:, length - 1 :].sum()

    def chunked(base: Any, adapter: Any, packed: Packed) -> jax.Array:
        return forward.outputs(model, base, lora.fuse(model, adapter, LORA), packed).logprobs.sum()

    prompt, response = np.ones((queries, length), np.int32), np.ones((queries, k, new), np.int32)
    batch = Batch(prompt, prompt > 0, response, response > 0, {})
    peaks = {}
    for name, function in {"chunked": chunked, "all_logits": all_logits}.items():
        compiled = jax.jit(jax.grad(function, argnums=1)).lower(model.shapes, adapter, pack(batch)).compile()
        peaks[f"{name}_mib"] = compiled.memory_analysis().temp_size_in_bytes >> 20
    line = {"measured": "memory", "case": f"{queries} x ({length} + {k} x {new})", **peaks}
    print(json.dumps(line), flush=True)
    yield line


def measure_parity(here: Here, queries: int = 4, length: int = 32, new: int = 32) -> Iterator[dict[str, Any]]:
    """Of an adapter that changes something: the largest and mean difference in nats, and of the gradient its share."""
    rng, adapter = np.random.default_rng(0), adapters.init(here.loaded.config, LORA, seed=0)
    for module in adapter.values():
        module["b"] = rng.normal(0, 0.02, module["b"].shape).astype(np.float32)
    batch = whole_rows(here, rng, queries, length, 1, new)
    theirs = {kind: peers.logprobs_and_gradient(here.loaded, adapters.to_peft(adapter), batch, kind) for kind in peers.KINDS}
    full, half = peers.KINDS
    found = {"ours": _logprobs_and_gradient(here, adapter, batch), "peft": theirs[half]}
    exact, slope = theirs[full]
    norm = np.sqrt(sum((x**2).sum() for x in slope.values()))
    line: dict[str, Any] = {"measured": "parity", "case": f"{queries} x ({length} + {new})"}
    for who, (logprobs, gradient) in found.items():
        apart = np.sqrt(sum(((gradient[name] - x) ** 2).sum() for name, x in slope.items()))
        nats = np.abs(logprobs - exact)
        line[f"{who}_nats"] = [round(float(x), 4) for x in (nats.mean(), nats.max())]
        line[f"{who}_gradient"] = round(float(apart / norm), 4)
    print(json.dumps(line), flush=True)
    yield line


def _logprobs_and_gradient(
    here: Here, adapter: adapters.Adapter, batch: Batch
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ours, in bfloat16: log-probabilities of the responses, and the gradient of minus their sum."""
    model = Model.create(here.loaded.config, dtype=jnp.bfloat16, scan=False)
    base = fill(model, here.loaded.weights, lambda _, array: jnp.asarray(array))

    def total(adapter: Any) -> tuple[Array, Array]:
        said = forward.outputs(model, base, lora.fuse(model, adapter, LORA), pack(batch)).logprobs
        return -said.sum(), said

    (_, said), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(adapter)
    return np.asarray(said)[:, 0], adapters.to_peft(jax.device_get(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(MEASURES), help="some of the measures, with commas between")
    parser.add_argument("--backend", default="jax", choices=("jax", "torch"))
    parser.add_argument("--data", type=Path, help="HH's records, whose prompts `chat` takes; else the quickstart's openings")
    parser.add_argument("--prompts", type=int, default=64, help="how many `chat` takes")
    parser.add_argument("--new", type=lambda text: [int(n) for n in text.split(",")], default=[64, 256, 512, 2048])
    parser.add_argument("--gpu", action="store_true", help="what one card does, and nothing else")
    parser.add_argument("--minutes", type=float, default=6, help="after which --gpu begins no measure")
    parser.add_argument("--times", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 16])
    parser.add_argument("--without", default="", help="peers that are left out, with commas between")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM, which is then a peer of `generate`")
    parser.add_argument("--out", type=Path, help="a file that the lines are added to")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(MEASURES):
        parser.error(f"--only: no measure {', '.join(sorted(unknown))}; choose from {', '.join(MEASURES)}")
    if not options.gpu and peers is None:
        parser.error("the peers are not installed: pip install 'ple_jax[dev]', or give --gpu")
    if options.gpu:
        here = Here(options, importlib.import_module("card").loaded(small=jax.default_backend() == "cpu"))
    else:
        here = Here(options)
    print(json.dumps(here.said()), flush=True)
    lines = []
    for line in measured(here):
        lines.append(line)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**here.said(), **line}) + "\n")
    print(table(lines))


def measured(here: Here) -> Iterator[dict[str, Any]]:
    """The lines of what is asked for."""
    if here.options.gpu:
        yield from importlib.import_module("card").lines(here)
        return
    for name in here.options.only.split(","):
        yield from globals()[f"measure_{name}"](here)


if __name__ == "__main__":
    main()
