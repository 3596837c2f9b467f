"""Reads a GGUF file (llama.cpp's format) into Hugging Face's names and layout, without torch.

A family is one row of `_ARCHITECTURES`: how its metadata become a config.json, and how to undo what llama.cpp's converter
did to its tensors.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast

from ple_jax.core.errors import UserError
from ple_jax.core.secrets import shown
from ple_jax.models import families, rope, tokenizer
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import expected_shapes


class Reader(GGUFReader):
    """A GGUFReader over a plain array. Slicing np.memmap itself, twice per token, takes 1.5 s for 49,000 tokens."""

    path: Path

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value. Raises a UserError if it is missing and has no default."""
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise UserError(f"{self.path} has no {key} in its metadata; convert the model again with llama.cpp")
        return default

    def number(self, key: str, default: Any = None) -> Any:
        """Returns one of the architecture's own metadata values; `key` is given without the architecture's name.

        Raises:
            UserError: if it is missing and has no default, or differs from layer to layer.
        """
        value = self.value(f"{self.value('general.architecture')}.{key}", default)
        if isinstance(value, list):
            raise UserError(f"{self.path}: {key} differs from layer to layer, which is not supported")
        return _decimal(value) if isinstance(value, float) else value

    def tensor(self, name: str) -> ReaderTensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def _decimal(value: float | np.float32) -> float:
    """Returns the decimal number that was stored as float32: 1e-5 for 9.99999974738e-06."""
    return float(str(np.float32(value)))


# ---------------------------------------------------------------- metadata -> config.json


def _scaling(reader: Reader) -> dict[str, Any] | None:
    """Reads the RoPE scaling that TextModel.set_gguf_parameters of llama.cpp's converter wrote.

    Returns:
        A config.json's rope_scaling; None without a scaling, or for LongRoPE with its tables, which `_phi3` reads.

    Raises:
        UserError: if the scaling is not supported.
    """
    kind = reader.number("rope.scaling.type", "none")
    if kind == "none" or (kind == "longrope" and reader.tensor(_LONG_SHORT[0])):
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": reader.number("rope.scaling.factor")}
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    prefix = f"{reader.value('general.architecture')}.rope.scaling."
    stored = {key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)} - {"type", "finetuned"}
    if kind != "yarn" or stored - names.keys():
        raise UserError(f"{reader.path} uses RoPE scaling {kind!r} with {sorted(stored)}, which is not supported")
    return {"rope_type": kind} | {ours: reader.number(f"rope.scaling.{k}") for k, ours in names.items() if k in stored}


def _llama(reader: Reader) -> dict[str, Any]:
    raw = {
        "attention_bias": reader.tensor("blk.0.attn_q.bias") is not None,
        "mlp_bias": reader.tensor("blk.0.ffn_up.bias") is not None,
    }
    if (table := reader.tensor(_FREQUENCIES)) is None:
        return raw
    # Llama 3.1's scaling comes as its divisors of the frequencies; these numbers are all that was ever published
    divisors = _dequantize(table, reader.path).ravel()
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = {"rope_theta": reader.number("rope.freq_base", 10000.0)}
    plain, scaled = (np.array(rope.frequencies(theta | s, 2 * len(divisors))[0]) for s in ({}, scaling))
    if not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise UserError(f"{reader.path}: {_FREQUENCIES} is not the RoPE scaling of Llama 3.1, and no other is supported")
    return raw | {"rope_scaling": scaling}


def _gemma(reader: Reader, deep: int, period: int) -> dict[str, Any]:
    """Returns the settings of Gemma 2 or 3.

    Every `period`-th layer attends to all positions, unless the file gives another period. The model with `deep`
    layers, 27B, scales its queries differently, which the file does not record.
    """
    layers, heads, head_dim = (reader.number(k) for k in ("block_count", "attention.head_count", "attention.key_length"))
    period = reader.number("attention.sliding_window_pattern", period)
    window = reader.number("attention.sliding_window", 0)
    kinds = ("sliding_attention" if window and (i + 1) % period else "full_attention" for i in range(layers))
    return {
        "query_pre_attn_scalar": reader.number("embedding_length") // heads if layers == deep else head_dim,
        "sliding_window": window or None,
        "layer_types": list(kinds),
        "tie_word_embeddings": True,
    }


def _gemma2(reader: Reader) -> dict[str, Any]:
    return _gemma(reader, deep=46, period=2) | {
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0),
    }


def _gemma3(reader: Reader) -> dict[str, Any]:
    return _gemma(reader, deep=62, period=6) | {
        "rope_theta": reader.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
    }


def _phi3(reader: Reader) -> dict[str, Any]:
    original, longest = reader.number("rope.scaling.original_context_length"), reader.number("context_length")
    raw = {
        "original_max_position_embeddings": original,
        "sliding_window": reader.number("attention.sliding_window") or None,
    }
    tables = [table for name in _LONG_SHORT if (table := reader.tensor(name)) is not None]
    if len(tables) < len(_LONG_SHORT):
        return raw
    scale = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
    if not math.isclose(stored := reader.number("rope.scaling.attn_factor"), scale, rel_tol=1e-5):
        raise UserError(f"{reader.path}: attention factor {stored} is not LongRoPE's, {scale}, and no other is supported")
    long, short = ([_decimal(x) for x in _dequantize(table, reader.path).ravel()] for table in tables)
    return raw | {"rope_scaling": {"type": "longrope", "long_factor": long, "short_factor": short}}


def _smollm3(reader: Reader) -> dict[str, Any]:
    # the file does not tell; llama.cpp has the same number built in
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(reader.number("block_count"))]}


def _olmo2(reader: Reader) -> dict[str, Any]:
    if reader.number("attention.sliding_window", 0):
        raise UserError(f"{reader.path} has sliding windows: this is OLMo 3, which is not supported")
    return {}


def _gpt2(reader: Reader) -> dict[str, Any]:
    return dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta"))


def _gpt_neox(reader: Reader) -> dict[str, Any]:
    return _gpt2(reader) | {
        "rotary_emb_base": reader.number("rope.freq_base", 10000.0),
        "use_parallel_residual": reader.number("use_parallel_residual"),
    }


# ---------------------------------------------------------------- what the converter did to a tensor, undone


def _as_stored(name: str, weight: np.ndarray, c: ModelConfig) -> np.ndarray:
    return weight


def _unpermuted(name: str, weight: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Undoes LlamaModel.permute of the converter, which puts the two rows of a rotary pair in q and k next to each other."""
    heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _minus_one(name: str, weight: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Subtracts one from the weights of Gemma's norms: they scale by 1 + weight, and the file stores the sum."""
    return weight - 1 if name.endswith("norm.weight") else weight


def _transposed(name: str, weight: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Transposes the weights of GPT-2's Conv1D modules, which Hugging Face stores as [in, out]."""
    return weight.T if _is_conv1d(name) else weight


def _is_conv1d(name: str) -> bool:
    return name.split(".")[-2].startswith("c_") and name.endswith(".weight")


def _interleaved(name: str, weight: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Puts q, k and v of each head together, as GPT-NeoX has them; the file has all q, then all k, then all v."""
    if ".query_key_value." not in name:
        return weight
    return weight.reshape(3, c.num_heads, c.head_dim, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)


# ---------------------------------------------------------------- the table

_FREQUENCIES = "rope_freqs.weight"
_LONG_SHORT = ("rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class _Architecture:
    arch: MODEL_ARCH
    model_type: str
    model_class: str
    config: Callable[[Reader], dict[str, Any]] = lambda reader: {}  # what differs from the common config; None: not there
    undo: Callable[[str, np.ndarray, ModelConfig], np.ndarray] = _as_stored
    tables: tuple[str, ...] = ()  # tensors that belong to the config
    epsilon: str = "layer_norm_rms_epsilon"
    partial: str = ""  # config key of the part of a head that is rotated


_ARCHITECTURES = {
    "llama": _Architecture(MODEL_ARCH.LLAMA, "llama", "LlamaForCausalLM", _llama, _unpermuted, (_FREQUENCIES,)),
    "qwen2": _Architecture(MODEL_ARCH.QWEN2, "qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Architecture(MODEL_ARCH.QWEN3, "qwen3", "Qwen3ForCausalLM"),
    "gemma2": _Architecture(MODEL_ARCH.GEMMA2, "gemma2", "Gemma2ForCausalLM", _gemma2, _minus_one),
    "gemma3": _Architecture(MODEL_ARCH.GEMMA3, "gemma3_text", "Gemma3ForCausalLM", _gemma3, _minus_one),
    "phi3": _Architecture(
        MODEL_ARCH.PHI3, "phi3", "Phi3ForCausalLM", _phi3, tables=_LONG_SHORT, partial="partial_rotary_factor"
    ),
    "smollm3": _Architecture(MODEL_ARCH.SMOLLM3, "smollm3", "SmolLM3ForCausalLM", _smollm3, _unpermuted),
    "olmo2": _Architecture(MODEL_ARCH.OLMO2, "olmo2", "Olmo2ForCausalLM", _olmo2),
    "gpt2": _Architecture(MODEL_ARCH.GPT2, "gpt2", "GPT2LMHeadModel", _gpt2, _transposed, epsilon="layer_norm_epsilon"),
    "gptneox": _Architecture(
        MODEL_ARCH.GPTNEOX,
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _gpt_neox,
        _interleaved,
        epsilon="layer_norm_epsilon",
        partial="rotary_pct",
    ),
}


# ---------------------------------------------------------------- reading


def read(path: str | Path) -> tuple[dict[str, Any], ModelConfig, Mapping[str, np.ndarray], PreTrainedTokenizerFast]:
    """Reads a GGUF file with any quantisation that the gguf package can undo.

    The file does not record everything: Mistral is stored as Llama, without its sliding window.

    Returns:
        The content of an equivalent config.json; its `ModelConfig`; the weights under Hugging Face's names and in its
        layout, as float32, each read from disk on access; the tokenizer.

    Raises:
        UserError: if it is not a GGUF file, is truncated, has an unsupported architecture or tokenizer, or if a tensor is
            missing, unknown, of another shape or (when it is read) has values that are not finite.
    """
    reader = open_file(Path(path))
    try:
        raw = read_config(reader)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a value in its metadata that it cannot have ({error}); convert the model again with llama.cpp"
        ) from error
    config = families.read(raw, str(path))
    return raw, config, _Tensors(reader, config), read_tokenizer(reader)


def read_config(reader: Reader) -> dict[str, Any]:
    """Returns the content of an equivalent config.json, from the metadata and the names of the tensors.

    Raises:
        UserError: if the architecture or one of its features is not supported, or a value is missing.
    """
    row, number = _architecture(reader), reader.number
    if number("expert_count", 0):
        raise UserError(f"{reader.path} is a mixture of experts, which is not supported")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // heads)
    rotated = number("rope.dimension_count", head_dim)
    if rotated != head_dim and not row.partial:
        raise UserError(f"{reader.path} rotates {rotated} of {head_dim} head dimensions, which is not supported")
    raw = {
        "vocab_size": len(reader.value("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(reader),
        "rms_norm_eps": number(f"attention.{row.epsilon}"),
        "tie_word_embeddings": reader.tensor("output.weight") is None,
        "max_position_embeddings": number("context_length"),
    } | row.config(reader)
    if row.partial:
        raw[row.partial] = rotated / head_dim
    names = FAMILIES[row.model_type].names
    known = {names.get(key, key): value for key, value in raw.items() if value is not None}
    return {"model_type": row.model_type, "architectures": [row.model_class], **known, **_end(reader)}


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors under Hugging Face's names. Names and shapes are checked at once, data read and dequantised on access."""

    def __init__(self, reader: Reader, config: ModelConfig):
        self._row, self._path, self._config = _architecture(reader), reader.path, config
        stored = {tensor.name: tensor for tensor in reader.tensors}
        shapes, names = expected_shapes(config), get_tensor_name_map(self._row.arch, config.num_layers)
        wanted = {name: names.get_name(name, (".weight", ".bias")) for name in shapes}
        if missing := [f"{theirs} ({ours})" for ours, theirs in wanted.items() if theirs not in stored]:
            raise UserError(f"{reader.path} lacks tensor {missing[0]}; download or convert the model again")
        # a bias or a table of RoPE frequencies would change the model's output if it were left out
        if unknown := sorted(stored.keys() - set(wanted.values()) - set(self._row.tables)):
            raise UserError(f"{reader.path} has tensor {unknown[0]}, which a {config.family} model here does not have")
        self._tensors = {ours: stored[str(theirs)] for ours, theirs in wanted.items()}
        for name, tensor in self._tensors.items():
            shape = tuple(int(n) for n in reversed(tensor.shape))
            expected = shapes[name][::-1] if self._row.undo is _transposed and _is_conv1d(name) else shapes[name]
            if shape != expected:
                raise UserError(f"{reader.path}: tensor {tensor.name} has shape {shape}, its metadata says {expected}")

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        weight = _dequantize(tensor, self._path).reshape([int(n) for n in reversed(tensor.shape)])
        if not np.isfinite(weight).all():
            raise UserError(f"{self._path}: tensor {tensor.name} holds values that are not finite")
        return self._row.undo(name, weight, self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_tokenizer(reader: Reader) -> PreTrainedTokenizerFast:
    """Builds the tokenizer, with its chat template, from the `tokenizer.*` metadata.

    Raises:
        UserError: if this kind of tokenizer is not supported, or the metadata are incomplete or damaged.
    """
    keys = [key for key in reader.fields if key.startswith("tokenizer.") or key == "general.architecture"]
    try:
        return tokenizer.from_gguf({key: reader.value(key) for key in keys})
    except UserError:
        raise
    except BaseException as error:  # the Rust library raises bare Exception, as of merges that name no token
        if not tokenizer.failed(error):
            raise
        raise UserError(
            f"{reader.path}: the tokenizer of this file cannot be built ({error}); convert the model again with llama.cpp"
        ) from error


def open_file(path: Path) -> Reader:
    """Opens a GGUF file and reads its header, for `read_config` and `read_tokenizer`.

    Raises:
        UserError: if it does not exist, is truncated, is no GGUF file, or is one of several files of a model.
    """
    try:
        reader = Reader(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what its array slicing meets in a cut file
        raise UserError(f"{path} is not a GGUF file or is truncated ({error}); download it again") from error
    reader.path = path
    parts = reader.value("split.count", 1)
    if not isinstance(parts, int):
        raise UserError(f"{path} has split.count = {shown(parts, 80)}, which is no number; download it again")
    if parts > 1:
        raise UserError(f"{path} is one of {parts} files; join them with llama.cpp: llama-gguf-split --merge")
    return reader


def _architecture(reader: Reader) -> _Architecture:
    name = reader.value("general.architecture")
    if name not in _ARCHITECTURES:
        raise UserError(f"{reader.path} holds architecture {name!r}; supported: {', '.join(sorted(_ARCHITECTURES))}")
    return _ARCHITECTURES[name]


def _end(reader: Reader) -> dict[str, Any]:
    """Returns {"eos_token_id": [...]} if the end of a turn or of a message has a token of its own, and {} otherwise."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ids = dict.fromkeys(reader.value(key) for key in keys if key in reader.fields)
    return {"eos_token_id": list(ids)} if len(ids) > 1 else {}


def _dequantize(tensor: ReaderTensor, path: Path) -> np.ndarray:
    data = tensor.data
    if data.ndim == 2:
        # gguf works on 16 rows at a time; blocks do not mind where a row ends, and longer rows mean fewer Python steps
        data = data.reshape(data.shape[0] // math.gcd(data.shape[0], 16), -1)
    try:
        return dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{path}: tensor {tensor.name}: {error}; use another quantisation, e.g. Q8_0") from error
