"""The floating-point operations of a forward pass and of a gradient step."""

from ple_jax.models import layout
from ple_jax.models.config import ModelConfig
from ple_jax.training.costs import forward_flops


def forward_parts(c: ModelConfig, *, rows: int, tokens: int, source: int, predicted: int, adapter: int) -> dict[str, float]:
    """Computes the multiplications and additions of one forward pass over all rows, by part of the model.

    XLA's own count takes the body of a loop once, so this is a formula: for weights the same as a run's own
    (`forward_flops`), and for attention 4 * heads * head_dim per layer, token and source position, masked or not.

    Args:
        rows: number of rows.
        tokens: number of tokens per row that go through the layers.
        source: number of positions that each of them attends to.
        predicted: number of tokens per row that go through the head.
        adapter: number of parameters of the adapter.
    """
    each = rows * tokens
    return {
        "base": forward_flops(layout.active_weights(c), each),
        "adapter": forward_flops(adapter, each),
        "attention": 4.0 * each * source * c.num_layers * c.num_heads * c.head_dim,
        "head": forward_flops(c.vocab_size * c.hidden_size, rows * predicted),
    }


def gradient_flops(forward: dict[str, float], remat: str) -> float:
    """Computes the operations of a gradient step with a frozen base, whose weights get no gradients.

    The backward pass costs as much as the forward pass for the base, and twice as much for adapter and attention. The head's
    part is two matmuls (`forward.token_logprobs`). What is recomputed comes on top: with remat=full all layers, with dots
    the attention.

    Args:
        forward: the operations of the forward pass, as `forward_parts` returns them.
        remat: config.model.remat.
    """
    base, adapter, attention, head = (forward[part] for part in ("base", "adapter", "attention", "head"))
    again = {"none": 0.0, "dots": attention, "full": base + adapter + attention}[remat]
    return 2 * base + 3 * adapter + 3 * attention + 2 * head + again
