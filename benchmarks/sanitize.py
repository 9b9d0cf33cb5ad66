"""Run every kernel with every option at small odd sizes, under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.sanitize

Without --device cuda, the convolution kernels run only if TRITON_INTERPRET=1.

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1. Otherwise tensors are adjacent in torch's memory pools, where
an access beyond a tensor is no error. The numbers themselves are checked by the tests.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.fused_step import NETS, odd_step
from fastlangevin.kernels import extension, triton_backend
from fastlangevin.kernels.philox import Address
from fastlangevin.step import backend_status, resolve_backend

Shape = tuple[int, ...]

# Tails of every length, chains that share a block of four, and layouts with odd planes.
SHAPES: tuple[Shape, ...] = ((1, 1), (3, 5), (2, 1023), (2, 3, 5, 7), (3, 4, 3, 3), (2, 16, 5, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("fp32", "tf32", "fp16")
ADDRESS = {"seed": 2**63 + 11, "step": 5, "first_chain": 3}


def options(n: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Options of a step on n chains; every option is in at least one of these."""
    rows = torch.linspace(0.1, 1.0, n, device=device)
    yield {}
    yield {"noise_std": 0.0}
    yield {"clamp": (-0.5, 0.5), "grad_clip": 0.3, "maximize": True}
    yield {"clamp": (-0.5, 0.5), "noise_last": True}
    yield {"step_size": rows, "noise_std": rows}
    yield {"grad": None}
    yield {"z": True}
    if device.type == "cuda":
        yield {"rng_state": torch.tensor([7, 1], device=device)}


def take(run: Callable[..., Tensor], x: Tensor, g: Tensor, **step_options: Any) -> None:
    """Take a step and read all of x, so that initcheck reports elements that were not written."""
    step_options = {"step_size": 0.5, "noise_std": 0.1, **ADDRESS, **step_options}
    grad = step_options.pop("grad", g)
    z = torch.randn_like(x) if step_options.pop("z", False) else None
    run(x, grad, z, **step_options)
    if not bool(torch.isfinite(x).all()):
        raise AssertionError(f"not finite after {sorted(step_options)} on {list(x.shape)}")


def steps(run: Callable[..., Tensor], device: torch.device, shapes: Sequence[Shape]) -> int:
    """Take a step with every combination of the test set; returns their number."""
    count = 0
    for shape, dtype in itertools.product(shapes, DTYPES):
        # All options in float32. In the other dtypes only loads, stores and tails differ.
        for step_options in itertools.islice(
            options(shape[0], device), None if dtype.itemsize == 4 else 1
        ):
            take(run, *tensors(shape, dtype, device), **step_options)
            count += 1
    for shape in (shape for shape in shapes if len(shape) == 4):
        for step_options in options(shape[0], device):
            take(run, *tensors(shape, torch.float32, device, torch.channels_last), **step_options)
            count += 1
        x, g = tensors(shape, torch.float32, device)
        take(run, x.to(memory_format=torch.channels_last), g.bfloat16())
        take(run, *(v.transpose(1, 2) for v in (x, g)))
        count += 2
    for offset in (1, 2, 3):  # not aligned to 16 bytes
        x, g = tensors((1, 1029), torch.float32, device)
        take(run, x[:, offset:], g[:, offset:])
        count += 1
    return count


def fused_steps(device: torch.device, precisions: Sequence[str]) -> int:
    """Take a step of the fused engine with smooth networks of odd sizes; returns their number."""
    networks = list(itertools.product(NETS, precisions))
    for name, precision in networks:
        odd_step(name, precision, str(device))
    return len(networks)


def tensors(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x.contiguous(memory_format=memory_format), g.contiguous(memory_format=memory_format)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one shape and one precision")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    shapes, precisions = SHAPES, PRECISIONS
    if chosen.quick:
        shapes, precisions = SHAPES[3:4], PRECISIONS[-1:]
    kernels = {k: v for k, v in backend_status(device).items() if k != "reference"}
    for name, reason in kernels.items():
        if reason is None:
            count = steps(resolve_backend(name, device), device, shapes)
            print(f"{name}: {count} steps", flush=True)
        else:
            print(f"{name}: cannot run: {reason}")
    if kernels["triton"] is None:
        print(f"fused: {fused_steps(device, precisions)} steps", flush=True)
    if all(kernels.values()):
        raise SystemExit(f"sanitize: no kernels run on {device}")
    makers = {"native": extension, "triton": triton_backend}
    address = Address(seed=1, step=2, stream=0, first_chain=3)
    for name in (name for name, reason in kernels.items() if reason is None):
        for shape, uniform in itertools.product(shapes, (False, True)):
            numbers = makers[name].fill(shape, address, device, uniform=uniform)
            if numbers is None or not bool(torch.isfinite(numbers).all()):
                raise AssertionError(f"{name}: the noise of {list(shape)} is not finite")


if __name__ == "__main__":
    main()
