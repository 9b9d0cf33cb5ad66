"""The compiled extension: whether it serves a device, and the noise that it makes.

It sees addresses, sizes and strides, no tensors; one binary serves every version of torch.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastlangevin.kernels.devices import indexed
from fastlangevin.kernels.memory import in_memory

library: Any = None
_why_missing = ""
try:
    library = importlib.import_module("fastlangevin._native")
except ImportError as error:
    _why_missing = str(error)

# The dtypes that the kernels read and write, and their numbers there.
DTYPES: dict[torch.dtype, int] = (
    {} if library is None else {getattr(torch, name): k for name, k in library.DTYPES.items()}
)


def available(device: torch.device) -> str | None:
    """None where the extension serves the device, else why not and what to do."""
    if library is None:
        return (
            f"the extension is not built ({_why_missing}); with a C++ compiler at hand, "
            "reinstall fastlangevin"
        )
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        here = "ROCm" if device.type == "cuda" else device.type
        return f"its kernels are for the CPU and CUDA, not for {here}"
    if not library.CUDA:
        return (
            f"the extension was built without CUDA ({library.WHY_NO_CUDA}); reinstall with nvcc "
            "and FASTLANGEVIN_CUDA=1"
        )
    # Without a driver there is no current device, and the reason is the same for all.
    return _cuda_reason(indexed(device).index or 0)


def contents() -> str:
    """What was built, for which devices, and why not for others."""
    if library is None:
        return f"not built ({_why_missing})"
    cpu = f"for CPUs (here {library.instruction_set()})"
    return f"{cpu} and CUDA" if library.CUDA else f"{cpu}, not CUDA ({library.WHY_NO_CUDA})"


def device_and_queue(x: Tensor) -> tuple[int, int]:
    """The CUDA device and its current stream; for the CPU, -1 and how many threads to use."""
    if not x.is_cuda:
        return -1, torch.get_num_threads()
    index = x.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def normal(shape: Sequence[int], **address: Any) -> Tensor | None:
    """:func:`fastlangevin.noise.normal` in float32, on checked arguments.

    None where the reference must make it: torch's tensors are not in memory, as under
    FakeTensorMode, or make_fx records its operators.
    """
    return _fill(shape, uniform=False, **address)


def uniform(shape: Sequence[int], **address: Any) -> Tensor | None:
    """:func:`fastlangevin.noise.uniform`, as :func:`normal`."""
    return _fill(shape, uniform=True, **address)


def _fill(
    shape: Sequence[int],
    *,
    uniform: bool,
    seed: int,
    step: int,
    stream: int,
    first_chain: int,
    device: torch.device,
) -> Tensor | None:
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    # make_fx records torch's operators, and would not see what is written here.
    if not in_memory(out) or get_proxy_mode() is not None:
        return None
    chains = out.shape[0]
    index, queue = device_and_queue(out)
    library.fill_noise(
        out.data_ptr(), uniform, chains, out.numel() // max(chains, 1), seed, step, stream,
        first_chain, index, queue,
    )  # fmt: skip
    return out


@functools.lru_cache
def _cuda_reason(index: int) -> str | None:
    return library.cuda_reason(index) or None
