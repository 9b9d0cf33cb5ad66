"""Linear measurements y = A x of images: callables from [n, C, H, W] to [n, ...]."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count, check_number, check_positive
from fastlangevin.gradients.precision import network_precision
from fastlangevin.learn.data.arrays import map_npy
from fastlangevin.learn.data.pictures import ALPHA_MODES, GREY_MODES, open_picture, read_picture
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import cut, reading
from fastlangevin.names import check_name, did_you_mean

Operator = Callable[[Tensor], Tensor]
OPERATORS = ("mask", "downsample", "blur", "grey")


def identity(x: Tensor) -> Tensor:
    """Return x: the measurement y = x."""
    return x


class Mask:
    """y = m x. Pixels with m = 0 are hidden and measure 0.

    mask: bool [H, W] or [C, H, W]; True marks a known pixel.

    Raises TypeError or ValueError for another dtype or shape, and for a mask that hides nothing or
    everything.
    """

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"Mask: mask must be a bool tensor, got {type(mask).__name__}")
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
        """Return x with its known pixels taken from y."""
        return torch.where(self._fitted(x), y, x)

    def _fitted(self, x: Tensor) -> Tensor:
        if self.mask.shape[-2:] != x.shape[-2:] or self.mask.shape[:-2] not in ((), x.shape[1:2]):
            raise ValueError(
                f"Mask: mask must have the images' shape {list(x.shape[-2:])} or "
                f"{list(x.shape[1:])}, got {list(self.mask.shape)}"
            )
        return self.mask.to(x.device)


class Downsample:
    """y = the means over squares of ``factor`` x ``factor`` pixels. factor must divide H and W."""

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
    """y = x convolved with a Gaussian, truncated at 3 sigma, with replicated edges.

    sigma: standard deviation in pixels, at most 10^4.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = check_positive("Blur", "sigma", sigma)
        if self.sigma > 1e4:  # the kernel has 6 sigma weights
            raise ValueError(f"Blur: sigma must be at most 10000 pixels, got {self.sigma:g}")
        self.radius = math.ceil(3 * self.sigma)

    def __call__(self, x: Tensor) -> Tensor:
        at = torch.arange(-self.radius, self.radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.softmax(-(at**2) / (2 * self.sigma**2), 0)
        ends = self.radius, self.radius
        rows = functional.pad(x, (0, 0, *ends), mode="replicate").flatten(0, 1)[:, None]
        columns = functional.conv2d(rows, kernel.view(1, 1, -1, 1))
        columns = functional.pad(columns, (*ends, 0, 0), mode="replicate")
        return functional.conv2d(columns, kernel.view(1, 1, 1, -1)).view_as(x)


class Grey:
    """y = the mean over channels, [n, 1, H, W]. The images must have several channels."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ValueError("Grey: the images must have several channels, got 1")
        return x.mean(1, keepdim=True)


def make_operator(
    name: str, shape: tuple[int, ...], mask: str = "box", factor: int = 2, sigma: float = 1.0
) -> Operator:
    """Return one of :data:`OPERATORS` for images of ``shape`` (C, H, W).

    mask: "box" hides the central square of half the side, and "half" hides the lower half. Any
        other value is a file: a picture, or a .npy of [H, W] or [C, H, W]. Zero marks hidden pixels
        and, in a colour picture, black does. Transparent pictures are refused as ambiguous.
    factor: factor of "downsample".
    sigma: standard deviation of "blur", in pixels.

    Raises FileNotFoundError, FileError for a file that is not a mask, or ValueError naming what
    does not fit.
    """
    check_name("operator", name, OPERATORS)
    operators: dict[str, Callable[[], Operator]] = {
        "mask": lambda: Mask(_read_mask(mask, shape)),
        "downsample": lambda: Downsample(factor),
        "blur": lambda: Blur(sigma),
        "grey": Grey,
    }
    operator = operators[name]()
    operator(torch.zeros((1, *shape), dtype=torch.float32, device="cpu"))
    return operator


def _read_mask(name: str, shape: tuple[int, ...]) -> Tensor:
    height, width = shape[-2:]
    if name in ("box", "half"):
        mask = torch.ones((height, width), dtype=torch.bool, device="cpu")
        if name == "half":
            mask[height // 2 :] = False
        else:
            top, left = height // 4, width // 4
            mask[top : height - top, left : width - left] = False
        return mask
    path = Path(name)
    try:
        values = map_npy(path) if path.suffix == ".npy" else _read_picture(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"mask must be box, half or a file, got {name!r}{did_you_mean(name, ('box', 'half'))}"
        ) from None
    if values.size > math.prod(shape):
        raise FileError(f"{name} must be a mask {list(shape[-2:])}, got {list(values.shape)}")
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        got = "NaN or infinity" if values.dtype.kind == "f" else cut(str(values.dtype))
        raise FileError(f"{name} must hold finite numbers to be a mask, got {got}")
    known = torch.from_numpy(np.asarray(values != 0))
    with reading(path, "a mask"):
        Mask(known)(torch.zeros((1, *shape), dtype=torch.float32, device="cpu"))
    return known


def _read_picture(path: Path) -> np.ndarray:
    """Read the largest channel of every pixel of a picture, [H, W]."""
    encoded = read_picture(path)
    with reading(path, "a mask"), open_picture(encoded) as image:
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            raise ValueError("it has transparent pixels; save it in grey, with 0 for hidden pixels")
        if image.mode in GREY_MODES or image.mode == "F":
            return np.asarray(image)
        return np.asarray(image.convert("RGB")).max(-1)


@torch.inference_mode(False)  # the caller's inference mode would disable gradients
def adjoint(
    operator: Operator, y: Tensor, shape: tuple[int, ...], called: str = "adjoint: operator"
) -> Tensor:
    """Return A^T y, [n, *shape], for measurements y [n, ...]: <A x, y> = <x, A^T y>.

    This is the vector-Jacobian product of the linear A at zero. Raises ValueError, naming the
    operator as ``called``, if A x does not depend on x through autograd.
    """
    zero = y.new_zeros((len(y), *shape)).requires_grad_()
    seen = operator(zero)
    transposed = None
    if seen.requires_grad:
        (transposed,) = torch.autograd.grad(seen, zero, y, allow_unused=True)
    if transposed is None:
        raise ValueError(
            f"{called}'s output does not depend on its images through autograd (was it detached, "
            "or computed in numpy or under torch.no_grad?)"
        )
    return transposed


def norm(
    operator: Operator,
    shape: tuple[int, ...],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return a lower bound of |A|, the largest singular value on images of ``shape``."""
    x = _probe((1, *shape), 0, device, dtype)
    square = 0.0
    for _ in range(50):  # of the power iteration
        x = adjoint(operator, operator(x / x.norm()), shape)
        square = float(x.norm())
        if square == 0:
            break
    return math.sqrt(square)


def check_operator(
    op: str,
    operator: Operator,
    shape: tuple[int, ...],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "operator",
) -> tuple[int, ...]:
    """Check an operator A on images of ``shape``, and return the shape of one measurement.

    A must be linear and differentiable, map each image by itself, and not map every image to 0. It
    counts as linear if A(s x - 2 s z) = s A x - 2 s A z for small and large s, to half of the
    digits of float32 or of A's dtype, whichever has fewer. This allows for the rounding of sums
    over 10^6 pixels. Raises TypeError or ValueError, naming the argument as ``name``, otherwise.
    """
    called = f"{op}: {name}"
    if not callable(operator):
        raise TypeError(f"{called} must be a function, got {operator!r}")

    def apply(x: Tensor) -> Tensor:
        y, n = operator(x), len(x)
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 2 or len(y) != n:
            got = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{called} must map images {list(x.shape)} to a floating tensor [{n}, ...], "
                f"got {got}"
            )
        return y

    x = _probe((2, *shape), 0, device, dtype)
    with network_precision("fp32", x.device):
        y = apply(x)
        if not bool(y.any()):
            raise ValueError(f"{called} must not map every image to 0")
        eps = max(torch.finfo(kind).eps for kind in (y.dtype, torch.float32))
        for s in (1.0, 1e-3, 1e2):
            want = s * y[:1] - 2 * s * y[1:]
            difference = (apply(s * x[:1] - 2 * s * x[1:]) - want).float()
            error = float(difference.norm() / (s * y).float().norm())
            if not error <= eps**0.5:
                raise ValueError(
                    f"{called} must be linear, but A(s x - 2 s z) is not s A x - 2 s A z for "
                    f"x, z in [-1, 1] and s = {s:g}: they differ by {error:.2g} |s A x|"
                )
        other = _probe(y.shape, 1, device, dtype).to(y.dtype)
        back = adjoint(operator, other, shape, called)
        product, transposed = float((y * other).sum()), float((x * back).sum())
    if not abs(product - transposed) <= eps**0.5 * float(y.norm() * other.norm()):
        raise ValueError(
            f"{called} is linear, but its gradient is another map's (is a part of it "
            f"detached?): <A x, y> = {product:.4g}, <x, A' y> = {transposed:.4g}"
        )
    return tuple(y.shape[1:])


def _probe(
    shape: tuple[int, ...], step: int, device: torch.device | None, dtype: torch.dtype
) -> Tensor:
    """Draw U(-1, 1) with seed 0, in float64 if the measurements are, else in float32."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    u = _noise.uniform(shape, seed=0, step=step, stream=_noise.USER, device=device, dtype=dtype)
    return 2 * u - 1


def measure(operator: Operator, x: Tensor, noise: float, seed: int) -> Tensor:
    """Return A x + noise e, with e standard normal; hidden pixels of a Mask stay 0."""
    y = operator(x)
    if check_number("measure", "measurement_noise", noise) == 0:
        return y
    e = _noise.normal(y.shape, seed=seed, step=1, stream=_noise.USER, device=y.device)
    y = y + noise * e.to(y.dtype)
    return operator(y) if isinstance(operator, Mask) else y


def picture(operator: Operator, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return measurements as images of ``shape``: y if it has this shape, else A^T y / |A|^2."""
    if tuple(y.shape[1:]) == shape:
        return y
    return adjoint(operator, y, shape) / norm(operator, shape, y.device, y.dtype) ** 2
