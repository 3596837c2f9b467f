"""The pure training step, and `JaxBackend`, the only holder of state."""

import functools
import math
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int
from ml_collections import ConfigDict

from ple_jax import checkpoint, generate, lora, sharding
from ple_jax.core.batches import decoding
from ple_jax.core.types import Batch, Loss, Outputs, Response, Sampling
from ple_jax.models import adapters, attention
from ple_jax.models import checkpoint as weights
from ple_jax.models.config import ModelConfig
from ple_jax.models.decoder import Model, fill, head_logits
from ple_jax.models.families import FAMILIES, expected_shapes

_CHUNK = 512  # tokens whose logits exist at one time: 100 MB in fp32 at a vocabulary of 49152


# ---------------------------------------------------------------- log-probabilities of response tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logprobs(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "row time hidden"],
    targets: Int[Array, "row time"],
    softcap: float | None = None,
    shards: int = 1,
) -> Float32[Array, "row time"]:
    """log softmax(logits)[target], chunked over time: [row, time, vocab] never exists, forward or backward.

    The gradient is with respect to `hidden` alone (the head is frozen) and is computed beside the value, so that the
    backward pass needs neither the logits nor a second pass over the vocabulary.

    Args:
        softcap: of the logits, where the family has one.
        shards: over how many devices rows are spread: chunks are as large as one device can take.
    """
    return _over_time(lambda h, y: _chunk(head, h, y, softcap)[0], hidden, targets, shards)


def _chunk(head: Array, hidden: Array, targets: Array, softcap: float | None) -> tuple[Array, Array, Array]:
    logits = head_logits(head, hidden, softcap=softcap)
    normaliser = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return target - normaliser, normaliser, logits


def _over_time(f: Any, hidden: Array, targets: Array, shards: int) -> Any:
    rows, time = targets.shape
    # chunks along time only: rows may be spread over devices
    size = max(1, min(time, _CHUNK * shards // rows))
    pad = -time % size
    h = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, size, hidden.shape[-1]).swapaxes(0, 1)
    y = jnp.pad(targets, ((0, 0), (0, pad))).reshape(rows, -1, size).swapaxes(0, 1)
    out = jax.lax.map(lambda part: f(*part), (h, y))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :time], out)


def _token_logprobs_forward(
    head: Array, hidden: Array, targets: Array, softcap: float | None, shards: int
) -> tuple[Array, tuple[Array, Array]]:
    def f(h: Array, y: Array) -> tuple[Array, Array]:
        value, normaliser, logits = _chunk(head, h, y, softcap)
        # subtracted in fp32, then rounded to the head's dtype: where p is nearly one, the rest is smaller than p's rounding
        error = jax.nn.one_hot(y, logits.shape[-1], dtype=jnp.float32) - jnp.exp(logits - normaliser[..., None])
        if softcap is not None:  # d tanh
            error = error * (1 - (logits / softcap) ** 2)
        return value, jnp.einsum("btv,vd->btd", error.astype(head.dtype), head, preferred_element_type=jnp.float32)

    value, gradient = _over_time(f, hidden, targets, shards)
    return value, (gradient, jnp.zeros((), hidden.dtype))


def _token_logprobs_backward(
    softcap: float | None, shards: int, saved: tuple[Array, Array], g: Array
) -> tuple[None, Array, None]:
    gradient, like = saved
    return None, (g[..., None] * gradient).astype(like.dtype), None


token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_entropy(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "row time hidden"],
    softcap: float | None = None,
    shards: int = 1,
) -> Float32[Array, "row time"]:
    """Entropy in nats of the next-token distribution, chunked like `token_logprobs`; not differentiated."""

    def f(h: Array, y: Array) -> Array:
        _, normaliser, logits = _chunk(head, h, y, softcap)
        logp = logits - normaliser[..., None]
        return -(jnp.exp(logp) * logp).sum(-1)

    return _over_time(f, hidden, jnp.zeros(hidden.shape[:2], jnp.int32), shards)


# ---------------------------------------------------------------- the packed row [prompt | response 1 | ... | response K]


def pack(batch: Batch) -> tuple[Array, Array, Array]:
    """Tokens, positions [row, time] and the block mask [row, time, time] of packed rows, time = P + K * R.

    Every response sees the prompt and itself, never another response; its positions start after the prompt's. A pair
    costs P + 2R tokens instead of 2(P + R).
    """
    rows, k, r = batch.response.shape
    prompt_len = batch.prompt_mask.astype(jnp.int32).sum(1)
    tokens = jnp.concatenate([batch.prompt, batch.response.reshape(rows, k * r)], 1)
    valid = jnp.concatenate([batch.prompt_mask, batch.response_mask.reshape(rows, k * r)], 1)
    segment = jnp.concatenate([jnp.full((batch.prompt.shape[1],), -1), jnp.repeat(jnp.arange(k), r)])
    prompt_position = jnp.cumsum(batch.prompt_mask.astype(jnp.int32), 1) - 1
    response_position = prompt_len[:, None] + jnp.tile(jnp.arange(r), k)[None]
    position = jnp.concatenate([prompt_position, response_position], 1)
    time = tokens.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))
    own = (segment[None] == -1) | (segment[None] == segment[:, None])
    return tokens, position, (causal & own)[None] & valid[:, None]


def outputs(
    model: Model,
    base: Any,
    fused: Any,
    batch: Batch,
    *,
    entropy: bool = False,
    score: Float[Array, "hidden 1"] | None = None,
    value: Float[Array, "hidden 1"] | None = None,
) -> Outputs:
    """What the model says of a batch. Logits exist for response tokens alone; the compiler leaves out what is not used.

    Args:
        score: a reward model's head, read at a response's last token.
        value: PPO's head, read where each token is predicted.
    """
    rows, k, r = batch.response.shape
    tokens, position, mask = pack(batch)
    hidden, _ = model.apply(base, fused, tokens, positions=position, mask=mask)
    p = batch.prompt.shape[1]
    # the last prompt token predicts the first token of every response
    first = jnp.broadcast_to(hidden[:, None, p - 1 : p], (rows, k, 1, hidden.shape[-1]))
    responses = hidden[:, p:].reshape(rows, k, r, -1)
    predicting = jnp.concatenate([first, responses[:, :, :-1]], 2).reshape(rows, k * r, -1)
    head, shards = model.head(base), 1
    if model.mesh is not None:
        # once: the loop over chunks would gather it in every turn
        head = sharding.gathered("head", head, model.mesh)
        shards = math.gcd(rows, sharding.row_multiple(model.mesh))

    def shaped(x: Array) -> Array:
        return jnp.where(batch.response_mask, x.reshape(rows, k, r), 0.0)

    scores = None
    if score is not None:
        last = jnp.maximum(batch.response_mask.astype(jnp.int32).sum(-1) - 1, 0)
        scores = _read(score, jnp.take_along_axis(responses, last[..., None, None], 2)[:, :, 0])
    softcap = model.config.logits_softcap
    logprobs = shaped(token_logprobs(head, predicting, batch.response.reshape(rows, k * r), softcap, shards))
    spread = shaped(token_entropy(head, predicting, softcap, shards)) if entropy else None
    values = None if value is None else shaped(_read(value, predicting))
    return Outputs(logprobs, spread, values, scores)


def _read(head: Float[Array, "hidden 1"], hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "*batch"]:
    # a sum, not a matmul, whose fp32 is bfloat16 on TPUs
    return (hidden.astype(jnp.float32) * head.reshape((1,) * (hidden.ndim - 1) + (-1,))).sum(-1)


def _heads(adapter: adapters.Adapter) -> dict[str, Array]:
    """The heads beside an adapter, as arguments of `outputs`."""
    return {name: adapter[name]["w"] for name in (adapters.SCORE, adapters.VALUE) if name in adapter}


# ---------------------------------------------------------------- the step


def optimizer(*, clip_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; the learning rate is applied by the caller, so that it may change."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(weight_decay),
    )


def gradients(
    model: Model, settings: adapters.Lora, loss: Loss, base: Any, adapter: Any, batch: Batch, share: Array, key: Array
) -> tuple[Any, dict[str, Array]]:
    """Gradients of the mean loss over the optimiser batch, this micro-batch's part; `share` is 1 / its real rows.

    `key` draws the adapter's dropout, where there is any.
    """

    def total(adapter: Any) -> tuple[Array, dict[str, Array]]:
        fused = lora.fuse(model, adapter, settings, base=base, dropout=key)
        value, metrics = loss(outputs(model, base, fused, batch, **_heads(adapter)), batch)
        valid = batch.data["valid"]
        reduced = {name: (m * valid).sum() * share for name, m in {"loss": value, **metrics}.items()}
        return reduced["loss"], reduced

    return jax.grad(total, has_aux=True)(adapter)


def apply_gradients(
    transform: optax.GradientTransformation, adapter: Any, state: Any, grads: Any, lr: Array
) -> tuple[Any, Any, Array]:
    """One AdamW step: new adapter, new optimizer state, the gradient's global norm before clipping."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python scalars and integer counters with arrays
        norm = optax.tree.norm(grads)
        updates, state = transform.update(grads, state, adapter)
        return jax.tree.map(lambda p, u: p - lr * u, adapter, updates), state, norm


class Programs(NamedTuple):
    """The compiled programs of a run, `jax.jit` objects. What `--mode=plan --topology` compiles is these too."""

    generate: Any  # (base, adapter, prompt, prompt_mask, prefix, uniforms, *, sampling) -> (tokens, lengths)
    outputs: Any  # (base, adapter, batch, *, entropy) -> Outputs
    scores: Any  # (base, adapter, batch) -> scores
    gradients: Any  # (base, adapter, batch, share, key, *, loss) -> (gradients, metrics)
    accumulate: Any  # (gradients, gradients) -> gradients; donates the first
    apply: Any  # (adapter, state, gradients, lr) -> (adapter, state, norm); donates adapter and state


def placement(adapter: adapters.Adapter, transform: optax.GradientTransformation, mesh: Mesh) -> tuple[Any, Any]:
    """NamedShardings of an adapter and of its optimizer state; shapes are all that is read."""
    return sharding.adapter(adapter, mesh), sharding.adapter(jax.eval_shape(transform.init, adapter), mesh)


def programs(
    model: Model, adapter: adapters.Adapter, mesh: Mesh, *, transform: optax.GradientTransformation, settings: adapters.Lora
) -> Programs:
    """The programs of one model on one mesh; nothing is compiled before it is called or lowered.

    Args:
        adapter: the adapter, or its shapes.
    """
    place = placement(adapter, transform, mesh)

    def fuse(base: Any, adapter: Any) -> Any:
        return lora.fuse(model, adapter, settings, base=base)

    return Programs(
        generate=jax.jit(
            lambda base, adapter, *data, sampling: generate.generate(
                model, base, fuse(base, adapter), *data, sampling=sampling
            ),
            static_argnames="sampling",
        ),
        outputs=jax.jit(
            lambda base, adapter, batch, entropy: outputs(
                model, base, fuse(base, adapter), batch, entropy=entropy, **_heads(adapter)
            ),
            static_argnames="entropy",
        ),
        scores=jax.jit(
            lambda base, adapter, batch: outputs(model, base, fuse(base, adapter), batch, **_heads(adapter)).scores
        ),
        gradients=jax.jit(
            lambda base, adapter, batch, share, key, loss: gradients(
                model, settings, loss, base, adapter, batch, share, key
            ),
            static_argnames="loss",
            out_shardings=(place[0], sharding.replicated(mesh)),
        ),
        accumulate=jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0),
        apply=jax.jit(
            functools.partial(apply_gradients, transform),
            donate_argnums=(0, 1),  # of the gradients no output has the shape left over
            out_shardings=(*place, sharding.replicated(mesh)),
        ),
    )


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
    ):
        self.model, self.mesh, self.base, self.width, self.bucket = model, mesh, base, width, bucket
        transform = optimizer(clip_norm=clip_norm, weight_decay=weight_decay)
        place, state_place = placement(adapter, transform, mesh)
        self._adapter = jax.device_put(adapter, place)
        with jax.numpy_dtype_promotion("standard"):
            self._state = jax.jit(transform.init, out_shardings=state_place)(self._adapter)
        self.freeze_reference()  # the start adapter; a fresh one is the base itself
        self._key = jax.random.key(seed)
        made = programs(model, adapter, mesh, transform=transform, settings=settings)
        self._generate, self._outputs, self._scores, self._gradients, self._accumulate, self._apply = made
        self._fuse = jax.jit(lambda base, adapter: lora.fuse(model, adapter, settings, base=base))

    # -------------------------------------------------------------- Backend

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
    ) -> list[Response]:
        """One response per prompt, decoded `width` rows at a time."""
        responses: list[Response] = []
        for count, *chunk in decoding(prompts, uniforms, width=self.width, smallest=self.bucket):
            tokens, mask, noise = sharding.put_rows(self.mesh, chunk)
            shared = jax.device_put(np.asarray(prefix, np.int32), sharding.replicated(self.mesh))
            out, lengths = jax.device_get(
                self._generate(self.base, self._adapter, tokens, mask, shared, noise, sampling=sampling)
            )
            for ids, n in zip(out[:count], lengths[:count], strict=True):
                chosen = tuple(int(t) for t in ids[:n])
                responses.append(Response(chosen, finished=chosen[-1] in sampling.eos))
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
        fused = {} if base else self._fuse(self.base, self._adapter)
        return generate.stream(self.model, self.base, fused, np.asarray(prompt, np.int32), uniforms, sampling=sampling)

    def logprobs(self, batch: Batch, *, reference: bool = False, base: bool = False) -> Outputs:
        """Log-probabilities and entropy of a batch's response tokens under the policy, the frozen reference or the base."""
        adapter = {} if base else self._reference if reference else self._adapter
        rows = len(batch.prompt)
        result = self._outputs(self.base, adapter, self._put(batch, _round_up(rows, self._multiple)), entropy=True)
        return jax.tree.map(lambda x: np.asarray(x)[:rows], jax.device_get(result))

    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """What the head says of every response."""
        part = self._put(batch, _round_up(len(batch.prompt), self._multiple))
        return np.asarray(jax.device_get(self._scores(self.base, self._adapter, part)))[: len(batch.prompt)]

    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float) -> dict[str, float]:
        """One optimizer step on the mean loss over all rows of `batches`, gradients accumulated over them."""
        rows = max(len(b.prompt) for b in batches)
        real = sum(float(b.data["valid"].sum()) for b in batches)
        share = jnp.float32(1 / real)
        grads: Any = None
        metrics: dict[str, float] = {}
        # dropout depends on the number of steps taken, which a checkpoint holds: a resumed run draws the same
        step = jax.random.fold_in(self._key, optax.tree.get(self._state, "count"))
        for i, batch in enumerate(batches):
            part = self._put(batch, _round_up(rows, self._multiple))
            key = jax.random.fold_in(step, i)
            new, values = self._gradients(self.base, self._adapter, part, share, key, loss=loss)
            grads = new if grads is None else self._accumulate(grads, new)
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        self._adapter, self._state, norm = self._apply(self._adapter, self._state, grads, jnp.float32(lr))
        return {**metrics, "grad_norm": float(norm)}

    def freeze_reference(self) -> None:
        """The policy as it is now becomes the reference: the same base with a frozen copy of the adapter."""
        self._reference = jax.tree.map(jnp.copy, self._adapter)

    def adapter(self) -> dict[str, np.ndarray]:
        return adapters.to_peft(jax.device_get(self._adapter))

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        checkpoint.save(path, step, self._trees(), meta, keep=keep)

    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest checkpoint under `path`; its meta, or None if there is none."""
        found = checkpoint.restore(path, self._trees())
        if found is None:
            return None
        trees, meta = found
        self._adapter, self._state, self._reference = trees["adapter"], trees["optimizer"], trees["reference"]
        return meta

    def environment(self) -> dict[str, Any]:
        devices = list(self.mesh.devices.flat)
        return {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")},
            "device": devices[0].device_kind,
            "platform": devices[0].platform,
            "mesh": ", ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items()),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }

    # -------------------------------------------------------------- inside

    @property
    def _multiple(self) -> int:
        return sharding.row_multiple(self.mesh)

    def _trees(self) -> dict[str, Any]:
        return {"adapter": self._adapter, "optimizer": self._state, "reference": self._reference}

    def _put(self, batch: Batch, rows: int) -> Batch:
        """The batch on the devices, filled up to `rows` with copies of its first row that are not valid.

        Copies and not zeros: a loss that divides by its data would make NaN of zeros, and 0 * NaN is NaN.
        """

        def fill_up(x: np.ndarray) -> np.ndarray:
            x = np.asarray(x, np.float32) if x.dtype == np.float64 else x
            return np.concatenate([x, np.repeat(x[:1], rows - len(x), 0)])

        filled = jax.tree.map(fill_up, batch)
        filled.data["valid"][len(batch.prompt) :] = 0
        return sharding.put_rows(self.mesh, filled)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def use_scan(setting: str, platform: str | None = None) -> bool:
    """Whether layers are scanned: on GPU and TPU by default, not on CPU, where scanning copies the weights.

    Args:
        setting: config.model.layers.
        platform: where the programs will run; jax's default backend if it is not given.
    """
    return (platform or jax.default_backend()) != "cpu" if setting == "auto" else setting == "scan"


def load(config: ConfigDict) -> weights.Loaded:
    """Weights, model config and tokenizer of the base model; a mesh that does not fit is refused before."""
    sharding.make_mesh(**config.mesh)
    return weights.load(config.model.path, config.model.revision)


def count(config: ConfigDict, loaded: weights.Loaded) -> tuple[int, int]:
    """Parameters of the base and of the adapter."""
    base = sum(math.prod(shape) for shape in expected_shapes(loaded.config).values())
    return base, adapters.count(adapters.start(config, loaded.config))


def transposed(loaded: weights.Loaded) -> bool:
    """Whether the base keeps its linear weights as [in, out]."""
    return FAMILIES[loaded.config.family].transposed


def make_model(config: ConfigDict, model_config: ModelConfig, mesh: Mesh, *, platform: str | None = None) -> Model:
    """The decoder a config asks for, on the devices of a mesh; `platform` is what these stand for, if they are simulated."""
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
    """What a user should know before the run starts."""
    return sharding.notes(backend.mesh, kv_heads=backend.model.config.num_kv_heads)


def build(config: ConfigDict, loaded: weights.Loaded, *, head: str | None = None) -> JaxBackend:
    """The backend a config asks for, weights on the mesh; a `head` of that name is trained too, or a score head alone."""
    mesh = sharding.make_mesh(**config.mesh)
    model = make_model(config, loaded.config, mesh)
    settings = adapters.settings(config)
    adapter = adapters.start(config, loaded.config)  # before the weights are read: it may be refused
    put = sharding.put_weight(mesh, kv_heads=loaded.config.num_kv_heads)
    base = fill(model, loaded.weights, put, quantize=config.model.quantize)
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
    )
