"""Every implementation of attention against a float64 oracle, forward and backward; the fused ones through the compilers."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from speed import quick

from ple_jax.backend import sharding
from ple_jax.backend.attention import AT_ONCE, BLOCK, attend, attend_cache, cache_length, choose
from ple_jax.core.errors import UserError

SCALE = 0.3


def oracle(q, k, v, mask, softcap, g):
    """Output and gradients of sum(out * g), in float64, one query at a time. Queries that see nothing give zero."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    for row, kv, group, time in np.ndindex(q.shape[:4]):
        seen = np.flatnonzero(mask[row, time])
        if not seen.size:
            continue
        keys, values, grad = k[row, kv, seen], v[row, kv, seen], g[row, kv, group, time]
        score = SCALE * keys @ q[row, kv, group, time]
        slope = np.ones_like(score)
        if softcap is not None:
            slope = 1 / np.cosh(score / softcap) ** 2
            score = softcap * np.tanh(score / softcap)
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        out[row, kv, group, time] = weight @ values
        dscore = weight * (values @ grad - weight @ (values @ grad)) * slope * SCALE
        dq[row, kv, group, time] = dscore @ keys
        dk[row, kv, seen] += np.outer(dscore, q[row, kv, group, time])
        dv[row, kv, seen] += np.outer(weight, grad)
    return out, dq, dk, dv


def causal(rows, time):
    return np.broadcast_to(np.tril(np.ones((time, time), bool)), (rows, time, time))


def left_padded(lengths, time):
    """Rows of these lengths at the right end; the padding sees nothing and is not seen."""
    real = np.arange(time)[None] >= time - np.array(lengths)[:, None]
    return causal(len(lengths), time) & real[:, None, :] & real[:, :, None]


def packed(prompt, responses, padding, time):
    """[padding | prompt | response 1 | ... | response K | padding]: a response sees the prompt and itself."""
    segment = np.full(time, -1)
    segment[padding : padding + prompt] = 0
    start = padding + prompt
    for i, length in enumerate(responses, 1):
        segment[start : start + length] = i
        start += length
    sees = (segment[None] == segment[:, None]) | (segment[None] == 0)
    return np.tril(sees) & (segment[None] >= 0) & (segment[:, None] >= 0)


def windowed(rows, time, window):
    distance = np.arange(time)[:, None] - np.arange(time)[None]
    return np.broadcast_to((distance >= 0) & (distance < window), (rows, time, time))


def prefill(rows, time, source):
    """A prompt written at the start of a longer cache."""
    return np.broadcast_to(np.arange(source)[None] <= np.arange(time)[:, None], (rows, time, source))


# name: mask [row, time, source], KV heads, queries per KV head, head_dim, soft cap
CASES = {
    "causal": (causal(2, 128), 1, 1, 32, None),
    "grouped": (causal(2, 130), 2, 3, 16, None),
    "left padding": (left_padded([40, 7, 1], 40), 2, 2, 16, None),
    "packed": (np.stack([packed(30, [50, 41], 9, 140), packed(100, [3, 20], 0, 140)]), 1, 2, 16, None),
    "window": (windowed(2, 150, 9), 1, 2, 16, None),
    "softcap": (left_padded([150, 21], 150), 1, 2, 16, 0.7),
    "whole tiles of padding": (left_padded([40, 500], 640), 1, 1, 8, None),
    "whole tiles outside the window": (windowed(1, 600, 40), 2, 1, 8, 2.0),
    "cache": (prefill(2, 20, 150), 2, 2, 16, None),
}


def inputs(mask, kv, group, dim, dtype=jnp.float32):
    rows, time, source = mask.shape
    rng = np.random.default_rng(0)
    shapes = [(rows, kv, group, time, dim), (rows, kv, source, dim), (rows, kv, source, dim), (rows, kv, group, time, dim)]
    q, k, v, g = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    g *= mask.any(-1)[:, None, None, :, None]  # nothing reads what a query that sees nothing gives
    return [jnp.asarray(x, dtype) for x in (q, k, v, g)]


def run(q, k, v, g, mask, softcap, implementation, mesh=None):
    """Output and the gradients of sum(out * g), jitted."""

    @jax.jit
    def f(q, k, v, g, mask):
        def forward(q, k, v):
            return attend(q, k, v, mask=mask, scale=SCALE, softcap=softcap, implementation=implementation, mesh=mesh)

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(g)

    return f(q, k, v, g, jnp.asarray(mask))


def check(actual, expected, mask, tolerance):
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in actual)  # of queries that see nothing too
    sees = mask.any(-1)[:, None, None, :, None]
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        a = np.asarray(a, np.float64)
        a = np.where(sees, a, 0) if name == "out" else a
        np.testing.assert_allclose(a, e, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("time", [130, 258, 390, 515])
def test_long_causal_rows_are_computed_in_parts(time, softcap):
    """One to four of them, some a position longer; packed rows, of which much is not visible anyway."""
    rng = np.random.default_rng(time)
    data = [rng.normal(size=(1, 1, *shape, 16)).astype(np.float32) for shape in ((2, time), (time,), (time,), (2, time))]
    mask = (packed(time // 3, [time // 4, time // 3], 5, time) | np.eye(time, dtype=bool))[None]

    @jax.jit
    def both(*x):
        how = {"mask": mask, "scale": SCALE, "softcap": softcap, "implementation": "xla", "causal": True}
        out, pull = jax.vjp(lambda *x: attend(*x, **how), *x[:3])
        return out, *pull(x[3])

    for ours, exact in zip(both(*data), oracle(*data[:3], mask, softcap, data[3]), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-4)
    call = jax.jit(lambda *x: attend(*x, mask=mask, scale=SCALE, implementation="xla", causal=True))
    assert (f"x{2 * time}x{time}xf32" in call.lower(*data[:3]).as_text()) == (time < 256)  # the scores of all


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("filled", [1, 32, 33, 77, 320])
def test_a_cache_is_read_in_blocks_as_far_as_it_is_filled(filled, softcap):
    """Blocks of which nothing is visible lie before and between others; what is after the last filled one is no number."""
    rng, length = np.random.default_rng(0), 320
    q, k, v = (rng.normal(size=(2, 2, *shape, 16)).astype(np.float32) for shape in ((3, 1), (length,), (length,)))
    mask = (np.arange(length) < filled)[None, None] & (rng.random((2, 1, length)) < 0.4)
    mask[0, :, 32:64] = False
    mask[1, :, :40] = False
    mask[:, :, filled - 1] = True
    end = -(-filled // BLOCK) * BLOCK
    expected = oracle(q, k, v, mask, softcap, np.ones(q.shape))[0]
    k[:, :, end:], v[:, :, end:] = np.nan, np.nan

    def read(start, size, rows):
        return tuple(jax.lax.dynamic_slice_in_dim(jnp.asarray(x)[rows], start, size, 2) for x in (k, v))

    @jax.jit
    def ours(q, mask, filled):
        how = {"length": length, "reach": filled, "mask": mask, "scale": SCALE, "softcap": softcap}
        return attend_cache(q, read, **how, looped=True)

    np.testing.assert_allclose(ours(q, mask, filled), expected, atol=1e-5)


def test_rows_are_read_in_parts_each_as_far_as_its_own_are_filled():
    """The longest row of one part is none of another's: what is after it there is no number. Parts change no bit."""
    rng, length, reach = np.random.default_rng(0), 320, np.array([3, 40, 0, 0, 290, 33, 1, 320, 64, 0, 0, 0], np.int32)
    q, k, v = (rng.normal(size=(12, 2, *shape, 16)).astype(np.float32) for shape in ((3, 1), (length,), (length,)))
    mask = (np.arange(length) < np.maximum(reach, 1)[:, None])[:, None]
    expected = oracle(q, k, v, mask, None, np.ones(q.shape))[0]
    for first, end in ((0, 64), (4, 320), (8, 64)):
        k[first : first + 4, :, end:], v[first : first + 4, :, end:] = np.nan, np.nan

    def attended(q, k, v, mask, reach, **how):
        def read(start, size, rows):
            return tuple(jax.lax.dynamic_slice_in_dim(x[rows], start, size, 2) for x in (k, v))

        return attend_cache(q, read, length=length, reach=reach, mask=mask, scale=SCALE, looped=True, **how)

    found, busy = jax.jit(functools.partial(attended, together=4))(q, k, v, mask, reach), reach > 0
    np.testing.assert_allclose(found[busy], expected[busy], atol=1e-5)
    alone = jax.jit(attended)(q[4:8], k[4:8], v[4:8], mask[4:8], reach[4:8])
    np.testing.assert_array_equal(found[4:8], alone)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_a_prefix_is_held_once_for_the_rows_that_see_it(dtype, tolerance):
    """Its keys and values stand before those of every row; the second row sees nothing of it."""
    rng, before, length = np.random.default_rng(0), 40, 32
    shapes = (2, 1), (before + length,), (before + length,)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, *shape, 16)), dtype) for shape in shapes)
    k, v = (x.at[:, :, :before].set(x[:1, :, :before]) for x in (k, v))
    mask = rng.random((3, 1, before + length)) < 0.4
    mask[1, :, :before] = False

    def read(start, size, rows):
        return tuple(jax.lax.dynamic_slice_in_dim(x[rows], before + start, size, 2) for x in (k, v))

    how = {"length": length, "reach": length, "mask": mask, "scale": SCALE, "softcap": 0.7, "looped": False}
    found = attend_cache(q, read, **how, prefix=(k[:1, :, :before], v[:1, :, :before]))
    expected = oracle(q, k, v, mask, 0.7, np.ones(q.shape))[0]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


def test_rows_that_read_nothing_are_numbers():
    """All rows of a part are done: what is computed for them goes into the cache, where another response begins."""
    length, reach = 320, jnp.array([0, 0, 5, 0], jnp.int32)

    def read(start, size, rows):
        return (jnp.ones((2, 1, size, 8)),) * 2

    q, mask = jnp.ones((4, 1, 1, 1, 8)), jnp.ones((4, 1, 1), bool)
    found = attend_cache(q, read, length=length, reach=reach, mask=mask, scale=1.0, looped=True, together=2)
    np.testing.assert_array_equal(found[:2], 0.0)
    np.testing.assert_allclose(found[2], 1.0)


def test_a_short_cache_is_read_at_once_and_of_a_long_one_large_blocks_on_an_accelerator():
    """As many of them as a number says; of what only the device knows all."""
    asked = []

    def read(start, size, rows):
        asked.append(size)
        return (jnp.zeros((1, 1, size, 8)),) * 2

    longer, short, long = AT_ONCE + BLOCK, jnp.int32(3), jnp.int32(AT_ONCE + 1)
    for length, reach, looped in (
        (AT_ONCE, short, True), (longer, short, True), (longer, long, False), (longer, AT_ONCE, False),
        (longer, 1000, False),
    ):  # fmt: skip
        q, mask = jnp.zeros((1, 1, 1, 1, 8)), jnp.ones((1, 1, length), bool)
        attend_cache(q, read, length=length, reach=reach, mask=mask, scale=1.0, looped=looped)
    assert asked == [AT_ONCE, BLOCK, AT_ONCE, BLOCK, AT_ONCE, AT_ONCE, BLOCK]
    assert [cache_length(n) for n in (1, AT_ONCE, AT_ONCE + 1)] == [1, AT_ONCE, AT_ONCE + BLOCK]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("splash_interpret", marks=pytest.mark.slow)])
def test_equals_the_oracle(case, implementation):
    mask, kv, group, dim, softcap = CASES[case]
    args = inputs(mask, kv, group, dim)
    expected = oracle(*args[:3], mask, softcap, args[3])
    check(run(*args, mask, softcap, implementation), expected, mask, 2e-5)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[-1] is None])
def test_what_cudnn_is_given_equals_the_oracle(case, monkeypatch):
    """Layout, padding, mask and scale of the call, with jax's own einsums in the place of the GPU's kernel."""
    real = jax.nn.dot_product_attention

    def in_xla(query, *args, implementation, **kwargs):
        assert implementation == "cudnn" and query.shape[1] % 128 == 0
        return real(query, *args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    mask, kv, group, dim, _ = CASES[case]
    args = inputs(mask, kv, group, dim)
    check(run(*args, mask, None, "cudnn"), oracle(*args[:3], mask, None, args[3]), mask, 2e-5)


@pytest.mark.parametrize("implementation", ["xla", "splash_interpret"])
def test_bfloat16(implementation):
    mask, kv, group, dim, softcap = CASES["softcap"]
    args = inputs(mask, kv, group, dim, jnp.bfloat16)
    out = run(*args, mask, softcap, implementation)
    assert all(x.dtype == jnp.bfloat16 for x in out)
    # bfloat16 keeps 8 bits; with bfloat16 scores or softmax the error would be several times this
    check(out, oracle(*args[:3], mask, softcap, args[3]), mask, 4e-2)


SHARDED = {"divides": (2, 4), "heads replicated": (3, 4), "rows replicated": (2, 3)}  # heads of keys and values, rows


@pytest.mark.parametrize("name", quick(SHARDED, "divides"))
def test_sharded_equals_the_oracle(name):
    kv, rows = SHARDED[name]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    mask = left_padded([20, 5, 17, 1][:rows], 20)
    args = inputs(mask, kv, 2, 8)
    if rows == 4:
        args = sharding.put_rows(mesh, args)
    check(run(*args, mask, None, "splash_interpret", mesh), oracle(*args[:3], mask, None, args[3]), mask, 2e-5)


def test_sharded_rows_and_heads_stay_where_they_are():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spec = PartitionSpec(sharding.BATCH, "tensor")
    mask = causal(4, 16)
    q, k, v, _ = (jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs(mask, 2, 2, 8))
    call = jax.jit(lambda *x: attend(*x, mask=jnp.asarray(mask), scale=SCALE, implementation="splash_interpret", mesh=mesh))
    compiled = call.lower(q, k, v).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.output_shardings.spec == spec


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_decoding_takes_the_einsums(implementation):
    mask = prefill(2, 1, 33) | (np.arange(33) < 9)
    q, k, v, _ = inputs(mask, 2, 2, 16)
    fused, plain = (attend(q, k, v, mask=jnp.asarray(mask), scale=SCALE, implementation=i) for i in (implementation, "xla"))
    np.testing.assert_array_equal(fused, plain)


def test_unknown_implementations_and_a_lost_soft_cap_raise():
    mask = causal(1, 4)
    q, k, v, _ = inputs(mask, 1, 1, 8)
    for implementation, softcap in (("auto", None), ("cudnn", 50.0)):
        with pytest.raises(ValueError, match="choose"):
            attend(q, k, v, mask=jnp.asarray(mask), scale=1.0, softcap=softcap, implementation=implementation)


@pytest.mark.parametrize(
    ("platform", "dtype", "softcap", "head_dim", "expected"),
    [
        ("cpu", "float32", None, 64, "xla"),
        ("cpu", "bfloat16", None, 64, "xla"),
        ("gpu", "bfloat16", None, 128, "cudnn"),
        ("cuda", "float16", None, 64, "cudnn"),
        ("gpu", "float32", None, 64, "xla"),
        ("gpu", "bfloat16", 50.0, 128, "xla"),
        ("gpu", "bfloat16", None, 256, "xla"),  # Hopper could, Ampere could not
        ("gpu", "bfloat16", None, 100, "xla"),
        ("rocm", "bfloat16", None, 64, "xla"),
        ("tpu", "bfloat16", None, 64, "splash"),
        ("tpu", "float32", 50.0, 256, "splash"),
    ],
)
def test_auto(platform, dtype, softcap, head_dim, expected):
    assert choose("auto", platform=platform, dtype=jnp.dtype(dtype), softcap=softcap, head_dim=head_dim) == expected


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "softcap", "head_dim", "message"),
    [
        ("cudnn", "cpu", "bfloat16", None, 64, "NVIDIA GPU, but the devices are 'cpu'"),
        ("cudnn", "rocm", "bfloat16", None, 64, "NVIDIA GPU"),
        ("splash", "gpu", "bfloat16", None, 64, "a TPU, but the devices are 'gpu'"),
        ("cudnn", "gpu", "float32", None, 64, "bfloat16 or float16, not float32"),
        ("cudnn", "gpu", "bfloat16", 30.0, 64, "cannot cap scores, which this model does .at 30"),
        ("cudnn", "gpu", "bfloat16", None, 100, "multiple of 8 up to 256, not 100"),
        ("cudnn", "gpu", "bfloat16", None, 264, "multiple of 8 up to 256, not 264"),
        ("flash", "gpu", "bfloat16", None, 64, "'flash' is unknown; choose auto, xla, cudnn, splash"),
        ("splash_interpret", "cpu", "float32", None, 64, "unknown"),
    ],
)
def test_what_cannot_work_says_why(setting, platform, dtype, softcap, head_dim, message):
    with pytest.raises(UserError, match=message):
        choose(setting, platform=platform, dtype=jnp.dtype(dtype), softcap=softcap, head_dim=head_dim)
    chosen = "cudnn" if platform == "gpu" else "xla"
    assert choose(chosen, platform=platform, dtype=jnp.bfloat16, softcap=None, head_dim=256) == chosen


def both_passes(mesh, implementation, *, rows, time, kv, group, dim):
    """Forward and backward as a function of abstract arrays, and these."""
    heads = NamedSharding(mesh, PartitionSpec(sharding.BATCH, "tensor"))
    q = jax.ShapeDtypeStruct((rows, kv, group, time, dim), jnp.bfloat16, sharding=heads)
    k = jax.ShapeDtypeStruct((rows, kv, time, dim), jnp.bfloat16, sharding=heads)
    mask = jax.ShapeDtypeStruct((rows, time, time), jnp.bool_, sharding=NamedSharding(mesh, PartitionSpec(sharding.BATCH)))

    @jax.jit
    def f(q, k, v, mask, g):
        def forward(q, k, v):
            return attend(q, k, v, mask=mask, scale=dim**-0.5, implementation=implementation, mesh=mesh)

        return jax.vjp(forward, q, k, v)[1](g)

    return f, (q, k, k, mask, q)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "eight devices"])
def test_cudnn_lowers_for_cuda(mesh, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    # the version is asked of the CUDA plug-in, which a CPU machine does not have
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    f, args = both_passes(sharding.make_mesh(**mesh), "cudnn", rows=8, time=100, kv=2, group=2, dim=64)
    text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    rows, kv = (2, 1) if mesh else (8, 2)  # a device's share
    assert f"tensor<{rows}x128x{kv * 2}x64xbf16>, tensor<{rows}x128x{kv}x64xbf16>" in text


# the tests' compilation cache keeps what was compiled for the slice, and cannot load it without one
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu), not a TPU")
def test_splash_compiles_for_a_tpu_slice_without_the_scores(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no cloud machine to ask about itself
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    f, args = both_passes(mesh, "splash", rows=32, time=1000, kv=2, group=4, dim=64)
    compiled = f.lower(*args).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3  # out, dq, dk and dv
    scores = 8 * 4 * 1000 * 1000 * 4  # bytes of a device's fp32 scores: 8 rows, 1 KV head of 4 queries
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4
