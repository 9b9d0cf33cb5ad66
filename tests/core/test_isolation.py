"""A call changes nothing outside of itself at any moment: other threads, torch's generators, forks.

The energies here stop in the middle of their forward pass, in the thread that samples, until the
test has done in its own thread what would be disturbed. So nothing depends on the scheduler.
"""

import gc
import os
import queue
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlangevin
from fastlangevin import LangevinSampler, locks

CPU = torch.device("cpu")
SHAPE = (3, 2, 8, 8)
# A recording refuses it, as it does a pause: "auto" is autograd with and without one.
OPAQUE = time.thread_time


@pytest.fixture(autouse=True)
def _no_warnings_of_train_mode() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LangevinSampler: in train mode")
        yield


class Energy(nn.Module):
    """A conv net that calls ``pause`` in its forward pass."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        spectral = nn.utils.parametrizations.spectral_norm
        middle = {
            "plain": nn.Identity(),
            "dropout": nn.Dropout(0.3),
            "checkpoint": nn.Dropout(0.3),
            "batch norm": nn.BatchNorm2d(4),
            "spectral norm": spectral(nn.Conv2d(4, 4, 1)),
        }[kind]
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), middle, nn.Softplus())
        self.checkpointed = kind == "checkpoint"
        self.train(kind != "plain")
        self.pause: Callable[[], Any] = OPAQUE

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        self.pause()
        rest = self.net[1:]
        h = checkpoint(rest, h, use_reentrant=False) if self.checkpointed else rest(h)
        return h.flatten(1).sum(1)


def start() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) - 0.5


def call(energy: nn.Module, seed: int, **settings: Any) -> Tensor:
    return LangevinSampler(energy, steps=3, step_size=0.01, **settings)(start(), seed=seed)


def differentiable(energy: nn.Module, seed: int, how: Any = "step", **settings: Any) -> Tensor:
    x0 = start().requires_grad_()
    sampler = LangevinSampler(energy, steps=3, step_size=0.01, **settings)
    x = sampler(x0, seed=seed, differentiable=True, checkpoint=how)
    grads = torch.autograd.grad(x.square().sum(), [x0, *energy.parameters()], allow_unused=True)
    return torch.cat([x.detach().flatten(), *(g.flatten() for g in grads if g is not None)])


def diagnose(energy: nn.Module, seed: int, **settings: Any) -> Tensor:
    sampler = LangevinSampler(energy, steps=3, step_size=0.01, **settings)
    return sampler.diagnose(start(), seed=seed).energy


def metropolis(energy: nn.Module, seed: int, **settings: Any) -> Tensor:
    return call(energy, seed, metropolis=True, **settings)


METHODS = [call, differentiable, diagnose, metropolis]
KINDS = ["plain", "dropout", "batch norm", "spectral norm"]


def beside(energy: Energy, sample: Callable[[], Tensor], act: Callable[[], None]) -> Tensor:
    """The result of ``sample`` in a thread; ``act`` is called here each time the energy pauses."""
    paused: queue.SimpleQueue[bool] = queue.SimpleQueue()
    resumed: queue.SimpleQueue[None] = queue.SimpleQueue()
    results: list[Tensor] = []

    def pause() -> None:
        if threading.current_thread() is thread:
            paused.put(True)
            resumed.get(timeout=20)

    def run() -> None:
        try:
            results.append(sample())
        finally:
            paused.put(False)

    thread = threading.Thread(target=run)
    energy.pause = pause
    thread.start()
    try:
        while paused.get(timeout=20):
            act()
            resumed.put(None)
    finally:
        energy.pause = OPAQUE
        resumed.put(None)
        thread.join()
    return results[0]


@pytest.mark.parametrize(
    ("kind", "method", "gradient"),
    [
        (kind, method, ("auto", "autograd")[i // 2])
        for i, kind in enumerate(KINDS)
        for j, method in enumerate(METHODS)
        if (i + j) % 2
    ],
)
def test_numbers_drawn_in_another_thread_are_those_of_torchs_generator(
    kind: str, method: Callable[..., Tensor], gradient: str
) -> None:
    energy = Energy(kind)
    alone = method(energy, 5, gradient=gradient)
    torch.manual_seed(11)
    want = [int(torch.randint(2**62, ())) for _ in range(500)]
    torch.manual_seed(11)
    found: list[int] = []

    def act() -> None:
        found.extend(int(torch.randint(2**62, ())) for _ in range(7))

    assert torch.equal(beside(energy, lambda: method(energy, 5, gradient=gradient), act), alone)
    assert found
    assert found == want[: len(found)]
    assert int(torch.randint(2**62, ())) == want[len(found)]


@pytest.mark.parametrize(
    ("kind", "method", "gradient"),
    [
        ("plain", call, "auto"),
        ("plain", differentiable, "autograd"),
        ("dropout", call, "autograd"),
        ("dropout", differentiable, "auto"),
        ("plain", metropolis, "autograd"),
    ],
)
def test_gradients_of_the_same_parameters_in_another_thread_are_all_there(
    kind: str, method: Callable[..., Tensor], gradient: str
) -> None:
    energy = Energy(kind)
    alone = method(energy, 5, gradient=gradient)

    def train() -> list[Tensor]:
        torch.manual_seed(3)
        energy.zero_grad()
        energy(start()).mean().backward()
        assert all(p.requires_grad and p.grad is not None for p in energy.parameters())
        return [p.grad.clone() for p in energy.parameters() if p.grad is not None]

    want, found = train(), []
    assert torch.equal(
        beside(energy, lambda: method(energy, 5, gradient=gradient), lambda: found.append(train())),
        alone,
    )
    assert found
    for grads in found:
        assert all(map(torch.equal, grads, want))


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, method)
        for i, kind in enumerate([*KINDS, "checkpoint"])
        for j, method in enumerate(METHODS)
        if (i + j) % 2 == 0
    ],
)
def test_two_threads_that_share_an_energy_get_the_chains_of_one(
    kind: str, method: Callable[..., Tensor]
) -> None:
    energy = Energy(kind)
    buffers = {name: value.clone() for name, value in energy.named_buffers()}
    want = [method(energy, seed) for seed in range(2)]
    energy.pause = lambda: time.sleep(1e-3)  # lets the other thread go on
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: method(energy, s)}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert torch.equal(found[seed], want[seed])
    for name, value in energy.named_buffers():
        assert torch.equal(value, buffers[name])


@pytest.mark.parametrize("kind", ["dropout", "checkpoint"])
def test_steps_computed_again_draw_the_same_numbers(kind: str) -> None:
    energy = Energy(kind)
    unrolled = differentiable(energy, 5, how="none")
    for how in ("step", 1):
        again = differentiable(energy, 5, how=how)
        assert torch.allclose(again, unrolled, rtol=1e-4, atol=1e-6)


def test_what_another_thread_writes_to_buffers_between_steps_stays() -> None:
    energy = Energy("batch norm")
    sampler = LangevinSampler(energy, steps=3, gradient="autograd")
    x, _, chain = sampler._read(start(), seed=0)
    for _ in chain.steps(x):
        energy.net[1].running_mean += 1
    assert torch.equal(energy.net[1].running_mean, torch.full((4,), 3.0))


def test_a_sampler_inside_an_energy_has_numbers_of_its_own() -> None:
    inner = LangevinSampler(Energy("dropout"), steps=2, gradient="autograd")

    def energy(x: Tensor) -> Tensor:
        y = inner(x, seed=1).detach()
        return (F.dropout(x, 0.5) * y).flatten(1).sum(1)

    before = torch.get_rng_state()
    found = LangevinSampler(energy, steps=2)(start(), seed=2)
    assert torch.equal(found, LangevinSampler(energy, steps=2)(start(), seed=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampled_energy_forms_no_gradient_of_a_weight() -> None:
    formed: list[str] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.convolution_backward.default:
                formed.append(str(args[-1]))
            return func(*args, **(kwargs or {}))

    with Seen():
        call(Energy(), 0, gradient="autograd")
    assert formed == ["[True, False, False]"] * 3


# Forks -------------------------------------------------------------------------------------------


def exit_of_child(work: Callable[[], Any], limit: int = 20) -> int:
    """Fork; the status with which the child ends, that of a signal where it does not in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("kind", "gradient"),
    [("plain", "auto"), ("dropout", "autograd"), ("spectral norm", "auto"), ("checkpoint", "auto")],
)
def test_a_child_forked_while_a_thread_samples_can_sample(kind: str, gradient: str) -> None:
    energy, states = Energy(kind), []
    want, before = call(energy, 5, gradient=gradient), torch.get_rng_state()

    def work() -> None:
        energy.pause = OPAQUE
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(call(energy, 5, gradient=gradient), want)

    beside(
        energy,
        lambda: call(energy, 6, gradient="autograd"),
        lambda: states.append(exit_of_child(work)),
    )
    assert states
    assert not any(states)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("gradient", ["explicit", "fused"])
def test_no_lock_of_the_package_stays_held_in_a_child(gradient: str) -> None:
    energy = fastlangevin.ConvEnergy(channels=1, size=8, width=8)
    sampler = LangevinSampler(energy, steps=2, gradient=gradient)
    want = sampler(n=2, seed=0)
    gc.collect()
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        taken = [lock for lock in list(locks._made) if lock.acquire(timeout=5)]
        held.set()
        go.wait(30)
        for lock in taken:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def work() -> None:
        assert torch.equal(sampler(n=2, seed=0), want)

    try:
        assert exit_of_child(work) == 0
    finally:
        go.set()
        thread.join()


def test_every_lock_of_the_package_is_made_by_one_helper() -> None:
    package = Path(fastlangevin.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "locks.py":
            assert not re.search(r"\bR?Lock\(\)", path.read_text()), path
