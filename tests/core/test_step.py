"""The step contract: every backend that runs here against the reference in float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels.reference import langevin_step
from fastlangevin.step import (
    BACKENDS,
    backend_status,
    bind_step,
    choose_backend,
    resolve_backend,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Around a block of four normals, a prime-like odd number, a vector length + 1, several rows, and
# more than one grid or thread's share.
SHAPES = [
    *[(0, 5), (3, 0), (1, 1), (1, 3), (1, 4), (1, 5), (3, 5), (2, 1023), (3, 4097), (4, 40_001)],
    *[(7,), (4, 3, 5, 7), (2, 4, 6, 8)],
]
A, B = 0.3, 0.05
OPTIONS = {
    "plain": {},
    "maximize": {"maximize": True},
    "clip": {"grad_clip": 0.4},
    "clamp": {"clamp": (-0.9, 0.8)},
    "last": {"noise_last": True, "clamp": (-0.9, 0.8)},
    "all": {"maximize": True, "clamp": (-0.9, 0.8), "grad_clip": 0.4},
    "all last": {"maximize": True, "clamp": (-0.9, 0.8), "grad_clip": 0.4, "noise_last": True},
}


def numbers(shape: tuple, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same on all devices, on the one that torch creates tensors on."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


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


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max()) if x.numel() else 0.0


def check(got: Tensor, exact: Tensor, eager: Tensor, slack: float = 0.0) -> None:
    """At most twice eager torch's error; where that is below one unit in the last place, one."""
    unit = torch.finfo(got.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert error(got, exact) <= max(2 * error(eager, exact), unit) + slack


@pytest.fixture
def step_(backend: str, device: torch.device) -> Iterator[Callable[..., Tensor]]:
    """langevin_step_ by one backend, at an address and with coefficients that tests override.

    Tensors that tests create meanwhile are on the backend's device.
    """

    def run(x: Tensor, grad: Tensor | None, **options: Any) -> Tensor:
        defaults = {"step_size": A, "noise_std": B, "seed": 3, "step": 5, "backend": backend}
        return fl.langevin_step_(x, grad, **defaults | options)

    with device:
        yield run


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


# Against the reference in float64 ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(step_: Callable[..., Tensor], shape: tuple, dtype: torch.dtype) -> None:
    x, grad, z = (numbers(shape, dtype, seed) for seed in range(3))
    exact = langevin_step(x.double(), grad.double(), z.double(), step_size=A, noise_std=B)
    eager = eager_step(x, grad, z, step_size=A, noise_std=B)
    check(step_(x, grad, noise=z), exact, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_chain", ["", "step_size", "noise_std", "step_size noise_std"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(
    step_: Callable[..., Tensor], options: dict, per_chain: str, dtype: torch.dtype
) -> None:
    x, grad, z = (numbers((4, 3, 5, 7), dtype, seed) for seed in range(3))
    coefficients = {"step_size": A, "noise_std": B} | {
        name: torch.tensor([0.1, 0.0, 0.3, 0.7]) for name in per_chain.split()
    }
    exact = langevin_step(x.double(), grad.double(), z.double(), **coefficients, **options)
    by_hand = eager_step(x.double(), grad.double(), z.double(), **coefficients, **options)
    assert error(by_hand, exact) <= 1e-14
    eager = eager_step(x, grad, z, **coefficients, **options)
    check(step_(x, grad, noise=z, **coefficients, **options), exact, eager)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
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
def test_the_contracts_noise(step_: Callable[..., Tensor], first_chain: int) -> None:
    """From x = 0 with b = 1 the state is the noise: 2e-6 from the formula in float64."""
    address = {"seed": 2**64 - 3, "step": 2**32 - 1, "first_chain": first_chain}
    z = fl.noise.normal((8, 3, 37, 41), **address, dtype=torch.float64)
    x = step_(torch.zeros(z.shape), None, step_size=0.0, noise_std=1.0, **address)
    assert error(x, z) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_contract_noise_and_gradient(
    step_: Callable[..., Tensor], options: dict, dtype: torch.dtype
) -> None:
    x, grad = numbers((4, 3, 5, 7), dtype), numbers((4, 3, 5, 7), dtype, 1)
    z = fl.noise.normal(x.shape, seed=3, step=5, first_chain=9, dtype=torch.float64)
    exact = langevin_step(x.double(), grad.double(), z, step_size=A, noise_std=B, **options)
    eager = eager_step(x, grad, z, step_size=A, noise_std=B, **options)
    check(step_(x, grad, first_chain=9, **options), exact, eager, slack=2e-6 * B)


@pytest.mark.parametrize("clamp", [None, (-0.9, 0.8)])
@pytest.mark.parametrize("noise_last", [False, True])
def test_noise_alone(step_: Callable[..., Tensor], clamp: tuple | None, noise_last: bool) -> None:
    x, z = numbers((3, 1023)), numbers((3, 1023), seed=1)
    options = {"noise_std": B, "clamp": clamp, "noise_last": noise_last}
    exact = langevin_step(x.double(), torch.zeros(3, 1023), z.double(), step_size=A, **options)
    assert error(step_(x, None, noise=z, **options), exact) <= 2.4e-7


# Norm clips --------------------------------------------------------------------------------------


def clipped(grad: Tensor, kind: str, bound: float) -> Tensor:
    """The clip written out, chain by chain, in float64."""
    rows = list(grad.double())
    norms = [math.sqrt(float(row.square().sum())) for row in rows]
    if kind == "batch_norm":
        norms = [math.sqrt(sum(norm**2 for norm in norms))] * len(rows)
    return torch.stack([g * min(1, bound / n) for g, n in zip(rows, norms, strict=True)])


@pytest.mark.parametrize("step_size", [A, torch.tensor([0.1, 0.5, 0.0, 0.3])], ids=["", "chain"])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["chain_norm", "batch_norm"])
@pytest.mark.parametrize("bound", [0.3, 3.0, 300.0])
def test_norm_clips(
    step_: Callable[..., Tensor],
    kind: str,
    bound: float,
    grad_dtype: torch.dtype,
    step_size: float | Tensor,
) -> None:
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


# Invariances, bit for bit ------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers [n, c, h, w] in other memory."""
    misaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    wider = torch.empty(*x.shape[:3], x.shape[3] + 3, dtype=x.dtype)[..., 1:-2].copy_(x)
    rows = torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)
    return {
        "channels_last": x.to(memory_format=torch.channels_last, copy=True),
        "misaligned": misaligned,
        "sliced": wider,
        "every other row": rows,
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "reversed dims": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


LAYOUTS = ["contiguous", *layouts(torch.zeros(2, 3, 5, 7))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(
    step_: Callable[..., Tensor], layout: str, grad_layout: str, dtype: torch.dtype
) -> None:
    x, grad = numbers((4, 3, 5, 7), dtype), numbers((4, 3, 5, 7), dtype, 1)
    options = {"clamp": (-0.9, 0.8), "grad_clip": 0.9}
    want = step_(x.clone(), grad, **options)
    state = x if layout == "contiguous" else layouts(x)[layout]
    gradient = grad if grad_layout == "contiguous" else layouts(grad)[grad_layout]
    strides = state.stride()
    assert torch.equal(step_(state, gradient, **options), want)
    assert state.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_memory_layouts_of_supplied_noise(step_: Callable[..., Tensor], layout: str) -> None:
    x, grad, z = (numbers((4, 3, 5, 7), seed=seed) for seed in range(3))
    want = step_(x.clone(), grad, noise=z)
    assert torch.equal(step_(x.clone(), grad, noise=layouts(z)[layout]), want)


def test_a_slice_is_written_and_nothing_beside_it(step_: Callable[..., Tensor]) -> None:
    around = numbers((4, 3, 5, 11))
    inside, before = around[1:3, :, :, 2:9], around.clone()
    want = step_(inside.clone(), None)
    step_(inside, None)
    assert torch.equal(inside, want)
    around[1:3, :, :, 2:9] = before[1:3, :, :, 2:9]
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.4, ("chain_norm", 5.0)], ids=str)
@pytest.mark.parametrize("elements", [1, 5, 1023, 1024])
def test_batch_split(
    step_: Callable[..., Tensor], elements: int, clip: Any, dtype: torch.dtype
) -> None:
    x, grad = numbers((16, elements), dtype), numbers((16, elements), dtype, 1)
    parts = [
        step_(x[i:j].clone(), grad[i:j], first_chain=100 + i, grad_clip=clip)
        for i, j in ((0, 1), (1, 4), (4, 8), (8, 16))
    ]
    assert torch.equal(step_(x, grad, first_chain=100, grad_clip=clip), torch.cat(parts))


@pytest.mark.parametrize("shape", [(8, 20_001), (1, 100_003)])
def test_thread_count(
    step_: Callable[..., Tensor], place: tuple[str, torch.device], shape: tuple
) -> None:
    backend, device = place
    if backend == "triton" or device.type != "cpu":
        pytest.skip(f"backend {backend} on {device.type}: does not use torch's threads")
    x, grad = numbers(shape), numbers(shape, seed=1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(step_(x.clone(), grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_repeat_and_address(step_: Callable[..., Tensor]) -> None:
    """The same address gives the same bits; any other gives other numbers everywhere."""
    x, grad = numbers((3, 1023)), numbers((3, 1023), seed=1)
    first = step_(x.clone(), grad)
    assert torch.equal(step_(x.clone(), grad), first)
    for other in ({"seed": 4}, {"seed": 3 + 2**32}, {"step": 6}, {"first_chain": 3}):
        assert (step_(x.clone(), grad, **other) == first).float().mean() < 0.01


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint32])
def test_numpy_integers_are_integers(step_: Callable[..., Tensor], kind: type) -> None:
    address = {"seed": 40, "step": 50, "first_chain": 60}
    want = step_(torch.zeros(3, 5), None, **address)
    got = step_(torch.zeros(3, 5), None, **{name: kind(value) for name, value in address.items()})
    assert torch.equal(got, want)


# The step's promises -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise_last", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("where", ["x", "grad"])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 0.4, ("chain_norm", 5.0)], ids=str)
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
    x, want = (numbers((4, 3, 5, 7), dtype).to(device) for _ in range(2))
    bound = bind_step(resolve_backend(backend, device), x, **options, **forms)
    version = x._version
    for step, grad in enumerate(grads):
        for a, b in ((A, B), (A, 0.0), (per_chain, B), (A, per_chain)):
            fl.langevin_step_(
                want, grad, step_size=a, noise_std=b, step=step, backend=backend, **options, **forms
            )
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


# Errors ------------------------------------------------------------------------------------------

ONES = torch.ones(4, 3)
CASES = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "x must be of dtype float32"),
    ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "x must be of dtype float32"),
    (
        {"x": torch.tensor(1.0)},
        ValueError,
        r"x must have a leading chain dimension, got shape \[\]",
    ),
    ({"x": torch.ones(4, 3, requires_grad=True)}, ValueError, "x requires grad"),
    ({"x": torch.ones(4, 3, requires_grad=True) * 1}, ValueError, "x requires grad"),
    ({"x": ONES.to(torch.float8_e5m2)}, TypeError, "x must be of dtype .*got torch.float8_e5m2"),
    (
        {"x": torch.ones(6).as_strided((4, 3), (1, 1))},
        ValueError,
        "elements of x share memory; use x.clone()",
    ),
    (
        {"x": torch.ones(9).as_strided((4, 3), (2, 1))},
        ValueError,
        "elements of x share memory; use x.clone()",
    ),
    ({"x": torch.ones(4, 1).expand(4, 3)}, ValueError, "x is an expanded view"),
    ({"x": torch.ones(3).expand(4, 3)}, ValueError, "x is an expanded view"),
    ({"grad": 1.0}, TypeError, "grad must be a tensor, got float"),
    ({"grad": torch.ones(4, 2)}, ValueError, r"grad must have x's shape \[4, 3\], got \[4, 2\]"),
    ({"grad": torch.ones(4, 1)}, ValueError, r"grad must have x's shape \[4, 3\], got \[4, 1\]"),
    ({"grad": ONES.long()}, TypeError, "grad must be of dtype float32.*, got torch.int64"),
    ({"grad": ONES.to(torch.complex64)}, TypeError, "grad must be of dtype float32"),
    ({"grad": ONES.to("meta")}, ValueError, "grad must be on x's device cpu, got meta"),
    ({"grad": ONES.to(torch.float8_e5m2)}, TypeError, "grad must be of dtype float32"),
    ({"grad": ONES.to_sparse()}, TypeError, "grad must be a strided tensor, got layout torch.sp"),
    ({"noise": [0.0]}, TypeError, "noise must be a tensor, got list"),
    ({"noise": torch.ones(4)}, ValueError, r"noise must have x's shape \[4, 3\], got \[4\]"),
    ({"noise": ONES.int()}, TypeError, "noise must be of dtype float32.*, got torch.int32"),
    ({"noise": ONES.to("meta")}, ValueError, "noise must be on x's device cpu, got meta"),
    ({"clamp": (1.0, -1.0)}, ValueError, r"clamp must have lo < hi, got \(1.0, -1.0\)"),
    ({"clamp": (0.5, 0.5)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": (math.nan, 1.0)}, ValueError, "clamp must have lo < hi"),
    ({"clamp": 1.0}, TypeError, r"clamp must be a pair \(lo, hi\) or None, got 1.0"),
    ({"clamp": (0, 1, 2)}, TypeError, r"clamp must be a pair \(lo, hi\) or None"),
    ({"grad_clip": 0.0}, ValueError, "grad_clip must have a bound > 0, got 0.0"),
    ({"grad_clip": -1}, ValueError, "grad_clip must have a bound > 0, got -1"),
    ({"grad_clip": math.nan}, ValueError, "grad_clip must have a bound > 0, got nan"),
    ({"grad_clip": True}, ValueError, "grad_clip must have a bound > 0, got True"),
    ({"grad_clip": ("chain_norm", 0.0)}, ValueError, "grad_clip must have a bound > 0"),
    ({"grad_clip": ("norm", 1.0)}, ValueError, r'grad_clip must be a number, \("chain_norm", c\)'),
    ({"grad_clip": ("chain_norm",)}, ValueError, "grad_clip must be a number"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"step": 2**32}, ValueError, r"step must be in \[0, 2\*\*32\)"),
    ({"step": -1}, ValueError, "step must be in"),
    ({"first_chain": 2**32 - 3}, ValueError, "last chain must be in"),
    ({"first_chain": -1}, ValueError, "first_chain must be in"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, reference"),
]
COEFFICIENTS = [
    (-0.1, ValueError, "must be finite and >= 0, got -0.1"),
    (math.nan, ValueError, "must be finite and >= 0, got nan"),
    (math.inf, ValueError, "must be finite and >= 0, got inf"),
    ("fast", TypeError, "must be a number or a tensor, got 'fast'"),
    (None, TypeError, "must be a number or a tensor, got None"),
    (1j, TypeError, "must be a number or a tensor, got 1j"),
    (torch.tensor([1.0, -2.0, 3.0, 4.0]), ValueError, "must be finite and >= 0, got -2.0"),
    (torch.tensor([1.0, math.nan, 3.0, 4.0]), ValueError, "must be finite and >= 0, got nan"),
    (torch.ones(3), ValueError, r"must be a number or have one value per chain \[4\], got shape"),
    (torch.ones(1), ValueError, r"must be a number or have one value per chain \[4\], got shape"),
    (torch.ones(4, 1), ValueError, "must be a number or have one value per chain"),
    (torch.ones(4, dtype=torch.int64), TypeError, "must be of floating dtype, got torch.int64"),
]
CASES += [
    ({name: value}, error, f"langevin_step_: {name} {match}")
    for name in ("step_size", "noise_std")
    for value, error, match in COEFFICIENTS
]


@pytest.mark.parametrize(
    ("wrong", "error", "match"), CASES, ids=[f"{next(iter(case[0]))}-{case[2]}" for case in CASES]
)
def test_errors(wrong: dict, error: type[Exception], match: str) -> None:
    """Of the op's own checks, which no backend sees; x stays as it was."""
    x = wrong.get("x", ONES.clone())
    before = x.detach().clone() if isinstance(x, Tensor) else x
    arguments = {"x": x, "grad": ONES.clone(), "step_size": A, "noise_std": B, "seed": 0, "step": 0}
    with pytest.raises(error, match=match):
        fl.langevin_step_(**arguments | wrong)
    assert torch.equal(x, before) if isinstance(x, Tensor) else x == before


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_states(layout: torch.layout) -> None:
    x = ONES.to_sparse(layout=layout)
    with pytest.raises(TypeError, match=f"x must be a strided tensor, got layout {layout}"):
        fl.langevin_step_(x, None, step_size=A, noise_std=B, seed=0, step=0)


def test_negative_step_sizes_are_pointed_to_maximize() -> None:
    with pytest.raises(ValueError, match=r"to ascend, use maximize=True"):
        fl.langevin_step_(ONES.clone(), ONES, step_size=-1.0, noise_std=0.0, seed=0, step=0)


@pytest.mark.parametrize("noise_std", [B, 0.0])
@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 2**32}, {"first_chain": 2**32}], ids=str)
def test_addresses_are_checked_whether_or_not_noise_is_drawn(wrong: dict, noise_std: float) -> None:
    address = {"seed": 0, "step": 0} | wrong
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
        fl.langevin_step_(ONES.clone(), ONES, step_size=A, noise_std=noise_std, **address)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"native": "no compiler was found", "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr("fastlangevin.step._why_not", lambda name, device: reasons[name])
    for name in ("native", "triton"):
        match = f'backend "{name}" cannot run on cpu: {reasons[name]}'
        with pytest.raises(RuntimeError, match=match):
            fl.langevin_step_(
                ONES.clone(), ONES, step_size=A, noise_std=B, seed=0, step=0, backend=name
            )
    assert choose_backend("auto", torch.device("cpu")) == "reference"
    reasons["triton"] = None
    assert choose_backend("auto", torch.device("cpu")) == "reference", "interpreted, by name alone"
    assert choose_backend("auto", torch.device("cuda")) == "triton"
    reasons["native"] = None
    assert choose_backend("auto", torch.device("cpu")) == "native"


@pytest.mark.parametrize("name", ["grad", "noise"])
def test_memory_shared_with_x(step_: Callable[..., Tensor], name: str) -> None:
    """Read where x is written it would be lost; as x itself, or beside it, it is not."""
    memory = numbers((8, 4))
    x = memory[:4]
    before = memory.clone()
    given = {"grad": memory[4:], name: x.T} | ({"noise": memory[4:]} if name == "grad" else {})
    with pytest.raises(ValueError, match=f"{name} shares memory with x in another layout"):
        step_(x, **given)
    with pytest.raises(ValueError, match=f"{name} shares memory with x in another layout"):
        step_(x, **given | {name: memory[1:5]})
    assert torch.equal(memory, before)
    step_(x, memory[4:], noise_std=0.0)
    assert torch.equal(memory[4:], before[4:])
    alone = step_(before[:4].clone(), before[:4].clone(), noise_std=0.0)
    assert torch.equal(step_(y := before[:4].clone(), y, noise_std=0.0), alone)


@pytest.mark.parametrize("name", ["step_size", "noise_std"])
def test_coefficients_that_share_memory_with_x(step_: Callable[..., Tensor], name: str) -> None:
    """Read row by row while x is written: a row's value could be a state."""
    memory = numbers((4, 4)).abs()
    x, before = memory[:, :3], memory.clone()
    for shared in (memory[:, 0], memory[1, :], memory[2, 2]):
        with pytest.raises(ValueError, match=f"langevin_step_: {name} shares memory with x"):
            step_(x, None, **{name: shared})
    assert torch.equal(memory, before)
    want = step_(before[:, :3].clone(), None, **{name: before[:, 3].clone()})
    assert torch.equal(step_(x, None, **{name: memory[:, 3]}), want)


def test_strides_that_interleave_without_sharing(step_: Callable[..., Tensor]) -> None:
    """Offsets 0, 2, 4 and 3, 5, 7: neither dimension steps over the other."""
    x = numbers((8,)).as_strided((3, 2), (2, 3))
    want = step_(x.clone(), None)
    assert torch.equal(step_(x, None), want)


def test_views_that_share_a_storage_but_no_element(step_: Callable[..., Tensor]) -> None:
    memory = numbers((6, 2, 3, 4))
    x, grad = memory.clone()[:, 0], memory[:, 1]
    want = step_(x.clone(), grad.clone())
    assert torch.equal(step_(memory[:, 0], memory[:, 1]), want)


def test_a_gradient_whose_sign_is_noted_and_not_written(step_: Callable[..., Tensor]) -> None:
    grad = torch.complex(numbers((3, 4)), numbers((3, 4), seed=1)).conj().imag
    assert grad.is_neg()
    x = numbers((3, 4), seed=2)
    assert torch.equal(step_(x.clone(), grad), step_(x.clone(), grad.clone().resolve_neg()))


def test_chains_longer_than_the_address_space() -> None:
    x = torch.empty(1, 2**34 + 1, device="meta")
    with pytest.raises(ValueError, match=r"x must have at most 2\*\*34 elements per chain"):
        fl.langevin_step_(x, x, step_size=A, noise_std=B, seed=0, step=0)
