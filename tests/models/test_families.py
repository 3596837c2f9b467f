"""Every family against transformers and PEFT: logits, greedy tokens, packed rows, gradients, names, and what is refused."""

import functools
import itertools
import json
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from decoded import responses, unpadded
from families import UNSUPPORTED, VARIANTS, WINDOW
from safetensors.numpy import save_file
from speed import quick
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ple_jax.backend import forward, generate, lora
from ple_jax.backend.model import Model, fill
from ple_jax.core.errors import UserError
from ple_jax.core.packing import pack
from ple_jax.core.types import Batch, Sampling
from ple_jax.models import adapters, peft
from ple_jax.models import weights as checkpoints
from ple_jax.models.families import read
from ple_jax.models.rope import frequencies
from ple_jax.models.tokenizer import byte_tokenizer

LENGTHS = (5, 14, 9)  # two of them longer than a window
WIDTH = max(LENGTHS)
LORA = adapters.Lora(rank=4, alpha=8.0)
# where we adapt less than PEFT: the part that reads and writes text of a model that also sees, and no experts
TARGETS = {"gemma3": r".*language_model.*_proj", **dict.fromkeys(("mixtral", "qwen3_moe"), r".*self_attn.*_proj")}

# what is compiled here runs once: most of the time would go into optimising it
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Family(NamedTuple):
    name: str
    theirs: Any  # transformers' model
    folder: Any
    loaded: checkpoints.Loaded
    models: dict[bool, Model]  # by scan
    bases: dict[bool, Any]

    @property
    def scan(self) -> bool:
        """Where one way is enough: scanned for every other variant."""
        return list(VARIANTS).index(self.name) % 2 == 0


@pytest.fixture(scope="module", params=quick(VARIANTS, "gpt2", "gemma3_text"))
def family(request, tmp_path_factory) -> Family:
    """One variant, saved by transformers and read by us."""
    theirs, folder = families.build(VARIANTS[request.param]), tmp_path_factory.mktemp(request.param)
    families.save(theirs, folder)
    loaded = checkpoints.load(str(folder))
    models = {scan: Model.create(loaded.config, dtype=jnp.float32, scan=scan) for scan in (False, True)}
    bases = {scan: fill(model, loaded.weights, lambda _, array: jnp.asarray(array)) for scan, model in models.items()}
    return Family(request.param, theirs, folder, loaded, models, bases)


def padded(side: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    column, length = np.arange(WIDTH)[None], np.array(LENGTHS)[:, None]
    mask = column >= WIDTH - length if side == "left" else column < length
    tokens = np.random.default_rng(seed).integers(1, 256, mask.shape)
    return np.where(mask, tokens, 0).astype(np.int32), mask


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        ids, attention = torch.tensor(tokens).long(), torch.tensor(mask).long()
        return model(input_ids=ids, attention_mask=attention, position_ids=positions).logits.numpy()


def seen(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [row, time], and what may be attended to [row, time, source]: what came before and is no padding."""
    time = mask.shape[1]
    return jnp.cumsum(mask.astype(jnp.int32), 1) - 1, jnp.tril(jnp.ones((time, time), bool))[None] & mask[:, None]


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("feature", [(v, f) for v in VARIANTS for f in VARIANTS[v].without], ids=" without ".join)
def test_the_feature_is_seen(feature):
    """Without it transformers itself says something else, so that agreeing with transformers means having it."""
    variant = VARIANTS[feature[0]]
    tokens, mask = padded("left")
    with_it, without = (torch_logits(families.build(variant, **c), tokens, mask) for c in ({}, variant.without[feature[1]]))
    assert np.abs(with_it - without)[mask].max() > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_transformers(family, scan):
    model = family.models[scan]

    @jit
    def ours(base, tokens, mask):
        positions, visible = seen(mask)
        hidden, _ = model.apply(base, {}, tokens, positions=positions, mask=visible)
        return model.logits(base, hidden)

    for side in ("left", "right"):
        tokens, mask = padded(side)
        theirs = torch_logits(family.theirs, tokens, mask)
        np.testing.assert_allclose(ours(family.bases[scan], tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the cache


def test_decoding_token_by_token_gives_the_same_logits(family):
    """The first tokens in one go, the others one at a time, each row at its own position."""
    model, prefill = family.models[family.scan], 4

    @jit
    def decode(base, tokens, mask):
        positions, visible = seen(mask)

        def some(cache, start, count):
            cut = [jax.lax.dynamic_slice_in_dim(x, start, count, 1) for x in (tokens, positions, visible)]
            hidden, cache = model.apply(
                base, {}, cut[0], positions=cut[1], mask=cut[2], cache=cache, index=start, source_positions=positions
            )
            return cache, model.logits(base, hidden)

        cache, first = some(model.empty_cache(len(LENGTHS), WIDTH, jnp.float32), 0, prefill)
        _, rest = jax.lax.scan(lambda cache, i: some(cache, i, 1), cache, jnp.arange(prefill, WIDTH))
        return jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], 1)

    tokens, mask = padded("left")
    theirs = torch_logits(family.theirs, tokens, mask)
    np.testing.assert_allclose(decode(family.bases[family.scan], tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


def test_greedy_tokens_equal_transformers(family):
    """Prompts of unequal lengths behind a prefix that is computed once for all of them."""
    model, new = family.models[not family.scan], 28
    prefix, prompt, mask, expected = decisive_prompts(family.theirs, WINDOW + 3, new)
    prompts = [(*prefix.tolist(), *own) for own in unpadded(prompt, mask)]
    noise, greedy = np.zeros((len(LENGTHS), new), np.float32), Sampling(new, (), temperature=0.0)
    how = {"sampling": greedy, "prefix": prefix.tolist()}
    found = responses(model, family.bases[not family.scan], {}, prompts, noise, **how)
    np.testing.assert_array_equal([r.tokens for r in found], expected)


@pytest.mark.parametrize("name", quick(["mistral", "gemma3_text", "gpt2"], "gemma3_text"))
def test_streamed_tokens_equal_transformers(name, tmp_path):
    """One right-padded prompt, as a conversation has it, in families whose positions or windows must be kept up."""
    theirs = families.build(VARIANTS[name])
    families.save(theirs, tmp_path)
    loaded = checkpoints.load(str(tmp_path))
    model = Model.create(loaded.config, dtype=jnp.float32, scan=True)
    base = fill(model, loaded.weights, lambda _, array: jnp.asarray(array))
    prefix, prompt, mask, expected = decisive_prompts(theirs, WINDOW + 3, 28)
    ids, noise = np.concatenate([prefix, prompt[0][mask[0]]]), np.zeros(28, np.float32)
    tokens = generate.stream(model, base, {}, ids, noise, sampling=Sampling(28, (), temperature=0.0))
    assert list(tokens) == expected[0].tolist()


def decisive_prompts(theirs, prefix_len: int, new: int) -> tuple[np.ndarray, ...]:
    """Prompts after which the best token is never within 1e-3 of the next: a near-tie would say nothing of either side."""
    for seed in itertools.count():
        prompt, mask = padded("left", seed)
        prefix = np.random.default_rng(seed).integers(1, 256, prefix_len).astype(np.int32)
        # transformers knows no shared prefix: it stands in every row, between padding and prompt
        ids, attention = np.zeros((2, len(LENGTHS), prefix_len + WIDTH), np.int64)
        for row, length in enumerate(LENGTHS):
            ids[row, WIDTH - length :] = np.concatenate([prefix, prompt[row][mask[row]]])
            attention[row, WIDTH - length :] = 1
        generated = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(attention),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(generated.logits, 1).topk(2).values
        if (best[..., 0] - best[..., 1]).min() > 1e-3:
            return prefix, prompt, mask, generated.sequences[:, ids.shape[1] :].numpy()
    raise AssertionError


# ---------------------------------------------------------------- LoRA and packed rows


def adapted(family: Family) -> Any:
    """PEFT's model with a random adapter on all linear modules of the language model."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=TARGETS.get(family.name, "all-linear"),
        fan_in_fan_out=family.name == "gpt2",  # its matrices are [in, out]
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(families.build(VARIANTS[family.name]), settings).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(rng.normal(0, 0.2, parameter.shape)))
    return model


def random_batch() -> Batch:
    """Three prompts with two responses each, all of unequal lengths."""
    rng = np.random.default_rng(1)
    prompt, prompt_mask = padded("left", 1)
    response_mask = np.arange(9)[None, None] < np.array([[9, 4], [1, 8], [6, 7]])[..., None]
    response = np.where(response_mask, rng.integers(1, 256, response_mask.shape), 0).astype(np.int32)
    return Batch(prompt, prompt_mask, response, response_mask, {"valid": np.ones(len(prompt), np.float32)})


def separate_logprobs(model, batch: Batch) -> torch.Tensor:
    """Every response after its prompt in a row of its own, without padding."""
    values = torch.zeros(batch.response.shape)
    for i, k in np.ndindex(batch.response.shape[:2]):
        prompt, response = batch.prompt[i][batch.prompt_mask[i]], batch.response[i, k][batch.response_mask[i, k]]
        ids = torch.tensor(np.concatenate([prompt, response])).long()[None]
        logp = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        values[i, k, : len(response)] = logp.gather(-1, torch.tensor(response).long()[:, None])[:, 0]
    return values


def test_packed_rows_and_their_gradients_equal_peft(family, tmp_path):
    """[prompt | response 1 | response 2] in one row: each response's log-probabilities, and what they ask of LoRA."""
    model, base, batch = family.models[family.scan], family.bases[family.scan], random_batch()
    theirs = adapted(family)
    theirs.save_pretrained(tmp_path)
    adapter = adapters.from_peft(peft.read(tmp_path)[0])
    weights = np.random.default_rng(2).normal(size=batch.response.shape).astype(np.float32)

    @jit
    def ours(base, adapter, packed):
        def total(adapter):
            logprobs = forward.outputs(model, base, lora.fuse(model, adapter, LORA), packed).logprobs
            return (weights * logprobs).sum(), logprobs

        return jax.grad(total, has_aux=True)(adapter)

    gradient, logprobs = ours(base, adapter, pack(batch))
    expected = separate_logprobs(theirs, batch)
    np.testing.assert_allclose(logprobs, expected.detach().numpy(), atol=1e-4, rtol=0)
    (torch.from_numpy(weights) * expected).sum().backward()
    named = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    gradient = adapters.to_peft(gradient)
    assert sorted(gradient) == sorted(named)
    for name, theirs_ in named.items():
        np.testing.assert_allclose(gradient[name], theirs_, atol=1e-4 * np.abs(theirs_).max(), rtol=0, err_msg=name)


def test_names_of_adapted_modules_are_those_of_peft(family):
    """What we would write for "all-linear" has the names and shapes of what PEFT would."""
    from peft import get_peft_model_state_dict

    theirs = {name: tuple(x.shape) for name, x in get_peft_model_state_dict(adapted(family)).items()}
    ours = adapters.to_peft(adapters.init(family.loaded.config, LORA, seed=0))
    assert {name: x.shape for name, x in ours.items()} == theirs


# ---------------------------------------------------------------- config.json


def write_config(folder, raw: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().save_pretrained(folder)


def raw_config(variant: families.Variant) -> dict[str, Any]:
    return json.loads(families.config(variant).to_json_string())


def test_config_of_transformers_4_says_the_same(family, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(family.folder / "model.safetensors")
    write_config(tmp_path, families.older(raw_config(VARIANTS[family.name])))
    assert checkpoints.load(str(tmp_path)).config == family.loaded.config


@pytest.mark.parametrize("kind", sorted({families.config(v).model_type for v in VARIANTS.values()}))
def test_defaults_are_those_of_transformers(kind):
    """A config.json may say no more than a model's sizes; of Gemma 3's (google/gemma-3-4b-it) it says half of those."""
    full = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string())
    text = full.get("text_config", full)
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "n_embd", "n_layer", "n_head"]
    if "gemma3" not in kind:
        sizes += ["num_attention_heads", "vocab_size"]
    short = {key: text[key] for key in ["model_type", *sizes] if key in text}
    if text is not full:
        short = {"model_type": kind, "text_config": short}
    assert read(short, "config.json") == read(full, "config.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    ],
    ids=str,
)
def test_frequencies_equal_transformers(rope):
    """At the sizes of real models; transformers' own are the buffers of a rotary embedding."""
    rope = {"rope_theta": 5e5, "original_max_position_embeddings": 8192} | rope
    settings = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope
    )
    theirs = LlamaRotaryEmbedding(settings)
    ours, scale = frequencies(rope | {"max_position_embeddings": 131072}, 128)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=1e-5)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "ours", "other"),
    [("gpt2", "transformer.", ""), ("gemma3", "model.language_model.", "language_model.model.")],
)
def test_other_names_of_the_same_weights(name, ours, other, tmp_path):
    """GPT-2's checkpoints on hubs hold the bare backbone; Gemma 3's put the language model outside."""
    theirs = families.build(VARIANTS[name])
    families.save(theirs, tmp_path)
    expected = checkpoints.load(str(tmp_path))
    weights = {key: expected.weights[key] for key in expected.weights}
    renamed = {key.replace(ours, other, 1): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    again = checkpoints.load(str(tmp_path))
    assert renamed.keys() != weights.keys() == dict(again.weights).keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again.weights[key], value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_families_are_refused(name, tmp_path):
    write_config(tmp_path, raw_config(UNSUPPORTED[name]))
    with pytest.raises(UserError, match=f"{name}.*supported") as error:
        checkpoints.load(str(tmp_path))
    for supported in {families.config(variant).model_type for variant in VARIANTS.values()}:
        assert supported in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"hidden_act": "relu6"}, "relu6"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse layer index"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_features_that_are_not_there_are_refused_by_name(name, change, says, tmp_path):
    write_config(tmp_path, raw_config(VARIANTS[name]) | change)
    with pytest.raises(UserError, match=says):
        checkpoints.load(str(tmp_path))
