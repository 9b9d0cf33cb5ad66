"""The memory of a run, and a context that restores its modules."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.adjoint.storage import Allocations


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        with Allocations() as allocations:
            run()
        return allocations.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def buffers_of(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, buffer) of these modules, without those of their submodules."""
    return [(m, name, b) for m in modules for name, b in m.named_buffers(recurse=False)]


@contextlib.contextmanager
def restored_modules(
    modules: Sequence[nn.Module], dtype: torch.dtype | None
) -> Iterator[Callable[[], None]]:
    """Convert all modules of an energy to a dtype, if there is one, and restore them afterwards.

    Yields a function that restores flags, modes, .grads and buffers between two runs.
    """
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    owners = buffers_of(modules)
    buffers = list({id(b): b for _, _, b in owners}.values())
    leaves = [(p, p.data, p.requires_grad, p.grad) for p in parameters if p.is_leaf]
    values = [(b, b.data, b.detach().clone()) for b in buffers]
    # torch.jit.freeze removes the attribute.
    modes = [(m, m.training) for m in modules if hasattr(m, "training")]

    def restore() -> None:
        for parameter, _, requires_grad, _ in leaves:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for buffer, _, value in values:
            buffer.data.copy_(value)
        for module, name, buffer in owners:
            if module._buffers[name] is not buffer:  # a run has assigned another tensor
                module._buffers[name] = buffer
        for module, training in modes:
            module.training = training

    for tensor, data in [(p, data) for p, data, _, _ in leaves] + [(b, d) for b, d, _ in values]:
        tensor.grad = None  # torch requires a .grad to have its tensor's dtype
        if dtype is not None and data.is_floating_point():
            tensor.data = data.to(dtype)
    try:
        yield restore
    finally:
        restore()
        for buffer, data, value in values:
            buffer.data = data.copy_(value)
        for parameter, data, _, grad in leaves:
            parameter.data = data
            parameter.grad = grad
