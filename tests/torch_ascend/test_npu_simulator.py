"""The simulated NPU that other tests stand on: it computes what the CPU computes, and refuses what an NPU would refuse."""

import copy
import functools
import io
import os
import shutil

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from npu import simulator
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(bool(simulator.unavailable()), reason=simulator.unavailable())
inside = functools.partial(simulator.inside, PYTHONWARNINGS="error")


def equal(compute, *inputs, tolerance):
    """What `compute` gives for inputs on the NPU is on the NPU, and what it gives on the CPU."""
    found = compute(*[x.to("npu") for x in inputs])
    wanted = compute(*inputs)
    for one, other in zip(*[x if isinstance(x, tuple | list) else [x] for x in (found, wanted)], strict=True):
        assert one.device == torch.device("npu", 0)
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the device


@pytest.mark.slow
@inside(NPU_SIM_DEVICES="4", NPU_SIM_MEMORY=str(2**30))
def test_devices_are_counted_chosen_and_described():
    import torch_npu

    assert torch.npu.is_available() and torch.npu.device_count() == torch.accelerator.device_count() == 4
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch_npu.__version__ == torch.__version__.partition("+")[0] and torch_npu.npu is torch.npu
    assert torch.npu.get_device_properties(3).total_memory == 2**30 and "Ascend910B" in torch.npu.get_device_name(0)
    assert torch.npu.is_bf16_supported()
    torch.npu.set_device("npu:2")
    assert torch.npu.current_device() == 2 and torch.zeros(1, device="npu").device == torch.device("npu", 2)
    with torch.npu.device(1):
        assert torch.zeros(1).npu().device.index == 1
    assert nn.Linear(2, 2).npu().weight.device.index == 2
    with pytest.raises(RuntimeError, match="npu:4 does not exist: there are 4"):
        torch.zeros(1, device="npu:4")
    with pytest.raises(TypeError, match="npu"):
        torch.zeros(1, device="npu").numpy()
    with pytest.raises(AttributeError, match="npu_rms_norm"):  # without NPU_SIM_FUSED=1
        torch_npu.npu_rms_norm(torch.zeros(1, device="npu"), torch.zeros(1, device="npu"))
    torch.npu.Stream().wait_stream(torch.npu.current_stream())
    event = torch.npu.Event()
    event.record()
    torch.npu.current_stream().wait_event(event)
    torch.npu.synchronize()


@pytest.mark.slow
@inside(NPU_SIM_DEVICES="0")
def test_there_may_be_no_device():
    assert not torch.npu.is_available() and torch.npu.device_count() == 0
    with pytest.raises(RuntimeError, match="npu:0 does not exist"):
        torch.zeros(1, device="npu")


@pytest.mark.slow
@inside()
def test_tensors_of_different_devices_do_not_mix():
    x, i = random(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    mixtures = [
        lambda a, b: a(x) + b(x),
        lambda a, b: a(x).add_(b(x)),
        lambda a, b: a(x) @ b(x).T,
        lambda a, b: F.linear(a(x), b(x)),
        lambda a, b: torch.cat([a(x), b(x)]),
        lambda a, b: torch.where(a(x) > 0, a(x), b(x)),
        lambda a, b: F.embedding(a(i), b(x)),
        lambda a, b: a(x).gather(1, b(i)),
        lambda a, b: a(x)[b(i[:, 0])],
        lambda a, b: a(x).index_put_((b(i[:, 0]),), a(x[0])),
        lambda a, b: F.scaled_dot_product_attention(a(x[None]), a(x[None]), b(x[None])),
        lambda a, b: F.cross_entropy(a(x), b(i[:, 0])),
        lambda a, b: torch._foreach_add([a(x)], [b(x)]),
        lambda a, b: torch.searchsorted(a(x[0]), b(x)),
    ]
    for other in ("cpu", "npu:1"):
        for first, second in [("npu:0", other), (other, "npu:0")]:
            for mixed in mixtures:
                with pytest.raises((RuntimeError, ValueError), match="device|indices should be"):
                    mixed(lambda tensor, to=first: tensor.to(to), lambda tensor, to=second: tensor.to(to))
    assert (x.npu() * torch.tensor(2.0)).device.type == "npu"  # but a number goes with every device
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="npu", generator=torch.Generator())


@pytest.mark.slow
@inside(NPU_SIM_MEMORY=str(10_000))
def test_memory_is_counted_and_runs_out():
    def held():
        return torch.npu.memory_allocated(), torch.npu.max_memory_allocated()

    assert held() == (0, 0) and torch.npu.mem_get_info() == (10_000, 10_000)
    x = torch.empty(1000, device="npu")
    y = x.view(10, 100)[:, ::2]  # no memory of its own
    assert held() == (4000, 4000)
    z = torch.empty(1000, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        y.repeat(1, 5)
    assert held() == (8000, 8000)
    del z
    assert held() == (4000, 8000) and torch.npu.mem_get_info() == (6000, 10_000)
    torch.npu.reset_peak_memory_stats()
    assert held() == (4000, 4000) and torch.accelerator.memory_allocated() == 4000
    x.untyped_storage().resize_(0)  # as FSDP frees a gathered weight
    assert held() == (0, 4000)
    there = torch.empty(5, device="npu:3")
    assert held() == (0, 4000) and torch.npu.memory_allocated("npu:3") == torch.npu.memory_allocated(device=3) == 20
    assert torch.npu.memory_reserved(there.device) == 20
    torch.npu.empty_cache()


@pytest.mark.slow
@inside()
def test_random_numbers_are_each_devices_own():
    host = torch.get_rng_state()
    torch.npu.manual_seed_all(3)
    state = torch.npu.get_rng_state()
    drawn = torch.randn(5, device="npu")
    assert torch.randn(5, device="npu:1").tolist() == drawn.tolist() != torch.randn(5, device="npu").tolist()
    assert torch.get_rng_state().equal(host)
    torch.manual_seed(3)
    assert torch.randn(5, device="npu").equal(drawn)
    generator = torch.Generator("npu").manual_seed(3)
    assert torch.randn(5, device="npu", generator=generator).equal(drawn) and generator.device == torch.device("npu", 0)
    ones = torch.ones(500, device="npu")
    for draw in (
        lambda: F.dropout(ones, 0.25),
        lambda: torch.multinomial(ones, 3),
        lambda: torch.randint(10, (50,), device="npu"),
        lambda: torch.rand(50, device="npu"),
        lambda: nn.init.kaiming_uniform_(torch.empty(5, 5, device="npu")),
    ):
        torch.npu.set_rng_state(state)
        once, twice = draw(), draw()
        assert not once.equal(twice)
        torch.npu.set_rng_state(state)
        assert draw().equal(once)
    dropped = F.dropout(ones, 0.25)
    assert sorted(set(dropped.tolist())) == pytest.approx([0, 4 / 3]) and 0.15 < (dropped == 0).float().mean() < 0.35
    assert F.dropout(ones, 0.25, training=False).equal(ones)


# ---------------------------------------------------------------- operators


def attention(x, i):
    """By fewer heads of keys than of queries."""
    q, k, v = (random(2, heads, time, 8, seed=heads + time).to(x) for heads, time in [(4, 5), (2, 7), (2, 7)])
    visible = torch.ones(5, 7, dtype=torch.bool, device=x.device).tril(2).expand(2, 1, 5, 7)
    masked = F.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    return masked, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def cache(x, i):
    """Written in place."""
    keys = x.new_zeros(2, 9, 6)
    address, new = keys.data_ptr(), x.view(2, 2, 6)
    keys[:, 1:3] = new
    keys[:, torch.tensor([4, 5], device=x.device)] = 2 * new
    keys.index_copy_(1, torch.tensor([7, 0], device=x.device), 3 * new)
    keys.narrow(1, 6, 1).copy_(new[:, :1])
    assert keys.data_ptr() == address
    return keys


OPERATORS = {
    "attention": attention,
    "cache": cache,
    "logsumexp": lambda x, i: x.logsumexp(-1),
    "log_softmax": lambda x, i: x.log_softmax(-1),
    "logaddexp": lambda x, i: torch.logaddexp(x, -x),
    "gather": lambda x, i: x.gather(1, i),
    "take_along_dim": lambda x, i: x.take_along_dim(i, 1),
    "where": lambda x, i: torch.where(x > 0, x, 0.0),
    "cumsum": lambda x, i: x.softmax(-1).cumsum(-1),
    "inverse of a CDF": lambda x, i: (x.softmax(-1).cumsum(-1) < 0.5).sum(-1),
    "index_select": lambda x, i: x.index_select(1, i[0]),
    "index": lambda x, i: x[i[:, 0] % 4],
    "boolean index": lambda x, i: x[x > 0],
    "index_put": lambda x, i: x.clone().index_put_((i[:, 0] % 4, i[:, 1]), x.new_ones(())),
    "index_add": lambda x, i: x.clone().index_add_(1, i[0], x[:, :3]),
    "scatter_add": lambda x, i: x.clone().scatter_add_(1, i, x[:, :3]),
    "masked_fill": lambda x, i: x.masked_fill(x > 0, float("-inf")),
    "searchsorted": lambda x, i: torch.searchsorted(x.sort().values, x),
    "argmax": lambda x, i: x.argmax(-1),
    "topk": lambda x, i: tuple(x.topk(3)),
    "sort": lambda x, i: tuple(x.sort(dim=-1, descending=True, stable=True)),
    "repeat_interleave": lambda x, i: x.repeat_interleave(2, 0),
    "embedding": lambda x, i: F.embedding(i % 4, x),
    "one_hot": lambda x, i: F.one_hot(i, 6),
    "pad": lambda x, i: F.pad(x, (1, 2), value=7.0),
    "chunk": lambda x, i: [part * 2 for part in x.chunk(2, -1)],
    "flip, roll, stack": lambda x, i: torch.stack([x.flip(0), x.roll(1, 0)]),
    "expand": lambda x, i: x[:, None].expand(-1, 3, -1).reshape(-1, 6),
    "unfold": lambda x, i: x.unfold(1, 2, 2),
    "transpose": lambda x, i: x.T.contiguous().view(-1),
    "bits of fp32": lambda x, i: (x.view(torch.int32) ^ 5).view(torch.float32),
    "bits of bf16": lambda x, i: x.bfloat16().view(torch.int16) >> 1,
    "resize": lambda x, i: x.clone().resize_(2, 3),
    "to another dtype": lambda x, i: x.T.to(torch.bfloat16),
    "float64": lambda x, i: x.double().sum(),
    "einsum": lambda x, i: torch.einsum("ab,cb->ac", x, x),
    "addmm": lambda x, i: torch.addmm(x[:, :4], x, x.T),
    "rms_norm": lambda x, i: F.rms_norm(x, (6,), x[0]),
    "silu": lambda x, i: F.silu(x),
    "cross_entropy": lambda x, i: F.cross_entropy(x, i[:, 0]),
    "norm": lambda x, i: torch.nn.utils.get_total_norm([x, x[0]]),
    "vmap": lambda x, i: torch.vmap(lambda row: row.cumsum(0))(x),
    "nothing": lambda x, i: x[:, :0] @ x[:0].T[:0],
}


@pytest.mark.slow
@inside()
def test_operators_compute_what_the_cpu_computes():
    x, i = random(4, 6), torch.tensor([[0, 5, 2], [1, 1, 3], [4, 0, 0], [2, 3, 5]])
    for operator in OPERATORS.values():
        equal(operator, x, i, tolerance=1e-6)
        with torch.inference_mode():
            equal(operator, x, i, tolerance=1e-6)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.slow
@inside(NPU_SIM_FUSED="1")
def test_operators_of_other_libraries():
    x = torch.tensor([3.0, 4.0], device="npu", requires_grad=True)
    Square.apply(x).sum().backward()
    assert x.grad.tolist() == [6, 8] and x.grad.device.type == "npu"

    import torch_npu

    x = random(2, 6).npu().requires_grad_()
    weight = random(6, seed=1).npu()
    fused = torch_npu.npu_rms_norm(x, weight, 1e-6)[0]
    torch.testing.assert_close(fused, F.rms_norm(x, (6,), weight, 1e-6))
    fused.square().sum().backward()
    assert fused.device == x.grad.device == torch.device("npu", 0)

    library = torch.library.Library("mine", "DEF")
    library.define("scale(Tensor x, *, float by=3.) -> (Tensor, Tensor)")
    for key, name in {"PrivateUse1": "npu", "CPU": "cpu"}.items():
        library.impl("scale", lambda x, by=3.0, name=name: (x * by, torch.tensor(len(name))), key)
    library.define("host(Tensor x) -> Tensor")
    library.impl("host", lambda x: x.new_full((), float(x.device.type == "cpu")), "CPU")
    scaled, kernel = torch.ops.mine.scale(x.detach(), by=2.0)
    assert scaled.equal(2 * x) and scaled.device.type == "npu" and kernel == 3
    ran_on_host = torch.ops.mine.host(x.detach())  # no kernel of its own: the CPU's, like every operator of PyTorch
    assert ran_on_host == 1 and ran_on_host.device.type == "npu"
    with pytest.raises(RuntimeError, match="autocast"), torch.autocast("npu", torch.bfloat16):
        x @ x.T


# ---------------------------------------------------------------- training


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", attention_dropout=0.1,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def losses(model, tokens, mask, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens, attention_mask=mask).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@pytest.mark.slow
@inside()
def test_a_language_model_trains_to_the_cpus_losses():
    model = llama().eval()
    tokens = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    wanted = list(losses(copy.deepcopy(model), tokens, mask))
    assert wanted[-1] < wanted[0] - 0.5

    tokens, mask = tokens.npu(), mask.npu()
    trained = copy.deepcopy(model).npu()
    assert list(losses(trained, tokens, mask)) == pytest.approx(wanted, abs=1e-5)
    assert {p.device.type for p in trained.parameters()} == {p.grad.device.type for p in trained.parameters()} == {"npu"}
    in_bf16 = list(losses(copy.deepcopy(model).to("npu", torch.bfloat16), tokens, mask))
    assert in_bf16 != wanted and in_bf16 == pytest.approx(wanted, abs=0.05)

    found = []
    for checkpointing in (False, True):  # with dropout: what is computed again must be dropped again
        again = copy.deepcopy(model).npu().train()
        if checkpointing:
            for layer in again.model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        torch.npu.manual_seed(1)
        found.append(list(losses(again, tokens, mask)))
    assert found[0] == found[1] and found[0] != pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
@inside()
def test_copies_and_files():
    x, there = random(3, 8), torch.zeros(3, 8, device="npu")
    there[:, :2] = x[:, :2]
    there[:, 2:4].copy_(x[:, 2:4].bfloat16().pin_memory(), non_blocking=True)
    there[:, 4:] = x[:, 4:].to("npu:1")
    assert there.to("cpu", non_blocking=True).equal(torch.cat([x[:, :2], x[:, 2:4].bfloat16().float(), x[:, 4:]], 1))

    model = nn.Linear(3, 2).npu()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, device="npu")).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    for where, device in {None: "npu:0", "cpu": "cpu", "npu:1": "npu:1"}.items():
        file.seek(0)
        read = torch.load(file, map_location=where)
        assert read["model"]["weight"].device == read["optimizer"]["state"][0]["exp_avg"].device == torch.device(device)
        assert read["model"]["weight"].cpu().equal(model.weight.cpu())
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, map_location="cpu")["optimizer"])
    assert optimizer.state[model.weight]["exp_avg"].device.type == "npu"

    read = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    assert read["weight"].device.type == "cpu" and read["weight"].equal(model.weight.cpu())


# ---------------------------------------------------------------- processes


def start_ranks() -> tuple[int, object]:
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,npu:hccl")
    return dist.get_rank(), dist.group.WORLD._get_backend(torch.device("npu"))


@pytest.mark.slow
@inside(ranks=2)
def test_collectives():
    rank, hccl = start_ranks()

    def full(value, size=2):
        return torch.full((size,), float(value), device="npu")

    for operation, wanted in {"SUM": 3, "AVG": 1.5, "MAX": 2}.items():
        x = full(rank + 1)
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
        assert x.tolist() == [wanted] * 2 and x.device.index == rank
    x = full(rank).bfloat16()
    dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [1, 1]
    dist.broadcast(x := full(rank + 5), src=1)
    assert x.tolist() == [6, 6]
    dist.all_gather(parts := [full(-1), full(-1)], full(rank))
    assert torch.cat(parts).tolist() == [0, 0, 1, 1]
    # PyTorch 2.13 has new names for these two
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(x := full(-1, 4), full(rank))
    assert x.tolist() == [0, 0, 1, 1]
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(x := full(-1), torch.arange(4.0, device="npu") + rank)
    assert x.tolist() == [[1, 3], [5, 7]][rank]
    scatter(x, torch.arange(4.0, device="npu") + rank, dist.ReduceOp.AVG)
    assert x.tolist() == [[0.5, 1.5], [2.5, 3.5]][rank]
    dist.scatter(x, [full(3), full(4)] if rank == 0 else None, src=0)
    assert x.tolist() == [rank + 3] * 2
    assert hccl.calls == {
        "allreduce": 4, "broadcast": 1, "allgather": 2, "reduce_scatter": 2, "scatter": 1,
    }, hccl.calls  # fmt: skip

    before = dict(hccl.calls)  # what is on the host goes by gloo
    dist.barrier()
    dist.all_reduce(x := torch.ones(2))
    dist.all_gather_object(gathered := [None, None], {"rank": rank})
    dist.broadcast_object_list(sent := [rank], src=1)
    assert x.tolist() == [2, 2] and gathered == [{"rank": 0}, {"rank": 1}] and sent == [1] and hccl.calls == before
    with pytest.raises(RuntimeError, match="hccl: tensors must be on an NPU"):
        hccl.allreduce([torch.ones(2)], dist.AllreduceOptions())
    dist.destroy_process_group()


class Adapted(nn.Module):
    """A frozen bf16 layer and its trained fp32 adapter."""

    def __init__(self, size, seed):
        super().__init__()
        self.base = nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.base.weight.data.copy_(random(size, size, seed=seed) / size**0.5)
        self.a = nn.Parameter(random(4, size, seed=seed + 1) / size)
        self.b = nn.Parameter(torch.zeros(size, 4))

    def forward(self, x):
        return x + torch.tanh(self.base(x.bfloat16()).float() + x @ self.a.T @ self.b.T)


def adapters_train_beside_a_sharded_base(rank, hccl):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def train(model, x, y, reduce):
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(adapter, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            for parameter in adapter:
                reduce(parameter.grad)
            torch.nn.utils.clip_grad_norm_(adapter, 1.0)
            optimizer.step()
        return torch.cat([parameter.detach().cpu().flatten() for parameter in adapter])

    model = nn.Sequential(*(Adapted(16, seed) for seed in range(3)))
    x, y, half = random(4, 16, seed=7), random(4, 16, seed=8), slice(2 * rank, 2 * rank + 2)
    wanted = train(copy.deepcopy(model), x, y, lambda gradient: None)

    mesh = init_device_mesh("npu", (2,))
    sharded = copy.deepcopy(model).npu()
    adapters = {parameter for parameter in sharded.parameters() if parameter.requires_grad}
    for layer in [*sharded, sharded]:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    base = sharded[0].base.weight
    assert isinstance(base, DTensor) and base.to_local().shape == (8, 16) and base.dtype == torch.bfloat16
    found = train(sharded, x[half].npu(), y[half].npu(), lambda gradient: dist.all_reduce(gradient, dist.ReduceOp.AVG))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert hccl.calls["allgather"] >= 9 and hccl.calls["allreduce"] == 18

    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        assert state.keys() == model.state_dict().keys()
        assert all(state[f"{i}.base.weight"].equal(model[i].base.weight) for i in range(3))


def gradients_are_scattered(rank, hccl):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x = random(4, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    model(x).square().mean().backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    for dtype, tolerance in {torch.float32: 1e-6, torch.bfloat16: 1e-2}.items():
        sharded = copy.deepcopy(model).npu()
        sharded.zero_grad()
        fully_shard(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        sharded(x[2 * rank : 2 * rank + 2].npu()).float().square().mean().backward()
        for one, other in zip(sharded.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor().cpu(), other.grad, rtol=0, atol=tolerance)
        clipped = torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0)
        torch.testing.assert_close(clipped.full_tensor().cpu(), norm, rtol=10 * tolerance, atol=0)
    assert hccl.calls["reduce_scatter"] == 2


@pytest.mark.slow
@inside(ranks=2)
def test_fully_sharded():
    torch.manual_seed(0)
    rank, hccl = start_ranks()
    adapters_train_beside_a_sharded_base(rank, hccl)
    gradients_are_scattered(rank, hccl)
    dist.destroy_process_group()


# ---------------------------------------------------------------- the means


@pytest.mark.slow
def test_a_failing_script_fails_the_test():
    with pytest.raises(AssertionError, match="exit code 3\nprinted\n"):
        simulator.run("print('printed'); raise SystemExit(3)")
    assert simulator.run("raise SystemExit(3)", check=False).returncode == 3


def test_no_compiler_is_a_reason_to_skip(monkeypatch):
    assert simulator.unavailable() == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert simulator.unavailable() == "the simulated NPU needs a C++ compiler: g++"
