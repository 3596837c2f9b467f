"""Speed beside the peers at their best: the same weights, shapes, samples and rewards, in turns, in one run.

    python scripts/benchmark.py [--only generate,step,dpo,grpo,iterative,memory,parity] [--repeats 5] [--backend jax|torch]
                                [--model smollm2-135m] [--vllm PYTHON] [--out FILE]

Ours has the config's defaults: model.dtype=auto, an adapter on all linear modules. So have the peers (`scripts/peers.py`),
in the dtype that multiplies faster here. All sides of a measure take turns, so that a slow machine slows all; what
is said is the median over the turns of seconds and of pairwise ratios, and their range. The first call of a side, which
compiles or warms up, is not measured.

generate   64 new tokens after prompts of 16, at 16 and 64 rows, no EOS: transformers' generate and generate_batch, and vLLM
           with --vllm=PYTHON, an interpreter that has it.
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
import peers
import torch
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
from ple_jax.losses import dpo
from ple_jax.models import adapters, weights
from ple_jax.training import loop, opening, workdir

LORA = adapters.Lora(rank=peers.RANK, alpha=float(peers.ALPHA))
Side = Callable[[], None]
MEASURES = ("generate", "step", "dpo", "grpo", "iterative", "memory", "parity")


class Here:
    """What all measures share: the weights, both sides' dtypes, how often."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.loaded = options, weights.load(options.model)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.theirs = peers.dtype(self.device)
        vocab = self.loaded.config.vocab_size
        self.ids = min(1000, vocab // 2), vocab  # of ordinary tokens: special ones are the first
        self.ours = "bfloat16" if self.device != "cpu" or processor.bfloat16() else "float32"

    def backend(self, width: int) -> Backend:
        """Ours, with a fresh adapter."""
        adapter = adapters.init(self.loaded.config, LORA, seed=0)
        shared = {"width": width, "bucket": 16, "clip_norm": 1.0, "weight_decay": 0.0}
        if self.options.backend == "torch":
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
        return jax_backend.JaxBackend(made, base, adapter, mesh, settings=LORA, **shared)

    def peer(self) -> Any:
        return peers.model(self.loaded, self.theirs, self.device)

    def said(self) -> dict[str, Any]:
        names = ("jax", "jaxlib", "torch", "transformers", "peft", "trl", "numpy")
        return {
            "backend": self.options.backend, "dtype": self.ours, "peers_dtype": str(self.theirs).removeprefix("torch."),
            "processor": platform.processor() or platform.machine(), "bfloat16_units": processor.bfloat16(),
            "cores": len(os.sched_getaffinity(0)), "device": jax.devices()[0].device_kind, "model": self.options.model,
            **{name: version(name) for name in names},
        }  # fmt: skip


# ---------------------------------------------------------------- turns


def turns(sides: Mapping[str, Side], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times, one after the other; one unmeasured call of each first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(what: str, case: str, tokens: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """One line: tokens/s of every side, and ours over each peer's, turn by turn."""
    line: dict[str, Any] = {"measured": what, "case": case, "tokens": tokens}
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
                "generate": peers.generate(peer, prompts, new),
                "generate_batch": peers.generate_batch(peer, prompts, new),
                "roof": roof(here, width, said=width, times=new, backward=False),
            }
            if vllm:
                sides["vllm"] = vllm(prompts, new)
            yield report("generate", f"{width} x {new}", width * new, turns(sides, here.options.repeats))


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
def our_iteration(here: Here, own: Mapping[str, Any]) -> Iterator[tuple[Side, list[str], peers.Reward]]:
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
    llm = LLM(**settings, skip_tokenizer_init=True, enable_lora=True, enable_prefix_caching=False)
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        how = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=1.0, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, lora_request=policy, use_tqdm=False)
        print("done", file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def _vllm(here: Here, longest: int) -> Iterator[Callable[[np.ndarray, int], Side]]:
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
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB; on a CPU it would ask for nearly all of the memory
        pipe = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        with subprocess.Popen([here.options.vllm, script], env=env, **pipe) as child:

            def send(what: Any, answer: str) -> None:
                child.stdin.write(json.dumps(what) + "\n")
                child.stdin.flush()
                said = []
                for line in child.stderr:
                    if line.strip() == answer:
                        return
                    said.append(line)
                raise SystemExit(f"vLLM ended: {''.join(said[-20:])}")

            settings = {"model": str(base), "adapter": str(Path(folder, "adapter")), "max_lora_rank": LORA.rank}
            send({**settings, "dtype": str(here.theirs).removeprefix("torch."), "max_model_len": longest}, "ready")
            yield lambda prompts, new: functools.partial(send, [prompts.tolist(), new], "done")
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
    found = {"ours": _logprobs_and_gradient(here, adapter, batch), "peft": theirs[torch.bfloat16]}
    exact, slope = theirs[torch.float32]
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
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM, which is then a peer of `generate`")
    parser.add_argument("--out", type=Path, help="a file that the lines are added to")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(MEASURES):
        parser.error(f"--only: no measure {', '.join(sorted(unknown))}; choose from {', '.join(MEASURES)}")
    here, lines = Here(options), []
    print(json.dumps(here.said()), flush=True)
    for name in options.only.split(","):
        for line in globals()[f"measure_{name}"](here):
            lines.append(line)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**here.said(), **line}) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
