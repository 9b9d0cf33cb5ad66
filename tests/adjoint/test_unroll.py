"""Gradients through a chain against autograd through a plain unroll."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.adjoint.storage import Allocations
from tests.adjoint.shared import (
    ACTIVATIONS,
    SHAPE,
    Calls,
    K,
    N,
    assert_close,
    gradients,
    make_net,
    numbers,
    sampler,
    starts,
)

SCHEDULES = ["none", "step", 1, 3, "20MiB", "auto"]


def plain_unroll(
    energy: Callable[..., Tensor],
    x: Tensor,
    z: Tensor,
    *,
    step_size: Any = 0.3,
    noise_std: Any = 0.2,
    clamp: tuple[float, float] | None = None,
    grad_clip: Any = None,
    noise_order: str = "after",
    straight: bool = False,
    grad_steps: int | None = None,
) -> Tensor:
    """The loop that people write, with all of its graph. Coefficients broadcast over x."""
    lo, hi = clamp or (-float("inf"), float("inf"))
    for k in range(len(z)):
        a = step_size[k] if isinstance(step_size, list) else step_size
        b = noise_std[k] if isinstance(noise_std, list) else noise_std
        if grad_steps is not None and k <= len(z) - grad_steps:
            x = x.detach()
        if noise_order == "before":
            x = (x + b * z[k]).clamp(lo, hi)
        at = x.detach().requires_grad_() if straight or not x.requires_grad else x
        (g,) = torch.autograd.grad(energy(at).sum(), at, create_graph=True)
        if isinstance(grad_clip, tuple):
            norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            g = g * (grad_clip[1] / norm).clamp(max=1)
        elif grad_clip is not None:
            g = g.clamp(-grad_clip, grad_clip)
        if noise_order == "after":
            x = (x - a * g + b * z[k]).clamp(lo, hi)
        else:
            x = (x - a * g).clamp(lo, hi)
        if noise_order == "last":
            x = x + b * z[k]
    return x


OPTIONS = [
    {},
    {"noise_order": "before", "clamp": (-0.9, 0.8)},
    {"noise_order": "last", "clamp": (-0.9, 0.8), "grad_clip": 0.1},
    {"clamp": (-0.9, 0.8), "grad_clip": ("chain_norm", 0.5)},
    {"grad_steps": 4},
    {"grad_steps": 1},
    {"grad_through": "straight", "clamp": (-0.9, 0.8)},
    {"grad_through": "straight", "noise_order": "before", "grad_clip": ("chain_norm", 0.5)},
]
CALL = ("grad_steps", "grad_through")


def both(
    net: nn.Module, x0: Tensor, options: dict, checkpoint: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """Our chain and the plain one."""
    z = numbers((K, *SHAPE), 1).to(x0.dtype)
    call = {name: value for name, value in options.items() if name in CALL}
    own = {name: value for name, value in options.items() if name not in CALL}
    ours = sampler(net, **own)(
        x0, noise=z, differentiable=True, checkpoint=checkpoint, **call, **more
    )
    straight = call.pop("grad_through", "exact") == "straight"
    return ours, plain_unroll(net, x0, z, straight=straight, **call, **own)


# In turn with a schedule that stores by step or nothing, by a count, or by a budget.
@pytest.mark.parametrize(
    ("options", "checkpoint"),
    [
        (options, SCHEDULES[(i + k) % 6])
        for i, options in enumerate(OPTIONS)
        for k in ((0, 3) if i < 4 else (1,))
    ],
    ids=str,
)
def test_gradients_match_a_plain_unroll_for_every_option(options: dict, checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2))
    ours, plain = both(net, x0, options | {"step_size": a, "noise_std": b}, checkpoint)
    leaves = [*([] if "grad_steps" in options else [x0]), a, b, *net.parameters()][:-1]
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    assert_close(gradients(ours, leaves), gradients(plain, leaves), 1e-10)


@pytest.mark.parametrize(
    ("activation", "checkpoint", "dtype"),
    [
        (name, ("none", "step", 3)[i % 3], (torch.float32, torch.float64)[i % 2])
        for i, name in enumerate([*ACTIVATIONS, *ACTIVATIONS[::2]])
    ],
    ids=str,
)
def test_gradients_match_a_plain_unroll_for_every_activation(
    activation: str, checkpoint: Any, dtype: torch.dtype
) -> None:
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    net, x0 = make_net(activation, dtype), starts(dtype)
    ours, plain = both(net, x0, {}, checkpoint)
    leaves = [x0, *net.parameters()][:-1]
    assert_close(gradients(ours, leaves), gradients(plain, leaves), rtol)


@pytest.mark.parametrize("checkpoint", ["step", 3, 1])
def test_recomputed_steps_draw_the_same_noise(checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    run = functools.partial(
        sampler(net), x0, seed=5, first_chain=7, first_step=11, differentiable=True
    )
    want = gradients(run(checkpoint="none"), [x0, *net.parameters()])
    assert_close(gradients(run(checkpoint=checkpoint), [x0, *net.parameters()]), want, 1e-10)


@pytest.mark.parametrize("checkpoint", [1, "20MiB"])
def test_every_tensor_that_a_step_reads_gets_its_gradient(checkpoint: Any) -> None:
    """Keywords, closures, noise, learned schedules, and tensors with a graph of their own."""
    net, x0 = make_net(), starts()
    label, held = numbers(SHAPE[1:], 8).requires_grad_(), numbers((), 9).requires_grad_()
    z = numbers((K, *SHAPE), 1).requires_grad_()
    log_a, b = numbers((K, 1), 3).requires_grad_(), numbers((K, N), 4).abs().requires_grad_()
    scale = held.exp()

    def energy(x: Tensor, y: Tensor) -> Tensor:
        return net(scale * x) + (y * x.square()).flatten(1).sum(1)

    leaves = [x0, label, held, z, log_a, b, *net.parameters()][:-1]
    found = []
    for schedule in (checkpoint, "none"):
        run = sampler(energy, step_size=0.1 * log_a.exp(), noise_std=b)
        out = run(x0, noise=z, y=label, differentiable=True, checkpoint=schedule)
        weight = numbers(out.shape, 2)
        found.append(torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True))
    assert all(bool(grad.any()) for grad in found[0])
    assert_close(*found, 1e-10)


@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_several_uses_of_a_chain_and_of_an_energy_in_one_loss(checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    grads = []
    for schedule in (checkpoint, "none"):
        run = functools.partial(sampler(net), differentiable=True, checkpoint=schedule)
        out = run(x0, seed=0)
        loss = out.square().sum() + net(out).sum() + run(out, seed=1).sum() + out.mean()
        grads.append(torch.autograd.grad(loss, [x0, *net.parameters()]))
    assert_close(*grads, 1e-10)


@pytest.mark.parametrize(
    ("noise_order", "checkpoint"),
    [("after", 1), ("before", 2), ("last", "step")],
)
def test_gradients_match_finite_differences(noise_order: str, checkpoint: Any) -> None:
    def chain(x0: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        run = fl.LangevinSampler(
            lambda x: torch.tanh(x @ w).square().sum(1),
            steps=4, step_size=a, noise_std=b, noise_order=noise_order,
        )  # fmt: skip
        return run(x0, seed=0, differentiable=True, checkpoint=checkpoint)

    tensors = (
        numbers((2, 2)),
        numbers((2, 2), 1),
        torch.tensor(0.3).double(),
        torch.ones(2).double(),
    )
    assert torch.autograd.gradcheck(
        chain, tuple(v.requires_grad_() for v in tensors), fast_mode=True
    )


def test_offload_on_a_cpu_changes_nothing() -> None:
    net, x0 = make_net(), starts()
    run = functools.partial(sampler(net), x0, seed=0, differentiable=True, checkpoint=3)
    leaves = [x0, *net.parameters()]
    for got, want in zip(
        gradients(run(offload=True), leaves), gradients(run(), leaves), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpoint", ["step", 5])
def test_offload_from_cuda(checkpoint: Any) -> None:
    """The same bits from host memory, and room on the device for what is not kept there."""
    net, steps = fl.ConvEnergy(size=8, width=2, activation="silu").cuda(), 60
    x0 = torch.zeros(64, *net.shape, device="cuda", requires_grad=True)
    run = functools.partial(
        fl.LangevinSampler(net, steps), x0, seed=0, differentiable=True, checkpoint=checkpoint
    )
    held, grads = [], []
    for offload in (False, True):
        before = torch.cuda.memory_allocated()
        out = run(offload=offload)
        held.append(torch.cuda.memory_allocated() - before)
        grads.append(gradients(out, [x0, *net.parameters()]))
        del out
    assert_close(*grads, 1e-5)
    kept = (60 if checkpoint == "step" else 5) - 3
    assert held[0] - held[1] >= kept * x0.numel() * 4


@pytest.mark.parametrize(
    ("activation", "options", "noise_order"),
    [
        (("relu", "leaky_relu")[(i + j) % 2], options, noise_order)
        for i, options in enumerate(({}, {"gradient": "autograd", "grad_through": "straight"}))
        for j, noise_order in enumerate(("after", "before", "last"))
    ],
)
def test_piecewise_linear_energies_pass_gradients_by_their_masks(
    activation: str, options: dict, noise_order: str
) -> None:
    """d x_K / d x_0 is exactly the plain unroll's, 0 or 1, and costs no evaluation."""
    net, x0 = make_net(activation).requires_grad_(False), starts()
    through = {"noise_order": noise_order, "clamp": (-0.9, 0.8)} | options
    z, calls = numbers((K, *SHAPE), 1), Calls(nn.Identity())
    call = {name: through.pop(name) for name in CALL if name in through}
    own = {name: value for name, value in through.items() if name != "gradient"}
    want = gradients(plain_unroll(net, x0, z, **own), [x0])[0]
    if "gradient" in options:
        calls = Calls(net)
    out = sampler(net, **through)(x0, noise=z, differentiable=True, **call)
    calls.since()
    got = gradients(out, [x0])[0]
    assert torch.equal(got, want)
    assert calls.since() == 0
    passed = got / numbers(SHAPE, 2)
    assert set(passed.unique().tolist()) == {0.0, 1.0}


def test_piecewise_linear_chains_keep_clamp_masks_instead_of_states() -> None:
    net, x0 = make_net("relu").requires_grad_(False), starts()
    with Allocations() as memory:
        out = sampler(net, steps=40)(x0, seed=0, differentiable=True)
    # The result, and a byte for each of its elements.
    assert memory.live <= out.numel() * (8 + 1) + 1024


def test_a_curved_energy_is_not_taken_for_a_piecewise_linear_one() -> None:
    net, x0 = make_net("silu").requires_grad_(False), starts()
    ours, plain = both(net, x0, {}, "auto")
    assert_close(gradients(ours, [x0]), gradients(plain, [x0]), 1e-10)
    ours, _ = both(net, x0, {"grad_through": "straight"}, "auto")
    assert torch.equal(gradients(ours, [x0])[0], numbers(SHAPE, 2))


@pytest.mark.parametrize("checkpoint", ["step", 3, 1])
def test_parameters_that_share_a_gradient_each_get_their_sum_over_the_steps(
    checkpoint: str | int,
) -> None:
    """The derivative of a + b goes to both as one tensor, to which steps must not add twice."""
    a, b = (numbers(SHAPE[1:], seed).requires_grad_() for seed in (5, 6))

    def energy(x: Tensor) -> Tensor:
        return (x - (a + b)).pow(4).flatten(1).sum(1)

    x, z = starts(), numbers((K, *SHAPE), 1)
    out = sampler(energy, step_size=0.01)(
        x, seed=0, noise=z, differentiable=True, checkpoint=checkpoint
    )
    want = gradients(plain_unroll(energy, x, z, step_size=0.01), [x, a, b])
    assert_close(gradients(out, [x, a, b]), want, 1e-10)
