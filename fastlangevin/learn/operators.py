"""Linear measurements y = A x of images, as callables from [n, C, H, W] to [n, ...]."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count

Operator = Callable[[Tensor], Tensor]
OPERATORS = ("mask", "downsample", "blur", "grey")


def identity(x: Tensor) -> Tensor:
    """y = x."""
    return x


class Mask:
    """y = m x: pixels with m = 0 are hidden, and read 0.

    mask: bool [H, W] or [C, H, W], True where a pixel is known. Raises TypeError or ValueError for
    another dtype or shape, and for a mask that hides nothing or everything.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(f"Mask: mask must be bool, got {mask.dtype}")
        if mask.ndim not in (2, 3):
            raise ValueError(f"Mask: mask must be [H, W] or [C, H, W], got {list(mask.shape)}")
        if bool(mask.all()) or not bool(mask.any()):
            raise ValueError("Mask: mask must hide some pixels and leave some known")
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._fitted(x)

    def fill(self, x: Tensor, y: Tensor) -> Tensor:
        """x with its known pixels taken from y."""
        return torch.where(self._fitted(x), y, x)

    def _fitted(self, x: Tensor) -> Tensor:
        if self.mask.shape[-2:] != x.shape[-2:] or self.mask.shape[:-2] not in ((), x.shape[1:2]):
            raise ValueError(
                f"Mask: mask must have the images' shape {list(x.shape[-2:])} or "
                f"{list(x.shape[1:])}, got {list(self.mask.shape)}"
            )
        return self.mask.to(x.device)


class Downsample:
    """y = means over squares of ``factor`` x ``factor`` pixels; factor must divide H and W."""

    def __init__(self, factor: int) -> None:
        self.factor = check_count("Downsample", "factor", factor)
        if self.factor == 1:
            raise ValueError("Downsample: factor must be at least 2, got 1")

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"Downsample: factor must divide the images' {list(x.shape[-2:])}, "
                f"got {self.factor}"
            )
        return functional.avg_pool2d(x, self.factor)


class Blur:
    """y = x convolved with a Gaussian of ``sigma`` pixels, cut at 3 sigma; edges repeat."""

    def __init__(self, sigma: float) -> None:
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"Blur: sigma must be finite and > 0, got {sigma}")
        self.sigma = sigma
        self.radius = math.ceil(3 * sigma)

    def __call__(self, x: Tensor) -> Tensor:
        at = torch.arange(-self.radius, self.radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.softmax(-(at**2) / (2 * self.sigma**2), 0)
        rows = functional.pad(x, (self.radius,) * 4, mode="replicate").flatten(0, 1)[:, None]
        columns = functional.conv2d(rows, kernel.view(1, 1, -1, 1))
        return functional.conv2d(columns, kernel.view(1, 1, 1, -1)).view_as(x)


class Grey:
    """y = the mean over channels, [n, 1, H, W]; the images must have several."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ValueError("Grey: the images must have several channels, got 1")
        return x.mean(1, keepdim=True)


def make_operator(
    name: str, shape: tuple[int, ...], mask: str = "box", factor: int = 2, sigma: float = 1.0
) -> Operator:
    """One of :data:`OPERATORS` for images of ``shape`` (C, H, W).

    mask: "box" hides the central square of half the side, "half" the lower half; else a file, a
        picture or .npy of [H, W] or [C, H, W], in which all but 0 is known.

    Raises FileNotFoundError, or ValueError naming what does not fit.
    """
    if name not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {name!r}")
    made: dict[str, Callable[[], Operator]] = {
        "mask": lambda: Mask(_read_mask(mask, shape)),
        "downsample": lambda: Downsample(factor),
        "blur": lambda: Blur(sigma),
        "grey": Grey,
    }
    operator = made[name]()
    operator(torch.zeros((1, *shape)))
    return operator


def _read_mask(name: str, shape: tuple[int, ...]) -> Tensor:
    height, width = shape[-2:]
    if name in ("box", "half"):
        mask = torch.ones((height, width), dtype=torch.bool)
        if name == "half":
            mask[height // 2 :] = False
        else:
            top, left = height // 4, width // 4
            mask[top : height - top, left : width - left] = False
        return mask
    try:
        found = (
            np.load(name) if name.endswith(".npy") else np.asarray(Image.open(name).convert("L"))
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"mask must be box, half or a file, got {name!r}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"mask {name} cannot be read: {error}") from error
    return torch.from_numpy(np.asarray(found) != 0)


def adjoint(operator: Operator, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A^T y [n, *shape] of measurements y [n, ...] of images of ``shape``: <A x, y> = <x, A^T y>.

    The vector-Jacobian product at zero of A, which is linear.
    """
    zero = y.new_zeros((len(y), *shape)).requires_grad_()
    with torch.enable_grad():
        (transposed,) = torch.autograd.grad(operator(zero), zero, y)
    return transposed


def norm(operator: Operator, shape: tuple[int, ...], device: torch.device | None = None) -> float:
    """|A|, the largest singular value on images of ``shape``, by power iteration (from below)."""
    x = 2 * _noise.uniform((1, *shape), seed=0, step=0, stream=_noise.USER, device=device) - 1
    square = 0.0
    for _ in range(50):
        x = adjoint(operator, operator(x / x.norm()), shape)
        square = float(x.norm())
    return math.sqrt(square)


def check_operator(
    op: str, operator: Operator, shape: tuple[int, ...], device: torch.device | None = None
) -> tuple[int, ...]:
    """The shape of a measurement; ValueError unless the operator takes such images, linearly."""
    x = 2 * _noise.uniform((2, *shape), seed=0, step=0, stream=_noise.USER, device=device) - 1
    y = operator(x)
    if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != 2 or not y.is_floating_point():
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{op}: operator must map images [2, {', '.join(map(str, shape))}] to a floating "
            f"tensor [2, ...], got {got}"
        )
    other = 2 * _noise.uniform(y.shape, seed=0, step=1, stream=_noise.USER, device=device) - 1
    error = float((y * other).sum() - (x * adjoint(operator, other, shape)).sum())
    if not abs(error) <= 1e-4 * float(y.norm() * other.norm()):
        raise ValueError(f"{op}: operator must be linear, but <A x, y> - <x, A' y> = {error:.3g}")
    return tuple(y.shape[1:])


def picture(operator: Operator, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Measurements as images of ``shape`` to look at: as they are, or A^T y / |A|^2."""
    if tuple(y.shape[1:]) == shape:
        return y
    return adjoint(operator, y, shape) / norm(operator, shape, y.device) ** 2
