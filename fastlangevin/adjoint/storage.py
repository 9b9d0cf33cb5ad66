"""Storage of a chain's states between forward and backward pass, and measurements of memory."""

import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.dispatch_mode import DispatchMode
from fastlangevin.kernels.memory import tensors_in


class States:
    """Stores states of a chain by index, on their device or, with ``offload``, in host memory.

    From CUDA they are copied to pinned memory on a separate stream, in parallel to the chain's
    work. Dropping a state starts to fetch the stored state with the highest index, which the
    backward pass needs next.
    """

    def __init__(self, device: torch.device, offload: bool) -> None:
        self._states: dict[int, Tensor] = {}
        self._fetched: tuple[int, Tensor] | None = None
        self._device = device
        # The states of a CPU are in host memory already.
        self._stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def put(self, k: int, x: Tensor) -> None:
        if self._stream is not None:
            host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
            x = host
        self._states[k] = x

    def get(self, k: int) -> Tensor:
        if self._stream is None:
            return self._states[k]
        if self._fetched is None or self._fetched[0] != k:
            self._fetch(k)
        assert self._fetched is not None
        _, x = self._fetched
        self._fetched = None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        x.record_stream(current)
        return x

    def drop(self, k: int) -> None:
        del self._states[k]
        if self._stream is not None and self._states:
            self._fetch(max(self._states))

    def clear(self) -> None:
        self._states.clear()
        self._fetched = None

    def _fetch(self, k: int) -> None:
        with torch.cuda.stream(self._stream):
            self._fetched = k, self._states[k].to(self._device, non_blocking=True)


def free_memory(device: torch.device) -> int | None:
    """The free bytes of a device, or the available bytes of the machine for a CPU; None if unknown.

    What torch has reserved but not allocated counts as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    return None


class Allocations(DispatchMode):
    """A context that counts the live and peak bytes of the tensors that torch makes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {_memory(t)[0] for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            key, owner = _memory(tensor)
            if key not in self._storages and key not in inputs:
                self._add(key, owner)
        return out

    def _add(self, key: int, storage: Any) -> None:
        size = storage.nbytes() if isinstance(storage, torch.UntypedStorage) else storage.nbytes

        def remove(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, remove)
        self.live += size
        self.peak = max(self.peak, self.live)


def _memory(tensor: Tensor) -> tuple[int, Any]:
    """A key and the owner of a tensor's memory: its storage, or itself if oneDNN has packed it."""
    if tensor.is_mkldnn:
        return id(tensor), tensor
    storage = tensor.untyped_storage()
    return storage._cdata, storage
