"""A reward from a neural network: a reward model or any other sequence classifier, in a Hugging Face folder or on a hub."""

import functools
import hashlib
import importlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from ple_jax import prompts
from ple_jax.core.backends import REWARD_MODELS
from ple_jax.core.errors import Unusable, UserError
from ple_jax.core.extras import need
from ple_jax.core.rules import many, mapping, optional, text, whole
from ple_jax.core.types import Reward
from ple_jax.models import families, hub
from ple_jax.models.tokenizer import from_folder
from ple_jax.models.values import check
from ple_jax.models.weights import check_ids, read_json, tokenizer_of
from ple_jax.prompts import template
from ple_jax.rewards import WHERE

VERSION = "2"  # another one with every change of the values
_HEAD = "ForSequenceClassification"
_CHOICES = {
    "framework": ("auto", *REWARD_MODELS),
    "output": ("auto", "logit", "probability", "logodds"),
    "dtype": ("float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda", "npu"),
}
_VALUES = {  # of a config.json; what is not there is not checked
    "model_type": text, "architectures": optional(many(text, empty=True)), "text_config": optional(mapping),
    "id2label": optional(mapping), "num_labels": whole(1, 2**16), "problem_type": optional(text),
    "max_position_embeddings": optional(whole(1, 2**31)), "n_positions": optional(whole(1, 2**31)),
    "pad_token_id": optional(whole(-1)), "vocab_size": optional(whole(1, 2**31)),
}  # fmt: skip
# their first position is pad_token_id + 1, so of max_position_embeddings they take so many fewer
_SHIFTED = (
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip


# one piece: half of it says what every option means
def make(
    path: str,
    *,
    revision: str | None = None,
    framework: str = "auto",
    label: str | int | None = None,
    output: str = "auto",
    with_prompt: bool = True,
    max_tokens: int | None = None,
    rows: int = 16,
    dtype: str = "float32",
    device: str = "auto",
    name: str | None = None,
    backend: str = "jax",
    mesh: Mapping[str, int] | None = None,
) -> Reward:
    """Returns a reward that is the score which a sequence classifier gives to a response, in its conversation or alone.

    Weights are read when the first response is scored; everything else is checked here.

    Args:
        path: a folder with config.json, tokenizer.json and safetensors, or user/name on a hub.
        revision: branch, tag or commit of a model on a hub; its main branch if it is not given.
        framework: jax, torch, or auto: the run's own, or torch if the decoder here does not know the family.
        label: name (of config.json's id2label, in any case) or number of the label that counts; needed if there are several.
        output: which value of that label is the reward: logit, probability, or logodds, log(p / (1 - p)). auto is the logit
            for a model with one label or for regression, else the probability.
        with_prompt: score prompt and response as a conversation, rendered by the model's own chat template if it has one;
            otherwise the response alone.
        max_tokens: length of the longest text, at most (and by default) what the model takes. The oldest tokens of a longer
            text are cut off, since the response is what is judged.
        rows: number of texts in one forward pass.
        dtype: float32 or bfloat16.
        device: auto, cpu, cuda or npu, for framework=torch.
        name: name of the reward; by default the last part of the path.
        backend, mesh: those of the run, which offers them.

    Raises:
        UserError: if there is no such model, it is no classifier, it needs code of its own or has no safetensors, if an
            option has a value that it does not take, or if torch is needed and not installed.
    """
    _check({"framework": framework, "output": output, "dtype": dtype, "device": device}, rows=rows, max_tokens=max_tokens)
    folder = _folder(path, revision)
    raw = _config(folder)
    framework = choose_framework(framework, backend, raw.get("model_type", ""), path)
    if framework == "jax" and device != "auto":
        raise UserError(f"{WHERE} device = {device!r} goes with framework='torch'; JAX takes the run's mesh")
    if framework == "jax" and backend != "jax" and math.prod((mesh or {}).values()) > 1:
        raise UserError(
            f"{WHERE} framework = 'jax' takes the run's mesh, whose devices have a process each with --backend={backend}:"
            " set framework to 'torch'"
        )
    positions = families.read(raw, str(folder / "config.json")).max_positions if framework == "jax" else _positions(raw)
    limit = min((most for most in (max_tokens, positions) if most is not None), default=None)
    labels = label_names(raw)
    index, output = _index(labels, label, path), _output(output, labels, raw)
    independent = raw.get("problem_type") == "multi_label_classification"
    if type(rows_known := _text(raw).get("vocab_size")) is int:
        check_ids(tokenizer := tokenizer_of(folder, rows_known), (), rows_known, f"reward model {folder}")
    else:
        tokenizer = from_folder(folder)
    tokens = functools.partial(_tokens, tokenizer=tokenizer, with_prompt=with_prompt, limit=limit)

    def refuses(prompt: str) -> str:
        try:
            tokens(prompt, "a")
        except Unusable as error:
            return error.reason
        return ""

    @functools.cache
    def model() -> Any:
        where: dict[str, Any] = {"mesh": mesh or {}} if framework == "jax" else {"device": device}
        if hub.is_remote(path):  # other processes may have to fetch it too
            where["source"] = (path, revision)
        return importlib.import_module(REWARD_MODELS[framework]).classifier(folder, dtype=dtype, rows=rows, **where)

    def reward(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [tokens(prompt, response) for prompt, response in zip(queries, responses, strict=True)]
        # neighbours of one length waste no padding; the longest come first, so memory runs out at once or never
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        logits = np.empty((len(texts), len(labels)))
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            logits[some] = model()([texts[i] for i in some])
        return _value(logits, index, output, independent=independent).tolist()

    dated = (prompts.DATE,) if with_prompt and template.reads_clock(tokenizer) else ()
    what = (hub.identity(path, revision), index, output, with_prompt, limit, dtype, *dated)
    return Reward(
        name=name or Path(path).name,
        score=reward,
        version=f"{VERSION} {hashlib.sha256(repr(what).encode()).hexdigest()[:16]}",
        scale=(0.0, 1.0) if output == "probability" else (-np.inf, np.inf),
        batch=4 * rows,  # enough to be worth sorting
        refuses=refuses,
    )


def _check(chosen: Mapping[str, str], *, rows: int, max_tokens: int | None) -> None:
    """Raises a UserError if an option has a value that it does not take."""
    for key, value in chosen.items():
        if value not in _CHOICES[key]:
            raise UserError(f"{WHERE} {key} = {value!r}: choose {', '.join(_CHOICES[key])}")
    for key, number in (("rows", rows), ("max_tokens", 1 if max_tokens is None else max_tokens)):
        if not 1 <= number < 2**31:
            raise UserError(f"{WHERE} {key} = {number}: give at least 1")


def _folder(path: str, revision: str | None) -> Path:
    if hub.is_remote(path):
        return hub.fetch(path, revision, setting="config.reward.kwargs path")
    if revision is not None:
        raise UserError(f"{WHERE} revision = {revision!r} goes with a model on a hub, which {path!r} is not")
    if not os.path.isdir(path):
        raise UserError(
            f"{WHERE} path = {path!r} is neither a folder nor the user/name of a model on a hub; give the"
            " folder that holds the reward model's config.json (configs/reward_hh.py trains one)"
        )
    return Path(path)


def _config(folder: Path) -> dict[str, Any]:
    """Reads a classifier's config.json. Raises a UserError if the folder holds no classifier that can be run here."""
    raw = read_json(folder / "config.json")
    try:
        check(raw, _VALUES)
        check(_text(raw), _VALUES)
        label_names(raw)
    except UserError as error:
        raise UserError(f"reward model {folder / 'config.json'}: {error}") from None
    if "auto_map" in raw:
        raise UserError(
            f"reward model {folder} needs code of its own (auto_map in config.json), and code of a checkpoint is never run;"
            f" take one of transformers' ...{_HEAD} classes"
        )
    architectures = raw.get("architectures") or []
    if not any(architecture.endswith(_HEAD) for architecture in architectures):
        raise UserError(
            f"reward model {folder} is {', '.join(architectures) or 'of no stated architecture'} and no ...{_HEAD}: it has"
            " no head that scores; train one with configs/reward_hh.py, or take a reward model or a classifier"
        )
    if not any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        remedy = "download or copy the folder again"
        if any(folder.glob("pytorch_model*.bin")):
            remedy = (
                "pickled weights are not read; where you trust them, write the others: AutoModelForSequenceClassification"
                f".from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        raise UserError(f"reward model {folder} has no model.safetensors; {remedy}")
    return raw


def choose_framework(asked: str, backend: str, family: str, path: str) -> str:
    """Returns jax or torch: what is asked for, or with auto jax if that is the run's own and knows the family, else torch.

    Raises:
        UserError: if jax is asked for and does not know the family, or the framework is not installed.
    """
    if asked == "jax" and family not in families.FAMILIES:
        raise UserError(
            f"{WHERE} framework = 'jax': the decoder here does not know model_type {family!r} of {path}"
            f" (it knows {', '.join(families.FAMILIES)}); set framework to 'torch'"
        )
    ours = backend == "jax" and family in families.FAMILIES and importlib.util.find_spec("jax") is not None
    framework = asked if asked != "auto" else "jax" if ours else "torch"
    need(framework, f"reward model {path} ({family})")
    return framework


def _positions(raw: Mapping[str, Any]) -> int | None:
    """Returns the number of tokens that a model has positions for, or None if there is no limit."""
    own = _text(raw)
    most = own.get("max_position_embeddings", own.get("n_positions"))
    shift = 1 if own.get("pad_token_id") is None else own["pad_token_id"]
    return most - shift - 1 if most and raw["model_type"] in _SHIFTED else most


def _text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config.json, with those of the language model inside a multimodal model on top."""
    return {**raw, **(raw.get("text_config") or {})}


def label_names(raw: Mapping[str, Any]) -> list[str]:
    """Returns the names of the labels in their order, as transformers reads them: two if config.json does not say."""
    named = raw.get("id2label") or {i: f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}
    try:
        return [str(named[key]) for key in sorted(named, key=int)]
    except ValueError:
        raise UserError(f"id2label has the keys {', '.join(map(str, named))[:80]}, which are no numbers") from None


def _index(labels: Sequence[str], label: str | int | None, path: str) -> int:
    if label is None and len(labels) == 1:
        return 0
    found = [i for i, name in enumerate(labels) if label == i or (isinstance(label, str) and name.lower() == label.lower())]
    if len(found) != 1:
        raise UserError(
            f"{WHERE} label = {label!r}: give the name or number of one of the labels of {path}:"
            f" {', '.join(f'{name!r} ({i})' for i, name in enumerate(labels))}"
        )
    return found[0]


def _output(asked: str, labels: Sequence[str], raw: Mapping[str, Any]) -> str:
    probable = len(labels) > 1 and raw.get("problem_type") != "regression"
    if asked in ("probability", "logodds") and not probable:
        raise UserError(
            f"{WHERE} output = {asked!r}: the logits of a model of one label, or of regression, are no"
            " probabilities; take output='logit', with --config.reward.transform=sigmoid for values from 0 to 1"
        )
    return asked if asked != "auto" else "probability" if probable else "logit"


def _tokens(prompt: str, response: str, *, tokenizer: Any, with_prompt: bool, limit: int | None) -> list[int]:
    """Returns the tokens that the model reads for a response, at most `limit` and at least one."""
    if with_prompt:
        ids = prompts.dialogue(prompt, response, tokenizer)
    else:
        ids = list(tokenizer.encode(response, add_special_tokens=True))
    if not ids:  # an empty response, and a tokenizer that adds nothing
        ids = [next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)]
    return newest(ids, limit, first=(tokenizer.bos_token_id, tokenizer.cls_token_id))


def newest(tokens: list[int], limit: int | None, *, first: tuple[int | None, ...]) -> list[int]:
    """Returns the newest `limit` tokens, among which one of `first` that begins the text ([CLS], BOS) keeps its place."""
    if limit is None or len(tokens) <= limit:
        return tokens
    kept = 1 if tokens[0] in first else 0
    return tokens[:kept] + tokens[len(tokens) - limit + kept :]


def _value(
    logits: Float[np.ndarray, "n labels"], index: int, output: str, *, independent: bool
) -> Float64[np.ndarray, " n"]:
    """Computes one label's logit, probability or log-odds for every text.

    A label competes with all others, or, where labels are `independent`, only with its own absence.
    """
    own = logits[:, index].astype(np.float64)
    if output == "logit":
        return own
    others = 0.0 if independent else np.logaddexp.reduce(np.delete(logits, index, 1).astype(np.float64), axis=1)
    return own - others if output == "logodds" else np.exp(-np.logaddexp(0.0, others - own))
