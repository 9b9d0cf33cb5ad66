"""The differentiable chain against autograd through a plain loop."""

import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.core.sampler_shared import (
    GRID,
    ORDERS,
    SCHEDULES,
    SHAPE,
    A,
    B,
    K,
    contract_noise,
    everything,
    last,
    make_net,
    numbers,
    plain_chain,
    sampler,
    spelled_out,
)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = numbers(out.shape, out.dtype, 2)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [g if g is not None else torch.zeros_like(v) for g, v in zip(grads, leaves, strict=True)]


def assert_same_chain(ours: Tensor, plain: Tensor, leaves: list[Tensor]) -> None:
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    pairs = zip(gradients(ours, leaves), gradients(plain, leaves), strict=True)
    for got, want in pairs:
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-11)
        assert bool(want.any())


@pytest.mark.parametrize(
    ("options", "checkpoint"),
    [(options, ("auto", "none", "step")[(i + i // 3) % 3]) for i, options in enumerate(GRID)],
    ids=str,
)
def test_gradients_of_a_plain_unroll(
    net: nn.Module, x0: Tensor, options: dict, checkpoint: str
) -> None:
    """To x0, the parameters, step_size and noise_std, with the contract's noise."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B))
    options = options | {"step_size": a, "noise_std": b, "maximize": True}
    x0.requires_grad_()
    got = sampler(net, **options)(x0, seed=6, differentiable=True, checkpoint=checkpoint)
    want = last(plain_chain(net, x0, contract_noise(SHAPE, 6), detached=False, **options))
    # All but the head's bias, which shifts the energy and so no chain.
    assert_same_chain(got, want, [x0, net[0].weight, net[0].bias, net[3].weight, a, b])


@pytest.mark.parametrize(
    ("form", "noise_order"),
    [(form, ORDERS[i % 3]) for i, form in enumerate(("0-d tensor", "[n]", "[K, n]", "[K, 1]"))],
)
def test_learnable_schedules(net: nn.Module, x0: Tensor, form: str, noise_order: str) -> None:
    a = SCHEDULES[form]().double().requires_grad_()
    b = SCHEDULES[form]().double().flip(0).requires_grad_() if form != "0-d tensor" else a
    z, options = numbers((K, *SHAPE), seed=1), {"noise_order": noise_order}
    run = sampler(net, step_size=a, noise_std=b, **options)
    plain = {"step_size": spelled_out(a), "noise_std": spelled_out(b)}
    want = last(plain_chain(net, x0, z, detached=False, **plain, **options))
    got = run(x0, noise=z, differentiable=True)
    assert_same_chain(got, want, [a] if a is b else [a, b])


@pytest.mark.parametrize(
    ("grad_steps", "checkpoint"), [(1, "step"), (3, "none"), (3, "step"), (K, "step")]
)
def test_grad_steps(net: nn.Module, x0: Tensor, grad_steps: int, checkpoint: str) -> None:
    """Through the last steps alone: the state before them is a constant."""
    z = numbers((K, *SHAPE), seed=1)
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    x0.requires_grad_()
    options = {"grad_steps": grad_steps, "checkpoint": checkpoint}
    run = functools.partial(sampler(net, step_size=a), x0, noise=z, differentiable=True, **options)
    states = [x0, *(step["x"] for step in plain_chain(net, x0, z, step_size=A))]
    start = states[K - grad_steps]
    tail = plain_chain(net, start, z[K - grad_steps :], step_size=a, detached=False)
    assert_same_chain(run(), last(tail), [a, net[0].weight, net[3].weight])
    (dx0,) = torch.autograd.grad(run().sum(), x0, allow_unused=True)
    assert (dx0 is None) == (grad_steps < K)


@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_gradients_with_dropout_and_norms_in_train_mode(x0: Tensor, checkpoint: str) -> None:
    """Recomputed steps draw the same dropout: central differences of the call itself agree."""
    energy = everything()
    run = functools.partial(
        sampler(energy, steps=3, step_size=0.05), seed=0, differentiable=True, checkpoint=checkpoint
    )
    x, v = x0.clone().requires_grad_(), numbers(SHAPE, seed=5)
    (dx,) = gradients(run(x), [x])
    h, weight = 1e-5, numbers(SHAPE, seed=2)
    ends = [run(x0 + e * v).detach() for e in (h, -h)]
    assert float((dx * v).sum()) == pytest.approx(
        float(((ends[0] - ends[1]) * weight).sum()) / (2 * h), rel=1e-6
    )


def test_checkpoints_keep_the_states_alone(net: nn.Module, x0: Tensor) -> None:
    """What autograd holds between the forward and the backward pass, in elements of the state."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    kept = {}
    for checkpoint in ("none", "step"):
        held: weakref.WeakSet[Held] = weakref.WeakSet()

        def pack(tensor: Tensor, held: weakref.WeakSet[Held] = held) -> Held:
            # Detached where it has a graph: that holds this item, and would live for ever.
            held.add(item := Held(tensor if tensor.grad_fn is None else tensor.detach()))
            return item

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
            out = sampler(net)(x0, seed=0, differentiable=True, checkpoint=checkpoint)
        kept[checkpoint] = sum(item.tensor.numel() for item in held)
        del out
    weights = sum(p.numel() for p in net.parameters())
    assert kept["step"] <= K * (x0.numel() + weights) < kept["none"]


class Tilted(nn.Module):
    """A net plus a linear term whose coefficient comes from outside, not as a parameter."""

    def __init__(self, tilt: Tensor | None = None) -> None:
        super().__init__()
        self.net, self.tilt = make_net(nn.Tanh()), tilt

    def forward(self, x: Tensor, tilt: Any = None) -> Tensor:
        tilt = self.tilt if tilt is None else tilt["tilt"] if isinstance(tilt, dict) else tilt
        return self.net(x)[:, 0] + (tilt * x).flatten(1).sum(1)


WAYS_IN = {
    "keyword": lambda tilt: (Tilted(), {"tilt": tilt}),
    "keyword, nested": lambda tilt: (Tilted(), {"tilt": {"tilt": tilt}}),
    "partial": lambda tilt: (functools.partial(Tilted(), tilt=tilt), {}),
    "attribute": lambda tilt: (Tilted(tilt), {}),
    "closure": lambda tilt: ((lambda net: lambda x: net(x, tilt))(Tilted()), {}),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_schedule_loses_a_gradient(x0: Tensor, way: str) -> None:
    """A tensor that requires grad gets the plain unroll's, however it came into the energy."""
    tilt = numbers(SHAPE[1:], seed=8).requires_grad_()
    energy, options = WAYS_IN[way](tilt)
    run = functools.partial(sampler(energy), x0, seed=0, differentiable=True, **options)
    assert_same_chain(run(checkpoint="auto"), run(checkpoint="none"), [tilt])


@pytest.mark.parametrize("kind", ["chain_norm", "batch_norm"])
def test_norm_clips_at_a_zero_gradient_are_differentiable(kind: str) -> None:
    """A chain at rest is not clipped, and d x_1 / d x_0 = 1 - a there."""
    x0 = torch.zeros(2, 3, requires_grad=True)
    x0.data[1] = 0.01 * (kind == "chain_norm")
    run = sampler(fl.GaussianEnergy(), steps=1, step_size=0.25, grad_clip=(kind, 1.0))
    (grad,) = torch.autograd.grad(run(x0, seed=0, differentiable=True).sum(), x0)
    assert torch.allclose(grad, torch.full((2, 3), 0.75))


def test_weights_alone_may_require_grad(net: nn.Module, x0: Tensor) -> None:
    z = numbers((K, *SHAPE), seed=1)
    got = sampler(net)(x0, noise=z, differentiable=True)
    want = last(plain_chain(net, x0, z, detached=False))
    assert_same_chain(got, want, [net[0].weight, net[0].bias, net[3].weight])
    assert not x0.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_low_precision_x0_gets_its_gradient(dtype: torch.dtype) -> None:
    x0 = numbers((3, 5), dtype).requires_grad_()
    run = sampler(fl.GaussianEnergy(), step_size=0.5, noise_std=0)
    out = run(x0, seed=0, differentiable=True)
    (grad,) = torch.autograd.grad(out.sum(), x0)
    assert out.dtype == torch.float32
    assert torch.equal(grad, torch.full_like(grad, 0.5**K))


def test_without_differentiable_there_is_no_graph(net: nn.Module, x0: Tensor) -> None:
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    run = sampler(net, step_size=a)
    x0.requires_grad_()
    for out in (run(x0, seed=0), run.trajectory(x0, seed=0), *run.diagnose(x0, seed=0)):
        assert not out.requires_grad
