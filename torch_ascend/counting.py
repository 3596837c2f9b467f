"""Counts the bytes of tensors that are alive, by watching the operators that are dispatched."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_ascend.fakes import replaced


class Counter(TorchDispatchMode):
    """A mode that counts the bytes of the storages that were made in it and are still alive.

    Tensors may be real, or without memory (FakeTensorMode).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._bytes: dict[int, int] = {}

    def reset(self) -> None:
        """Starts counting `peak` anew, from the bytes that are alive now."""
        self.peak = self.now

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made elsewhere, as long as they live."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if storage._cdata not in self._bytes:
                self._bytes[storage._cdata] = 0
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
            self._set(storage)

    def _set(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size - self._bytes[storage._cdata]
        self._bytes[storage._cdata] = size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._bytes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1  # a number that nobody knows, read by the host
        made = function(*args, **(kwargs or {}))
        # a DTensor has its memory in a tensor of its own, which came by here too
        found = [x for x in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(x, Tensor)]
        self.add(x for x in found if not isinstance(x, DTensor))
        return made

    def __enter__(self) -> "Counter":
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            # FSDP2 empties the storages of what it has gathered, and keeps the tensors
            made = resize(storage, size)
            if storage._cdata in self._bytes:
                self._set(storage)
            return made

        self._undo = replaced(torch.UntypedStorage, "resize_", resized)
        self._undo.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.__exit__(None, None, None)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages, each counted once. Of a DTensor only this process's part counts."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in (x.untyped_storage() for x in local)}.values())
