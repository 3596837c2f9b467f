"""The tiny Llama with an adapter in float64: what float32 is measured against, and how near to it float32 has to be.

A step in float32 does to a gradient what small errors in all weights do: it is the exact gradient of weights that are a few
roundings away (backward stability). So the unit of `Exact.gradient` is what one rounding of every weight changes, in
float64; it follows from the type and from how the loss is conditioned, and not from a processor's order of additions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ple_jax.core.types import Batch, Outputs
from ple_jax.models import adapters
from ple_jax.models.adapters import Lora

EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 8  # of every weight that a result in float32 may be away; measured are up to 3, see `Exact`


def negative_likelihood(outputs: Outputs, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """A loss for all libraries: a sum over all tokens."""
    return -outputs.logprobs.sum((1, 2)), {}


class Known(NamedTuple):
    """A loss in float64. Its units are the most that one rounding of all weights changes."""

    metrics: dict[str, float]
    gradient: dict[str, np.ndarray]  # by "path/kind"
    logprobs: np.ndarray
    units: dict[str, float]  # of the metrics
    unit: float  # of an entry of the gradient
    logprob_unit: float

    @property
    def share(self) -> float:
        """Of the largest entry of the gradient, how far an entry in float32 may be off."""
        return ROUNDINGS * self.unit / max(np.abs(x).max() for x in self.gradient.values())

    @property
    def loss_share(self) -> float:
        """Of the loss, how far it may be off in float32."""
        return ROUNDINGS * (self.units["loss"] / abs(self.metrics["loss"]) + EPS)


def norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm: transformers' own goes through float32."""
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary angles: transformers' own go through float32."""
    dim, theta = tiny.RAW["head_dim"], tiny.RAW["rope_parameters"]["rope_theta"]
    inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turned = position_ids[..., None].double() * inverse
    both = torch.cat([turned, turned], -1)
    return both.cos(), both.sin()


def leaves(adapter: adapters.Adapter) -> dict[str, Any]:
    """Every array by "path/kind"."""
    return {f"{path}/{kind}": x for path, module in adapter.items() for kind, x in module.items()}


def tree(named: dict[str, Any]) -> adapters.Adapter:
    """The inverse of `leaves`."""
    found: adapters.Adapter = {}
    for name, x in named.items():
        path, _, kind = name.rpartition("/")
        found.setdefault(path, {})[kind] = x
    return found


class Exact:
    """transformers' module and PEFT's adapter in float64; of every response a row of its own."""

    def __init__(self, adapter: adapters.Adapter, settings: Lora = tiny.LORA):
        self.head = {k: torch.tensor(m["w"]).double() for k, m in adapter.items() if k in (adapters.SCORE, adapters.VALUE)}
        self.adapter = {path: module for path, module in adapter.items() if path not in self.head}
        base = tiny.transformers_model(tiny.RAW, tiny.weights())
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, rank_pattern=dict(settings.rank_pattern),
            alpha_pattern=dict(settings.alpha_pattern), use_rslora=settings.rslora, use_dora=settings.dora,
            target_modules=list(self.adapter),
        )  # fmt: skip
        self.model = get_peft_model(base, config).double()
        for part in self.model.modules():
            if type(part).__name__ == "LlamaRMSNorm":
                part.forward = functools.partial(norm, part)
            if type(part).__name__ == "LlamaRotaryEmbedding":
                part.forward = angles
        # in memory a magnitude is a module's weight, in a file it has the module's name
        self.trained = {
            name.replace(".default", "").removesuffix(".weight" if "magnitude" in name else ""): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }
        with torch.no_grad():
            for name, array in adapters.to_peft(self.adapter).items():
                self.trained[name].copy_(torch.tensor(array))
        for parameter in self.head.values():
            parameter.requires_grad_()

    def outputs(self, batch: Batch) -> Outputs:
        """Log-probabilities of the response tokens; the score of every response, where there is a head."""
        (queries, k, new), length = batch.response.shape, batch.prompt.shape[1] + batch.response.shape[2]
        ids = np.zeros((queries, k, length), np.int64)
        prompts, responses = batch.prompt_mask.sum(1), batch.response_mask.sum(2)
        for i, j in np.ndindex(queries, k):  # padded on the right, where nothing before looks
            row = [*batch.prompt[i][batch.prompt_mask[i]], *batch.response[i, j][batch.response_mask[i, j]]]
            ids[i, j, : len(row)] = row
        rows = torch.tensor(ids).flatten(0, 1)
        hidden = self.model.base_model.model.model(input_ids=rows).last_hidden_state
        logprobs = self.model.base_model.model.lm_head(hidden).log_softmax(-1)
        before = torch.tensor(prompts)[:, None] + torch.arange(new)[None] - 1  # of every token, the one that predicts it
        before = before.repeat_interleave(k, 0).clamp(max=length - 2)
        every = torch.arange(len(rows))[:, None]
        found = logprobs[every, before, rows[every, before + 1]].view(queries, k, new)
        found = torch.where(torch.tensor(batch.response_mask), found, 0.0)
        if adapters.SCORE not in self.head:
            return Outputs(found)
        last = torch.tensor(prompts[:, None] + responses - 1).flatten()
        return Outputs(found, scores=(hidden[every[:, 0], last] @ self.head[adapters.SCORE][:, 0]).view(queries, k))

    def once(self, batch: Batch, loss: Callable) -> tuple[dict[str, float], dict[str, np.ndarray], np.ndarray]:
        """Loss and metrics, averaged over queries, the gradient, and log-probabilities."""
        for parameter in (*self.trained.values(), *self.head.values()):
            parameter.grad = None
        data = {name: torch.tensor(np.asarray(x, np.float64)) for name, x in batch.data.items()}
        found = self.outputs(batch)
        value, metrics = loss(found, Batch(*map(torch.tensor, batch[:4]), data))
        value.mean().backward()
        grads = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in self.trained.items()}
        named = leaves(adapters.from_peft(grads))
        heads = {f"{name}/w": p.grad.numpy() for name, p in self.head.items() if p.grad is not None}
        means = {"loss": value.mean().item(), **{n: m.double().mean().item() for n, m in metrics.items()}}
        return means, named | heads, found.logprobs.detach().numpy()

    def gradient(self, batch: Batch, loss: Callable) -> Known:
        """The exact one, and its units: the most of three draws."""
        metrics, gradient, logprobs = self.once(batch, loss)
        units, unit, logprob_unit = dict.fromkeys(metrics, 0.0), 0.0, 0.0
        weights = [*self.model.parameters(), *self.head.values()]
        rng = torch.Generator().manual_seed(0)
        for _ in range(3):
            kept = [x.detach().clone() for x in weights]
            with torch.no_grad():
                for x in weights:
                    x.mul_(1 + EPS * torch.randn(x.shape, generator=rng, dtype=torch.float64))
            other, moved, said = self.once(batch, loss)
            units = {name: max(unit, abs(other[name] - metrics[name])) for name, unit in units.items()}
            unit = max(unit, *(np.abs(moved[name] - x).max() for name, x in gradient.items()))
            logprob_unit = max(logprob_unit, np.abs(said - logprobs).max())
            with torch.no_grad():
                for x, before in zip(weights, kept, strict=True):
                    x.copy_(before)
        return Known(metrics, gradient, logprobs, units, unit, logprob_unit)


def assert_metrics_near(found: dict[str, float], known: Known) -> None:
    """So are a loss and its metrics, which are rounded themselves."""
    assert found.keys() == known.metrics.keys()
    for name, exact in known.metrics.items():
        room = ROUNDINGS * (known.units[name] + EPS * max(abs(exact), 1.0))
        assert found[name] == pytest.approx(exact, rel=0, abs=room), name


def assert_near(found: dict[str, np.ndarray], known: Known) -> None:
    """A gradient in float32 is the exact one of weights a few roundings away."""
    assert found.keys() == known.gradient.keys()
    assert 0 < known.share < 1e-3  # else it shows nothing
    for name, exact in known.gradient.items():
        np.testing.assert_allclose(found[name], exact, atol=ROUNDINGS * known.unit, rtol=0, err_msg=name)


def assert_logprobs_near(found: np.ndarray, known: Known) -> None:
    """So are log-probabilities, each rounded itself."""
    room = ROUNDINGS * (known.logprob_unit + EPS * np.abs(known.logprobs).max())
    assert room < 1e-3
    np.testing.assert_allclose(found, known.logprobs, atol=room, rtol=0)
