"""A tiny Llama with random weights: the same one as our pytrees and as transformers' module."""

import numpy as np

from ple_jax.models.checkpoint import expected_shapes
from ple_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=5000.0, norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip


def weights(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (1 + 0.1 * rng.normal(size=shape) if len(shape) == 1 else 0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def transformers_model(config: ModelConfig, tensors: dict[str, np.ndarray]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            pad_token_id=0,
        )
    )
    model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=not config.tie_embeddings)
    return model.eval()


def random_adapter(config: ModelConfig, rank: int = 4, seed: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """An adapter whose b is not zero, so that it does something."""
    from ple_jax import lora

    rng = np.random.default_rng(seed)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    fresh = lora.init(config, rank=rank, targets=targets, seed=seed)
    return {p: {k: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for k, x in m.items()} for p, m in fresh.items()}
