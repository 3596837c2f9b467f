"""`torch.npu` of the simulated device: what torch_npu.npu has, by its names."""

import contextlib
import types

import torch
from torch.accelerator import current_device_index as current_device
from torch.accelerator import set_device_index as set_device

from torch_npu import _C


def _named(function):
    """PyTorch's function for every accelerator, whose argument torch_npu also takes by name."""
    return lambda device=None: function(device)


current_stream = default_stream = _named(torch.accelerator.current_stream)  # there is one
max_memory_allocated = _named(torch.accelerator.max_memory_allocated)
max_memory_reserved = _named(torch.accelerator.max_memory_reserved)
mem_get_info = _named(torch.accelerator.get_memory_info)
memory_allocated = _named(torch.accelerator.memory_allocated)
memory_reserved = _named(torch.accelerator.memory_reserved)
memory_stats = _named(torch.accelerator.memory_stats)
reset_peak_memory_stats = _named(torch.accelerator.reset_peak_memory_stats)
synchronize = _named(torch.accelerator.synchronize)


def device_count():
    return _C.device_count


def is_available():
    return _C.device_count > 0


_initialized = True  # torch.utils.checkpoint asks


def init():
    pass


def is_initialized():
    return _initialized


def _lazy_init():
    pass


def _is_in_bad_fork():
    return False


def _index(device):
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def get_device_properties(device=None):
    return types.SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info(device)[1])


def get_device_name(device=None):
    return "Ascend910B2"


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16, torch.float32]


class device:
    """The current device within a `with`."""

    def __init__(self, device):
        self.index = _index(device)

    def __enter__(self):
        self.before = current_device()
        set_device(self.index)

    def __exit__(self, *_):
        set_device(self.before)


# functions: PyTorch's own streams and events refuse to work with those of a subclass


def Stream(device=None, priority=0):
    return torch.Stream(torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False):
    return torch.Event("npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)


def stream(stream):
    return contextlib.nullcontext()


def set_stream(stream):
    pass


def empty_cache():
    pass


default_generators = tuple(_C.default_generators)


def manual_seed(seed):
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed):
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed():
    return default_generators[current_device()].initial_seed()


def get_rng_state(device=None):
    return default_generators[_index(device)].get_state()


def set_rng_state(state, device=None):
    default_generators[_index(device)].set_state(state)
