"""`JaxBackend`, the only object of this backend that holds state, and the functions that build it from a config."""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float32
from ml_collections import ConfigDict

from ple_jax import algorithms
from ple_jax.backend import attention, checkpoint, compilation, generate, lora, sharding
from ple_jax.backend.generate import Rows
from ple_jax.backend.model import Cache, Model, fill
from ple_jax.backend.train import optimizer, placement, programs
from ple_jax.core import packing, processor, refill, together
from ple_jax.core.batches import bucket
from ple_jax.core.types import Batch, Compiled, Loss, Outputs, Packed, Response, Sampling, Tell
from ple_jax.models import adapters, weights
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import attention_reach, expected_shapes


class _Decoded(NamedTuple):
    """What rows are decoded with: base and adapter as they were at `open`, the cache of the shared prefix, and the rows."""

    base: Any
    fused: Any
    prefix: Cache | None
    rows: Rows
    sampling: Sampling


class JaxBackend:
    """The `Backend` of JAX: base weights, adapter, optimizer state and reference adapter, all on one mesh."""

    def __init__(
        self,
        model: Model,
        base: Any,
        adapter: adapters.Adapter,
        mesh: Mesh,
        *,
        settings: adapters.Lora,
        width: int,
        bucket: int,
        clip_norm: float,
        weight_decay: float,
        seed: int = 0,
        fold: bool = False,
    ):
        self.model, self.mesh, self.base, self.width, self.bucket, self.fold = model, mesh, base, width, bucket, fold
        transform = optimizer(clip_norm=clip_norm, weight_decay=weight_decay)
        place, state_place = placement(adapter, transform, mesh)
        self.policy = jax.tree.map(sharding.put, adapter, place)
        self._fresh = jax.jit(transform.init, out_shardings=state_place)
        self.state: Any = None
        self._freeze()  # the start adapter; a fresh one is the base itself
        self._key = jax.random.key(seed)
        self.programs = programs(model, adapter, mesh, transform=transform, settings=settings)
        self._decoded: _Decoded | None = None

    # -------------------------------------------------------------- Backend

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
        known: Mapping[int, Response] | None = None,
        tell: Tell | None = None,
    ) -> list[Response]:
        """Samples one response per prompt, `width` of them at a time; arguments as in `core.types.Backend`."""
        requests = refill.Requests([tuple(prompt) for prompt in prompts], uniforms, sampling, tuple(prefix))
        how = {"width": self.width, "smallest": self.bucket, "multiple": self._multiple}
        return refill.sample(self, requests, **how, known=known, tell=tell)

    def stream(
        self,
        prompt: Sequence[int],
        uniforms: Float32[np.ndarray, " max_new"],
        *,
        sampling: Sampling,
        base: bool = False,
    ) -> Iterator[int]:
        """Returns an iterator over the tokens of one response as they are sampled. With `base` the adapter is not used."""
        fused = {} if base else self.programs.fuse(self.base, self.policy)
        return generate.stream(self.model, self.base, fused, np.asarray(prompt, np.int32), uniforms, sampling=sampling)

    @together.together
    def logprobs(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        base: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Outputs:
        """Computes log-probabilities (nats) of a batch's response tokens under the policy, the frozen reference or the base.

        The logits are divided by `temperature`, above 0. With `entropy`, the entropy (nats) at every token is computed, too.
        """
        adapter = {} if base else self.reference if reference else self.policy
        how = {"entropy": entropy, "temperature": temperature}
        return self._said(batch, lambda packed: self.programs.outputs(self.base, adapter, packed, **how))

    @together.together
    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """Computes the score head's value for every response."""
        return self._said(batch, lambda packed: self.programs.scores(self.base, self.policy, packed))

    @together.together
    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float, temperature: float = 1.0) -> dict[str, float]:
        """Takes one optimizer step on the mean loss over all rows of `batches`, with gradients accumulated over them.

        Returns the means of the metrics, and "grad_norm", the gradient's norm before clipping.
        """
        most = max(len(b.prompt) for b in batches)
        real = sum(float(b.data["valid"].sum()) for b in batches)
        share = jnp.float32(1 / real)
        grads: Any = None
        parts = []
        # dropout depends on the number of steps taken, which a checkpoint holds: a resumed run draws the same
        step = jax.random.fold_in(self._key, sharding.own(optax.tree.get(self.state, "count")))
        how = {"loss": loss, "temperature": temperature}
        passes = ((i, self.put(batch, one)) for i, batch in enumerate(batches) for one in self._passes(batch, most))
        for i, data in passes:
            key = jax.random.fold_in(step, i)
            new, values = self.programs.gradients(self.base, self.policy, *data, share, key, **how)
            grads = new if grads is None else self.programs.accumulate(grads, new)
            parts.append(values)
        self.policy, self.state, norm = self.programs.apply(self.policy, self.state, grads, jnp.float32(lr))
        # read when all is under way: reading a part's would wait for it, and the next one would be put there only then
        parts, norm = sharding.fetch((parts, norm))
        metrics = {name: sum(float(values[name]) for values in parts) for name in parts[0]}
        return {**metrics, "grad_norm": float(norm)}

    @together.together
    def freeze_reference(self) -> None:
        """Makes the current policy the reference: the same base with a frozen copy of the adapter.

        The optimiser starts afresh: moments of what was learned before would move the policy off it without any gradient.
        """
        self._freeze()

    def _freeze(self) -> None:
        self.reference = jax.tree.map(jnp.copy, self.policy)
        with jax.numpy_dtype_promotion("standard"):
            self.state = self._fresh(self.policy)

    @together.together
    def adapter(self) -> dict[str, np.ndarray]:
        return adapters.to_peft(sharding.fetch(self.policy))

    @together.together
    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        checkpoint.save(path, step, self._trees(), meta, keep=keep)

    @together.together
    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest checkpoint under `path` and returns its meta; None if there is none.

        Raises:
            Damaged: a file of it is not as it was written.
            UserError: it holds other shapes, dtypes or names than this config needs.
        """
        found = checkpoint.restore(path, self._trees())
        if found is None:
            return None
        trees, meta = found
        self.policy, self.state, self.reference = trees["adapter"], trees["optimizer"], trees["reference"]
        return meta

    def environment(self) -> dict[str, Any]:
        devices = list(self.mesh.devices.flat)
        return {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")},
            "device": devices[0].device_kind,
            "platform": devices[0].platform,
            "mesh": ", ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items()),
            **processor.environment(devices[0].platform),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **({"processes": jax.process_count()} if jax.process_count() > 1 else {}),
        }

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        return jax.profiler.trace(str(folder))

    def compiled(self) -> Compiled:
        return compilation.compiled()

    # -------------------------------------------------------------- refill.Engine

    @together.together
    def open(self, shape: refill.Shape, sampling: Sampling) -> None:
        """Allocates the rows, all of them free, and computes the prefix. Decoding uses the adapter as it is now."""
        base, fused, prefix = self.base, {}, None
        if self.fold:
            base = lora.folded(self.base, self.programs.fold(self.base, self.policy))
        else:
            fused = self.programs.fuse(self.base, self.policy)
        if shape.prefix:
            tokens = sharding.put(np.asarray(shape.prefix, np.int32), sharding.replicated(self.mesh))
            prefix = self.programs.prefix(base, fused, tokens)
        rows = self.programs.rows(base, count=shape.rows, room=shape.room, new=shape.new)
        self._decoded = _Decoded(base, fused, prefix, rows, sampling)

    @together.together
    def begin(self, group: refill.Group) -> None:
        """Reads the prompts of a group, and draws the first token of every response to them."""
        base, fused, prefix, rows, sampling = self._open_rows
        tokens, lengths = sharding.put_rows(self.mesh, (group.tokens, group.lengths))
        everywhere = sharding.replicated(self.mesh)
        rest = [sharding.put(x, everywhere) for x in (group.prompt, group.row, group.uniforms)]
        there = base, fused, prefix if group.shared else None
        rows = self.programs.begin(*there, rows, tokens, lengths, *rest, sampling=sampling)
        self._decoded = self._open_rows._replace(rows=rows)

    @together.together
    def decode(self, free: int) -> refill.Decoded:
        """Decodes until `free` rows are free, but at most `STEPS` tokens a row; returns what the rows hold then."""
        *there, rows, sampling = self._open_rows
        how = {"sampling": sampling, "within": self._within(rows)}
        rows = self.programs.decode(*there, rows, jnp.int32(free), jnp.int32(refill.STEPS), **how)
        self._decoded = self._open_rows._replace(rows=rows)
        return refill.Decoded(*sharding.fetch((rows.done, rows.length, *rows.out)))

    def close(self) -> None:
        """Releases the rows. If a call of all processes has failed, only this process's rows are released."""
        if together.busy():  # a call failed, and the others are not there to be told
            self._decoded = None
        else:
            self._let_go()

    @together.together
    def _let_go(self) -> None:
        self._decoded = None

    # -------------------------------------------------------------- inside

    @property
    def _open_rows(self) -> "_Decoded":
        assert self._decoded is not None, "rows are opened first"
        return self._decoded

    def _within(self, rows: Rows) -> int | None:
        """Returns a bound of the positions that rows fill after `STEPS` more tokens; None if the device finds it out."""
        if attention.loops(self.mesh):
            return None
        filled, done = sharding.fetch((rows.filled, rows.done))
        return bucket(int(np.where(done, 0, filled).max()) + refill.STEPS, attention.AT_ONCE)

    @property
    def _multiple(self) -> int:
        return sharding.row_multiple(self.mesh)

    def _trees(self) -> dict[str, Any]:
        return {"adapter": self.policy, "optimizer": self.state, "reference": self.reference}

    def _passes(self, batch: Batch, most: int) -> list[packing.Pass]:
        cost = packing.cost(self.mesh.devices.flat[0].platform, attention_reach(self.model.config))
        return packing.passes(batch, cost, most=most, shards=self._multiple)

    def _said(self, batch: Batch, program: Callable[[Packed], Any]) -> Any:
        """Applies a program to a batch's packed rows; returns its results for every query, as numpy, in batch order."""
        made = self._passes(batch, len(batch.prompt))
        rows = (packing.laid_out(batch, one, shards=self._multiple)[1] for one in made)
        found = sharding.fetch([program(sharding.put_rows(self.mesh, packed)) for packed in rows])
        return jax.tree.map(lambda *parts: packing.reunited(parts, made), *found)

    def put(self, batch: Batch, one: packing.Pass) -> tuple[Batch, Packed]:
        """Puts a pass of the batch on the devices; returns its queries and its packed rows. float64 becomes float32."""
        data = packing.laid_out(batch, one, shards=self._multiple)
        narrow = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x, data)
        return sharding.put_rows(self.mesh, narrow)


def load(config: ConfigDict, *, planned: bool = False) -> weights.Loaded:
    """Loads weights, model config and tokenizer of the base model; no weight is put on a device.

    Turns on the compile cache first, if the config asks for it.

    Args:
        planned: whether nothing will be computed, so that the mesh need not fit the devices.

    Raises:
        UserError: the mesh does not fit the devices (found before anything is read), or the model cannot be read.
    """
    if config.model.compile_cache:
        compilation.keep()
    if not planned:
        sharding.make_mesh(**config.mesh)
    return weights.load(config.model.path, config.model.revision)


def fast_dtype(config: ConfigDict) -> str:
    """Returns the dtype in which this config's devices compute fastest.

    That is bfloat16 on accelerators (on GPUs from Ampere on) and on processors with AMX, float32 elsewhere.

    Raises:
        UserError: JAX finds no device.
    """
    device = sharding.devices()[0]
    if device.platform == "cpu":
        fast = processor.bfloat16()
    else:
        generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of an NVIDIA GPU
        fast = not generation.isdigit() or int(generation) >= 8
    return "bfloat16" if fast else "float32"


def count(config: ConfigDict, loaded: weights.Loaded) -> tuple[int, int]:
    """Returns the numbers of parameters of the base and of the adapter."""
    base = sum(math.prod(shape) for shape in expected_shapes(loaded.config).values())
    return base, adapters.count(adapters.start(config, loaded.config))


def transposed(loaded: weights.Loaded) -> bool:
    """Says whether the base keeps its linear weights as [in, out]."""
    return FAMILIES[loaded.config.family].transposed


def use_scan(setting: str, platform: str | None = None) -> bool:
    """Says whether layers are scanned: by default on GPU and TPU, but not on CPU, where scanning copies the weights.

    Args:
        setting: config.model.layers.
        platform: where the programs will run; jax's default backend if it is not given.
    """
    return (platform or jax.default_backend()) != "cpu" if setting == "auto" else setting == "scan"


def make_model(config: ConfigDict, model_config: ModelConfig, mesh: Mesh, *, platform: str | None = None) -> Model:
    """Creates the decoder that a config asks for, without weights, for the devices of a mesh.

    Args:
        platform: the platform that the devices stand for, if they are simulated.

    Raises:
        UserError: the attention that the config names cannot work on these devices or for this model.
    """
    present, dtype = mesh.devices.flat[0].platform, jnp.dtype(config.model.dtype)
    return Model.create(
        model_config,
        dtype=dtype,
        scan=use_scan(config.model.layers, platform or present),
        remat=config.model.remat,
        attention=attention.choose(
            config.model.attention,
            platform=present,
            dtype=dtype,
            softcap=model_config.attention_softcap,
            head_dim=model_config.head_dim,
        ),
        mesh=mesh,
    )


def notes(backend: JaxBackend) -> list[str]:
    """Returns what a user should know before the run starts, one line each."""
    mesh = backend.mesh
    return [*sharding.notes(mesh, kv_heads=backend.model.config.num_kv_heads), *sharding.idle(mesh)]


def build(config: ConfigDict, loaded: weights.Loaded, *, head: str | None = None) -> JaxBackend:
    """Builds the backend that a config asks for, with its weights on the mesh.

    Args:
        head: name of a head that is trained beside the adapter, or alone ("score", if reward_model.train is "head").

    Raises:
        UserError: the mesh, the attention or a stored adapter does not fit the devices or the model.
    """
    return _assemble(config, loaded, head) if together.size() == 1 else _build(weights.pinned(config, loaded), head)


@together.together
def _build(config: ConfigDict, head: str | None) -> JaxBackend:
    algorithms.load(config.algorithm)  # the losses that process 0 sends may be of a module that only a config names
    return together.shared(_assemble(config, load(config), head))


def _assemble(config: ConfigDict, loaded: weights.Loaded, head: str | None) -> JaxBackend:
    mesh = sharding.make_mesh(**config.mesh)
    model = make_model(config, loaded.config, mesh)
    settings = adapters.settings(config)
    adapter = adapters.start(config, loaded.config)  # before the weights are read: it may be refused
    put = sharding.put_weight(mesh, kv_heads=loaded.config.num_kv_heads)
    place = sharding.place_weight(mesh, kv_heads=loaded.config.num_kv_heads)
    base = fill(model, loaded.weights, put, quantize=config.model.quantize, place=place)
    if settings.dora and config.model.adapter is None:
        adapter = lora.magnitudes(model, base, adapter, settings)
    if head:
        adapter = adapters.with_head(config, adapter, loaded.config, head)
    return JaxBackend(
        model,
        base,
        adapter,
        mesh,
        settings=settings,
        width=config.sampling.width,
        bucket=config.sampling.bucket,
        clip_norm=config.optimizer.clip_norm,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
        fold=config.sampling.fold_adapter,
    )
