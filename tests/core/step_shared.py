"""The numbers and the eager step that the tests of the step compare with."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
A, B = 0.3, 0.05


def numbers(shape: tuple, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same on all devices, on the one that torch creates tensors on."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max()) if x.numel() else 0.0
