"""State that recordings must notice, and changes by other threads, which must stay."""

import array
import collections
import ctypes
import itertools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastlangevin import LangevinSampler
from fastlangevin.gradients import engine_cache


class Energy(nn.Module):
    """A conv net times what ``factor`` makes of the module."""

    def __init__(self, factor: Callable[["Energy"], Any] = lambda module: 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 9, 1)
        )
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1) * self.factor(self)


class Numbered:
    """An object that can be an element of a set or a key of a dictionary."""

    def __init__(self) -> None:
        self.n = 0


class NumberedList(list[int]):
    n = 0


def of_child(module: Any) -> float:
    return 1.0 + next(module.child.counter)


def of_namespace(module: Any) -> float:
    return 1.0 + next(module.config.counter)


def of_array(module: Any) -> float:
    module.cells[0] += 1
    return float(module.cells[0])


def of_zero_dimensions(module: Any) -> float:
    module.scalar += 1
    return 1.0


def of_large_array(module: Any) -> float:
    module.pixels[0] += 1
    return float(module.pixels.ravel()[0])


def of_ctypes(module: Any) -> float:
    module.integer.value += 1
    return float(module.integer.value)


def of_order(module: Any) -> float:
    module.recent.move_to_end(next(iter(module.recent)))
    return float(next(iter(module.recent)))


def of_element(module: Any) -> float:
    for item in module.elements:
        item.n += 1
        return 1.0 + item.n
    return 0.0


def of_subclass(module: Any) -> float:
    module.numbers.n += 1
    return 1.0 + module.numbers.n


STATE: dict[str, tuple[Callable[[Any], float], Callable[[], dict[str, Any]]]] = {
    "iterator of a child": (
        of_child,
        lambda: {"child": types.SimpleNamespace(counter=itertools.count())},
    ),
    "iterator of a namespace": (
        of_namespace,
        lambda: {"config": types.SimpleNamespace(counter=itertools.count())},
    ),
    "array": (of_array, lambda: {"cells": array.array("i", [0])}),
    "array without dimensions": (of_zero_dimensions, lambda: {"scalar": np.array(0)}),
    "large array": (of_large_array, lambda: {"pixels": np.zeros((2048, 1024), np.uint8)}),
    "ctypes": (of_ctypes, lambda: {"integer": ctypes.c_int()}),
    "order of a dictionary": (
        of_order,
        lambda: {"recent": collections.OrderedDict.fromkeys((1, 2, 3))},
    ),
    "element of a set": (of_element, lambda: {"elements": {Numbered()}}),
    "key of a dictionary": (of_element, lambda: {"elements": {Numbered(): 1}}),
    "attribute of a list": (of_subclass, lambda: {"numbers": NumberedList()}),
}


@pytest.mark.parametrize(("factor", "make"), STATE.values(), ids=STATE)
def test_energies_with_such_state_stay_with_autograd(
    factor: Callable[[Any], float], make: Callable[[], dict[str, Any]]
) -> None:
    x0 = torch.rand((3, 2, 5, 5), generator=torch.Generator().manual_seed(1))
    chains = []
    for gradient in ("auto", "autograd"):
        energy = Energy(factor)
        for name, value in make().items():
            setattr(energy, name, value)
        sampler = LangevinSampler(energy, 3, 0.1, gradient=gradient)
        chains.append(sampler(x0, seed=0))
    assert torch.equal(*chains)


def test_energies_without_state_are_recorded() -> None:
    x0 = torch.rand((3, 2, 5, 5), generator=torch.Generator().manual_seed(1))
    assert LangevinSampler(Energy(), 1).choose_engine(x0, {}).name != "autograd"


def scaled(weight: Tensor) -> Tensor:
    return weight / weight.norm()


def test_an_energy_that_calls_a_compiled_function_is_recorded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        compiled = torch.jit.script(scaled)
    energy = Energy(lambda module: compiled(module.net[3].weight).sum())
    attempts = counted_recordings(monkeypatch)
    sampler = LangevinSampler(energy, 1)
    for seed in range(3):
        sampler(torch.rand(3, 2, 5, 5), seed=seed)
    assert len(attempts) == 1


def test_a_traced_function_is_recorded_again_when_a_tensor_in_it_changes() -> None:
    held = torch.ones(4 * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced = torch.jit.trace(lambda weight: weight * held, torch.ones(1, 4 * 9))
    energy, x0 = Energy(lambda module: traced(module.net[3].weight).sum()), torch.rand(3, 2, 5, 5)
    sampler = LangevinSampler(energy, 2, 0.1)
    for _ in range(2):
        expected = LangevinSampler(energy, 2, 0.1, gradient="autograd")(x0, seed=0)
        assert torch.allclose(sampler(x0, seed=0), expected, rtol=1e-4, atol=1e-5)
        held.mul_(3)


def of_count(module: Any) -> float:
    if module.counts:
        module.count += 1
    return 1.0


def counted_recordings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one with each recording of an energy."""
    attempts: list[None] = []

    def counted(*args: Any) -> Any:
        attempts.append(None)
        return recorded(*args)

    recorded = engine_cache.record
    monkeypatch.setattr(engine_cache, "record", counted)
    return attempts


def counting_energy(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[None]]:
    """Return an energy that counts its calls, and a list as long as the recordings of it."""
    energy: Any = Energy(of_count)
    energy.counts, energy.count = True, 0
    return energy, counted_recordings(monkeypatch)


def test_an_energy_that_cannot_be_recorded_is_seldom_run_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy, attempts = counting_energy(monkeypatch)
    x0, sampler = torch.rand(3, 2, 5, 5), LangevinSampler(energy, 1)
    for _ in range(40):
        sampler(x0, seed=0)
    assert 1 < len(attempts) <= 4
    tried = len(attempts)
    energy.eval()
    sampler(x0, seed=0)
    assert len(attempts) == tried + 1


def test_an_energy_that_could_not_be_recorded_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy, _ = counting_energy(monkeypatch)
    x0, sampler = torch.rand(3, 2, 5, 5), LangevinSampler(energy, 1)
    for _ in range(10):
        sampler(x0, seed=0)
    energy.counts = False
    names = {sampler.choose_engine(x0, {}).name for _ in range(40)}
    assert names == {"autograd", "fused"} or names == {"autograd", "explicit"}


def test_an_engine_that_is_named_is_tried_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    energy, _ = counting_energy(monkeypatch)
    x0, sampler = torch.rand(3, 2, 5, 5), LangevinSampler(energy, 1, gradient="explicit")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="changes"):
            sampler.choose_engine(x0, {})
    energy.counts = False
    assert sampler.choose_engine(x0, {}).name == "explicit"


def test_what_another_thread_changes_meanwhile_stays() -> None:
    """The run itself stores nothing, so nothing is restored: the change comes from elsewhere."""
    started, changed = threading.Event(), threading.Event()
    energy = Energy()
    energy.losses, energy.step = [], 0

    def wait(*_: Any) -> None:
        started.set()
        assert changed.wait(20)

    def change() -> None:
        assert started.wait(20)
        energy.losses.append(1.0)
        energy.step = 7
        energy.net[3].weight = nn.Parameter(torch.ones_like(energy.net[3].weight))
        energy.eval()
        changed.set()

    thread = threading.Thread(target=change)
    thread.start()
    original = torch.nn.functional.leaky_relu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "leaky_relu",
            lambda *args, **kwargs: (wait(), original(*args, **kwargs))[1],
        )
        LangevinSampler(energy, 1)(torch.zeros(2, 2, 5, 5), seed=0)
    thread.join()
    assert (energy.losses, energy.step, energy.training) == ([1.0], 7, False)
    assert bool((energy.net[3].weight == 1).all())
