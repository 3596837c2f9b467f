"""The decoder: transformers' module, filled with weights tensor by tensor, called with everything it depends on.

Ours are the mask that says which tokens see which, the KV cache, the adapter, and the operators of `torch_ascend.ops`.
Transformers' own cache, whose interface changes from version to version, is not used.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ple_jax.core.errors import UserError
from ple_jax.models.adapters import Adapter, Lora
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES
from ple_jax.models.layout import module_shapes
from torch_ascend import device as devices
from torch_ascend import lora
from torch_ascend.attention import attend_cache
from torch_ascend.ops import Ops
from torch_ascend.quantize import Quantized

_ATTENTION = "ple_ops"  # our function's name among transformers' attention implementations


class Cache(NamedTuple):
    """A KV cache: keys and values of all source positions, [row, kv_head, source, dim] per layer, written in place."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return self.keys[0].shape[2]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, source: int, *, dtype: torch.dtype, device: torch.device) -> "Cache":
        shape = (rows, config.num_kv_heads, source, config.head_dim)
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)] for _ in range(2))
        return cls(keys, values)


class Model:
    """A frozen decoder on one device (or sharded over several), and how it is called."""

    def __init__(
        self, module: PreTrainedModel, config: ModelConfig, ops: Ops, device: torch.device, able: devices.Capabilities
    ):
        self.module, self.config, self.ops, self.device, self.able = module, config, ops, device, able
        self.decoder = getattr(module, module.base_model_prefix)
        self.dtype = module.dtype
        self.windowed = any(kind.window is not None for kind in config.kinds)
        self.adapter: Adapter = {}  # of the call that runs
        self.numbers: lora.Numbers | None = None  # of its tokens
        self._cache: Cache | None = None
        self._prefix: Cache | None = None
        self._index: int | Tensor = 0

    def apply(
        self,
        adapter: Adapter,
        tokens: Int[Tensor, "row time"],
        *,
        positions: Int[Tensor, "row time"],
        mask: Bool[Tensor, "row time source"],
        source_positions: Int[Tensor, "row source"] | None = None,
        cache: Cache | None = None,
        index: int | Int[Tensor, " row"] = 0,
        prefix: Cache | None = None,
        numbers: lora.Numbers | None = None,
    ) -> Float[Tensor, "row time hidden"]:
        """Computes the final hidden states, after the last norm.

        Args:
            adapter: a dict of tensors; {} for the base alone.
            mask: whether a token may see a source position; a cache is read as far as the mask goes.
            source_positions: positions of what is in the cache (default: `positions`), read if a layer has a window.
            cache: keys and values are written to it, and read from it.
            index: where they are written: from this position on, or with one token per row at a position per row.
            prefix: keys and values of one row, to which all rows may attend in a call with one token per row; `mask` and
                `source_positions` begin with it.
            numbers: of the tokens among all tokens of a batch; they determine the noise of dropout.
        """
        visible = mask[:, None]
        if self.windowed:  # how far back every source lies: each layer cuts at its own window
            source = positions if source_positions is None else source_positions
            distance = positions[:, None, :, None] - source[:, None, None, :]
            visible = torch.where(visible, distance, -1).to(torch.int32)
        self.adapter, self.numbers = adapter, numbers
        self._cache, self._prefix, self._index = cache, prefix, index
        try:
            out = self.decoder(input_ids=tokens, attention_mask=visible, position_ids=positions, use_cache=False)
        finally:
            self._cache = self._prefix = None
            # adapter and numbers stay: recomputation in the backward pass reads them
            self.numbers = numbers if torch.is_grad_enabled() else None
        return out.last_hidden_state

    @functools.cached_property
    def head(self) -> Float[Tensor, "vocab hidden"]:
        """The output matrix; in fp32 where a matmul of bfloat16 cannot give fp32 logits."""
        weight = self.module.get_output_embeddings().weight
        return weight if self.able.mixed_matmul else weight.float()

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Computes logits in fp32, whatever the weights are: rounded to bfloat16, a logit of 20 would be off by 0.06."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.head.dtype == torch.float32:
            out = flat.float() @ self.head.T
        else:
            out = torch.mm(flat, self.head.T, out_dtype=torch.float32)
        if (cap := self.config.logits_softcap) is not None:
            out = cap * torch.tanh(out / cap)
        return out.reshape(*hidden.shape[:-1], -1)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float | None
    ) -> Float[Tensor, "row head time dim"]:
        if visible.dtype != torch.bool:
            window = self.config.kinds[self.config.pattern[layer]].window
            visible = visible >= 0 if window is None else (visible >= 0) & (visible < window)
        how: Any = {"scale": scale, "softcap": softcap}
        if self._cache is None:
            return self.ops.attention(query, key, value, visible, **how)
        cache, prefix, index = self._cache, self._prefix, self._index
        before = None if prefix is None else (prefix.keys[layer], prefix.values[layer])
        reach = visible.shape[-1] - (0 if prefix is None else prefix.length)
        key, value = (
            _written(whole[layer], part, index)[:, :, :reach] for whole, part in zip(cache, (key, value), strict=True)
        )
        if isinstance(index, Tensor) and self.holds_prefix:
            return attend_cache(query, key, value, visible, prefix=before, **how)
        return self.ops.attention(query, key, value, visible, **how)

    @property
    def holds_prefix(self) -> bool:
        """Whether decoding attends to the cache in blocks, and to a prefix that is held once for all rows.

        If scores in float32 would need a copy of the keys, or a part of a cache might be copied to be read, each row has the
        prefix in its own cache instead, and the whole of that is read at once.
        """
        return self.able.strided and (self.dtype == torch.float32 or self.able.mixed_matmul)

    def layers(self) -> nn.ModuleList:
        return self.module.get_submodule(our_names(FAMILIES[self.config.family].layers))


def _written(whole: Tensor, part: Float[Tensor, "row kv time dim"], index: int | Tensor) -> Tensor:
    """Writes keys or values to a layer's cache in place, from `index` on or at one position per row; returns that cache."""
    if isinstance(index, int):
        whole[:, :, index : index + part.shape[2]] = part
        return whole
    rows, heads, length, dim = whole.shape
    first = torch.arange(rows * heads, device=whole.device).view(rows, heads) * length
    whole.view(-1, dim).index_copy_(0, (first + index[:, None]).flatten(), part.reshape(-1, dim))
    return whole


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes attention for transformers' attention modules, which call this by its registered name."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.owner.attend(module.layer_idx, query, key, value, attention_mask, scale, softcap).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)


# ---------------------------------------------------------------- from a checkpoint to a module


def create(
    config: ModelConfig,
    raw: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    able: devices.Capabilities | None = None,
    remat: str = "none",
) -> Model:
    """Creates the decoder of a config.json with its parameters on the meta device: `fill` gives them weights.

    Args:
        raw: the config.json.
        able: what the device can do; it is looked up if it is not given.
        remat: what the backward pass recomputes: none | dots (all but matmuls) | full.

    Raises:
        UserError: transformers does not take this config.json.
    """
    try:
        read = AutoConfig.for_model(**raw.get("text_config", raw))  # of a model with images, the language model
    except Exception as error:  # it checks values in many places, each of which raises what it likes
        why = " ".join(str(error).split())[:300]
        raise UserError(f"transformers does not take this model's config.json: {why}") from error
    read.tie_word_embeddings = config.tie_embeddings
    with _parameters_on_meta(dtype):
        module = AutoModelForCausalLM.from_config(read, attn_implementation=_ATTENTION, dtype=dtype)
    module.eval()  # no dropout of the base's own
    model = Model(module.requires_grad_(False), config, ops, device, able or devices.capabilities(device))
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            part.owner = model
    if remat != "none":
        for layer in model.layers():
            layer.forward = _checkpointed(layer.forward, remat)
    return model


@contextlib.contextmanager
def _parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Opens a context in which new modules have parameters without memory, and buffers (rotary frequencies) with values."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _checkpointed(forward: Callable[..., Tensor], remat: str) -> Callable[..., Tensor]:
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in matmuls else CheckpointPolicy.PREFER_RECOMPUTE

    options = {}
    if remat == "dots":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return recomputed


def adapt(model: Model, settings: Lora, paths: Iterable[str]) -> None:
    """Puts `lora.Linear` in the place of the modules with these paths."""
    transposed = FAMILIES[model.config.family].transposed
    for path in paths:
        make = functools.partial(
            lora.Linear, path=path, settings=settings, current=lambda: model.adapter, numbers=lambda: model.numbers,
            transposed=transposed,
        )
        _replace(model, path, make)


def quantize(model: Model, kind: str) -> None:
    """Puts `quantize.Quantized` in the place of every linear module of the layers.

    Raises:
        UserError: the layers are mixtures of experts, which are not linear modules.
    """
    if model.config.experts:
        raise UserError("the torch backend does not quantise experts; take --config.model.quantize=none, or --backend=jax")
    for path, *_ in module_shapes(model.config):
        _replace(model, path, lambda base: Quantized(base, kind, transposed=FAMILIES[model.config.family].transposed))


def _replace(model: Model, path: str, make: Callable[[nn.Module], nn.Module]) -> None:
    name = our_names(path)
    parent, _, last = name.rpartition(".")
    setattr(model.module.get_submodule(parent), last, make(model.module.get_submodule(name)))


def fill(model: Model, weights: Mapping[str, np.ndarray], *, layer_done: Callable[[nn.Module], None] | None = None) -> None:
    """Gives every parameter its weights, in the model's dtype and on its device; the host holds few at a time.

    Args:
        weights: by Hugging Face's names, as `ple_jax.models.weights.load` gives them.
        layer_done: called with every layer as soon as it is whole, and before the next one is read. It may shard it.
    """
    own, family = {our_names(name): name for name in weights}, FAMILIES[model.config.family]
    head = next(n for n, part in model.module.named_modules() if part is model.module.get_output_embeddings())

    def place(module: nn.Module, prefix: str) -> None:
        for name, part in module.named_modules():
            if isinstance(part, Quantized) and part.values is None:
                stored = own[f"{prefix}{name}.weight".replace(".base.", ".")]
                part.fill(_tensor(weights[stored], stored).to(model.device))
        for name, parameter in list(module.named_parameters()):
            if parameter.device.type != "meta" or name == f"{head}.weight":
                continue
            parent, _, last = name.rpartition(".")
            values = _read(model.config, weights, own, f"{prefix}{name}", parameter)
            filled = nn.Parameter(values.to(model.device, model.dtype), requires_grad=False)
            module.get_submodule(parent).register_parameter(last, filled)

    for i, layer in enumerate(model.layers()):
        place(layer, f"{our_names(family.layers)}.{i}.")
        if layer_done is not None:
            layer_done(layer)
    place(model.module, "")
    output = model.decoder.get_input_embeddings().weight
    if not model.config.tie_embeddings:
        array = weights[f"{family.head}.weight"]
        output = nn.Parameter(_tensor(array, head, output).to(model.device, model.dtype), requires_grad=False)
    model.module.get_output_embeddings().weight = output
    for part in model.module.modules():  # rotary frequencies
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(model.device))


def our_names(name: str) -> str:
    """Returns the module tree's path for a path of the checkpoint.

    If the checkpoint is of a model with images, its language model stands alone here.
    """
    return name.replace(".language_model", "")


def _read(
    config: ModelConfig, weights: Mapping[str, np.ndarray], own: Mapping[str, str], name: str, like: nn.Parameter
) -> Tensor:
    """Reads a parameter's values, in the checkpoint's dtype."""
    stored = name.replace(".base.", ".")  # a `lora.Linear` holds the module it stands for
    if stored in own:
        return _tensor(weights[own[stored]], stored, like)
    if ".experts." in stored or stored.endswith(".gate.weight"):
        return _tensor(_experts(config, weights, stored), stored, like)
    raise UserError(f"{type(like).__name__} {stored} of transformers' {config.family} model is not among the weights")


def _tensor(array: np.ndarray, name: str, like: nn.Parameter | None = None) -> Tensor:
    if like is not None and array.shape != tuple(like.shape):
        raise UserError(f"tensor {name} has shape {array.shape}, transformers' model wants {tuple(like.shape)}")
    array = np.require(array, requirements=["C", "W"])  # contiguous, and not a file's pages, which may not be written to
    if array.dtype.name == "bfloat16":  # ml_dtypes' is unknown to torch; its bits are the same
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _experts(config: ModelConfig, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Reads the router or the experts of one layer, as transformers has them.

    Experts' weights are [expert, 2 * inner, hidden] (gate and up) and [expert, hidden, inner] (down).
    """
    family = FAMILIES[config.family]
    layer = name.removeprefix(f"{family.layers}.").split(".")[0]
    prefix, names = f"{family.layers}.{layer}.", family.experts

    def of(kind: str, expert: int) -> np.ndarray:
        return weights[f"{prefix}{names[kind].format(expert)}.weight"]

    if name.endswith(".gate.weight"):
        return weights[f"{prefix}{names['router']}.weight"]
    if name.endswith("gate_up_proj"):
        return np.stack([np.concatenate([of("gate", i), of("up", i)]) for i in range(config.experts)])
    return np.stack([of("down", i) for i in range(config.experts)])
