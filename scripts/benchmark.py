"""Speed and memory beside transformers and PEFT: the same weights, the same shapes, the same run, in turns.

    python scripts/benchmark.py [--model smollm2-135m] [--repeats 5] [--only memory|train|generate] [--backend jax|torch]

Prints one JSON line per measurement: the median tokens/s of both sides over the repeats and the median of their
pairwise ratios (the two sides take turns, so that a machine that slows down slows both). Needs the extra `dev`.

generate: 64 new tokens after prompts of 16 tokens, at batch 16 and 64, sampling at temperature 1, no EOS.
train:    one LoRA step (rank 8, all linear modules), forward, backward and AdamW, frozen fp32 base:
          "rows"  8 rows of 128 tokens, log-probabilities of the last 64 (PEFT: labels on the last 64)
          "pairs" 8 queries of 16 tokens with two responses of 24, as PLE trains; ours packs a pair into one row, PEFT
                  has a row for each response; tokens are counted as PEFT sees them.
memory:   temporary memory of the compiled training step with log-probabilities chunked over time, as we train, and with
          the fp32 logits of all tokens. Nothing is run. (JAX alone.)
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ple_jax.backend import backend as jax_backend
from ple_jax.backend import forward, lora, sharding
from ple_jax.backend.model import Model, fill
from ple_jax.core.types import Backend, Batch, Sampling
from ple_jax.models import adapters, weights

LORA = adapters.Lora(rank=8, alpha=16.0)


def median_pair(ours: Callable[[], None], theirs: Callable[[], None], tokens: int, repeats: int) -> dict[str, float]:
    """tokens/s of both, and the ratio, each a median; one unmeasured call of each first (it compiles)."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(repeats + 1):
        for name, call in {"ours": ours, "theirs": theirs}.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ours_tokens_per_second": round(tokens / statistics.median(seconds["ours"]), 1),
        "theirs_tokens_per_second": round(tokens / statistics.median(seconds["theirs"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def transformers_model(loaded: weights.Loaded) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**loaded.raw, pad_token_id=0))
    tensors = {k: torch.tensor(v) for k, v in loaded.weights.items()}
    model.load_state_dict(tensors, strict=not loaded.config.tie_embeddings)
    return model.eval()


def backend(loaded: weights.Loaded, width: int, which: str) -> Backend:
    if which == "torch":
        return torch_backend(loaded, width)
    mesh = sharding.make_mesh()
    model = Model.create(loaded.config, scan=jax_backend.use_scan("auto"))
    base = fill(model, loaded.weights, lambda _, array: jax.device_put(array, sharding.replicated(mesh)))
    adapter = adapters.init(loaded.config, LORA, seed=0)
    return jax_backend.JaxBackend(
        model, base, adapter, mesh, settings=LORA, width=width, bucket=16, clip_norm=1.0, weight_decay=0.0
    )


def torch_backend(loaded: weights.Loaded, width: int) -> Backend:
    from torch_ascend import model, ops
    from torch_ascend.backend import TorchBackend

    device = torch.device("cpu")
    made = model.create(loaded.config, loaded.raw, dtype=torch.float32, device=device, ops=ops.REFERENCE)
    model.adapt(made, LORA, adapters.resolve(loaded.config, LORA.targets))
    model.fill(made, loaded.weights)
    adapter = adapters.init(loaded.config, LORA, seed=0)
    return TorchBackend(made, adapter, width=width, bucket=16, clip_norm=1.0, weight_decay=0.0)


def measure_generate(loaded: weights.Loaded, repeats: int, which: str, new: int = 64, prompt_len: int = 16) -> None:
    rng = np.random.default_rng(0)
    theirs = transformers_model(loaded)
    for width in (16, 64):
        ours = backend(loaded, width, which)
        prompts = rng.integers(1000, loaded.config.vocab_size, (width, prompt_len))
        noise = rng.random((width, new), dtype=np.float32)
        ids = torch.tensor(prompts)

        def call_ours(ours=ours, prompts=prompts, noise=noise) -> None:
            ours.generate(prompts.tolist(), noise, sampling=Sampling(new, ()))

        def call_theirs(ids=ids) -> None:
            with torch.no_grad():
                theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                    eos_token_id=None,
                )

        report(
            "generate",
            {
                "backend": which,
                "batch": width,
                "new_tokens": new,
                **median_pair(call_ours, call_theirs, width * new, repeats),
            },
        )


def negative_likelihood(outputs, batch):
    return -outputs.logprobs.sum((1, 2)), {}


def measure_train(loaded: weights.Loaded, repeats: int, which: str) -> None:
    rng = np.random.default_rng(0)
    ours = backend(loaded, 16, which)
    theirs = get_peft_model(
        transformers_model(loaded), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    ).train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for name, (queries, prompt_len, k, response_len) in {"rows": (8, 64, 1, 64), "pairs": (8, 16, 2, 24)}.items():
        prompt = rng.integers(1000, loaded.config.vocab_size, (queries, prompt_len)).astype(np.int32)
        response = rng.integers(1000, loaded.config.vocab_size, (queries, k, response_len)).astype(np.int32)
        valid = {"valid": np.ones(queries, np.float32)}
        batch = Batch(prompt, np.ones(prompt.shape, bool), response, np.ones(response.shape, bool), valid)
        rows = np.concatenate([np.repeat(prompt, k, 0), response.reshape(queries * k, -1)], 1)
        ids = torch.tensor(rows).long()
        labels = ids.clone()
        labels[:, :prompt_len] = -100

        def call_ours(batch=batch) -> None:
            ours.update([batch], negative_likelihood, lr=1e-4)

        def call_theirs(ids=ids, labels=labels) -> None:
            optimizer.zero_grad()
            theirs(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        shape = f"{queries} queries x ({prompt_len} + {k} x {response_len})"
        speeds = median_pair(call_ours, call_theirs, ids.numel(), repeats)
        report("train", {"backend": which, "case": name, "shape": shape, **speeds})


def measure_memory(loaded: weights.Loaded) -> None:
    """Temporary memory of the compiled training step, as the compiler reports it; nothing is run."""
    c = loaded.config
    model = Model.create(c, scan=jax_backend.use_scan("auto"))
    adapter = adapters.init(c, LORA, seed=0)
    queries, prompt_len, k, response_len = 8, 64, 2, 128

    def all_logits(base, adapter, batch):
        """Logits of every token, prompts included, in fp32, kept for the backward pass."""
        tokens, position, mask = forward.pack(batch)
        hidden, _ = model.apply(base, lora.fuse(model, adapter, LORA), tokens, positions=position, mask=mask)
        logp = jax.nn.log_softmax(model.logits(base, hidden))
        return jax.numpy.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[:, prompt_len - 1 :].sum()

    def chunked(base, adapter, batch):
        return forward.outputs(model, base, lora.fuse(model, adapter, LORA), batch).logprobs.sum()

    shape = jax.ShapeDtypeStruct
    batch = Batch(
        shape((queries, prompt_len), np.int32),
        shape((queries, prompt_len), bool),
        shape((queries, k, response_len), np.int32),
        shape((queries, k, response_len), bool),
        {},
    )
    peaks = {}
    for name, function in {"chunked": chunked, "all_logits": all_logits}.items():
        compiled = jax.jit(jax.grad(function, argnums=1)).lower(model.shapes, adapter, batch).compile()
        peaks[f"{name}_mib"] = compiled.memory_analysis().temp_size_in_bytes >> 20
    report("memory", {"shape": f"{queries} queries x ({prompt_len} + {k} x {response_len})", **peaks})


def report(what: str, values: dict) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"measured": what, **values, "process_peak_mib": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("generate", "train", "memory"))
    parser.add_argument("--backend", default="jax", choices=("jax", "torch"))
    options = parser.parse_args()
    loaded = weights.load(options.model)
    if options.only in (None, "memory") and options.backend == "jax":
        measure_memory(loaded)
    if options.only in (None, "train"):
        measure_train(loaded, options.repeats, options.backend)
    if options.only in (None, "generate"):
        measure_generate(loaded, options.repeats, options.backend)


if __name__ == "__main__":
    main()
