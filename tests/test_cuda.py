"""The native kernels on a CUDA device, held to the same kernels on the CPU bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels import native

CUDA = torch.device("cuda", 0)
REASON = native.available(CUDA) if torch.cuda.is_available() else "there is no CUDA device here"
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native on CUDA: {REASON}")

SHAPES = [(3, 1), (5, 3), (4, 1023), (2, 3, 5, 7), (64, 3, 32, 32)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"noise_std": 0.0},
    {"clamp": (-0.5, 0.5), "grad_clip": 0.3, "maximize": True},
    {"clamp": (-0.5, 0.5), "noise_last": True},
]


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_(x: Tensor, grad: Tensor | None, **options: Any) -> Tensor:
    defaults = {"step_size": 0.7, "noise_std": 0.1, "seed": 2**63 + 5, "step": 9}
    return fl.langevin_step_(x, grad, **defaults | options, backend="native")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, Any]
) -> None:
    x, grad = numbers(shape, 0, dtype), numbers(shape, 1, grad_dtype)
    got = step_(x.to(CUDA), grad.to(CUDA), **options)
    assert torch.equal(got.cpu(), step_(x, grad, **options))


def test_layouts_and_values_per_chain() -> None:
    x, grad = numbers((6, 3, 8, 8), 0), numbers((6, 3, 8, 8), 1)
    each = {"step_size": torch.linspace(0, 1, 6), "noise_std": torch.linspace(0, 0.2, 6)}
    want = step_(x.clone(), grad, **each)
    for form in (torch.contiguous_format, torch.channels_last):
        y = x.to(CUDA).contiguous(memory_format=form)
        got = step_(y, grad.to(CUDA), **{name: value.to(CUDA) for name, value in each.items()})
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise(draw: Any, shape: tuple[int, ...]) -> None:
    address = {"seed": 3, "step": 2**32 - 1, "first_chain": 7}
    assert torch.equal(draw(shape, **address, device=CUDA).cpu(), draw(shape, **address))


def test_a_stream_of_the_users() -> None:
    x, grad = numbers((64, 3, 32, 32), 0), numbers((64, 3, 32, 32), 1)
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):
        got = step_(x.to(CUDA), grad.to(CUDA))
    stream.synchronize()
    assert torch.equal(got.cpu(), step_(x, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_out_and_cast(form: torch.memory_format, dtype: torch.dtype) -> None:
    x, grad = numbers((6, 3, 8, 8), 0, dtype), numbers((6, 3, 8, 8), 1)
    want = step_(x.clone(), grad)
    y = x.to(CUDA)
    out = torch.empty_like(y)
    cast = torch.empty_like(y, dtype=torch.float16, memory_format=form)
    options = {"step_size": 0.7, "noise_std": 0.1, "seed": 2**63 + 5, "step": 9, "first_chain": 0}
    native.step_(y, grad.to(CUDA), None, out=out, cast=cast, **options)
    assert torch.equal(y.cpu(), x)
    assert torch.equal(out.cpu(), want)
    assert torch.equal(cast.cpu(), want.half())


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 1, 1, 1, 1, 1, 1, 3)])
def test_a_seed_in_memory_is_not_ignored(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=CUDA)
    x = x.double() if x.dim() == 2 else x
    state = torch.zeros(2, dtype=torch.int64, device=CUDA)
    options = {"step_size": 0.7, "noise_std": 0.1, "seed": 0, "step": 0, "first_chain": 0}
    with pytest.raises(ValueError, match=r"state cannot be used: x of .* through the reference"):
        native.step_(x, None, None, state=state, **options)


def test_a_graph_is_replayed_with_another_seed_and_step() -> None:
    x, grad = numbers((8, 3, 16, 16), 0), numbers((8, 3, 16, 16), 1)
    y, g = x.to(CUDA), grad.to(CUDA)
    state = torch.zeros(2, dtype=torch.int64, device=CUDA)
    options = {"clamp": None, "grad_clip": None, "maximize": False, "noise_last": False}
    fixed = {"step_size": 0.7, "noise_std": 0.1, "first_chain": 0} | options

    def run() -> None:
        native.step_(y, g, None, seed=0, step=2, state=state, **fixed)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, first_step in ((5, 0), (6, 40)):
        y.copy_(x)
        state.copy_(torch.tensor([seed, first_step]))
        graph.replay()
        want = step_(x.clone(), grad, seed=seed, step=2 + first_step)
        assert torch.equal(y.cpu(), want)
