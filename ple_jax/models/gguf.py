"""Reading a GGUF file (llama.cpp's format) into Hugging Face's names, without torch."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast

from ple_jax.core.config import UserError
from ple_jax.models import families, tokenizer
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import expected_shapes

_ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA}


class _Reader(GGUFReader):
    """GGUFReader over a plain array: slicing np.memmap itself, twice per token, costs 1.5 s on a 49k vocabulary."""

    path: Path

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def value(self, key: str, default: Any = None) -> Any:
        """Metadata value; a missing one without a default is an error."""
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise UserError(f"{self.path} has no {key} in its metadata; convert the model again with llama.cpp")
        return default


def read(path: str | Path) -> tuple[dict[str, Any], ModelConfig, dict[str, np.ndarray], PreTrainedTokenizerFast]:
    """Reads a Llama-family GGUF file of any quantisation that the gguf package can undo.

    Returns:
        The config as a config.json would have it, and ours;
        weights under Hugging Face's names, float32, linear layers [out, in]; the tokenizer.

    Raises:
        UserError: not a GGUF file, truncated, another architecture or tokenizer, a tensor missing, unknown, of another
            shape or with values that are not finite.
    """
    reader = _open(Path(path))
    raw = read_config(reader)
    config = families.read(raw, str(path))
    return raw, config, read_weights(reader, config), read_tokenizer(reader)


def read_config(reader: _Reader) -> dict[str, Any]:
    """The model's numbers as a config.json has them, from the `llama.*` metadata."""
    architecture = reader.value("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(f"{reader.path} holds architecture {architecture!r}; supported: {', '.join(sorted(_ARCHITECTURES))}")
    hidden, heads = (reader.value(f"llama.{key}") for key in ("embedding_length", "attention.head_count"))
    head_dim = reader.value("llama.attention.key_length", hidden // heads)
    if (scaling := reader.value("llama.rope.scaling.type", "none")) != "none":
        raise UserError(f"{reader.path} uses RoPE scaling {scaling!r}, which is not supported")
    if (rotated := reader.value("llama.rope.dimension_count", head_dim)) != head_dim:
        raise UserError(f"{reader.path} rotates {rotated} of {head_dim} head dimensions, which is not supported")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(reader.value("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": reader.value("llama.feed_forward_length"),
        "num_hidden_layers": reader.value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.value("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": reader.value("llama.rope.freq_base", 10000.0),
        # stored as float32: 1e-5 comes back as 9.99999974738e-06
        "rms_norm_eps": float(str(np.float32(reader.value("llama.attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "max_position_embeddings": reader.value("llama.context_length"),
    }


def read_weights(reader: _Reader, config: ModelConfig) -> dict[str, np.ndarray]:
    """Dequantised weights, float32, under Hugging Face's names; q and k in Hugging Face's order of rotary pairs."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = expected_shapes(config)
    wanted = {name: names.get_name(name, (".weight",)) for name in shapes}
    if missing := [f"{theirs} ({ours})" for ours, theirs in wanted.items() if theirs not in stored]:
        raise UserError(f"{reader.path} lacks tensor {missing[0]}; download or convert the model again")
    # a bias or a table of RoPE frequencies would change the model's output if it were left out
    if unknown := sorted(stored.keys() - set(wanted.values())):
        raise UserError(f"{reader.path} has tensor {unknown[0]}, which the Llama decoder here does not support")

    def load(name: str) -> np.ndarray:
        tensor = stored[str(wanted[name])]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != shapes[name]:
            raise UserError(f"{reader.path}: tensor {tensor.name} has shape {shape}, its metadata says {shapes[name]}")
        weight = _dequantize(tensor, str(reader.path)).reshape(shape)
        if not np.isfinite(weight).all():
            raise UserError(f"{reader.path}: tensor {tensor.name} holds values that are not finite")
        if name.endswith("q_proj.weight"):
            return _unpermute(weight, config.num_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(weight, config.num_kv_heads)
        return weight

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(shapes, pool.map(load, shapes), strict=True))


def read_tokenizer(reader: _Reader) -> PreTrainedTokenizerFast:
    """The tokenizer and its chat template, from the `tokenizer.*` metadata."""
    return tokenizer.from_gguf({key: reader.value(key) for key in reader.fields if key.startswith("tokenizer.")})


def _open(path: Path) -> _Reader:
    try:
        reader = _Reader(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what its array slicing meets in a cut file
        raise UserError(f"{path} is not a GGUF file or is truncated ({error}); download it again") from error
    reader.path = path
    return reader


def _dequantize(tensor: ReaderTensor, path: str) -> np.ndarray:
    data = tensor.data
    if data.ndim == 2:
        # gguf works on 16 rows at a time; blocks do not mind where a row ends, and longer rows mean fewer Python steps
        data = data.reshape(data.shape[0] // math.gcd(data.shape[0], 16), -1)
    try:
        return dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{path}: tensor {tensor.name}: {error}; use another quantisation, e.g. Q8_0") from error


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes convert_hf_to_gguf.py's LlamaModel.permute: llama.cpp keeps a rotary pair in neighbouring rows."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
