"""Cases of the step, the variants that can take it, and a check that all take the same step.

    x <- clamp(x + g + b z, -1, 1)

This is the paper's update up to the sign of g, and the one that users write by hand.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin as fl
from benchmarks import timing
from fastlangevin.kernels import reference
from fastlangevin.step import backend_status

SEED, STEP, CLAMP = 20190422, 7, (-1.0, 1.0)
BASELINES = ("eager", "eager in place", "torch.compile", "torchebm")
OURS = ("reference", "native", "triton")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# One rounding to the state's dtype at |x| <= 1. In bf16 all other errors are negligible.
_TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2.0e-3}
# For the mean and standard deviation of noise / b. States |x| <= 0.5 in bf16 round b z by up to
# 0.05 b.
_STATISTICS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
# The reference is a specification and makes some 50 int64 temporaries: it is timed at small sizes.
_REFERENCE_BYTES = 2**23


class Case(NamedTuple):
    """One question: how long does this step take?"""

    size: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    noise_std: float
    device: torch.device

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes_moved(self) -> int:
        # Read x, read g, write x: no step can move less. Other traffic of a variant, such as noise
        # written to memory, counts as time and not as bytes.
        return 3 * self.elements * _DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        noise = "noise" if self.noise_std else "b=0"
        return f"{self.size}-{self.dtype}-{self.layout}-{noise}"

    def tensors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """A state in (-scale, scale) and a gradient of 0.01 scale, in the case's layout."""
        options = {"device": self.device, "dtype": torch.float32}
        x = torch.rand(self.shape, **options).mul_(2 * scale).sub_(scale)
        g = torch.randn(self.shape, **options).clamp_(-3, 3).mul_(0.01 * scale)
        form = {"dtype": _DTYPES[self.dtype], "memory_format": _LAYOUTS[self.layout]}
        return x.to(**form), g.to(**form)


class Variant(NamedTuple):
    """One way to take the step: take(x, g) returns x, changed in place, or a new state."""

    name: str
    take: Callable[[Tensor, Tensor], Tensor]
    sign: float = 1.0  # of the gradient


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """Sizes x dtypes x layouts x noise; ``quick``: one small size in fp32."""
    if quick:
        return [
            Case("64x1x8x8", (64, 1, 8, 8), "fp32", "contiguous", noise_std, device)
            for noise_std in (0.01, 0.0)
        ]
    all_cases = []
    for size in ("64x1x8x8", "64x3x32x32", "256 MB" if device.type == "cuda" else "64 MB"):
        for dtype in _DTYPES:
            shape = _shape(size, _DTYPES[dtype].itemsize)
            # With one channel both layouts are the same memory.
            for layout in _LAYOUTS if shape[1] > 1 else ["contiguous"]:
                all_cases += [Case(size, shape, dtype, layout, b, device) for b in (0.01, 0.0)]
    return all_cases


def _shape(size: str, itemsize: int) -> tuple[int, ...]:
    if not size.endswith(" MB"):
        return tuple(int(n) for n in size.split("x"))
    image = (3, 128, 128)
    return (round(int(size[:-3]) * 1e6 / (torch.Size(image).numel() * itemsize)), *image)


def variants(case: Case, compiled: bool = True) -> list[Variant]:
    """All variants that can take this step here. The slow reference only takes small ones."""
    b = case.noise_std
    available = [Variant("eager", _eager(b)), Variant("eager in place", _in_place(b))]
    if compiled:
        # Earlier cases count against the limit on recompilations, and the number of threads is
        # compiled in.
        torch._dynamo.reset()
        compiled_step = torch.compile(_in_place(b), dynamic=False, fullgraph=True)
        available.append(Variant("torch.compile", compiled_step))
    if _torchebm_supports(case):
        available.append(Variant("torchebm", _torchebm(b), sign=-1.0))
    for name, reason in backend_status(case.device).items():
        small = case.elements * _DTYPES[case.dtype].itemsize <= _REFERENCE_BYTES
        if reason is None and (name != "reference" or small):
            available.append(Variant(name, _ours(b, name)))
    return available


def _eager(b: float) -> Callable[[Tensor, Tensor], Tensor]:
    if b == 0:
        return lambda x, g: (x + g).clamp(*CLAMP)
    return lambda x, g: (x + g + b * torch.randn_like(x)).clamp(*CLAMP)


def _in_place(b: float) -> Callable[[Tensor, Tensor], Tensor]:
    if b == 0:
        return lambda x, g: x.add_(g).clamp_(*CLAMP)
    return lambda x, g: x.add_(g).add_(torch.randn_like(x), alpha=b).clamp_(*CLAMP)


def _torchebm_supports(case: Case) -> bool:
    return (
        (case.device.type, case.dtype, case.layout) == ("cuda", "fp32", "contiguous")
        and case.noise_std > 0  # its kernel always draws noise
        and all(importlib.util.find_spec(name) for name in ("torchebm", "triton"))
    )


def _torchebm(b: float) -> Callable[[Tensor, Tensor], Tensor]:
    from torchebm.cuda.fused_langevin import fused_langevin_step

    # Its noise coefficient is noise_scale * sqrt(2 * step_size), with step_size 1 here.
    options = {"step_size": 1.0, "noise_scale": b / 2**0.5, "clamp": CLAMP, "seed": STEP}
    return lambda x, g: fused_langevin_step(x, g, out=x, **options)


def _ours(b: float, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(
        fl.langevin_step_, step_size=1.0, noise_std=b, seed=SEED, step=STEP, clamp=CLAMP,
        maximize=True, backend=backend,
    )  # fmt: skip


def check(case: Case, variant: Variant) -> None:
    """AssertionError unless the variant takes the float64 reference's step.

    Our backends are compared with the noise contract, element by element. The noise of other
    variants must have mean 0 and standard deviation b within 5 standard errors. The first and last
    8 chains are checked.
    """
    foreign = case.noise_std > 0 and variant.name not in OURS
    # The statistics of foreign noise hold only if nothing is clamped.
    x, g = case.tensors(scale=0.5 if foreign else 1.1)
    rows = torch.arange(case.shape[0], device=case.device)
    rows = torch.cat((rows[:8], rows[-8:])).unique()
    before, grad = x[rows].double(), variant.sign * g[rows].double()
    after = variant.take(x, g)
    assert after.shape == x.shape, (
        f"{variant.name}: expected shape {list(x.shape)}, got {list(after.shape)}"
    )
    moved = after[rows].double()
    if foreign:
        z = (moved - before - grad) / case.noise_std
        slack = _STATISTICS[_DTYPES[case.dtype]] + 5 / z.numel() ** 0.5
        mean, std = z.mean().item(), z.std().item()
        assert abs(mean) < slack and abs(std - 1) < slack, (  # noqa: PT018
            f"{variant.name}, {case}: noise of mean {mean:.4f} b and deviation {std:.4f} b"
        )
        return
    z = _contract_noise(case, rows) if case.noise_std else None
    expected = reference.langevin_step(
        before, grad, z, step_size=1.0, noise_std=case.noise_std, clamp=CLAMP, maximize=True
    )
    error = (moved - expected).abs().max().item()
    bound = _TOLERANCE[_DTYPES[case.dtype]]
    assert error <= bound, f"{variant.name}, {case}: off by {error:.2e}, more than {bound:.1e}"


def _contract_noise(case: Case, rows: Tensor) -> Tensor:
    options = {"seed": SEED, "step": STEP, "device": case.device, "dtype": torch.float64}
    shape = (1, *case.shape[1:])
    return torch.cat([fl.noise.normal(shape, first_chain=int(c), **options) for c in rows])


def samplers(
    case: Case, candidates: list[Variant], least_seconds: float
) -> tuple[dict[str, timing.Sampler], dict[str, str], int]:
    """Check variants and prepare their timing, and that of the copy.

    Returns functions to time by name, errors by name, and the number of sets of buffers.
    """
    # A step touches two tensors that a cache can hold, x and g.
    sets = timing.buffer_sets(case.bytes_moved * 2 // 3, case.device)
    buffers = [case.tensors() for _ in range(sets)]
    ready = {"copy": timing.sampler(
        timing.copy_steps(case.bytes_moved, case.device), case.device, least_seconds
    )}  # fmt: skip
    errors: dict[str, str] = {}
    for variant in candidates:
        try:
            check(case, variant)
            steps: list[Callable[[], Any]] = [
                functools.partial(variant.take, x, g) for x, g in buffers
            ]
            ready[variant.name] = timing.sampler(steps, case.device, least_seconds)
        except Exception as error:  # the other variants are still timed
            errors[variant.name] = f"{type(error).__name__}: {error}"
    return ready, errors, sets
