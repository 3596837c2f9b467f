"""Every value of a config.json replaced by an odd one: read as transformers reads it, or refused in one line."""

import copy
import functools
import json
import math
import warnings

import families
import numpy as np
import pytest
from families import VARIANTS
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ple_jax.core.errors import UserError
from ple_jax.models.families import read
from ple_jax.models.layout import expected_shapes

ODD = (0, -1, 1, 3, 0.5, 1e300, 10**9, 10**30, 10**400, math.nan, math.inf, "", "text", "16", None, True, [], [1], {}, [[]])
_RAWS = {name: json.loads(families.config(variant).to_json_string(use_diff=False)) for name, variant in VARIANTS.items()}


def places(raw, path=()):
    """Every key of a config.json, those of nested objects included."""
    for key, value in raw.items():
        yield (*path, key)
        if isinstance(value, dict) and key != "vision_config":
            yield from places(value, (*path, key))


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    functools.reduce(dict.__getitem__, path[:-1], raw)[path[-1]] = value
    return raw


def outcome(raw):
    """The config, or None where it is refused in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read(raw, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
        return None


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_value_is_a_traceback(name, old):
    raw = families.older(_RAWS[name]) if old else _RAWS[name]
    assert outcome(raw) is not None
    for path in places(raw):
        for value in ODD:
            config = outcome(changed(raw, path, value))
            if config is not None:
                assert len(expected_shapes(config)) < 1e5
                assert min(config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) >= 1
                assert np.isfinite([*config.kinds[0].frequencies, config.kinds[0].rope_scale, config.norm_eps]).all()


SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.model == "LlamaForCausalLM"])
def test_what_both_take_means_the_same(name):
    """Sizes and rotary frequencies, of every odd value that transformers takes too."""
    raw, compared = _RAWS[name], 0
    extra = {"rope_theta": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    for start in (raw, families.older(raw), raw | extra):
        # no Llama has a partial rotation, and whether transformers' reads one depends on what else was imported
        for path in (path for path in places(start) if "partial_rotary_factor" not in path):
            for value in ODD:
                odd = changed(start, path, value)
                if (ours := outcome(odd)) is None:
                    continue
                try:
                    config = LlamaConfig(**copy.deepcopy(odd))
                    theirs = LlamaRotaryEmbedding(config)
                except Exception:  # whatever transformers raises: it does not take the value
                    continue
                compared += 1
                assert {a: getattr(ours, a) for a in SIZES} == {a: getattr(config, b) for a, b in SIZES.items()}, path
                kind, length = ours.kinds[0], theirs.inv_freq.shape[0]
                np.testing.assert_allclose(kind.frequencies[:length], theirs.inv_freq, rtol=1e-5, err_msg=f"{path} {value}")
                assert kind.rope_scale == pytest.approx(theirs.attention_scaling, rel=1e-6)
    assert compared > 100


def test_both_names_of_gemma_3s_rotary_settings():
    """rope_scaling comes on top of the full layers' settings, as in transformers."""
    raw = _RAWS["gemma3_text"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    theirs = AutoConfig.for_model(**copy.deepcopy(raw)).rope_parameters
    assert theirs["full_attention"]["factor"] == 2.0 and theirs["full_attention"]["rope_theta"] == 400.0
    kinds = read(raw, "config.json").kinds
    plain = 400.0 ** -(np.arange(0, 16, 2) / 16)
    assert any(np.allclose(kind.frequencies, plain / 2.0) for kind in kinds)
