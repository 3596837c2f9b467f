"""The configuration of a decoder: the sizes and switches in which the families of `ple_jax.models.families` differ."""

from dataclasses import dataclass
from typing import NamedTuple


class LayerKind(NamedTuple):
    """The settings that may differ from layer to layer: rotary positions, and how far back a token attends."""

    frequencies: tuple[float, ...] = ()  # inverse rotary frequencies, radians per position; zeros leave a layer unrotated
    rope_scale: float = 1.0  # factor on cos and sin (YaRN's and LongRoPE's attention factor)
    window: int | None = None  # a token sees this many positions, itself included


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder: its sizes, and the switches for what it does differently from other families."""

    family: str  # of ple_jax.models.families.FAMILIES: names and layout of the weights
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]  # every layer's index into `kinds`
    # of pre_attention_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm (on the branch, before it is added back)
    norms: tuple[str, ...] = ("pre_attention_norm", "pre_mlp_norm")
    norm: str = "rms"  # rms | rms_plus_one (scale 1 + weight) | layer (with a bias)
    norm_eps: float = 1e-5
    qk_norm: str = "none"  # none | head (each head by itself) | all (all heads together): before the rotation
    parallel: bool = False  # attention and MLP read the same input
    activation: str = "silu"  # silu | gelu | gelu_tanh
    gated: bool = True  # activation(gate(x)) * up(x) instead of activation(up(x))
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0  # the MLP is a mixture of this many, each of `intermediate_size` (see ple_jax.backend.experts)
    experts_per_token: int = 0
    normalize_experts: bool = True  # a token's experts' probabilities sum to one
    query_scale: float = 1.0  # factor on q k^T
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    learned_positions: bool = False  # a table [max_positions, hidden] is added to the embedding
    tie_embeddings: bool = False
    max_positions: int = 2048

    @property
    def group(self) -> int:
        """The number of query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads
