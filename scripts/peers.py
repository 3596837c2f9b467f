"""The other side of `scripts/benchmark.py`: transformers, PEFT and TRL, in the dtype and the modes that suit them best."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from ple_jax.core.types import Batch
from ple_jax.models import weights

RANK, ALPHA = 8, 16
KINDS = (torch.float32, torch.bfloat16)
_PAGE = 32  # tokens


def dtype(device: str) -> torch.dtype:
    """The dtype in which this device multiplies faster, measured on one matmul of a small model's shape."""
    seconds = {}
    for kind in (torch.bfloat16, torch.float32):
        x, w = (torch.randn(shape, dtype=kind, device=device) for shape in ((64, 576), (3072, 576)))
        for _ in range(3):
            torch.nn.functional.linear(x, w).sum().item()
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w).sum().item()
        seconds[kind] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


def model(loaded: weights.Loaded, kind: torch.dtype, device: str) -> Any:
    """transformers' model of the same weights with a fresh PEFT adapter on every linear module."""
    from transformers import LlamaConfig

    config = LlamaConfig(**loaded.raw, pad_token_id=0)
    config._attn_implementation = "sdpa"
    made = AutoModelForCausalLM.from_config(config, dtype=kind)
    tensors = {name: torch.tensor(np.asarray(array, np.float32)).to(kind) for name, array in loaded.weights.items()}
    made.load_state_dict(tensors, strict=not loaded.config.tie_embeddings)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(made.to(device), lora)


# ---------------------------------------------------------------- sampling


def generate_sorted(
    made: Any, prompts: Sequence[Sequence[int]], new: int, *, eos: Sequence[int], width: int
) -> Callable[[], int]:
    """transformers' `generate` in batches of `width` prompts of about the same length, each until all of it have ended."""
    order = sorted(prompts, key=len)
    batches = [order[i : i + width] for i in range(0, len(order), width)]

    def call() -> int:
        tokens = 0
        for batch in batches:
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=made.device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=made.device)
            with torch.inference_mode():
                out = made.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=None if eos else new,
                    do_sample=True, top_k=0, pad_token_id=0, eos_token_id=list(eos) or None,
                )[:, longest:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(list(eos), device=out.device, dtype=out.dtype))
            tokens += int((ended.cumsum(1) - ended.long() == 0).sum())
        return tokens

    return call


def generate_batch(
    made: Any, prompts: Sequence[Sequence[int]], new: int, *, eos: Sequence[int], width: int
) -> Callable[[], int]:
    """transformers' continuous batching, on the model inside PEFT's, whose adapter is in its modules."""
    inner = made.get_base_model()
    ends = list(eos) or -1
    settings = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=0)
    longest, how = max(map(len, prompts)), {}
    if made.device.type == "cpu":  # where it would take nine tenths of the memory for keys and values
        pages = width * -(-(longest + new) // _PAGE)
        how["continuous_batching_config"] = ContinuousBatchingConfig(
            page_size=_PAGE, num_blocks=pages + width, max_batch_tokens=max(width * min(longest, 64), longest, _PAGE)
        )

    def call() -> int:
        with torch.inference_mode():
            found = inner.generate_batch(list(prompts), generation_config=settings, progress_bar=False, **how)
        lengths = [len(one.generated_tokens) for one in found.values()]
        if len(found) != len(prompts) or (not eos and set(lengths) != {new}):
            raise RuntimeError(f"generate_batch gave {len(found)} responses of {sorted(set(lengths))} tokens")
        return sum(lengths)

    return call


# ---------------------------------------------------------------- steps


def lora_step(made: Any, batch: Batch) -> Callable[[], None]:
    """A step of PEFT's model on a batch whose rows are whole, a row for every response: labels on the responses."""
    k = batch.response.shape[1]
    rows = np.concatenate([np.repeat(batch.prompt, k, 0), batch.response.reshape(len(batch.prompt) * k, -1)], 1)
    ids = torch.tensor(rows, device=made.device).long()
    labels = ids.clone()
    labels[:, : batch.prompt.shape[1]] = -100
    parameters = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def call() -> None:
        optimizer.zero_grad()
        made(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return call


def logprobs_and_gradient(
    loaded: weights.Loaded, adapter: Mapping[str, np.ndarray], batch: Batch, kind: torch.dtype
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities of the only response of every row, which is whole, and the gradient of minus their sum.

    Args:
        adapter: under PEFT's names, as the gradient is.
    """
    made = model(loaded, kind, "cpu").eval()
    parameters = {name.replace(".default", ""): p for name, p in made.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in adapter.items():
            parameters[name].copy_(torch.tensor(tensor))
    ids, length = torch.tensor(np.concatenate([batch.prompt, batch.response[:, 0]], 1)).long(), batch.prompt.shape[1]
    logits = made(input_ids=ids).logits[:, length - 1 : -1].float()
    said = logits.log_softmax(-1).gather(-1, ids[:, length:, None])[..., 0]
    (-said.sum()).backward()
    return said.detach().numpy(), {name: p.grad.float().numpy() for name, p in parameters.items()}


Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


@contextlib.contextmanager
def dpo_step(made: Any, tokenizer: Any, pairs: Sequence[Pair], beta: float) -> Iterator[Callable[[], None]]:
    """A step of TRL's DPO trainer on these pairs, all of them one batch, in the rows that its collator makes."""
    import trl
    from datasets import Dataset

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with _arguments(trl.DPOConfig, made, per_device_train_batch_size=len(pairs), beta=beta, max_length=None) as args:
        trainer = Trainer(
            model=made, args=args, train_dataset=Dataset.from_list(list(pairs)), processing_class=tokenizer
        )
        yield lambda: _silently(trainer)


Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@contextlib.contextmanager
def grpo_iteration(
    made: Any, tokenizer: Any, prompts: Sequence[str], reward: Reward, *, samples: int, new: int, micro: int, steps: int
) -> Iterator[Callable[[], None]]:
    """TRL's GRPO: samples of every prompt at once, rewards, and `steps` optimiser steps on all of them."""
    import trl

    per_step = len(prompts) // steps
    options = {
        "per_device_train_batch_size": micro * samples, "gradient_accumulation_steps": per_step // micro,
        "num_generations": samples, "steps_per_generation": len(prompts) // micro, "max_completion_length": new,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "beta": 0.0, "shuffle_dataset": False,
    }  # fmt: skip
    with _arguments(trl.GRPOConfig, made, **options) as args:
        trainer = _sampling(trl.GRPOTrainer, made, args, tokenizer, prompts, reward)
        yield lambda: _silently(trainer)


@contextlib.contextmanager
def online_dpo_iteration(
    made: Any, tokenizer: Any, prompts: Sequence[str], reward: Reward, *, new: int, micro: int, steps: int
) -> Iterator[Callable[[], None]]:
    """TRL's online DPO: two samples of every prompt, the better one is chosen, and as many optimiser steps."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    options = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": len(prompts) // steps // micro,
        "max_new_tokens": new, "temperature": 1.0,
    }  # fmt: skip
    with _arguments(OnlineDPOConfig, made, **options) as args:
        trainer = _sampling(OnlineDPOTrainer, made, args, tokenizer, prompts, reward)
        yield lambda: _silently(trainer)


def _sampling(kind: Any, made: Any, args: Any, tokenizer: Any, prompts: Sequence[str], reward: Reward) -> Any:
    """One of TRL's trainers that sample."""
    from datasets import Dataset

    return kind(
        model=made,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        reward_funcs=lambda prompts, completions, **_: list(reward(prompts, completions)),
    )


@contextlib.contextmanager
def _arguments(kind: Any, made: Any, **options: Any) -> Iterator[Any]:
    """TRL's settings: nothing is saved or sent, one pass over the data, and the learning rate of the other side."""
    cpu = made.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        yield kind(
            output_dir=folder, num_train_epochs=1, learning_rate=1e-4, max_grad_norm=1.0, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no", use_cpu=cpu, dataloader_pin_memory=not cpu,
            bf16=False, activation_checkpointing=False, **options,  # the model is in its dtype already
        )  # fmt: skip


def _silently(trainer: Any) -> None:
    """Another pass over the data; what trainers print of it is not said."""
    with contextlib.redirect_stdout(None):
        trainer.train()
