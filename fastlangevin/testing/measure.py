"""Time and memory of two runs, and their modules left as they were found."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.adjoint.memory import Allocations


def times(
    runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, taken in turns: a machine's slow phases fall on both."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for run, found in zip(runs, seconds, strict=True):
            begin = _now(device)
            run()
            found.append(_now(device) - begin)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        with Allocations() as made:
            run()
        return made.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def buffers_of(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, buffer) of all modules inside of these, once each."""
    inside = {id(m): m for root in modules for m in root.modules()}.values()
    return [(m, name, b) for m in inside for name, b in m.named_buffers(recurse=False)]


@contextlib.contextmanager
def left_alone(
    modules: Sequence[nn.Module], dtype: torch.dtype | None
) -> Iterator[Callable[[], None]]:
    """Put modules back as they were; meanwhile in a dtype, if one is given.

    Yields what puts flags, modes, .grads and buffers back in between.
    """
    parameters = [p for m in modules for p in m.parameters()]
    places = buffers_of(modules)
    buffers = list({id(b): b for _, _, b in places}.values())
    found = [(p, p.data, p.requires_grad, p.grad) for p in parameters if p.is_leaf]
    values = [(b, b.data, b.detach().clone()) for b in buffers]
    modes = [
        (m, m.training)
        for root in modules
        for m in root.modules()
        if hasattr(m, "training")  # torch.jit.freeze leaves no mode
    ]

    def put_back() -> None:
        for parameter, _, requires_grad, _ in found:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for buffer, _, value in values:
            buffer.data.copy_(value)
        for module, name, buffer in places:
            if module._buffers[name] is not buffer:  # assigned to, not written to
                module._buffers[name] = buffer
        for module, training in modes:
            module.training = training

    for tensor, data in [(p, data) for p, data, _, _ in found] + [(b, d) for b, d, _ in values]:
        tensor.grad = None  # torch holds a .grad to its tensor's dtype
        if dtype is not None and data.is_floating_point():
            tensor.data = data.to(dtype)
    try:
        yield put_back
    finally:
        put_back()
        for buffer, data, value in values:
            buffer.data = data.copy_(value)
        for parameter, data, _, grad in found:
            parameter.data = data
            parameter.grad = grad
