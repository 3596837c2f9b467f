"""`TorchBackend`, the only holder of state, and how one is made."""

import functools
import math
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from ml_collections import ConfigDict
from torch import Tensor

from ple_jax import algorithms
from ple_jax.core.batches import decoding
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Loss, Outputs, Response, Sampling
from ple_jax.models import adapters, weights
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import expected_shapes, module_shapes
from torch_ascend import checkpoint, generate, lora, ops, sharding
from torch_ascend import device as devices
from torch_ascend import model as models
from torch_ascend.forward import Lazy, hidden_states, outputs
from torch_ascend.model import Model
from torch_ascend.ops import Ops


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
    ):
        self.model, self.width, self.bucket, self.clip_norm, self.seed = model, width, bucket, clip_norm, seed
        self.sharded, self.notes, self.steps = sharded, list(notes), 0
        self._adapter = lora.trainable(adapter, model.device)
        self._leaves = lora.leaves(self._adapter)
        self._optimizer = torch.optim.AdamW(
            self._leaves.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, foreach=True
        )
        for leaf in self._leaves.values():  # as it will be after the first step: a checkpoint always holds the same tensors
            self._optimizer.state[leaf] = {
                "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf),
            }  # fmt: skip
        self._reference = lora.frozen(self._adapter)  # the start adapter; a fresh one is the base itself

    # -------------------------------------------------------------- Backend

    @sharding.together
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
    ) -> list[Response]:
        """One response per prompt, decoded `width` rows at a time, which are spread over the processes."""
        responses: list[Response] = []
        done = functools.partial(sharding.all_done, whole=self.sharded)
        own, able = sharding.own_rows(self.width), devices.capabilities(self.model.device)
        for count, tokens, mask, noise in decoding(prompts, uniforms, width=self.width, smallest=self.bucket):
            out, lengths = generate.generate(
                self.model,
                self._adapter,
                self._to_device(tokens[own].astype(np.int64)),
                self._to_device(mask[own]),
                self._to_device(np.asarray(prefix, np.int64)),
                self._to_device(noise[own]),
                sampling=sampling,
                all_done=done,
                steps_per_sync=able.steps_per_sync,
                # collectives are not recorded, nor experts, whose kernels ask the host
                recorded=able.records and not self.sharded and not self.model.config.experts,
            )
            out, lengths = sharding.gather(out), sharding.gather(lengths)
            for ids, n in zip(out[:count].tolist(), lengths[:count].tolist(), strict=True):
                responses.append(Response(tuple(ids[:n]), finished=ids[n - 1] in sampling.eos))
        return responses

    def stream(
        self,
        prompt: Sequence[int],
        uniforms: Float32[np.ndarray, " max_new"],
        *,
        sampling: Sampling,
        base: bool = False,
    ) -> Iterator[int]:
        """The tokens of one response as they are sampled; of the base without the adapter, if `base`."""
        if self.sharded:
            raise UserError("a chat needs the whole base on one device; start it without torchrun, --config.mesh.fsdp=1")
        noise = self._to_device(np.asarray(uniforms, np.float32))
        return generate.stream(self.model, {} if base else self._adapter, prompt, noise, sampling=sampling)

    @sharding.together
    @torch.no_grad()
    def logprobs(self, batch: Batch, *, reference: bool = False, base: bool = False) -> Outputs:
        """Log-probabilities and entropy of a batch's response tokens under the policy, the frozen reference or the base."""
        adapter, rows = {} if base else self._reference if reference else self._adapter, len(batch.prompt)
        found = outputs(self.model, adapter, self._put(batch, rows), entropy=True)
        whole = [None if x is None else sharding.gather(x)[:rows].numpy() for x in found]
        return Outputs(*whole)

    @sharding.together
    @torch.no_grad()
    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """What the head says of every response."""
        rows = len(batch.prompt)
        _, found, _ = hidden_states(self.model, self._adapter, self._put(batch, rows))
        return sharding.gather(found)[:rows].numpy()

    @sharding.together
    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float) -> dict[str, float]:
        """One optimizer step on the mean loss over all rows of `batches`, gradients accumulated over them."""
        rows = max(len(b.prompt) for b in batches)
        share = 1 / sum(float(b.data["valid"].sum()) for b in batches)
        metrics: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            part = self._put(batch, rows)
            # dropout depends on the number of steps taken, which a checkpoint holds: a resumed run draws the same
            torch.manual_seed(np.random.SeedSequence([self.seed, self.steps, i]).generate_state(1)[0])
            said: Any = Lazy(self.model, self._adapter, part)
            value, named = loss(said, part)
            reduced = {name: (m * part.data["valid"]).sum() * share for name, m in {"loss": value, **named}.items()}
            reduced["loss"].backward()
            for name, m in reduced.items():
                metrics[name] = metrics.get(name, 0.0) + m.detach().to(torch.float32)
        return self._apply(metrics, lr)

    @sharding.together
    def freeze_reference(self) -> None:
        """The policy as it is now becomes the reference: the same base with a frozen copy of the adapter."""
        self._reference = lora.frozen(self._adapter)

    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter, and the head where there is one, under PEFT's names and in its layout."""
        host = {path: {k: x.detach().cpu().numpy() for k, x in module.items()} for path, module in self._adapter.items()}
        return adapters.to_peft(host)

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        """Commits a checkpoint; process 0 has all that is in it."""
        checkpoint.save(path, step, self._tensors(), {**meta, "optimizer_steps": self.steps}, keep=keep)

    @sharding.together
    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest checkpoint under `path`; its meta, or None if there is none."""
        found = sharding.from_first(lambda: checkpoint.restore(path))
        if found is None:
            return None
        tensors, meta = found
        own = self._tensors()
        checkpoint.check(tensors, own, path)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        self.steps = meta.pop("optimizer_steps")
        for state in self._optimizer.state.values():
            state["step"].fill_(self.steps)
        return meta

    def environment(self) -> dict[str, Any]:
        """Versions, devices and flags: what bit-identical results depend on."""
        return {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "device": devices.description(self.model.device),
            "platform": self.model.device.type,
            "ops": self.model.ops.name,
            "processes": sharding.row_multiple(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    # -------------------------------------------------------------- inside

    def _apply(self, metrics: dict[str, Tensor], lr: float) -> dict[str, float]:
        """Clips the accumulated gradients by their global norm, and takes an AdamW step."""
        for leaf in self._leaves.values():
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        grads = [leaf.grad for leaf in self._leaves.values()]
        values = torch.stack(list(metrics.values()))
        sharding.add_up(grads)
        sharding.add_up([values])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # as optax clips, without an epsilon in the denominator
        torch._foreach_mul_(grads, torch.where(norm < self.clip_norm, 1.0, self.clip_norm / norm))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        *numbers, norm = torch.cat([values, norm[None]]).tolist()
        return {**dict(zip(metrics, numbers, strict=True)), "grad_norm": norm}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training needs to go on."""
        tensors = {f"adapter/{name}": leaf for name, leaf in self._leaves.items()}
        tensors |= {f"reference/{name}": leaf for name, leaf in lora.leaves(self._reference).items()}
        for name, leaf in self._leaves.items():
            state = self._optimizer.state[leaf]
            tensors |= {f"{moment}/{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return tensors

    def _to_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.model.device)

    def _put(self, batch: Batch, rows: int) -> Batch:
        """This process's rows of the batch on its device, after filling up with copies of the first row that are not valid.

        Copies and not zeros: a loss that divides by its data would make NaN of zeros, and 0 * NaN is NaN.
        """
        rows = _round_up(rows, sharding.row_multiple())
        own = sharding.own_rows(rows)

        def placed(x: np.ndarray) -> Tensor:
            # as JAX has them: no float64, which NPUs lack; token ids index, so they are int64
            x = x.astype({"f": np.float32, "i": np.int64, "u": np.int64}.get(x.dtype.kind, x.dtype))
            return self._to_device(np.concatenate([x, np.repeat(x[:1], rows - len(x), 0)])[own])

        data = dict(batch.data)
        data["valid"] = np.concatenate([data["valid"], np.zeros(rows - len(batch.prompt), np.float32)])
        prompt, prompt_mask, response, response_mask = map(placed, batch[:4])
        placed_data = {name: placed(np.asarray(x)) for name, x in data.items()}
        return Batch(prompt, prompt_mask, response, response_mask, placed_data)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def check(config: ConfigDict, fsdp: int) -> None:
    """Refuses what a config may ask for and this backend has not, where the base is spread over `fsdp` devices."""
    sharding.check_tensor(config.mesh)
    if config.model.quantize != "none" and fsdp > 1:
        raise UserError(
            f"config.model.quantize is {config.model.quantize!r} and the base is to be spread over {fsdp} devices: the torch"
            " backend keeps a quantised base whole; set --config.mesh.fsdp=1, or --config.model.quantize=none"
        )


def load(config: ConfigDict) -> weights.Loaded:
    """Weights, model config and tokenizer of the base model; a device that is not there is refused before."""
    check(config, config.mesh.fsdp)
    devices.resolve(config.model.device)
    return _load(config.model.path, config.model.revision)


@functools.lru_cache(maxsize=1)  # `build`, which every process makes by itself, loads too
def _load(path: str, revision: str | None) -> weights.Loaded:
    return weights.load(path, revision)


def count(config: ConfigDict, loaded: weights.Loaded) -> tuple[int, int]:
    """Parameters of the base and of the adapter."""
    base = sum(math.prod(shape) for shape in expected_shapes(loaded.config).values())
    return base, adapters.count(adapters.start(config, loaded.config))


def base_bytes(config: ConfigDict, loaded: weights.Loaded) -> int:
    """What the base takes on a device; of a quantised one the layers' linear modules are smaller."""
    whole = getattr(torch, config.model.dtype).itemsize
    linear = sum(inp * out for *_, inp, out in module_shapes(loaded.config))
    others = sum(math.prod(shape) for shape in expected_shapes(loaded.config).values()) - linear
    return int(others * whole + linear * {"none": whole, "int8": 1, "nf4": 4.25 / 8}[config.model.quantize])


def transposed(loaded: weights.Loaded) -> bool:
    """Whether the base keeps its linear weights as [in, out]."""
    return FAMILIES[loaded.config.family].transposed


def notes(backend: TorchBackend) -> list[str]:
    """What a user should know before the run starts."""
    return backend.notes


def make_model(config: ConfigDict, loaded: weights.Loaded, device: torch.device, table: Ops) -> Model:
    """The decoder a config asks for, without weights, its linear modules ready for an adapter."""
    made = models.create(
        loaded.config,
        loaded.raw,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        ops=table,
        remat=config.model.remat,
    )
    if config.model.quantize != "none":
        models.quantize(made, config.model.quantize)
    models.adapt(made, adapters.settings(config), adapters.resolve(loaded.config, config.lora.targets))
    return made


def build(config: ConfigDict, loaded: weights.Loaded, *, head: str | None = None) -> TorchBackend:
    """The backend a config asks for, weights on the devices; a `head` of that name is trained too, or a score head alone."""
    return _build(config, head)


@sharding.together
def _build(config: ConfigDict, head: str | None) -> TorchBackend:
    algorithms.load(config.algorithm)  # the losses that process 0 sends may be of a module that only a config names
    device, loaded = devices.resolve(config.model.device), load(config)
    made = assemble(config, loaded, device, ops.choose(config.model.ops, device), head=head)
    _load.cache_clear()
    return sharding.shared(made)


def assemble(
    config: ConfigDict, loaded: weights.Loaded, device: torch.device, table: Ops, *, head: str | None
) -> TorchBackend:
    """The backend on a device, with the operators of `table`; as `build`."""
    settings = adapters.settings(config)
    adapter = adapters.start(config, loaded.config)  # before the weights are read: it may be refused
    model = make_model(config, loaded, device, table)
    said = [f"operators: {table.name}"] if device.type == "npu" else []
    weigh = base_bytes(config, loaded)
    data, fsdp, note = sharding.choose(config.mesh, weigh, device)
    check(config, fsdp)
    mesh = sharding.device_mesh(data, fsdp, device) if fsdp > 1 else None
    models.fill(model, loaded.weights, layer_done=mesh and functools.partial(sharding.shard_layer, mesh=mesh))
    if mesh is not None:
        sharding.shard_root(model.decoder, mesh)
    replaced = ops.install(model.module, table)
    if settings.dora and config.model.adapter is None:
        adapter = models.magnitudes(model, adapter)
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
        sharded=fsdp > 1,
        notes=[*said, *([f"fused: {', '.join(replaced)}"] if replaced else []), *([note] if note else [])],
    )
