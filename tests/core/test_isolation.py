"""A call changes nothing outside of itself at any moment: other threads, torch's generators, forks.

The energies here stop in the middle of their forward pass, in the thread that samples, until the
test has done in its own thread what would be disturbed. So nothing depends on the scheduler.
"""

import gc
import os
import queue
import re
import signal
import sys
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
from fastlangevin import LangevinSampler, locks, noise
from fastlangevin.gradients import draws
from fastlangevin.gradients.draws import Draws
from fastlangevin.gradients.untouched import left_as_found
from fastlangevin.kernels import extension

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["auto", "autograd"])
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


@pytest.mark.parametrize("kind", ["plain", "dropout"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["auto", "autograd"])
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


@pytest.mark.parametrize("kind", [*KINDS, "checkpoint"])
@pytest.mark.parametrize("method", METHODS)
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
    for _ in chain.walk(x):
        energy.net[1].running_mean += 1
    assert torch.equal(energy.net[1].running_mean, torch.full((4,), 3.0))


# Numbers that energies draw ----------------------------------------------------------------------

X = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
DRAW: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(5),
    "rand out": lambda: torch.rand(5, out=torch.empty(5)),
    "rand_like": lambda: torch.rand_like(X),
    "randn": lambda: torch.randn(40),
    "randint": lambda: torch.randint(9, (5,)),
    "randint_like": lambda: torch.randint_like(X, 3, 9),
    "randperm": lambda: torch.randperm(9),
    "random_": lambda: torch.empty(5).random_(),
    "normal": lambda: torch.normal(X, 0.5),
    "normal_": lambda: torch.empty(5).normal_(),
    "log_normal_": lambda: torch.empty(5).log_normal_(),
    "cauchy_": lambda: torch.empty(5).cauchy_(),
    "exponential_": lambda: torch.empty(5).exponential_(),
    "geometric_": lambda: torch.empty(5).geometric_(0.5),
    "bernoulli": lambda: torch.bernoulli(X.sigmoid()),
    "binomial": lambda: torch.binomial(torch.full((5,), 9.0), torch.full((5,), 0.5)),
    "poisson": lambda: torch.poisson(X.exp()),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 4),
    "gamma": lambda: torch.distributions.Gamma(X.exp(), X.exp()).rsample(),
    "dirichlet": lambda: torch._sample_dirichlet(torch.ones(5)),
    "dropout": lambda: F.dropout(X, 0.5),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "alpha_dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "dropout1d": lambda: F.dropout1d(X, 0.5),
    "rrelu": lambda: F.rrelu(X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "checkpoint": lambda: checkpoint(lambda x: F.dropout(x, 0.5), X, use_reentrant=False),
    "jit": lambda: torch.jit.script(nn.Dropout())(X),
    "vmap": lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(X[0]),
    "func.grad": lambda: torch.func.grad(lambda x: F.dropout(x, 0.5).sum())(X),
    "several": lambda: torch.cat([torch.rand(3), F.dropout(torch.ones(3)), torch.randn(30)]),
    "manual_seed": lambda: (torch.rand(1), torch.manual_seed(4), torch.rand(3))[2],
    "fork_rng": lambda: _forked(),
    "own generator": lambda: torch.rand(3, generator=torch.Generator().manual_seed(4)),
}


def _forked() -> Tensor:
    first = torch.rand(2)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        inside = torch.rand(2)
    return torch.cat([first, inside, torch.rand(2)])


@pytest.mark.parametrize("name", DRAW)
def test_draws_have_the_bits_of_a_seeded_generator_which_does_not_move(name: str) -> None:
    torch.manual_seed(noise.fold_in(7, 3))
    want = [DRAW[name]() for _ in range(2)]
    torch.manual_seed(1)
    before, own = torch.get_rng_state(), Draws(7, CPU)
    for step in (2, 3, 3):
        with own.step(step):
            found = [DRAW[name]() for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["manual_seed", "fork_rng", "checkpoint"])
def test_energies_that_handle_the_generators_are_noticed(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the extension's profile function, and by the one in Python that replaces it."""
    if not compiled:
        monkeypatch.setattr(extension, "library", None)
    elif extension.library is None:
        pytest.skip("the extension is not built")
    torch.manual_seed(noise.fold_in(7, 3))
    want = [DRAW[name]() for _ in range(2)]
    torch.manual_seed(1)
    before, own = torch.get_rng_state(), Draws(7, CPU)
    with own.step(3):
        found = [DRAW[name]() for _ in range(2)]
    assert sys.getprofile() is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("compiled", [True, False])
def test_only_watched_objects_call_the_profile_function(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(extension, "library", None)
    elif extension.library is None:
        pytest.skip("the extension is not built")
    watched, other, callers = [1], [1], []
    try:
        extension.watch_methods([watched], lambda frame: callers.append(frame.f_code.co_name))
        other.append(2)
        (lambda: watched.append(2))()
        len(watched)
    finally:
        sys.setprofile(None)
    assert callers == ["<lambda>"]


@pytest.mark.parametrize("name", DRAW)
def test_energies_run_alone_draw_what_torch_would_give_next(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with left_as_found(nn.Identity(), CPU):
        found = [DRAW[name]() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, [DRAW[name]() for _ in range(2)]))


# Tagged as drawing, though on CPU and CUDA they draw nothing, or only by operators that are known.
DRAW_NOTHING = {
    "_cudnn_init_dropout_state",  # from the seed that it is given
    "_fill_mem_eff_dropout_mask_",
    "_flash_attention_forward_no_dropout_inplace",
    "_fused_sdp_choice",
    "_lstm_mps",
    "_nested_tensor_softmax_with_shape",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu",  # refuses dropout
}


def test_every_operator_of_torchs_that_draws_is_known() -> None:
    known = set(draws.drawing_operators())
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    packets = [
        getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        for name in names
        if name.startswith("aten::")
    ]
    ops = [getattr(p, overload) for p in packets if p is not None for overload in p.overloads()]
    drawing = {op for op in ops if torch.Tag.nondeterministic_seeded in op.tags}
    assert len(drawing) > 80
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in drawing - known:
        made_of_others = any(
            has(op.name(), key)
            for key in ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
        )
        listed = op._opname in draws._WITHOUT_GENERATOR or op._opname in DRAW_NOTHING
        assert made_of_others or listed or op._opname.endswith("_backward"), op


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
@pytest.mark.parametrize("kind", [*KINDS, "checkpoint"])
@pytest.mark.parametrize("gradient", ["auto", "autograd"])
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
@pytest.mark.parametrize("gradient", ["autograd", "explicit", "fused"])
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
