"""The lint finds what an NPU does badly, and nothing else."""

import families
import pytest
import torch
from npu import reference_kernels, simulator
from npu.lint import Lint
from torch.nn import functional as F

from torch_ascend import ops

X = torch.linspace(-1, 1, 12).reshape(3, 4)
HALF, WIDE, PICK = X.bfloat16(), X.double(), torch.tensor([2, 0])


def write(x, index, value):
    x = x.clone()
    x[index] = value
    return x


BAD = {
    "a float64 result": (lambda: X.double(), "float64"),
    "a float64 input": (lambda: WIDE.float(), "float64"),
    "softmax of bfloat16": (lambda: HALF.softmax(-1), "half precision"),
    "log_softmax of bfloat16": (lambda: HALF.log_softmax(-1), "half precision"),
    "logsumexp of bfloat16": (lambda: HALF.logsumexp(-1), "half precision"),
    "logsumexp of bfloat16 that keeps a dimension": (lambda: HALF.logsumexp(-1, keepdim=True), "half precision"),
    "logsumexp of float16": (lambda: X.half().logsumexp(-1), "half precision"),
    "cross entropy of bfloat16": (lambda: F.cross_entropy(HALF, torch.tensor([0, 1, 2])), "half precision"),
    "reading by a bool index": (lambda: X[X > 0], "boolean indexing"),
    "reading rows by a bool index": (lambda: X[torch.tensor([True, False, True])], "boolean indexing"),
    "writing by a bool index": (lambda: write(X, X > 0, torch.zeros(6)), "boolean indexing"),
    "nonzero": (lambda: X.nonzero(), "a shape that depends on values"),
    "where without values": (lambda: torch.where(X > 0), "a shape that depends on values"),
    "masked_select": (lambda: X.masked_select(X > 0), "a shape that depends on values"),
    "unique": (lambda: X.unique(), "a shape that depends on values"),
}
SYNCS = {
    "item": (lambda: X.sum().item(), 1),
    "int": (lambda: int(X.argmax()), 1),
    "bool": (lambda: bool((X > 0).any()), 1),
    "if": (lambda: 1 if X[0, 0] > 0 else 0, 1),
    "equal": (lambda: torch.equal(X, X + 1), 1),
    "a loop": (lambda: [float(x) for x in X[0]], 4),
}
CLEAN = {
    "softmax in fp32": lambda: HALF.softmax(-1, dtype=torch.float32),
    "logsumexp in fp32": lambda: HALF.float().logsumexp(-1),
    "scalars of Python": lambda: (X * 2.0 + 1) / 3,
    "integer indices": lambda: (X[PICK], write(X, PICK, torch.zeros(2, 4)), X[1:, ::2], X.gather(1, PICK[None])),
    "a mask": lambda: (X.masked_fill(X > 0, 0), torch.where(X > 0, X, 0)),
    "bfloat16": lambda: HALF @ HALF.T,
    "attention of bfloat16": lambda: F.scaled_dot_product_attention(*[HALF.reshape(1, 1, 3, 4)] * 3),
}


@pytest.mark.parametrize("name", BAD)
def test_a_violation_is_named_with_its_line(name):
    f, what = BAD[name]
    with Lint() as lint:
        f()
    assert len(lint.violations) == 1 and lint.syncs == 0
    assert lint.violations[0].startswith(f"{what}: aten.") and " at test_lint.py:" in lint.violations[0]


@pytest.mark.parametrize("name", SYNCS)
def test_syncs_are_counted(name):
    f, count = SYNCS[name]
    with Lint() as lint:
        f()
    assert lint.syncs == count and not lint.violations
    assert all(site.split(" at ")[1].startswith("test_lint.py:") for site in lint.sync_sites)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_code_passes(name):
    with Lint() as lint:
        CLEAN[name]()
    assert not lint.violations and not lint.sync_sites


def test_the_backward_pass_is_looked_at():
    x = X.clone().requires_grad_()
    y = x.double().sum().float()  # named once on the way there
    with Lint() as lint:
        y.backward()
    assert lint.violations and all(line.startswith("float64: ") for line in lint.violations)


@pytest.mark.parametrize("half_to_float", [False, True])
def test_softmax_that_widens_by_itself_passes(half_to_float):
    """As it does on accelerators."""
    x = HALF.to("meta")
    with Lint("meta") as lint:
        torch.ops.aten._softmax(x, -1, half_to_float)
    assert len(lint.violations) == (not half_to_float)


def test_only_the_device_is_looked_at():
    with Lint("npu") as lint:
        X.double().sum().item()
        X[X > 0].softmax(-1)
    assert not lint.violations and not lint.sync_sites


@pytest.mark.parametrize("table", ["reference", "npu"])
def test_the_operators_are_clean(table):
    reference_kernels.define()
    table = {"reference": ops.REFERENCE, "npu": ops.NPU}[table]
    model = families.build(families.VARIANTS["llama"]).to(torch.bfloat16).requires_grad_(False)
    ops.install(model, table)
    layer, x = model.model.layers[0], torch.ones(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(5)[None]
    q, k = (torch.ones(2, heads, 5, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with Lint() as lint:
        layer(x, position_embeddings=model.model.rotary_emb(x, positions)).sum().backward()
        for softcap in (None, 2.0):
            table.attention(q, k, k, visible, scale=0.25, softcap=softcap).sum().backward()
        table.token_logprob(torch.ones(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64))
    assert not lint.violations and not lint.sync_sites


@pytest.mark.slow
@pytest.mark.skipif(bool(simulator.unavailable()), reason=simulator.unavailable())
@pytest.mark.slow
def test_copies_to_the_host_are_syncs():
    simulator.run(
        """
        import torch, torch_npu
        from npu.lint import Lint

        x, host = torch.ones(3, device="npu"), torch.zeros(3)
        for wait in (x.cpu, x.tolist, lambda: host.copy_(x), lambda: x.to("cpu"), x.sum().item, lambda: bool(x.any())):
            with Lint("npu") as lint:
                wait()
            assert lint.syncs == 1 and not lint.violations, (lint.sync_sites, lint.violations)
        with Lint("npu") as lint:
            y = host.to("npu") + x
            y.copy_(host)
            y[torch.tensor([1], device="npu")] += 1
            torch.arange(3, device="npu")
        assert not lint.syncs and not lint.violations, (lint.sync_sites, lint.violations)
        with Lint("npu") as lint:
            y = x.requires_grad_().to(torch.float64)
            y.sum().backward()
        assert lint.violations and all(line.startswith("float64") for line in lint.violations)
        """
    )
