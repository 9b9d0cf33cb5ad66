"""What a step promises: no noise means descent, NaN stays NaN, x alone changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.step import (
    bind_step,
    resolve_backend,
)
from tests.core.step_shared import DTYPES, A, B, numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_noise_it_is_gradient_descent_exactly(
    step_: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """a = 1/2: the product is exact, so that one rounding is left, with or without an FMA."""
    x, grad = numbers((3, 1023), dtype), numbers((3, 1023), dtype, 1)
    compute = torch.promote_types(dtype, torch.float32)
    want = (x.to(compute) - 0.5 * grad.to(compute)).to(dtype)
    assert torch.equal(step_(x.clone(), grad, step_size=0.5, noise_std=0), want)
    assert torch.equal(step_(x.clone(), grad, step_size=0.5, noise_std=0.0, seed=4), want)
    assert torch.equal(step_(x, grad, step_size=0.5, noise_std=0.0, noise=x * math.nan), want)


def test_without_noise_the_generator_is_skipped(
    step_: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the extension is built, normal is the way to its generator, not philox.
    monkeypatch.setattr(fl.noise, "normal", lambda *_, **__: pytest.fail("numbers drawn"))
    x = step_(torch.zeros(2, 3), torch.ones(2, 3), noise_std=0.0)
    assert torch.equal(x, torch.full((2, 3), -A))


def test_a_zero_per_chain_noise_std_is_descent_for_that_chain(
    step_: Callable[..., Tensor],
) -> None:
    x, grad = numbers((2, 1023)), numbers((2, 1023), seed=1)
    want = step_(x.clone(), grad, step_size=0.5, noise_std=0.0)
    got = step_(x.clone(), grad, step_size=0.5, noise_std=torch.tensor([0.0, B]))
    assert torch.equal(got[0], want[0])
    assert (got[1] == want[1]).float().mean() < 0.01


@pytest.mark.parametrize("coefficient", [torch.tensor(A), torch.tensor(A, dtype=torch.float64)])
def test_zero_dimensional_coefficients(step_: Callable[..., Tensor], coefficient: Tensor) -> None:
    x, grad = numbers((3, 1023)), numbers((3, 1023), seed=1)
    want = step_(x.clone(), grad, step_size=A, noise_std=A)
    got = step_(x, grad, step_size=coefficient, noise_std=coefficient)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("where", "clip", "noise_last", "dtype"),
    [
        ("x", None, False, torch.float32),
        ("grad", 0.1, True, torch.float32),
        ("x", 0.1, True, torch.bfloat16),
        ("grad", None, False, torch.float16),
        ("grad", 0.1, False, torch.float64),
    ],
    ids=str,
)
def test_nan_stays_nan(
    step_: Callable[..., Tensor], where: str, clip: float | None, noise_last: bool, dtype: Any
) -> None:
    tensors = {"x": numbers((3, 37), dtype), "grad": numbers((3, 37), dtype, 1)}
    spots = [(0, 0), (1, 17), (2, 36)]
    for spot in spots:
        tensors[where][spot] = math.nan
    got = step_(**tensors, clamp=(-1.0, 1.0), grad_clip=clip, noise_last=noise_last)
    assert [tuple(spot) for spot in got.isnan().nonzero().tolist()] == spots


@pytest.mark.parametrize(("kind", "lost"), [("chain_norm", [1]), ("batch_norm", [0, 1, 2])])
def test_nan_is_not_hidden_by_a_norm_clip(
    step_: Callable[..., Tensor], kind: str, lost: list
) -> None:
    """A norm that is NaN spoils all that it scales, as torch's clip_grad_norm_ does."""
    grad = torch.ones(3, 5)
    grad[1, 2] = math.nan
    got = step_(torch.zeros(3, 5), grad, clamp=(-1.0, 1.0), grad_clip=(kind, 1.0))
    assert got.isnan().all(1).nonzero().flatten().tolist() == lost
    assert got.isnan().any(1).nonzero().flatten().tolist() == lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_are_clamped(step_: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([[math.inf, -math.inf, 0.0, 0.0]], dtype=dtype)
    grad = torch.tensor([[0.0, 0.0, math.inf, -math.inf]], dtype=dtype)
    assert step_(x, grad, clamp=(-1.0, 0.5)).tolist() == [[0.5, -1.0, -1.0, 0.5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_works_in_place_and_on_x_alone(step_: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, grad, z = (numbers((3, 37), dtype, seed) for seed in range(3))
    a, b = torch.full((3,), A), torch.full((3,), B)
    inputs = grad, z, a, b
    before, address, rng = [t.clone() for t in inputs], x.data_ptr(), torch.get_rng_state()
    got = step_(
        x, grad, noise=z, step_size=a, noise_std=b, clamp=(-1, 1), grad_clip=("chain_norm", 1)
    )
    assert got is x
    assert x.data_ptr() == address
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_coefficients_that_require_grad_leave_no_graph(step_: Callable[..., Tensor]) -> None:
    a = torch.tensor(A, requires_grad=True)
    grad = numbers((3, 5), seed=1).requires_grad_()
    x = step_(numbers((3, 5)), grad, step_size=a, noise_std=a)
    assert not x.requires_grad
    assert torch.equal(x, step_(numbers((3, 5)), grad.detach(), step_size=A, noise_std=A))


def test_autograd_is_told_of_the_change(step_: Callable[..., Tensor]) -> None:
    """A graph that saved x cannot be run after x changed: that would give a wrong gradient."""
    x, weight = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    loss = (x * weight).sum()
    step_(x, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("dtype", "clip"),
    [
        (torch.float32, None),
        (torch.float64, ("chain_norm", 5.0)),
        (torch.bfloat16, 0.4),
    ],
    ids=str,
)
def test_a_bound_step_is_the_step(
    place: tuple[str, torch.device], clip: Any, dtype: torch.dtype
) -> None:
    """What a loop calls, step after step on one x: with every form of gradient and coefficient."""
    backend, device = place
    options = {"seed": 2**64 - 3, "first_chain": 4, "clamp": (-0.9, 0.8), "grad_clip": clip}
    forms = {"maximize": True, "noise_last": True}
    grads = [numbers((4, 3, 5, 7), grad_dtype, 1).to(device) for grad_dtype in DTYPES]
    grads += [None, grads[0].to(memory_format=torch.channels_last)]
    grads += [torch.complex(grads[0], grads[0]).conj().imag]
    per_chain = torch.tensor([0.1, 0.0, 0.3, 0.7], device=device)
    coefficients = [(A, B), (A, 0.0), (per_chain, B), (A, per_chain)]
    if backend == "triton" and device.type == "cpu":  # interpreted, and bound in one way only
        grads, coefficients = grads[::6], coefficients[2:3]
    x, want = (numbers((4, 3, 5, 7), dtype).to(device) for _ in range(2))
    bound = bind_step(resolve_backend(backend, device), x, **options, **forms)
    for step, grad in enumerate(grads):
        for a, b in coefficients:
            fl.langevin_step_(
                want, grad, step_size=a, noise_std=b, step=step, backend=backend, **options, **forms
            )
            version = x._version
            assert bound(grad, a, b, step) is x
            assert torch.equal(x, want)
            assert x._version > version


def test_a_bound_step_of_an_inference_tensor(place: tuple[str, torch.device]) -> None:
    backend, device = place
    options = {"clamp": None, "grad_clip": None, "maximize": False, "noise_last": False}
    with torch.inference_mode():
        x = numbers((3, 5)).to(device)
        bound = bind_step(resolve_backend(backend, device), x, seed=3, first_chain=0, **options)
        bound(None, A, B, 5)
    want = fl.langevin_step_(
        numbers((3, 5)).to(device), None, step_size=A, noise_std=B, seed=3, step=5, backend=backend
    )
    assert torch.equal(x, want)
