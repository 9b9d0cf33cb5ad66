"""Gradients through the chain by every schedule: numbers, evaluations, memory, errors."""

import functools
import itertools
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import fastlangevin as fl
from fastlangevin.adjoint.memory import Allocations
from fastlangevin.adjoint.schedules import Budget, Sizes, choose_states, recomputed, reverse, sweep

N, K = 3, 7
SHAPE = (N, 2, 8, 8)
SCHEDULES = ["none", "step", 1, 3, "20MiB", "auto"]
ACTIVATIONS = ["leaky_relu", "relu", "silu", "softplus", "elu"]


def numbers(shape: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_net(activation: str = "silu", dtype: torch.dtype = torch.float64) -> nn.Module:
    net = fl.ConvEnergy(channels=2, size=8, width=2, activation=activation).to(dtype)
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.3 * numbers(parameter.shape, 100 + i))
    return net


def starts(dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.7 * numbers(SHAPE)).to(dtype).requires_grad_()


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, **{"steps": K, "step_size": 0.3, "noise_std": 0.2} | options)


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


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = numbers(out.shape, 2).to(out)
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]


def assert_close(got: list[Tensor], want: list[Tensor], rtol: float) -> None:
    """To rtol of each tensor's largest number."""
    for ours, plain in zip(got, want, strict=True):
        assert float((ours - plain).abs().max()) <= rtol * float(plain.abs().max())


class Calls:
    """Counts an energy's evaluations."""

    def __init__(self, net: nn.Module) -> None:
        self.count = 0
        net.register_forward_pre_hook(self._call)

    def _call(self, module: nn.Module, inputs: tuple) -> None:
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


# Schedules ---------------------------------------------------------------------------------------


@functools.cache
def fewest_advances(steps: int, states: int) -> int:
    """By trying every place for the next state: Griewank & Walther's recursion as it is written."""
    if steps == 1:
        return 0
    if states == 1:
        return steps * (steps - 1) // 2
    return min(
        j + fewest_advances(steps - j, states - 1) + fewest_advances(j, states)
        for j in range(1, steps)
    )


PAIRS = [*itertools.product((1, 2, 3, 5, 8, 13, 34, 60), (1, 2, 3, 5, 8)), (90, 4), (60, 60)]


@pytest.mark.parametrize(("steps", "states"), PAIRS)
def test_no_schedule_recomputes_less(steps: int, states: int) -> None:
    """The count, and that of a run of the actions in which each finds what it needs."""
    want = fewest_advances(steps, states) - (steps - 1)
    assert recomputed(steps, states) == want
    in_hand, kept, done, again = 0, {0}, steps, 0
    for kind, k in sweep(0, steps, states - 1):
        assert k == in_hand
        if kind == "store":
            kept.add(k)
        else:
            in_hand += 1
    assert in_hand == steps - 1
    for kind, k in reverse(steps, states, sorted(kept)):
        if kind == "restore":
            assert k in kept
            in_hand = k
        elif kind == "drop":
            kept.remove(k)
        else:
            assert k == in_hand
            in_hand += kind == "advance"
            again += kind == "advance"
            if kind == "store":
                kept.add(k)
            if kind == "backward":
                assert k == done - 1
                done = k
        assert len(kept) <= states
    assert (done, again, kept) == (0, want, set())


@pytest.mark.parametrize(("steps", "states"), [(1, 1), (2, 1), (7, 2), (7, 6), (9, 3), (12, 1)])
def test_evaluations_of_a_run(steps: int, states: int) -> None:
    net, x0 = make_net(), starts()
    calls = Calls(net)
    out = sampler(net, steps=steps)(x0, seed=0, differentiable=True, checkpoint=states)
    assert calls.since() == steps
    want = gradients(out, [x0])
    assert calls.since() == steps + fewest_advances(steps, states) - (steps - 1)
    out = sampler(net, steps=steps)(x0, seed=0, differentiable=True, checkpoint=states)
    weight = numbers(out.shape, 2)
    (first,) = torch.autograd.grad(out, x0, weight, retain_graph=True)
    calls.since()
    (second,) = torch.autograd.grad(out, x0, weight)
    # The first backward pass has used up all states but x0.
    assert calls.since() == steps + fewest_advances(steps, states)
    assert_close([first, second], want * 2, 1e-12)


# Gradients ---------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("checkpoint", SCHEDULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_a_plain_unroll(options: dict, checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2))
    ours, plain = both(net, x0, options | {"step_size": a, "noise_std": b}, checkpoint)
    leaves = [*([] if "grad_steps" in options else [x0]), a, b, *net.parameters()][:-1]
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    assert_close(gradients(ours, leaves), gradients(plain, leaves), 1e-10)


@pytest.mark.parametrize("checkpoint", SCHEDULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_activation(
    activation: str, checkpoint: Any, dtype: torch.dtype, rtol: float
) -> None:
    net, x0 = make_net(activation, dtype), starts(dtype)
    ours, plain = both(net, x0, {}, checkpoint)
    leaves = [x0, *net.parameters()][:-1]
    assert_close(gradients(ours, leaves), gradients(plain, leaves), rtol)


@pytest.mark.parametrize("checkpoint", ["step", 3, 1])
def test_the_contracts_noise_is_made_again(checkpoint: Any) -> None:
    net, x0 = make_net(), starts()
    run = functools.partial(
        sampler(net), x0, seed=5, first_chain=7, first_step=11, differentiable=True
    )
    want = gradients(run(checkpoint="none"), [x0, *net.parameters()])
    assert_close(gradients(run(checkpoint=checkpoint), [x0, *net.parameters()]), want, 1e-10)


@pytest.mark.parametrize("checkpoint", [1, 3, "20MiB"])
def test_no_tensor_that_a_step_reads_is_lost(checkpoint: Any) -> None:
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


@pytest.mark.parametrize("checkpoint", [1, 2, "step"])
@pytest.mark.parametrize("noise_order", ["after", "before", "last"])
def test_gradcheck(noise_order: str, checkpoint: Any) -> None:
    def chain(x0: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        run = fl.LangevinSampler(
            lambda x: torch.tanh(x @ w).square().sum(1),
            steps=4, step_size=a, noise_std=b, noise_order=noise_order,
        )  # fmt: skip
        return run(x0, seed=0, differentiable=True, checkpoint=checkpoint)

    tensors = (
        numbers((2, 3)),
        numbers((3, 4), 1),
        torch.tensor(0.3).double(),
        torch.ones(2).double(),
    )
    assert torch.autograd.gradcheck(chain, tuple(v.requires_grad_() for v in tensors))


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


# Piecewise linear energies -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("options", [{}, {"gradient": "autograd", "grad_through": "straight"}])
@pytest.mark.parametrize("noise_order", ["after", "before", "last"])
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


def test_masks_keep_no_state() -> None:
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


# Memory ------------------------------------------------------------------------------------------


def peak(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    with Allocations() as memory:
        torch.autograd.grad(run().sum(), leaves, allow_unused=True)
    assert memory.live == 0
    return memory.peak


def chain_peak(net: nn.Module, steps: int, checkpoint: Any) -> int:
    x0 = torch.zeros(2, *net.shape, requires_grad=True)
    run = fl.LangevinSampler(net, steps=steps)
    call = functools.partial(run, x0, seed=0, differentiable=True, checkpoint=checkpoint)
    return peak(call, [x0, *net.parameters()])


def test_memory_of_every_state() -> None:
    """At half of the width that the benchmark has: states weigh more beside a graph than there."""
    net = fl.ConvEnergy(width=16, activation="silu")
    assert chain_peak(net, 100, "none") >= 25 * chain_peak(net, 100, "step")


def test_memory_does_not_grow_with_the_chain() -> None:
    net = fl.ConvEnergy(size=8, width=4, activation="silu")
    assert chain_peak(net, 300, 20) <= 1.3 * chain_peak(net, 20, "step")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("share", "schedule"), [(0.0, "least"), (0.3, "states"), (1.5, "graphs")])
def test_a_budget_is_kept(activation: str, share: float, schedule: str) -> None:
    net, x0 = make_net(activation, torch.float32), starts(torch.float32)
    run = sampler(net, steps=15)
    calls = Calls(net)
    with pytest.raises(ValueError, match="the least that would do is") as error:
        run(x0, seed=0, differentiable=True, checkpoint="1B")
    least = str(error.value).rsplit(" ", 1)[1]
    unrolled = peak(
        lambda: run(x0, seed=0, differentiable=True, checkpoint="none"), [x0, *net.parameters()]
    )
    budget = least if share == 0 else f"{int(share * unrolled)}B"
    size = float(least[:-3]) * 1024 if share == 0 else share * unrolled
    calls.since()
    used = peak(
        lambda: run(x0, seed=0, differentiable=True, checkpoint=budget), [x0, *net.parameters()]
    )
    assert used <= size
    # Measuring takes two evaluations, or three where the graphs are kept.
    assert (
        calls.since()
        in {
            "least": {2 + 30 + recomputed(15, states) for states in (1, 2)},
            "states": {2 + 30 + recomputed(15, states) for states in range(2, 16)},
            "graphs": {3 + 15},
        }[schedule]
    )


def test_auto_takes_a_quarter_of_free_memory() -> None:
    sizes = Sizes(state=100, graph=1000, step=1500)
    choose = functools.partial(choose_states, "op", steps=10, sizes=sizes, offload=False)
    assert choose("auto", free=None) == 10
    assert choose("auto", free=4000) == 10
    assert choose("auto", free=3600) == 9
    assert choose("auto", free=3) == 1
    assert choose(Budget(10499, "10499B"), free=3) == 10
    assert choose(Budget(10500, "10500B"), free=3) is None
    assert choose(Budget(2499, "2499B"), free=3) == 7
    assert choose_states("op", Budget(1700, "1700B"), 10, sizes, 3, offload=True) == 10


def test_explain_says_what_each_schedule_takes() -> None:
    net, x0 = make_net(), starts()
    text = sampler(net, steps=100).explain(x0)
    for line in (
        "checkpoint 'none': 100 graphs, 100 evaluations",
        "checkpoint 'step': 99 states, 200 evaluations",
        f"checkpoint 13: 13 states, {200 + recomputed(100, 13)} evaluations",
        "checkpoint 1: 1 state, 5051 evaluations",
        "checkpoint 'auto': 99 states",
    ):
        assert line in text
    assert "identity" not in text
    text = sampler(make_net("relu").requires_grad_(False)).explain(x0)
    assert "d x_K / d x_0 is the identity where no clamp held" in text
    assert "gradients  not with this energy" in sampler(lambda x, y: x.sum(1)).explain(x0)


# Beside other parts of torch ---------------------------------------------------------------------


class Generator(nn.Module):
    """A chain as a module."""

    def __init__(self, net: nn.Module, **call: Any) -> None:
        super().__init__()
        self.net, self.call = net, {"seed": 0, "differentiable": True} | call

    def forward(self, x: Tensor) -> Tensor:
        return sampler(self.net)(x, **self.call)


@pytest.mark.parametrize("checkpoint", ["none", "step", 2, "20MiB"])
@pytest.mark.parametrize("computed", [False, True], ids=["leaf", "computed"])
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


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("checkpoint", ["step", 2, "20MiB"])
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
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=chain_of_a_rank, args=(r, address, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    net = make_net()
    out = sampler(net)(0.7 * numbers((4, *SHAPE[1:])), seed=0, differentiable=True)
    want = torch.autograd.grad(out.square().sum() / 2, list(net.parameters())[:-1])
    for rank in range(2):
        assert_close(torch.load(tmp_path / str(rank)), 2 * list(want), 1e-10)


# Errors ------------------------------------------------------------------------------------------

WRONG = [
    ({"checkpoint": 0}, ValueError, "checkpoint must keep at least 1 state"),
    ({"checkpoint": -3}, ValueError, r"checkpoint must keep at least 1 state \(x0\), got -3"),
    ({"checkpoint": 1.5}, TypeError, "checkpoint must be"),
    ({"checkpoint": True}, TypeError, "checkpoint must be"),
    ({"checkpoint": None}, TypeError, "checkpoint must be"),
    ({"checkpoint": "-1GiB"}, ValueError, "checkpoint must be .*, got '-1GiB'"),
    ({"checkpoint": "2 gigs"}, ValueError, "checkpoint must be"),
    ({"checkpoint": "10"}, ValueError, "checkpoint must be"),
    ({"checkpoint": "100B"}, ValueError, 'checkpoint="100B" is not enough .* the least that would'),
    ({"grad_through": "around"}, ValueError, "grad_through must be one of exact, straight"),
    ({"checkpoint": "none", "offload": True}, ValueError, "offload keeps states elsewhere"),
    ({"differentiable": False, "offload": True}, ValueError, "need differentiable=True"),
    ({"differentiable": False, "grad_through": "straight"}, ValueError, "need differentiable"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[c[2] for c in WRONG])
def test_options_that_do_not_fit(wrong: dict, error: type[Exception], match: str) -> None:
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
def test_nothing_requires_grad(checkpoint: Any) -> None:
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


@pytest.mark.parametrize("checkpoint", RECOMPUTED)
@pytest.mark.parametrize("make", [unseeded_dropout, counting])
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


@pytest.mark.parametrize("checkpoint", RECOMPUTED)
@pytest.mark.parametrize("which", [c[1] for c in changes()], ids=[c[0] for c in changes()])
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
