"""The states and energies that a sampler takes, and what it leaves as it was."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.core.sampler_shared import (
    LABELS,
    SHAPE,
    Conditional,
    K,
    N,
    backward,
    double_well,
    everything,
    last,
    numbers,
    plain_chain,
    sampler,
)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.clone(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.cat((x, x), 3)[..., 3:],
        lambda x: x[:1].expand(N, -1, -1, -1),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["contiguous", "channels_last", "sliced", "expanded", "requires grad"],
)
def test_x0_is_read_only(layout: Callable) -> None:
    x0 = layout(numbers(SHAPE, torch.float32))
    before, flag = x0.detach().clone(), x0.requires_grad
    run = sampler(double_well, step_size=0.01)
    want = run(before.contiguous(), seed=0)
    for x in (run(x0, seed=0), run.trajectory(x0, seed=0)[-1], run.diagnose(x0, seed=0).x):
        assert torch.equal(x0.detach(), before)
        assert x0.requires_grad == flag
        assert x0.grad is None
        assert torch.equal(x, want)
        assert not x.requires_grad
        assert x.data_ptr() != x0.data_ptr()


def test_the_memory_format_is_kept(net: nn.Module, x0: Tensor) -> None:
    z = numbers((K, *SHAPE), seed=1)
    got = sampler(net)(x0.to(memory_format=torch.channels_last), noise=z)
    assert got.stride() == x0.to(memory_format=torch.channels_last).stride() != x0.stride()
    assert torch.allclose(got, last(plain_chain(net, x0, z)), atol=1e-12)


@pytest.mark.parametrize(
    ("state", "network"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_the_state_is_float32_or_wider(state: torch.dtype, network: torch.dtype) -> None:
    """Steps far below bfloat16's resolution add up: the state is not kept in it."""
    energy = nn.Linear(3, 1, bias=False, dtype=network)
    energy.weight.data.fill_(1.0)
    x0 = torch.ones(N, 3, dtype=state)
    got = sampler(energy, steps=64, step_size=2**-12, noise_std=0)(x0, seed=0)
    assert got.dtype == (torch.float64 if state == torch.float64 else torch.float32)
    assert torch.equal(got, torch.full_like(got, 1 - 64 * 2**-12))


@pytest.mark.parametrize(("shape", "n"), [((-1,), 1), ((-1, 1), N), ((-1, 1, 1, 1), 2)], ids=str)
def test_energy_output_shapes(net: nn.Module, x0: Tensor, n: int, shape: tuple) -> None:
    want = sampler(net, gradient="autograd")(x0[:n], seed=0)
    got = sampler(lambda x: net(x).view(shape))(x0[:n], seed=0)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_one_chain_may_have_a_scalar_energy(net: nn.Module, x0: Tensor) -> None:
    want = sampler(net, gradient="autograd")(x0[:1], seed=0)
    got = sampler(lambda x: net(x).sum())(x0[:1], seed=0)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (3, 2, 2, 2, 2)], ids=str)
def test_states_of_any_rank(shape: tuple) -> None:
    def energy(x: Tensor) -> Tensor:
        return (x * x - 1).square().reshape(len(x), -1).sum(1)

    x0, z = numbers(shape), numbers((K, *shape), seed=1)
    want = last(plain_chain(energy, x0, z, step_size=0.05))
    assert torch.allclose(sampler(energy, step_size=0.05)(x0, noise=z), want, atol=1e-12)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "differentiable"])
def test_conditional_energies(x0: Tensor, method: str) -> None:
    model, z = Conditional(), numbers((K, *SHAPE), seed=1)
    want = last(plain_chain(lambda x: model(x, LABELS, 0.7), x0, z))
    options = {"noise": z, "y": LABELS, "scale": 0.7}
    if method == "differentiable":
        got = sampler(model)(x0, **options, differentiable=True)
    else:
        got = getattr(sampler(model), method)(x0, **options)
    x = {"trajectory": lambda: got[-1], "diagnose": lambda: got.x}.get(method, lambda: got)()
    assert torch.allclose(x, want, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "scale"),
    [
        (lambda model: lambda x: model(x, LABELS), 1.0),
        (lambda model: functools.partial(model, y=LABELS, scale=0.7), 0.7),
        (lambda model: functools.partial(functools.partial(model, y=LABELS), scale=0.7), 0.7),
        (lambda model: functools.partial(model.tempered, y=LABELS), 0.5),
        (lambda model: model.forward, 1.0),
    ],
    ids=["lambda", "partial", "partial of partial", "partial of method", "bound method"],
)
def test_callables_of_all_kinds(x0: Tensor, wrap: Callable, scale: float) -> None:
    model, z = Conditional(), numbers((K, *SHAPE), seed=1)
    energy = wrap(model)
    y = 0 if energy == model.forward else LABELS
    want = last(plain_chain(lambda x: model(x, y, scale), x0, z))
    assert torch.allclose(sampler(energy)(x0, noise=z), want, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "differentiable"), [((0, 3, 8, 8), True), ((0,), False), ((3, 0), True)], ids=str
)
def test_empty_batches(shape: tuple, differentiable: bool) -> None:
    run = sampler(fl.GaussianEnergy())
    got = run(torch.zeros(shape), seed=0, differentiable=differentiable)
    assert got.shape == shape
    assert run.trajectory(torch.zeros(shape), seed=0).shape == (1 + K, *shape)
    energy = run.diagnose(torch.zeros(shape), seed=0).energy
    assert torch.equal(energy, torch.zeros(K, shape[0], dtype=energy.dtype))
    assert sampler(fl.ConvEnergy(size=8, width=1))(n=0, seed=0).shape == (0, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_states_and_layers_without_elements_are_left_to_torch() -> None:
    """A kernel that walks elements would write no energy for them."""
    empty = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 1))
    for energy, shape in ((fl.GaussianEnergy(), (3, 0)), (empty, (4, 3))):
        with pytest.raises(RuntimeError, match="has no elements"):
            sampler(energy, gradient="fused")(torch.zeros(shape), seed=0)
        want = empty[-1].bias.item() if energy is empty else 0.0
        assert (sampler(energy).diagnose(torch.zeros(shape), seed=0).energy == want).all()


def trace(energy: nn.Module) -> dict[str, Any]:
    """All that a call could have changed, as comparable values."""
    return {
        "state": {name: value.tolist() for name, value in energy.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in energy.named_parameters()},
        "grad": {
            name: p.grad is not None and p.grad.tolist() for name, p in energy.named_parameters()
        },
        "identity": [id(p) for p in energy.parameters()],
        "training": {name: module.training for name, module in energy.named_modules()},
        "rng": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


RUNS = {
    "call": lambda run, x0, **options: run(x0, **options),
    "trajectory": lambda run, x0, **options: run.trajectory(x0, **options),
    "diagnose": lambda run, x0, **options: run.diagnose(x0, **options),
    "none": functools.partial(backward, checkpoint="none"),
    "step": functools.partial(backward, checkpoint="step"),
}


@pytest.mark.parametrize(
    ("run", "reassigning"), [(run, i % 2 == 0) for i, run in enumerate(RUNS.values())], ids=RUNS
)
def test_a_call_changes_nothing_outside(x0: Tensor, run: Callable, reassigning: bool) -> None:
    energy = everything(reassigning)
    before = trace(energy)
    run(sampler(energy, step_size=0.01), x0, seed=0)
    assert trace(energy) == before


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_call_without_a_seed_changes_only_one_draw_of_the_generator(
    x0: Tensor, run: Callable
) -> None:
    energy = everything()
    torch.manual_seed(1)
    fl.noise.draw_seed()
    after = trace(energy)
    torch.manual_seed(1)
    run(sampler(energy, step_size=0.01), x0)
    assert trace(energy) == after


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_chain_that_raises_changes_nothing_outside(x0: Tensor, run: Callable) -> None:
    energy, calls = everything(), []

    def raise_at_step_3(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third step")

    energy.register_forward_hook(raise_at_step_3)
    before, start = trace(energy), x0.clone()
    with pytest.raises(RuntimeError, match="the third step"):
        run(sampler(energy, step_size=0.01), x0, seed=0)
    assert trace(energy) == before
    assert torch.equal(x0, start)


@pytest.mark.parametrize("wrap", [lambda net: net.forward, functools.partial], ids=["m", "partial"])
def test_a_call_changes_nothing_in_a_wrapped_module(x0: Tensor, wrap: Callable) -> None:
    energy = everything()
    before = trace(energy)
    sampler(wrap(energy), step_size=0.01)(x0, seed=0)
    assert trace(energy) == before


@pytest.mark.parametrize("differentiable", [False, True])
def test_dropout_is_a_function_of_the_seed(x0: Tensor, differentiable: bool) -> None:
    run = sampler(everything(), step_size=0.05, noise_std=0)
    options = {"differentiable": differentiable}
    torch.manual_seed(1)
    first = run(x0, seed=0, **options)
    torch.manual_seed(2)
    assert torch.equal(run(x0, seed=0, **options), first)
    assert not torch.equal(run(x0, seed=1, **options), first)


@pytest.mark.parametrize("differentiable", [False, True])
def test_dropout_is_drawn_anew_at_every_step(x0: Tensor, differentiable: bool) -> None:
    energy, masks = everything(), []
    energy[3].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    options = {"differentiable": differentiable, "checkpoint": "none" if differentiable else "auto"}
    sampler(energy)(x0, seed=0, **options)
    assert len(masks) == K
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        (torch.no_grad, "__call__"),
        (torch.inference_mode, "__call__"),
        (torch.inference_mode, "trajectory"),
        (torch.enable_grad, "diagnose"),
    ],
)
def test_the_callers_grad_and_inference_modes_are_kept(
    net: nn.Module, x0: Tensor, mode: Callable, method: str
) -> None:
    """The same numbers in any mode of the caller, and a result that autograd can use after it."""
    want = sampler(net)(x0, seed=0)
    with mode():
        got = getattr(sampler(net), method)(x0, seed=0)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert modes == (mode is torch.enable_grad, mode is torch.inference_mode)
    x = {"__call__": got, "trajectory": got[-1], "diagnose": got[0]}[method]
    assert torch.equal(x, want)
    x.clone().requires_grad_().square().sum().backward()
    assert not x.is_inference()


def test_x0_made_in_inference_mode(net: nn.Module, x0: Tensor) -> None:
    with torch.inference_mode():
        start = x0.clone()
    assert torch.equal(sampler(net)(start, seed=0), sampler(net)(x0, seed=0))
