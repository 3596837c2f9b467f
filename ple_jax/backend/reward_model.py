"""Sequence classifiers (reward models, sentiment classifiers) on our decoder, behind `ple_jax.rewards.model`.

Its twin is `torch_ascend/reward_model.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict

from ple_jax.backend import sharding
from ple_jax.backend.backend import make_model
from ple_jax.backend.model import Model, fill
from ple_jax.core import together
from ple_jax.core.batches import bucket, round_up
from ple_jax.models import hub, weights
from ple_jax.models.config import ModelConfig

_BUCKET = 32  # tokens
_MODEL = {"layers": "auto", "remat": "none", "attention": "auto"}


def classifier(
    folder: Path, *, dtype: str, rows: int, mesh: Mapping[str, int], source: tuple[str, str | None] | None = None
) -> Callable[[Sequence[Sequence[int]]], Float32[np.ndarray, "n labels"]]:
    """Loads a sequence classifier from a Hugging Face folder, and puts its weights on a mesh.

    Args:
        folder: config.json and safetensors of a ...ForSequenceClassification of one of our decoder's families.
        dtype: float32 or bfloat16, of weights and activations; the head works in float32.
        rows: the most rows of one call.
        mesh: devices along each axis, as `sharding.make_mesh` takes them.
        source: path or hub id, and revision, that the folder is from: another process may have to fetch it.

    Returns:
        A function from rows of token ids to the logits of every label, read where transformers reads them: at the last token
        that is not the padding token of config.json.

    Raises:
        UserError: as in `weights.load_classifier` (a checkpoint without a head, for example) and `sharding.make_mesh`.
    """
    return _make(folder, source, dtype, rows, dict(mesh)).classify


def decoder(config: ModelConfig, dtype: str, mesh: Mesh) -> Model:
    """Returns a classifier's decoder, without weights, as it runs on a mesh."""
    return make_model(ConfigDict({"model": {"dtype": dtype, **_MODEL}}), config, mesh)


@together.together
def _make(
    folder: Path, source: tuple[str, str | None] | None, dtype: str, rows: int, mesh: Mapping[str, int]
) -> "_Classifier":
    folder = hub.here(folder, source)
    return together.shared(_Classifier(folder, dtype, rows, mesh))


class _Classifier:
    """A sequence classifier, its weights on the devices of all processes."""

    def __init__(self, folder: Path, dtype: str, rows: int, mesh: Mapping[str, int]):
        self._mesh = sharding.make_mesh(**mesh)
        loaded = weights.load_classifier(folder)
        model = decoder(loaded.config, dtype, self._mesh)
        put = sharding.put_weight(self._mesh, kv_heads=loaded.config.num_kv_heads)
        place = sharding.place_weight(self._mesh, kv_heads=loaded.config.num_kv_heads)
        self._base = fill(model, loaded.weights, put, place=place)
        head = loaded.weights[weights.SCORE].astype(np.float32)
        self._head = sharding.put(head, sharding.replicated(self._mesh))
        self._pad = weights.pad_token(loaded.raw)
        self._height = round_up(rows, sharding.row_multiple(self._mesh))
        self._precision = "highest" if dtype == "float32" else None

        @jax.jit
        def logits(base: Any, head: Array, tokens: Array, mask: Array, last: Array) -> Array:
            return pooled(model, base, tokens, mask, last) @ head.T

        self._logits = logits

    @together.together
    def classify(self, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n labels"]:
        with jax.default_matmul_precision(self._precision):
            there = sharding.put_rows(self._mesh, _padded(ids, self._height, self._pad))
            found = self._logits(self._base, self._head, *there)
        return np.asarray(sharding.fetch(found))[: len(ids)]


def _padded(ids: Sequence[Sequence[int]], height: int, pad: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads rows of token ids; returns the tokens, their mask, and the place in each row that is scored.

    Shapes are few, so that few programs are compiled.
    """
    tokens = np.zeros((height, bucket(max(map(len, ids)), _BUCKET)), np.int32)
    mask, last = np.zeros(tokens.shape, bool), np.zeros(height, np.int32)
    for row, own in enumerate(ids):
        tokens[row, : len(own)], mask[row, : len(own)] = own, True
        last[row] = last_token(own, pad)
    return tokens, mask, last


def last_token(ids: Sequence[int], pad: int | None) -> int:
    """Returns the place of the token whose hidden state is scored: the last that is not `pad`, or 0 where all are."""
    return max((i for i, token in enumerate(ids) if token != pad), default=0)


def pooled(
    model: Model,
    base: Any,
    tokens: Int[Array, "row time"],
    mask: Bool[Array, "row time"],
    last: Int[Array, " row"],
) -> Float[Array, "row hidden"]:
    """Computes the final hidden state at `last` of every row, in fp32. Rows are padded on the right."""
    time = tokens.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))[None] & mask[:, None]
    positions = jnp.broadcast_to(jnp.arange(time)[None], tokens.shape)
    hidden, _ = model.apply(base, {}, tokens, positions=positions, mask=causal)
    return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0].astype(jnp.float32)
