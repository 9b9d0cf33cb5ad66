"""Gradients through a chain next to other parts of torch, and their errors."""

import functools
import itertools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tests.adjoint.shared import (
    SHAPE,
    K,
    assert_close,
    gradients,
    make_net,
    numbers,
    sampler,
    starts,
)
from tests.processes import start


class Generator(nn.Module):
    """A chain as a module."""

    def __init__(self, net: nn.Module, **call: Any) -> None:
        super().__init__()
        self.net, self.call = net, {"seed": 0, "differentiable": True} | call

    def forward(self, x: Tensor) -> Tensor:
        return sampler(self.net)(x, **self.call)


@pytest.mark.parametrize(
    ("checkpoint", "computed"), [("none", True), ("step", False), (2, True), ("20MiB", False)]
)
def test_functional_call(checkpoint: Any, computed: bool) -> None:
    """Parameters that are put in for the call alone are there again in the backward pass."""
    model, x0 = Generator(make_net(), checkpoint=checkpoint), starts()
    bases = {n: (1.1 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    values = {n: (1.2 * p if computed else p) for n, p in bases.items()}
    found = gradients(torch.func.functional_call(model, values, x0), [x0, *bases.values()])
    other = Generator(make_net(), checkpoint=checkpoint)
    other.load_state_dict({n: p.detach() for n, p in values.items()})
    want = gradients(other(x0), [x0, *other.parameters()])
    want[1:] = [1.2 * grad if computed else grad for grad in want[1:]]
    assert_close(found[:-1], want[:-1], 1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_autocast(checkpoint: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 1))
    x0, grads = starts(torch.float32), []
    for schedule in (checkpoint, "none"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sampler(net)(x0, seed=0, differentiable=True, checkpoint=schedule)
        grads.append(gradients(out, [x0, *net.parameters()])[:-1])
    assert_close(grads[0][:1], grads[1][:1], 1e-5)
    # Under "none" all steps share a weight's cast, and so add up its gradients in bfloat16.
    assert_close(*grads, 2e-2)


@pytest.mark.parametrize(
    ("checkpoint", "use_reentrant"), [("step", False), (2, True), ("20MiB", False)]
)
def test_inside_the_users_own_checkpoint(checkpoint: Any, use_reentrant: bool) -> None:
    net, x0 = make_net(), starts()
    run = functools.partial(sampler(net), seed=0, differentiable=True, checkpoint=checkpoint)
    out = torch_checkpoint(run, x0, use_reentrant=use_reentrant)
    (out * numbers(SHAPE, 2)).sum().backward()
    got = [x0.grad, *(p.grad for p in net.parameters())][:-1]
    assert_close(got, gradients(run(x0), [x0, *net.parameters()])[:-1], 1e-10)


@pytest.mark.parametrize("checkpoint", ["none", "step", 2])
def test_around_the_users_own_checkpoint(checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    inside = functools.partial(torch_checkpoint, net, use_reentrant=False)
    call = {"seed": 0, "differentiable": True}
    got = gradients(
        sampler(inside)(x0, **call, checkpoint=checkpoint), [x0, *net.parameters()][:-1]
    )
    want = gradients(sampler(net)(x0, **call, checkpoint="none"), [x0, *net.parameters()][:-1])
    assert_close(got, want, 1e-10)


def chain_of_a_rank(rank: int, address: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    x0 = 0.7 * numbers((4, *SHAPE[1:]))[2 * rank : 2 * rank + 2]
    grads, ddp = [], nn.parallel.DistributedDataParallel
    for around in ("chain", "energy"):
        # The head's bias shifts an energy and so no chain.
        net = make_net()
        net.layers[-1].bias.requires_grad_(False)
        call = {"first_chain": 2 * rank, "checkpoint": 2}
        chain = ddp(Generator(net, **call)) if around == "chain" else Generator(ddp(net), **call)
        chain(x0).square().sum().backward()
        grads += [p.grad for p in net.parameters() if p.requires_grad]
    torch.save(grads, out / str(rank))
    torch.distributed.destroy_process_group()


def test_ddp(tmp_path: Path) -> None:
    """Gradients are averaged over ranks with DDP around the chain and around the energy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    for process in [start(chain_of_a_rank, rank, address, tmp_path) for rank in range(2)]:
        process.join(120)
        assert process.exitcode == 0
    net = make_net()
    out = sampler(net)(0.7 * numbers((4, *SHAPE[1:])), seed=0, differentiable=True)
    want = torch.autograd.grad(out.square().sum() / 2, list(net.parameters())[:-1])
    for rank in range(2):
        assert_close(torch.load(tmp_path / str(rank)), 2 * list(want), 1e-10)


WRONG = [
    ({"checkpoint": 0}, ValueError, "checkpoint must store at least 1 state"),
    ({"checkpoint": -3}, ValueError, r"checkpoint must store at least 1 state \(x0\), got -3"),
    ({"checkpoint": 1.5}, TypeError, "checkpoint must be"),
    ({"checkpoint": True}, TypeError, "checkpoint must be"),
    ({"checkpoint": None}, TypeError, "checkpoint must be"),
    ({"checkpoint": "-1GiB"}, ValueError, "checkpoint must be .*, got '-1GiB'"),
    ({"checkpoint": "2 gigs"}, ValueError, "checkpoint must be"),
    ({"checkpoint": "10"}, ValueError, "checkpoint must be"),
    ({"checkpoint": "100B"}, ValueError, 'checkpoint="100B" is not enough .* the least that would'),
    ({"grad_through": "around"}, ValueError, "grad_through must be one of exact, straight"),
    ({"checkpoint": "none", "offload": True}, ValueError, "offload stores states in host memory"),
    ({"differentiable": False, "offload": True}, ValueError, "needed for offload=True"),
    ({"differentiable": False, "grad_through": "straight"}, ValueError, "needed for grad_through"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[c[2] for c in WRONG])
def test_options_of_a_differentiable_call_are_checked(
    wrong: dict, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sampler(make_net())(starts(), **{"seed": 0, "differentiable": True} | wrong)


RECOMPUTED = ["step", 2]


@pytest.mark.parametrize("checkpoint", RECOMPUTED)
def test_second_derivatives_of_a_chain(checkpoint: Any) -> None:
    """Refused when they are taken; under "none" they are the plain unroll's."""
    net, x0 = make_net(), starts()
    run = functools.partial(sampler(net), x0, seed=0, differentiable=True)
    (grad,) = torch.autograd.grad(run(checkpoint=checkpoint).sum(), x0, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(run(checkpoint="none").sum(), x0, create_graph=True)
    assert bool(torch.autograd.grad(grad.sum(), x0)[0].any())


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("checkpoint", ["none", "step", 2, "20MiB"])
def test_energies_that_are_not_twice_differentiable(checkpoint: Any) -> None:
    """Autograd by itself gives None, or the gradient without the energy's part, in silence."""
    run = sampler(lambda x: OnceOnly.apply(x).flatten(1).sum(1))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        run(starts(), seed=0, differentiable=True, checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", ["none", "step", 2])
def test_a_chain_where_nothing_requires_grad_is_refused(checkpoint: Any) -> None:
    net, calls = make_net().requires_grad_(False), []
    counted = lambda x: calls.append(1) or net(x)  # noqa: E731
    call = {"seed": 0, "differentiable": True, "checkpoint": checkpoint}
    with pytest.raises(ValueError, match="nothing that requires grad"):
        sampler(counted)(starts().detach(), **call)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="grad_steps cuts it off"):
        sampler(net)(starts(), **call, grad_steps=2)
    with torch.no_grad():
        assert not sampler(net)(starts().detach(), **call).requires_grad


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return w * x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, w = ctx.saved_tensors
        return (2 * w * x * grad).detach(), None


@pytest.mark.parametrize("checkpoint", ["none", "step", 2])
def test_energies_that_detach_inside(checkpoint: Any) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return Detached.apply(x, self.w).flatten(1).sum(1)

    with pytest.raises(ValueError, match="detached inside the energy"):
        sampler(Energy())(starts().detach(), seed=0, differentiable=True, checkpoint=checkpoint)


def unseeded_dropout() -> Callable[[Tensor], Tensor]:
    generator, net = torch.Generator().manual_seed(0), make_net()
    return lambda x: net(x * (torch.rand(SHAPE, generator=generator, dtype=x.dtype) > 0.1))


def counting() -> Callable[[Tensor], Tensor]:
    net, calls = make_net(), itertools.count()
    return lambda x: net(x) * (1 + 0.01 * next(calls))


@pytest.mark.parametrize(("make", "checkpoint"), [(unseeded_dropout, "step"), (counting, 2)])
def test_energies_that_differ_when_computed_again(make: Callable, checkpoint: Any) -> None:
    x0 = starts()
    out = sampler(make())(x0, seed=0, differentiable=True, checkpoint=checkpoint)
    with pytest.raises(RuntimeError, match=r"energies of step \d differ by up to .* random num"):
        gradients(out, [x0])


@pytest.mark.parametrize("checkpoint", RECOMPUTED)
def test_weights_changed_behind_autograds_back(checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    out = sampler(net)(x0, seed=0, differentiable=True, checkpoint=checkpoint)
    net.layers[0].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match="or with other weights now"):
        gradients(out, [x0])


def changes() -> Iterator[tuple[str, Callable]]:
    yield "x0", lambda parts: parts["x0"]
    yield "weight", lambda parts: parts["net"].layers[0].weight
    yield "frozen weight", lambda parts: parts["net"].layers[2].weight
    yield "step_size", lambda parts: parts["a"]
    yield "noise", lambda parts: parts["z"]
    yield "keyword", lambda parts: parts["y"]


@pytest.mark.parametrize(
    ("which", "checkpoint"),
    [(change, RECOMPUTED[i % 2]) for i, (_, change) in enumerate(changes())],
    ids=[name for name, _ in changes()],
)
def test_changes_between_the_passes_are_noticed(which: Callable, checkpoint: Any) -> None:
    net, a, y = make_net(), torch.tensor(0.3), torch.ones(1)
    net.layers[2].weight.requires_grad_(False)
    parts = {"net": net, "x0": starts(), "a": a, "y": y, "z": numbers((K, *SHAPE), 1)}
    out = sampler(lambda x, y: y * net(x), step_size=a)(
        parts["x0"], noise=parts["z"], y=y, differentiable=True, checkpoint=checkpoint
    )
    if which(parts) is net.layers[0].weight or which(parts) is net.layers[2].weight:
        # The weights of a closure are seen by autograd alone, and by the energies.
        match = "modified by an inplace operation|energies of step"
    else:
        match = "modified by an inplace operation"
    with torch.no_grad():
        which(parts).mul_(1.5)
    with pytest.raises(RuntimeError, match=match):
        gradients(out, [net.layers[4].weight])
