"""A Llama block with the fused operators in it, forward and backward on an NPU that has shapes and dtypes alone."""

import json

import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from torch_ascend import ops

ROWS, TIME, SIZE, VOCAB = 2, 8, 64, 32
npu = torch.device("npu:0")
fused = ops.choose("auto", npu)


class Called(TorchDispatchMode):
    names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npu":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attention(module, query, key, value, attention_mask, scaling, **_):
    return fused.attention(query, key, value, attention_mask, scale=scaling).transpose(1, 2), None


def facts(*tensors):
    return [[list(x.shape), str(x.dtype), str(x.device)] for x in tensors]


ALL_ATTENTION_FUNCTIONS.register("fused", attention)
config = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=SIZE,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="fused",
)
with FakeTensorMode():
    torch.set_default_dtype(torch.bfloat16)
    with npu:
        model = LlamaForCausalLM(config).requires_grad_(False)
    replaced = ops.install(model, fused)
    x = torch.empty(ROWS, TIME, SIZE, device=npu, requires_grad=True)
    visible = torch.ones(ROWS, 1, TIME, TIME, device=npu, dtype=torch.bool)
    with Called() as forward:
        out = model.model(inputs_embeds=x, attention_mask=visible, use_cache=False).last_hidden_state
    names, Called.names = Called.names, []
    with Called():
        out.sum().backward()
    backward, Called.names = Called.names, []
    with Called():
        logprob, normaliser = fused.token_logprob(
            torch.empty(ROWS, TIME, VOCAB, device=npu, dtype=torch.float32),
            torch.zeros(ROWS, TIME, device=npu, dtype=torch.int64),
        )
    print(
        json.dumps(
            {
                "torch_npu": torch_npu.__version__,
                "replaced": replaced,
                "forward": names,
                "backward": backward,
                "loss": Called.names,
                "out": facts(out),
                "gradient": facts(x.grad),
                "logprob": facts(logprob, normaliser),
            }
        )
    )
