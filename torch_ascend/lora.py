"""LoRA in torch: linear modules that add the current adapter's term to what a frozen module computes. arXiv:2106.09685.

An adapter is `ple_jax.models.adapters`' dict `{module path: {"a": [in, rank], "b": [rank, out]}}` of fp32 tensors. It is not
part of the module tree: `Model.apply` is given one, so that policy, reference and base are one set of weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ple_jax.models.adapters import Adapter, Lora

Numbers = tuple[Tensor, int]  # of the tokens of rows, [row, time], among all of their batch; and how many these are


def magnitudes(module: nn.Module, adapter: Adapter, device: torch.device) -> Adapter:
    """Returns a DoRA adapter with the norms of W + scale A B as its magnitudes, on the host.

    Before it is trained, it computes what LoRA computes.
    """
    found = {}
    for part in module.modules():
        if isinstance(part, Linear):
            own = {kind: torch.tensor(x, device=device) for kind, x in adapter[part.path].items()}
            found[part.path] = {**adapter[part.path], "m": part.norm(own).cpu().numpy()}
    return {path: found[path] for path in adapter}


class Linear(nn.Module):
    """A frozen linear module with an adapter's term: y = W x + scale * B A x, where B A x is in fp32."""

    def __init__(
        self,
        base: nn.Module,
        path: str,
        settings: Lora,
        current: Callable[[], Adapter],
        *,
        transposed: bool,
        numbers: Callable[[], Numbers | None] = lambda: None,
    ):
        """Wraps a linear module.

        Args:
            base: nn.Linear, or a module whose weight is [in, out] (`transposed`).
            path: the module's name in adapters.
            current: returns the adapter of the current call.
            numbers: returns the `Numbers` of the current call's tokens.
        """
        super().__init__()
        self.base, self.path, self.current, self.transposed = base, path, current, transposed
        self.scale, self.rate, self.numbers = settings.scale_of(path), settings.dropout, numbers

    def forward(self, x: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        y = self.base(x)
        module = self.current().get(self.path)
        if module is None:
            return y
        h = x.to(module["a"].dtype)
        # only gradients are dropped for: sampling and log-probabilities see the whole input
        h = _dropped(h, self.rate, self.numbers()) if self.rate and torch.is_grad_enabled() else h
        low = (h @ module["a"]) @ module["b"]
        if "m" not in module:
            if torch.is_grad_enabled():  # not in place: what recomputation keeps of the forward pass (remat=dots) is this y
                return torch.add(y, low, alpha=self.scale).to(y.dtype)
            # in place: added in fp32 and rounded to y's dtype, in one operator where a device waits for every launch
            return y.add_(low, alpha=self.scale)
        bias = 0.0 if self.base.bias is None else self.base.bias.to(low.dtype)
        # zero where a module is not adapted, or where its weights are zero: W x + A B x as they are
        m = module["m"]
        gain = torch.where(m == 0, 1.0, m) / torch.where(m == 0, 1.0, self.norm(module))
        return (gain * (y - bias + self.scale * low) + bias).to(y.dtype)

    @torch.no_grad()
    def norm(self, module: dict[str, Tensor]) -> Float[Tensor, " out"]:
        """Computes ||W + scale * A B|| for every output, without computing A B itself.

        It is a constant to the gradient (arXiv:2402.09353, 4.3).
        """
        w = self.base.weight
        w = (w.full_tensor() if isinstance(w, DTensor) else w).to(torch.float32)
        w = w if self.transposed else w.T
        a, b = module["a"], module["b"] * self.scale
        cross = ((a.T @ w) * b).sum(0)
        square = (((a.T @ a) @ b) * b).sum(0)
        return ((w * w).sum(0) + 2 * cross + square).sqrt()


def _dropped(h: Float[Tensor, "*batch inp"], rate: float, numbers: Numbers | None) -> Float[Tensor, "*batch inp"]:
    if numbers is None:
        noise = torch.rand_like(h)
    else:  # drawn for all tokens of the batch: where one lies, and how many processes there are, changes nothing
        which, total = numbers
        noise = torch.rand((total, h.shape[-1]), device=h.device)[which]
    return torch.where(noise >= rate, h / (1 - rate), 0.0)


def trainable(adapter: Adapter, device: torch.device) -> Adapter:
    """Copies an adapter from the host (numpy) to a device, as leaves that accumulate gradients."""
    return {
        path: {kind: torch.tensor(x, dtype=torch.float32, device=device, requires_grad=True) for kind, x in module.items()}
        for path, module in adapter.items()
    }


def frozen(adapter: Adapter) -> Adapter:
    """Returns a copy of an adapter that training does not change."""
    return {path: {kind: x.detach().clone() for kind, x in module.items()} for path, module in adapter.items()}


def leaves(adapter: Adapter) -> dict[str, Tensor]:
    """Returns every tensor of an adapter by "path/kind", in the adapter's order."""
    return {f"{path}/{kind}": x for path, module in adapter.items() for kind, x in module.items()}


def head(adapter: Adapter, name: str) -> Tensor | None:
    """Returns the head [hidden, 1] of that name beside an adapter, or None if there is none."""
    return adapter[name]["w"] if name in adapter else None
