"""Random steps with any shape, layout, dtype and options, on every backend that runs here.

A backend must be as close to the float64 reference as float32 arithmetic allows, and must compute
the same bits for a shard of the chains as for the whole batch. The native kernels must equal the
float32 reference bit for bit.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise
from fastlangevin.kernels import native, reference
from fastlangevin.step import apply_step_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNIT = 2.0**-24  # half a spacing of float32 at 1
# A coefficient in float32, products and sums are less than eight roundings.
_ROUNDINGS = 8 * _UNIT
_NORMALS = 2e-6  # the noise contract


@dataclass
class StepCase:
    x: Tensor
    grad: Tensor | None
    z: Tensor | None
    options: dict[str, Any]


def step_case(seed: int) -> StepCase:
    """The case with this number; the same tensors and options at every call."""
    draw = random.Random(seed)
    shape = [draw.randint(1, 9) for _ in range(draw.randint(1, 5))]
    if draw.random() < 0.5:
        shape = [*shape[:2], draw.choice([61, 256, 2050])]
    x = _tensor(draw, shape)
    grad, z = (_tensor(draw, shape) if draw.random() < 0.6 else None for _ in range(2))
    for value in (x, grad, z):
        if value is not None and draw.random() < 0.1:
            index = tuple(draw.randrange(size) for size in shape)
            value[index] = draw.choice([float("nan"), float("inf"), -float("inf")])
    options = {
        "step_size": _coefficient(draw, shape[0]),
        "noise_std": _coefficient(draw, shape[0]),
        "seed": draw.randrange(2**64),
        "step": draw.randrange(2**32),
        "first_chain": draw.randrange(2**32 - shape[0] + 1),
        "clamp": draw.choice([None, (-0.5, 1.0)]),
        "grad_clip": draw.choice([None, 0.6, ("chain_norm", 2.0), ("batch_norm", 5.0)]),
        "maximize": draw.random() < 0.5,
        "noise_last": draw.random() < 0.5,
    }
    return StepCase(x, grad, z, options)


def check_step(case: StepCase, run: Callable[..., Tensor]) -> float:
    """The largest error of a backend's step, relative to its bound.

    AssertionError if it does not return x, a shard differs from the whole batch, or the native step
    differs from the reference.
    """
    x = case.x.clone()
    stepped = apply_step_(run, x, case.grad, case.z, **case.options)
    assert stepped is x, "the step did not return x"
    if run is native.step_:
        expected, z = case.x.clone(), case.z
        if z is None and not reference.is_zero(case.options["noise_std"]):
            address = {name: case.options[name] for name in ("seed", "step", "first_chain")}
            z = noise.normal(x.shape, **address)
        apply_step_(reference.step_, expected, case.grad, z, **case.options)
        assert _equal(stepped, expected), "the native step differs from the reference"
    _check_shard(case, run, stepped)
    exact, bound = _exact(case)
    finite = exact.isfinite()
    assert _equal(stepped.double()[~finite], exact[~finite]), "NaN or an infinity is elsewhere"
    error = (stepped.double() - exact).abs()[finite] / bound[finite]
    ratio = float(error.max()) if error.numel() else 0.0
    return ratio if ratio == ratio else float("inf")


def _check_shard(case: StepCase, run: Callable[..., Tensor], whole_batch: Tensor) -> None:
    first_row = case.x.shape[0] // 2
    # Torch sums a norm in an order that depends on the whole shape.
    if first_row == 0 or isinstance(case.options["grad_clip"], tuple):
        return
    options = {**case.options, "first_chain": case.options["first_chain"] + first_row}
    for name in ("step_size", "noise_std"):
        value = options[name]
        if isinstance(value, Tensor) and value.ndim:
            options[name] = value[first_row:]
    grad, z = (None if v is None else v[first_row:] for v in (case.grad, case.z))
    shard = apply_step_(run, case.x.clone()[first_row:], grad, z, **options)
    assert _equal(shard, whole_batch[first_row:]), (
        "a shard's chains differ from those of the whole batch"
    )


def _exact(case: StepCase) -> tuple[Tensor, Tensor]:
    """The step in float64, and a bound on the error of float32 arithmetic."""
    options, shape = case.options, case.x.shape
    grad, z = (None if v is None else v.double() for v in (case.grad, case.z))
    drawn = z is None and not reference.is_zero(options["noise_std"])
    if drawn:
        address = (shape, options["seed"], options["step"])
        z = noise.normal_ref(*address, first_chain=options["first_chain"], dtype=torch.float64)
    elif reference.is_zero(options["noise_std"]):
        z = None
    x = case.x.double()
    exact = apply_step_(reference.step_, x.clone(), grad, z, **options)
    a, b = (
        torch.as_tensor(reference.per_chain(options[name], x, torch.float64)).abs()
        for name in ("step_size", "noise_std")
    )
    bound = _finite(_ROUNDINGS * x.abs())
    if grad is not None:
        roundings, clip = _ROUNDINGS, options["grad_clip"]
        if isinstance(clip, tuple):
            summed = grad if clip[0] == "batch_norm" else grad[0]
            roundings += summed.numel() * _UNIT
        elif clip is not None:
            grad = grad.clamp(-clip, clip)
        bound = bound + _finite(roundings * a * grad.abs())
    if z is not None:
        bound = bound + _finite(_ROUNDINGS * b * z.abs() + _NORMALS * b * drawn)
    dtype = torch.finfo(case.x.dtype)
    # Half a spacing, which is constant below the smallest normal number.
    stored = dtype.eps / 2 * (exact.abs() + bound) + dtype.tiny * dtype.eps / 2
    return exact, bound + stored


def _finite(bound: Tensor) -> Tensor:
    """Remove terms that are infinite or NaN: if the result is finite, a clamp has removed them."""
    return bound.nan_to_num(0.0, 0.0)


def _tensor(draw: random.Random, shape: list[int], dtypes: Any = DTYPES) -> Tensor:
    """A tensor of a random dtype and layout: dimensions permuted, padded or at an offset."""
    order = draw.sample(range(len(shape)), len(shape))
    sizes = [shape[d] + draw.randint(0, 1) for d in order]
    offset = draw.randint(0, 3)
    storage = torch.zeros(offset + torch.Size(sizes).numel(), dtype=draw.choice(dtypes))
    view = storage[offset:].view(sizes).permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(0, size) for size in shape)]
    return view.copy_(_normal(draw, shape))


def _coefficient(draw: random.Random, chains: int) -> float | Tensor:
    per_chain = _normal(draw, [chains]).abs()
    forms: list[float | Tensor] = [0.0, 0.37, per_chain, per_chain.double(), per_chain[0]]
    return draw.choice(forms)


def _normal(draw: random.Random, shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**32)))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all elements are equal; NaN equals NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
