"""Where a chain's states lie between the forward and the backward pass, and how much fits there."""

import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class States:
    """States of a chain by index, on their device or, with ``offload``, in host memory.

    From CUDA they are copied through pinned memory on a stream of their own, beside the chain's
    work; dropping one begins to fetch the next below it, which a backward pass will want.
    """

    def __init__(self, device: torch.device, offload: bool) -> None:
        self._kept: dict[int, Tensor] = {}
        self._fetched: tuple[int, Tensor] | None = None
        self._device = device
        # What is on the CPU is in host memory already.
        self._stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None

    def __iter__(self) -> Iterator[int]:
        return iter(self._kept)

    def put(self, k: int, x: Tensor) -> None:
        if self._stream is not None:
            host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
            x = host
        self._kept[k] = x

    def get(self, k: int) -> Tensor:
        if self._stream is None:
            return self._kept[k]
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
        del self._kept[k]
        if self._stream is not None and self._kept:
            self._fetch(max(self._kept))

    def clear(self) -> None:
        self._kept.clear()
        self._fetched = None

    def _fetch(self, k: int) -> None:
        with torch.cuda.stream(self._stream):
            self._fetched = k, self._kept[k].to(self._device, non_blocking=True)


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, for a CPU those available in the machine; None if unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    return None


class Allocations(TorchDispatchMode):
    """Counts, inside ``with``, the bytes of the tensors that torch makes there: live and peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_memory(t)[0] for t in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors(out if isinstance(out, tuple | list) else (out,)):
            key, owner = _memory(tensor)
            if key not in self._storages and key not in given:
                self._add(key, owner)
        return out

    def _add(self, key: int, storage: Any) -> None:
        size = storage.nbytes() if isinstance(storage, torch.UntypedStorage) else storage.nbytes

        def gone(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _memory(tensor: Tensor) -> tuple[int, Any]:
    """What owns a tensor's memory, with a key: itself, where oneDNN has packed it."""
    if tensor.is_mkldnn:
        return id(tensor), tensor
    storage = tensor.untyped_storage()
    return storage._cdata, storage


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
