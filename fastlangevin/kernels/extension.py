"""The compiled extension: which devices it supports, its noise and its profile function.

The extension receives addresses, sizes and strides instead of tensors, so that one binary works
with every version of torch.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastlangevin.kernels.devices import indexed
from fastlangevin.kernels.memory import in_memory
from fastlangevin.kernels.philox import Address

library: Any = None
_why_missing = ""
try:
    library = importlib.import_module("fastlangevin._native")
except ImportError as error:
    _why_missing = str(error)

_NAMES = (
    "ACTIVATIONS", "CUDA", "ConvNet", "Convolution", "DTYPES", "MAX_DIMS", "OPERANDS",
    "apply_signs", "bfloat16_is_faster", "fill_noise", "instruction_set", "langevin_step",
    "matrix_unit", "pack_signs", "why_no_amx",
)  # fmt: skip
if missing := [name for name in _NAMES if library is not None and not hasattr(library, name)]:
    raise ImportError(
        f"the compiled extension {library.__file__} is out of date, it has no {missing[0]}: "
        "reinstall fastlangevin (pip install -e .)"
    )

# The dtypes that the kernels read and write, and the extension's numbers for them.
DTYPES: dict[torch.dtype, int] = (
    {} if library is None else {getattr(torch, name): k for name, k in library.DTYPES.items()}
)


def available(device: torch.device) -> str | None:
    """None if the extension can run on the device, else the reason and the remedy."""
    if library is None:
        return (
            f"the extension is not built ({_why_missing}); install a C++ compiler and "
            "reinstall fastlangevin"
        )
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        platform = "ROCm" if device.type == "cuda" else device.type
        return f"its kernels are for the CPU and CUDA, not for {platform}"
    if not library.CUDA:
        return (
            f"the extension was built without CUDA ({library.WHY_NO_CUDA}); reinstall with nvcc "
            "and FASTLANGEVIN_CUDA=1"
        )
    # Without a driver there is no current device, and every index has the same reason.
    return _cuda_reason(indexed(device).index or 0)


def contents() -> str:
    """A line of text: what the extension was built for, and why not for more."""
    if library is None:
        return f"not built ({_why_missing})"
    without = library.why_no_amx()  # asks the system, and the answer may change the instruction set
    amx = f", no AMX: {without}" if without else ""
    if library.matrix_unit():
        amx += ", float32 by tiles (bf16x6) where this is estimated to be faster"
    cpu = f"for CPUs (here {library.instruction_set()}{amx})"
    return f"{cpu} and CUDA" if library.CUDA else f"{cpu}, not CUDA ({library.WHY_NO_CUDA})"


def has_matrix_unit() -> bool:
    """Whether the active instruction set multiplies by a matrix unit.

    Asks the system for permission to use it, if the processor has one.
    """
    return library is not None and library.matrix_unit()


def bfloat16_is_faster() -> bool:
    """Whether products of bfloat16 numbers are faster here than products of float32 numbers.

    Like :func:`has_matrix_unit` this may ask the system for permission.
    """
    return library is not None and library.bfloat16_is_faster()


def device_and_queue(x: Tensor) -> tuple[int, int]:
    """The CUDA device's index and its current stream or, on the CPU, -1 and a thread count."""
    if not x.is_cuda:
        return -1, torch.get_num_threads()
    index = x.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def watch_methods(owners: Sequence[Any], called: Callable[[FrameType], None]) -> None:
    """Calls ``called(frame)`` before this thread calls a C method of one of the owners.

    ``frame`` is the caller's. This uses the thread's profile function, which runs at every call of
    any function, and ends with ``sys.setprofile(None)``.
    """
    if library is not None:
        library.watch_methods(tuple(owners), called)
        return

    def profile(frame: FrameType, event: str, function: Any) -> None:
        owner = getattr(function, "__self__", None) if event == "c_call" else None
        if owner is not None and any(owner is watched for watched in owners):
            called(frame)

    sys.setprofile(profile)


def fill(
    shape: Sequence[int], address: Address, device: torch.device, *, uniform: bool
) -> Tensor | None:
    """The normals, or uniforms, of a checked address, in float32.

    None if the reference must compute them: torch makes tensors without memory, as it does under
    FakeTensorMode, or make_fx records its operators and would not see what the kernel writes.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if not in_memory(out) or get_proxy_mode() is not None:
        return None
    chains = out.shape[0]
    index, queue = device_and_queue(out)
    library.fill_noise(
        out.data_ptr(), uniform, chains, out.numel() // max(chains, 1), *address, index, queue,
    )  # fmt: skip
    return out


@functools.lru_cache
def _cuda_reason(index: int) -> str | None:
    return library.cuda_reason(index) or None
