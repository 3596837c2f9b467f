"""`TorchBackend`, the only object of this backend that holds state, and the functions that build it from a config."""

import functools
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from ml_collections import ConfigDict
from torch import Tensor

from ple_jax import algorithms
from ple_jax.core import packing, processor, refill, together
from ple_jax.core.batches import round_up
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Compiled, Loss, Outputs, Packed, Response, Sampling, Tell
from ple_jax.models import adapters, weights
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import attention_reach, expected_shapes, module_shapes
from torch_ascend import checkpoint, generate, lora, ops, sharding, train
from torch_ascend import device as devices
from torch_ascend import model as models
from torch_ascend.forward import CHUNK, Lazy, outputs
from torch_ascend.model import Cache, Model
from torch_ascend.ops import Ops
from torch_ascend.sharding import ALONE, Place, World


class _Decoded(NamedTuple):
    """What rows are decoded with: the cache of the shared prefix, this process's rows, and the steps that decode them."""

    prefix: Cache | None
    rows: generate.Rows
    sampling: Sampling
    decode: generate.Decoding


class TorchBackend:
    """The `Backend` of PyTorch: base weights, adapter, optimizer state and reference adapter, on this process's device."""

    def __init__(
        self,
        model: Model,
        adapter: adapters.Adapter,
        *,
        width: int,
        bucket: int,
        clip_norm: float,
        weight_decay: float,
        seed: int = 0,
        sharded: bool = False,
        notes: Sequence[str] = (),
        world: World = ALONE,
    ):
        self.model, self.width, self.bucket, self.clip_norm, self.seed = model, width, bucket, clip_norm, seed
        self.sharded, self.notes, self.world, self.steps = sharded, list(notes), world, 0
        self.policy = lora.trainable(adapter, model.device)
        self.leaves = lora.leaves(self.policy)
        self.optimizer = train.optimizer(self.leaves, weight_decay=weight_decay)
        self.reference = lora.frozen(self.policy)  # the start adapter; a fresh one is the base itself
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
        """Samples one response per prompt, `width` of them at a time, in the rows of all processes.

        Arguments are as in `core.types.Backend`.
        """
        requests = refill.Requests([tuple(prompt) for prompt in prompts], uniforms, sampling, tuple(prefix))
        how = {"width": self.width, "smallest": self.bucket, "lanes": sharding.row_multiple(self.world)}
        return refill.sample(self, requests, **how, known=known, tell=tell)

    def stream(
        self,
        prompt: Sequence[int],
        uniforms: Float32[np.ndarray, " max_new"],
        *,
        sampling: Sampling,
        base: bool = False,
    ) -> Iterator[int]:
        """Returns an iterator over the tokens of one response as they are sampled. With `base` the adapter is not used.

        Raises UserError if the base is spread over several devices.
        """
        if self.sharded:
            raise UserError("a chat needs the whole base on one device; start it without torchrun, --config.mesh.fsdp=1")
        noise = self._to_device(np.asarray(uniforms, np.float32))
        return generate.stream(self.model, {} if base else self.policy, prompt, noise, sampling=sampling)

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
        say = functools.partial(outputs, self.model, adapter, entropy=entropy, temperature=temperature)
        return Outputs(*self._said(batch, say))

    @together.together
    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """Computes the score head's value for every response."""
        return self._said(batch, lambda packed: [Lazy(self.model, self.policy, packed).scores])[0]

    @together.together
    def update(
        self, batches: Sequence[Batch], loss: Loss, *, lr: float, temperature: float = 1.0
    ) -> dict[str, float]:
        """Takes one optimizer step on the mean loss over all rows of `batches`, with gradients accumulated over them.

        Returns the means of the metrics, and "grad_norm", the gradient's norm before clipping.
        """
        return self.step(self.accumulate(batches, loss, temperature), lr=lr)

    @together.together
    def freeze_reference(self) -> None:
        """Makes the current policy the reference: the same base with a frozen copy of the adapter.

        The optimiser starts afresh: moments of what was learned before would move the policy off it without any gradient.
        """
        self.reference, self.steps = lora.frozen(self.policy), 0
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()

    def adapter(self) -> dict[str, np.ndarray]:
        """Returns the adapter, and the head where there is one, under PEFT's names and in its layout."""
        host = {path: {k: x.detach().cpu().numpy() for k, x in module.items()} for path, module in self.policy.items()}
        return adapters.to_peft(host)

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        """Commits a checkpoint. Process 0 does so alone, since it holds everything that is in one."""
        checkpoint.save(path, step, self.tensors(), {**meta, "optimizer_steps": self.steps}, keep=keep)

    @together.together
    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest checkpoint under `path` and returns its meta; None if there is none.

        Raises:
            Damaged: a file of it is not as it was written.
            UserError: it holds other shapes, dtypes or names than this config needs.
        """
        found = together.from_first(lambda: checkpoint.restore(path))
        if found is None:
            return None
        tensors, meta = found
        own = self.tensors()
        checkpoint.check(tensors, own, path)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        self.steps = meta.pop("optimizer_steps")
        for state in self.optimizer.state.values():
            state["step"].fill_(self.steps)
        return meta

    def environment(self) -> dict[str, Any]:
        """Returns what bit-identical results depend on: versions, device, operators, processes, threads and processor."""
        return {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            **devices.versions(self.model.device),
            "device": devices.description(self.model.device),
            "platform": self.model.device.type,
            "ops": self.model.ops.name,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            **processor.environment(self.model.device.type),
        }

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Returns a context in which this process's work is traced. With several processes, that is the first one."""
        return devices.profile(self.model.device, folder)

    def compiled(self) -> Compiled:
        return Compiled(0, 0.0)

    # -------------------------------------------------------------- refill.Engine

    @together.together
    def open(self, shape: refill.Shape, sampling: Sampling) -> None:
        """Allocates this process's rows, all of them free, and computes the prefix."""
        model, prefix = self.model, None
        if shape.prefix:
            prefix = generate.read_prefix(model, self.policy, self._to_device(np.asarray(shape.prefix, np.int64)))
        room = shape.room + len(shape.prefix) * (not model.holds_prefix)
        rows = generate.Rows(model, shape.rows // sharding.row_multiple(self.world), room, shape.new, sampling.eos)
        # collectives are not recorded, nor experts, whose kernels ask the host
        recorded = model.able.records and not self.sharded and not model.config.experts
        self._decoded = _Decoded(
            prefix, rows, sampling, generate.Decoding(model, self.policy, prefix, rows, sampling, recorded=recorded)
        )

    @together.together
    def begin(self, group: refill.Group) -> None:
        """Reads this process's prompts of a group, and draws the first token of every response to them."""
        prefix, rows, sampling, _ = self._open_rows
        tokens, lengths = map(self._own, (group.tokens, group.lengths))
        mine, first = sharding.own_rows(self.world, len(group.row)), self.world.rank * len(rows.done)
        begins = (group.row[mine] >= first) & (group.row[mine] < first + len(rows.done))
        if not self.sharded and not begins.any():
            return
        prompt = group.prompt[mine][begins] - self.world.rank * len(lengths)
        chosen = (x.astype(np.int64) for x in (prompt, group.row[mine][begins] - first))
        rest = map(self._to_device, (*chosen, group.uniforms[mine][begins]))
        own = refill.Group(tokens, lengths, group.shared, *rest)
        generate.begin(self.model, self.policy, prefix if group.shared else None, rows, own, sampling=sampling)

    @together.together
    def decode(self, free: int) -> refill.Decoded:
        """Decodes until `free` of every process's rows are free, but at most `STEPS` tokens a row.

        Returns what the rows of all processes hold then.
        """
        _, rows, _, decode = self._open_rows
        enough = functools.partial(sharding.enough, self.world, free, whole=self.sharded)
        decode(enough, steps=refill.STEPS, unasked=self.model.able.steps_per_sync)
        found = (rows.done, rows.length, rows.tokens, rows.logprobs)
        return refill.Decoded(*(sharding.gather(self.world, x).numpy() for x in found))

    def close(self) -> None:
        """Releases the rows. If a call of all processes has failed, only this process's rows are released."""
        if together.busy():
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

    def accumulate(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, Tensor]:
        """Computes the first half of an update: leaves the gradients of this process's rows in the leaves' `.grad`.

        Returns this process's part of the metrics.
        """
        most = max(len(b.prompt) for b in batches)
        share = 1 / sum(float(b.data["valid"].sum()) for b in batches)
        metrics: dict[str, Tensor] = {}
        passes = ((i, self.put(batch, one)) for i, batch in enumerate(batches) for one in self._passes(batch, most))
        for i, data in passes:
            # dropout depends on the number of steps taken, which a checkpoint holds: a resumed run draws the same
            torch.manual_seed(np.random.SeedSequence([self.seed, self.steps, i]).generate_state(1)[0])
            found = train.gradients(self.model, loss, self.policy, *data, share, temperature)
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + value
        return metrics

    def step(self, metrics: dict[str, Tensor], *, lr: float) -> dict[str, float]:
        """Takes the second half of an update: an AdamW step on the gradients of all processes.

        Returns the metrics of all processes and "grad_norm", the gradient's norm before clipping; all are read at once.
        """
        values = torch.stack(list(metrics.values()))
        norm = train.apply_gradients(self.optimizer, self.leaves, clip_norm=self.clip_norm, lr=lr, world=self.world)
        sharding.add_up(self.world, [values])
        self.steps += 1
        *numbers, grad_norm = torch.cat([values, norm[None]]).tolist()
        return {**dict(zip(metrics, numbers, strict=True)), "grad_norm": grad_norm}

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor that training needs to go on, by name."""
        tensors = {f"adapter/{name}": leaf for name, leaf in self.leaves.items()}
        tensors |= {f"reference/{name}": leaf for name, leaf in lora.leaves(self.reference).items()}
        for name, leaf in self.leaves.items():
            state = self.optimizer.state[leaf]
            tensors |= {f"{moment}/{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return tensors

    def _to_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.model.device)

    def _passes(self, batch: Batch, most: int) -> list[packing.Pass]:
        """Divides a batch into the same passes as the JAX backend, so that both do the same."""
        cost = packing.cost(self.model.device.type, attention_reach(self.model.config))
        return packing.passes(batch, cost, most=most, shards=sharding.row_multiple(self.world))

    def _said(self, batch: Batch, say: Callable[[Packed], Iterable[Tensor | None]]) -> list[Any]:
        """Applies `say` to a batch's packed rows; returns its results for every query, as numpy, in batch order."""
        made, shards = self._passes(batch, len(batch.prompt)), sharding.row_multiple(self.world)
        rows = (packing.laid_out(batch, one, shards=shards)[1] for one in made)
        with torch.no_grad():
            found = [
                [None if x is None else sharding.gather(self.world, x).numpy() for x in say(self.put_rows(packed))]
                for packed in rows
            ]
        return [None if parts[0] is None else packing.reunited(parts, made) for parts in zip(*found, strict=True)]

    def put(self, batch: Batch, one: packing.Pass) -> tuple[Batch, Packed]:
        """Puts this process's part of a pass of the batch on its device; returns its queries and its packed rows."""
        whole, packed = packing.laid_out(batch, one, shards=sharding.row_multiple(self.world))
        prompt, prompt_mask, response, response_mask = map(self._own, whole[:4])
        data = {name: self._own(np.asarray(x)) for name, x in whole.data.items()}
        return Batch(prompt, prompt_mask, response, response_mask, data), self.put_rows(packed)

    def put_rows(self, packed: Packed) -> Packed:
        """Puts this process's packed rows on its device.

        The arrays of what is predicted are cut to the part that is read, in whole chunks, so that shapes are few.
        """
        used, first = round_up(int(packed.used), CHUNK), packed.targets.shape[1] - packed.before.shape[1]
        packed = packed._replace(targets=packed.targets[:, :used], before=packed.before[:, : used - first])
        return packed._replace(**{name: self._own(x) for name, x in packed._asdict().items() if x.ndim})

    def _own(self, x: np.ndarray) -> Tensor:
        """Puts this process's part of an array on its device.

        Floats become float32, as in JAX (NPUs have no float64), and integers int64, as indices have to be.
        """
        x = x.astype({"f": np.float32, "i": np.int64, "u": np.int64}.get(x.dtype.kind, x.dtype))
        return self._to_device(x[sharding.own_rows(self.world, len(x))])


def load(config: ConfigDict, *, planned: bool = False) -> weights.Loaded:
    """Loads weights, model config and tokenizer of the base model; no weight is put on a device.

    Args:
        planned: makes no difference here: how many devices there are is seen where the processes start.

    Raises:
        UserError: there is no such device, or the config asks for what this backend lacks (both found before anything is
            read), or the model cannot be read.
    """
    check(config, config.mesh.fsdp)
    devices.resolve(config.model.device)
    return _load(config.model.path, config.model.revision)


@functools.lru_cache(maxsize=1)  # `build`, which every process makes by itself, loads too
def _load(path: str, revision: str | None) -> weights.Loaded:
    return weights.load(path, revision)


def forget() -> None:
    """Drops the host's copy of the base that was loaded last."""
    _load.cache_clear()


def check(config: ConfigDict, fsdp: int) -> None:
    """Raises a UserError if the config asks for what this backend lacks, for a base that is spread over `fsdp` devices."""
    sharding.check_tensor(config.mesh)
    if config.sampling.fold_adapter:
        raise UserError(
            "config.sampling.fold_adapter is True, and the torch backend folds none: set it to False, or take --backend=jax"
        )
    if config.model.quantize != "none" and fsdp > 1:
        raise UserError(
            f"config.model.quantize is {config.model.quantize!r} and the base is to be spread over {fsdp} devices: the torch"
            " backend keeps a quantised base whole; set --config.mesh.fsdp=1, or --config.model.quantize=none"
        )


def fast_dtype(config: ConfigDict) -> str:
    """Returns the dtype in which this config's devices compute fastest.

    That is bfloat16 on accelerators (on GPUs from Ampere on) and on processors with AMX, float32 elsewhere.
    """
    device = devices.resolve(config.model.device)
    if device.type == "cpu":
        fast = processor.bfloat16()
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def count(config: ConfigDict, loaded: weights.Loaded) -> tuple[int, int]:
    """Returns the numbers of parameters of the base and of the adapter."""
    base = sum(math.prod(shape) for shape in expected_shapes(loaded.config).values())
    return base, adapters.count(adapters.start(config, loaded.config))


def transposed(loaded: weights.Loaded) -> bool:
    """Says whether the base keeps its linear weights as [in, out]."""
    return FAMILIES[loaded.config.family].transposed


def make_model(config: ConfigDict, loaded: weights.Loaded, place: Place, table: Ops) -> Model:
    """Creates the decoder that a config asks for, without weights, with its linear modules ready for an adapter."""
    made = models.create(
        loaded.config,
        loaded.raw,
        dtype=getattr(torch, config.model.dtype),
        device=place.device,
        ops=table,
        able=place.able,
        remat=config.model.remat,
    )
    if config.model.quantize != "none":
        models.quantize(made, config.model.quantize)
    paths = adapters.resolve(loaded.config, config.lora.targets)
    models.adapt(made, adapters.settings(config), paths)
    return made


def notes(backend: TorchBackend) -> list[str]:
    """Returns what a user should know before the run starts, one line each."""
    return backend.notes


def build(config: ConfigDict, loaded: weights.Loaded, *, head: str | None = None) -> TorchBackend:
    """Builds the backend that a config asks for, with its weights on the devices.

    Args:
        head: name of a head that is trained beside the adapter, or alone ("score", if reward_model.train is "head").

    Raises:
        UserError: there is no such device, the config asks for what this backend lacks, or a stored adapter does not fit.
    """
    return _build(config if together.size() == 1 else weights.pinned(config, loaded), head)


@together.together
def _build(config: ConfigDict, head: str | None) -> TorchBackend:
    algorithms.load(config.algorithm)  # the losses that process 0 sends may be of a module that only a config names
    device, loaded = devices.resolve(config.model.device), load(config)
    world = sharding.world()
    memory = sharding.least(world, devices.total_memory(device))
    place = choose_place(config, loaded.config, device, devices.capabilities(device), memory, world)
    made = assemble(config, loaded, place, ops.choose(config.model.ops, device), head=head)
    forget()
    return together.shared(made)


def choose_place(
    config: ConfigDict,
    model_config: ModelConfig,
    device: torch.device,
    able: devices.Capabilities,
    memory: int | None,
    world: World,
) -> Place:
    """Decides where this process builds its part of the backend.

    A base that does not fit into a device is spread over all devices, if the config has more than one copy of it.

    Args:
        memory: bytes of a device, the same in all processes; None if unknown.

    Raises:
        UserError: the config asks for what this backend lacks (see `check`).
    """
    needed = base_bytes(config, model_config)
    data, fsdp, note = sharding.choose(config.mesh, needed, memory)
    if config.model.quantize != "none" and fsdp > config.mesh.fsdp:  # it would be spread, by itself
        raise UserError(
            f"the base in {config.model.quantize} takes {needed / 2**30:.1f} GiB, which is too much for a device of"
            f" {(memory or 0) / 2**30:.1f}, and the torch backend keeps a quantised base whole: take a smaller one,"
            " --config.model.quantize=nf4, or none with --config.mesh.fsdp"
        )
    check(config, fsdp)
    mesh = sharding.make_mesh(device, data=data, fsdp=fsdp) if fsdp > 1 else None
    return Place(device, able, world, mesh, note)


def base_bytes(config: ConfigDict, model_config: ModelConfig) -> int:
    """Returns the bytes that the base takes on a device. If it is quantised, its layers' linear modules are smaller."""
    whole = getattr(torch, config.model.dtype).itemsize
    linear = sum(inp * out for *_, inp, out in module_shapes(model_config))
    others = sum(math.prod(shape) for shape in expected_shapes(model_config).values()) - linear
    return int(others * whole + linear * {"none": whole, "int8": 1, "nf4": 4.25 / 8}[config.model.quantize])


def assemble(config: ConfigDict, loaded: weights.Loaded, place: Place, table: Ops, *, head: str | None) -> TorchBackend:
    """Builds the backend in its place with the operators of `table`; `head` is as in `build`."""
    settings = adapters.settings(config)
    adapter = adapters.start(config, loaded.config)  # before the weights are read: it may be refused
    model = make_model(config, loaded, place, table)
    said = [f"operators: {table.name}"] if place.device.type == "npu" else devices.passed_over(config.model.device)
    shard = None if place.mesh is None else functools.partial(sharding.shard_layer, mesh=place.mesh)
    models.fill(model, loaded.weights, layer_done=shard)
    if place.mesh is not None:
        sharding.shard_root(model.decoder, place.mesh)
    if replaced := ops.install(model.module, table):
        said.append(f"fused: {', '.join(replaced)}")
    if settings.dora and config.model.adapter is None:
        adapter = lora.magnitudes(model.module, adapter, model.device)
    if head:
        adapter = adapters.with_head(config, adapter, loaded.config, head)
    return TorchBackend(
        model,
        adapter,
        width=config.sampling.width,
        bucket=config.sampling.bucket,
        clip_norm=config.optimizer.clip_norm,
        weight_decay=config.optimizer.weight_decay,
        seed=config.seed,
        sharded=place.mesh is not None,
        notes=[*said, *([place.note] if place.note else [])],
        world=place.world,
    )
