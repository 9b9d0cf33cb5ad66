"""The step contract: every backend that runs here against the reference in float64."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels.reference import langevin_step
from fastlangevin.step import (
    BACKENDS,
    backend_status,
)
from tests.core.step_shared import DTYPES, A, B, error, numbers
from tests.pairwise import pairwise

# Around a block of four normals, a prime-like odd number, a vector length + 1, several rows, and
# more than one grid or thread's share.
SHAPES = [
    *[(0, 5), (3, 0), (1, 1), (1, 3), (1, 4), (1, 5), (3, 5), (2, 1023), (3, 4097), (4, 40_001)],
    *[(7,), (4, 3, 5, 7), (2, 4, 6, 8)],
]
OPTIONS = {
    "plain": {},
    "maximize": {"maximize": True},
    "clip": {"grad_clip": 0.4},
    "clamp": {"clamp": (-0.9, 0.8)},
    "last": {"noise_last": True, "clamp": (-0.9, 0.8)},
    "all": {"maximize": True, "clamp": (-0.9, 0.8), "grad_clip": 0.4},
    "all last": {"maximize": True, "clamp": (-0.9, 0.8), "grad_clip": 0.4, "noise_last": True},
}


def eager_step(
    x: Tensor,
    grad: Tensor,
    z: Tensor,
    *,
    step_size: float | Tensor,
    noise_std: float | Tensor,
    clamp: tuple[float, float] = (-math.inf, math.inf),
    grad_clip: float = math.inf,
    maximize: bool = False,
    noise_last: bool = False,
) -> Tensor:
    """What a user's own loop does: every operation rounds to x's dtype."""
    a, b = (
        v.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) if isinstance(v, Tensor) else v
        for v in (step_size, noise_std)
    )
    move = a * grad.to(x.dtype).clamp(-grad_clip, grad_clip)
    moved = x + move if maximize else x - move
    if noise_last:
        return moved.clamp(*clamp) + b * z.to(x.dtype)
    return (moved + b * z.to(x.dtype)).clamp(*clamp)


def check(got: Tensor, exact: Tensor, eager: Tensor, slack: float = 0.0) -> None:
    """At most twice eager torch's error; where that is below one unit in the last place, one."""
    unit = torch.finfo(got.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert error(got, exact) <= max(2 * error(eager, exact), unit) + slack


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_backends_by_name(name: str, device: str) -> None:
    """The tests below run every backend where it serves; where it does not is skipped here."""
    reason = backend_status(torch.device(device))[name]
    if reason is not None:
        pytest.skip(f"backend {name} on {device}: {reason}")
    x, grad, z = (numbers((3, 5), seed=seed).to(device) for seed in range(3))
    exact = langevin_step(x.double(), grad.double(), z.double(), step_size=A, noise_std=B)
    got = fl.langevin_step_(
        x, grad, step_size=A, noise_std=B, seed=0, step=0, noise=z, backend=name
    )
    assert error(got, exact) <= 3e-7


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, DTYPES[k]) for i, shape in enumerate(SHAPES) for k in dict.fromkeys((0, i % 4))],
    ids=str,
)
def test_steps_of_every_size_match_float64(
    step_: Callable[..., Tensor], shape: tuple, dtype: torch.dtype
) -> None:
    x, grad, z = (numbers(shape, dtype, seed) for seed in range(3))
    exact = langevin_step(x.double(), grad.double(), z.double(), step_size=A, noise_std=B)
    eager = eager_step(x, grad, z, step_size=A, noise_std=B)
    check(step_(x, grad, noise=z), exact, eager)


@pytest.mark.parametrize(
    ("chosen", "per_chain", "dtype"),
    pairwise(OPTIONS, ["", "step_size", "noise_std", "step_size noise_std"], DTYPES),
    ids=str,
)
def test_steps_with_every_option_match_float64(
    step_: Callable[..., Tensor], chosen: str, per_chain: str, dtype: torch.dtype
) -> None:
    options = OPTIONS[chosen]
    x, grad, z = (numbers((4, 3, 5, 7), dtype, seed) for seed in range(3))
    coefficients = {"step_size": A, "noise_std": B} | {
        name: torch.tensor([0.1, 0.0, 0.3, 0.7]) for name in per_chain.split()
    }
    exact = langevin_step(x.double(), grad.double(), z.double(), **coefficients, **options)
    by_hand = eager_step(x.double(), grad.double(), z.double(), **coefficients, **options)
    assert error(by_hand, exact) <= 1e-14
    eager = eager_step(x, grad, z, **coefficients, **options)
    check(step_(x, grad, noise=z, **coefficients, **options), exact, eager)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_half_precision_states_are_rounded_once(
    step_: Callable[..., Tensor], dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Half a unit in the last place, up to float32's own error near a cancellation."""
    x, z = numbers((3, 4097), dtype), numbers((3, 4097), dtype, 2)
    grad = numbers((3, 4097), grad_dtype, 1)
    exact = langevin_step(x.double(), grad.double(), z.double(), step_size=A, noise_std=B)
    got = step_(x, grad, noise=z)
    half_unit = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((got.double() - exact).abs() <= half_unit * (1 + 1e-3) + 1e-6).all())


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(one, DTYPES[(i + k) % 4]) for i, one in enumerate(DTYPES) for k in (1, 2)],
    ids=str,
)
def test_gradient_dtypes(
    step_: Callable[..., Tensor], dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """The gradient is read as it is, not rounded to the state's dtype first."""
    x, z = numbers((3, 1023), dtype), numbers((3, 1023), dtype, 2)
    grad = numbers((3, 1023), grad_dtype, 1)
    exact = langevin_step(x.double(), grad.double(), z.double(), step_size=A, noise_std=B)
    compute = torch.promote_types(dtype, torch.float32)
    eager = eager_step(x.to(compute), grad.to(compute), z.to(compute), step_size=A, noise_std=B)
    check(step_(x, grad, noise=z), exact, eager.to(dtype))


@pytest.mark.parametrize("first_chain", [0, 2**31 - 1, 2**32 - 8])
def test_noise_equals_the_contracts_normals(step_: Callable[..., Tensor], first_chain: int) -> None:
    """From x = 0 with b = 1 the state is the noise: 2e-6 from the formula in float64."""
    address = {"seed": 2**64 - 3, "step": 2**32 - 1, "first_chain": first_chain}
    z = fl.noise.normal((8, 3, 5, 41), **address, dtype=torch.float64)
    x = step_(torch.zeros(z.shape), None, step_size=0.0, noise_std=1.0, **address)
    assert error(x, z) <= 2e-6


@pytest.mark.parametrize(
    ("chosen", "dtype"), list(zip(OPTIONS, itertools.cycle(DTYPES), strict=False)), ids=str
)
def test_steps_with_drawn_noise_match_float64(
    step_: Callable[..., Tensor], chosen: str, dtype: torch.dtype
) -> None:
    """Each option once: test_steps_with_every_option_match_float64 pairs them with dtypes."""
    options = OPTIONS[chosen]
    x, grad = numbers((4, 3, 5, 7), dtype), numbers((4, 3, 5, 7), dtype, 1)
    z = fl.noise.normal(x.shape, seed=3, step=5, first_chain=9, dtype=torch.float64)
    exact = langevin_step(x.double(), grad.double(), z, step_size=A, noise_std=B, **options)
    eager = eager_step(x, grad, z, step_size=A, noise_std=B, **options)
    check(step_(x, grad, first_chain=9, **options), exact, eager, slack=2e-6 * B)


@pytest.mark.parametrize(
    ("clamp", "noise_last"), [(None, False), ((-0.9, 0.8), False), ((-0.9, 0.8), True)]
)
def test_steps_without_a_gradient_match_float64(
    step_: Callable[..., Tensor], clamp: tuple | None, noise_last: bool
) -> None:
    x, z = numbers((3, 1023)), numbers((3, 1023), seed=1)
    options = {"noise_std": B, "clamp": clamp, "noise_last": noise_last}
    exact = langevin_step(x.double(), torch.zeros(3, 1023), z.double(), step_size=A, **options)
    assert error(step_(x, None, noise=z, **options), exact) <= 2.4e-7


def clipped(grad: Tensor, kind: str, bound: float) -> Tensor:
    """The clip written out, chain by chain, in float64."""
    rows = list(grad.double())
    norms = [math.sqrt(float(row.square().sum())) for row in rows]
    if kind == "batch_norm":
        norms = [math.sqrt(sum(norm**2 for norm in norms))] * len(rows)
    return torch.stack([g * min(1, bound / n) for g, n in zip(rows, norms, strict=True)])


@pytest.mark.parametrize(
    ("bound", "kind", "grad_dtype", "step_sizes"),
    [
        (0.3, "chain_norm", torch.float32, None),
        (3.0, "chain_norm", torch.bfloat16, (0.1, 0.5, 0.0, 0.3)),
        (300.0, "chain_norm", torch.float16, None),
        (0.3, "batch_norm", torch.float64, (0.1, 0.5, 0.0, 0.3)),
        (3.0, "batch_norm", torch.float32, None),
        (300.0, "batch_norm", torch.bfloat16, (0.1, 0.5, 0.0, 0.3)),
    ],
    ids=str,
)
def test_norm_clips_match_float64(
    step_: Callable[..., Tensor],
    bound: float,
    kind: str,
    grad_dtype: torch.dtype,
    step_sizes: tuple[float, ...] | None,
) -> None:
    step_size = A if step_sizes is None else torch.tensor(step_sizes)
    x, z = numbers((4, 3, 5, 7)), numbers((4, 3, 5, 7), seed=2)
    grad = numbers((4, 3, 5, 7), grad_dtype, 1) * torch.tensor([0.1, 1, 0.4, 2]).to(
        grad_dtype
    ).view(4, 1, 1, 1)
    norms = grad.double().flatten(1).norm(dim=1)
    assert bound != 3.0 or norms.min() < bound < norms.max(), "3.0 is to clip some chains only"
    exact = langevin_step(
        x.double(), clipped(grad, kind, bound), z.double(), step_size=step_size, noise_std=B
    )
    got = step_(x, grad, noise=z, grad_clip=(kind, bound), step_size=step_size)
    assert error(got, exact) <= 1e-6


@pytest.mark.parametrize("kind", ["chain_norm", "batch_norm"])
def test_norm_clip_of_a_zero_gradient(step_: Callable[..., Tensor], kind: str) -> None:
    x, before = numbers((3, 5)), numbers((3, 5))
    assert torch.equal(step_(x, torch.zeros(3, 5), noise_std=0.0, grad_clip=(kind, 1.0)), before)


@pytest.mark.parametrize("clip", [math.inf, ("chain_norm", math.inf), ("batch_norm", math.inf)])
def test_an_infinite_bound_clips_nothing(step_: Callable[..., Tensor], clip: Any) -> None:
    x, grad = numbers((3, 37)), numbers((3, 37), seed=1)
    assert torch.equal(step_(x.clone(), grad, grad_clip=clip), step_(x.clone(), grad))


def test_norm_clip_of_one_dimensional_chains(step_: Callable[..., Tensor]) -> None:
    grad = torch.tensor([0.5, -2.0, 8.0])
    x = step_(torch.zeros(3), grad, step_size=1.0, noise_std=0.0, grad_clip=("chain_norm", 1.0))
    assert x.tolist() == [-0.5, 1.0, -1.0]
