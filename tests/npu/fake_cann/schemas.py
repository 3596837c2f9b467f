"""Prints the schemas of torch_npu's operators named on the command line."""

import json
import sys

import torch
import torch_npu

schemas = {name: str(getattr(torch.ops.npu, name).default._schema) for name in sys.argv[1:]}
print(json.dumps({"torch_npu": torch_npu.__version__, "schemas": schemas}))
