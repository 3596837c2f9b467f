"""Writes merged weights to a folder that transformers and vLLM load, and pushes folders to a hub, without jax or torch."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ple_jax.core.errors import UserError
from ple_jax.core.files import to_disk, write_json
from ple_jax.models import peft
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import expected_shapes
from ple_jax.models.weights import Loaded

MARKER = "ple_jax.json"  # by it an earlier export is told from a folder of the user's own
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# what a model's folder holds beside its weights; code is never copied
_COPIED = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def merged(
    loaded: Loaded,
    adapter: Path,
    folder: Path,
    *,
    dtype: str,
    shard_gb: float,
    readme: str,
    about: Mapping[str, Any],
    head: str | None = None,
) -> Path:
    """Writes base plus adapter, merged in float32, as a folder that transformers' AutoModelForCausalLM loads.

    With a head it is for AutoModelForSequenceClassification: the head with one label takes the output matrix's place.
    Tensors are merged one by one: the host holds one shard and one tensor. The folder appears whole or not at all.

    Args:
        loaded: the base model.
        adapter: folder with a PEFT adapter.
        folder: what is written; an earlier export there is replaced.
        dtype: "float32", "bfloat16", "float16", or "keep" for every tensor's own.
        shard_gb: the most that one file holds, in 10^9 bytes; a larger tensor has a file of its own.
        readme, about: what README.md, and the export's own marker file, say of it.
        head: name of the adapter's module that was trained whole, "score".

    Raises:
        UserError: `folder` holds something else, the adapter is not this model's, a merged tensor has values that `dtype`
            cannot hold, or the disk is full.
    """
    _recover(folder)
    check_folder(folder)
    tensors = _tensors(loaded, adapter, DTYPES.get(dtype), head)
    first = next(tensors)
    _check_space(loaded, first[1].dtype, folder.parent)
    with _whole(folder) as partial:
        _write_description(loaded, partial, dtype, first[1].dtype, head)
        _write_shards(itertools.chain([first], tensors), partial, int(shard_gb * 1e9))
        (partial / "README.md").write_text(readme, encoding="utf-8")
        write_json(partial / MARKER, about)
    return folder


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _recover(folder: Path) -> None:
    """Restores the earlier export if a new one was killed between its two renames."""
    if (old := _beside(folder, "old")).exists() and not folder.exists():
        old.rename(folder)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, which takes the place of `folder` when the block ends.

    Where the block raises, the old folder stays.
    """
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    for left in (partial, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        mode = (partial / MARKER).stat().st_mode
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors keeps its files from everyone else
            to_disk(file)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises a UserError if an export would replace something that is not an earlier export."""
    if folder.exists() and not (folder / MARKER).is_file():
        raise UserError(f"{folder} is not an earlier export (it has no {MARKER}); move it away, nothing was written")


def _tensors(loaded: Loaded, adapter: Path, dtype: np.dtype | None, head: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the values of every weight of the merged model, in the order of `loaded.weights`.

    A head takes the output matrix's place, and comes last.
    """
    tensors, config = peft.read(adapter, head=head)
    modules = peft.modules(tensors)
    if unknown := [path for path in modules if f"{path}.weight" not in loaded.weights]:
        raise UserError(f"the adapter in {adapter} adapts {unknown[0]}, which {loaded.name} does not have")
    output = f"{FAMILIES[loaded.config.family].head}.weight"
    for name in loaded.weights:
        if head and name == output:
            continue
        stored = loaded.weights[name]
        weight, kind = stored, dtype or stored.dtype
        if (module := modules.get(name.removesuffix(".weight"))) is not None:
            scale = peft.scaling(config, name.removesuffix(".weight"))
            weight = peft.merge(stored, module, scale=scale, fan_in_fan_out=config["fan_in_fan_out"])
        with np.errstate(over="ignore"):  # said in our own words below
            weight = np.ascontiguousarray(weight, kind)
        if not np.isfinite(weight).all():
            raise UserError(
                f"merged tensor {name} holds values that are not finite in {kind}; set --config.export.dtype=bfloat16 or"
                " float32, or look for NaN in the adapter"
            )
        yield name.replace(".language_model.", "."), weight  # of a multimodal model the text part
    if head:
        yield f"{head}.weight", np.ascontiguousarray(peft.head_weight(tensors, head), dtype or np.float32)


def _check_space(loaded: Loaded, dtype: np.dtype, parent: Path) -> None:
    needed = sum(int(np.prod(shape)) for shape in expected_shapes(loaded.config).values()) * dtype.itemsize
    parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < needed * 1.01:
        raise UserError(
            f"merged weights need {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; free some,"
            " or set --config.export.dtype=bfloat16"
        )


def _write_shards(tensors: Iterable[tuple[str, np.ndarray]], folder: Path, limit: int) -> None:
    """Writes model.safetensors or, if it were longer than `limit` bytes, its numbered parts and their index."""
    from safetensors.numpy import save_file

    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(files)}.partial", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "0.partial").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.partial").rename(folder / file)
        where |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_description(loaded: Loaded, folder: Path, dtype: str, stored: np.dtype, head: str | None) -> None:
    """Writes config.json, generation_config.json and the tokenizer.

    The latter two are the source's own files where the source is a folder that has them, and the first of them has all
    tokens that end a response.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config, source = dict(_raw(loaded)), loaded.folder
    config.pop("auto_map", None)  # it names files of code, which are not exported and not needed
    if head:
        # every class of a family is called alike; a config.json need not name the one of the base
        family = CONFIG_MAPPING_NAMES[config["model_type"]].removesuffix("Config")
        config |= {"architectures": [f"{family}ForSequenceClassification"], "pad_token_id": loaded.tokenizer.pad_token_id}
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if dtype != "keep" or not {"dtype", "torch_dtype"} & config.keys():
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = str(stored)
    write_json(folder / "config.json", config)
    if source is None:
        loaded.tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # the name it has in every version of transformers; version 5 writes one that version 4 does not know
        write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    else:
        for file in sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}):
            shutil.copyfile(file, folder / file.name)
    if head:
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        _write_stops(loaded, folder / "generation_config.json")


def _write_stops(loaded: Loaded, file: Path) -> None:
    """Writes generation_config.json, or completes a copy of the source's own, so that others stop where the run stopped."""
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
    else:
        ids = {name: getattr(loaded.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        kept = {name: token for name, token in ids.items() if token is not None}
    write_json(file, {**kept, "eos_token_id": list(loaded.eos)} if loaded.eos else kept)


def _raw(loaded: Loaded) -> Mapping[str, Any]:
    """Returns the model's config.json; of a multimodal model that of its text part, which is what was read."""
    if "text_config" in loaded.raw:
        text = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        return {**loaded.raw["text_config"], **text, "eos_token_id": loaded.raw.get("eos_token_id")}
    if loaded.folder is not None:
        return loaded.raw
    return {
        **loaded.raw,
        "bos_token_id": loaded.tokenizer.bos_token_id,
        "eos_token_id": list(loaded.eos) if len(loaded.eos) > 1 else loaded.tokenizer.eos_token_id,
        "pad_token_id": loaded.tokenizer.pad_token_id,
    }


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a folder to a hub repository, which is made if it does not exist, and returns its address.

    Raises:
        UserError: there is no token or no network, or the hub refuses; the folder stays where it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export of ple_jax")
    except Exception as error:  # its own, or of the HTTP library below it, which changes between versions
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"could not push to {repo} ({reason}); log in with `hf auth login`, then `hf upload {repo} {folder}`;"
            f" everything was exported to {folder}"
        ) from error
    return str(address)
