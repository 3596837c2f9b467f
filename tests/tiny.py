"""A tiny Llama with random weights: the same one as our pytrees and as transformers' module."""

import numpy as np

from ple_jax.models.adapters import Lora
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import read
from ple_jax.models.layout import expected_shapes

RAW = {  # a config.json
    "model_type": "llama", "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = read(RAW, "tiny")
LORA = Lora(rank=4, alpha=8.0)  # a scale of two


def weights(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (1 + 0.1 * rng.normal(size=shape) if len(shape) == 1 else 0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def transformers_model(raw: dict, tensors: dict[str, np.ndarray]):
    """transformers' model of a Llama config.json and its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**raw))
    model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=not raw["tie_word_embeddings"])
    return model.eval()


def random_adapter(config: ModelConfig, rank: int = 4, seed: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """An adapter whose b is not zero, so that it does something."""
    from ple_jax.models import adapters

    rng = np.random.default_rng(seed)
    fresh = adapters.init(config, Lora(rank=rank), seed=seed)
    return {p: {k: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for k, x in m.items()} for p, m in fresh.items()}
