"""What a replay could get wrong: memory shared by tensors, and state that changes between calls."""

import dataclasses
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlangevin import LangevinSampler

torch.manual_seed(0)
W = torch.rand(1, 2, 4, 4, dtype=torch.float64) + 0.5
CONV = nn.Conv2d(2, 2, 3, padding=1).double()


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def writes_through_a_view(x: Tensor) -> Tensor:
    z = (x * 1).detach()
    z.view(len(x), -1)[:, :3] *= 0.2
    return flat(conv(x).tanh() * z)


def conv(x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, CONV.weight.to(x.dtype), CONV.bias.to(x.dtype), **{"padding": 1} | options)


def fills_a_view(x: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=x.dtype)
    view = total.view(1)
    view.copy_(x.detach().mean()[None])
    return flat(x**2) * (1.0 if total.item() > 0.55 else 3.0)


def transposed(x: Tensor, **options: Any) -> Tensor:
    weight = CONV.weight.to(x.dtype)
    return flat(F.conv_transpose2d(x, weight, **options).tanh())


ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a write through a view": writes_through_a_view,
    "a parameter made of the state": lambda x: flat(
        (x - nn.Parameter(x.detach().mean(1, keepdim=True))) ** 2
    ),
    "a subclass of the state": lambda x: flat((x - x.detach().as_subclass(Tensor) / 2) ** 2),
    "a sum with a factor": lambda x: flat(torch.add(x, x * W.to(x.dtype), alpha=1.1).tanh()),
    "a sum with a view of the same": lambda x: flat(
        torch.add(h := x * W.to(x.dtype), h[:, :1], alpha=-0.02) ** 2
    ),
    "a difference with its transpose": lambda x: flat(
        ((h := x * W.to(x.dtype)) - h.transpose(-1, -2)) ** 2
    ),
    "a view that is filled before its base is read": fills_a_view,
    "valid padding": lambda x: flat(conv(x, padding="valid").tanh()),
    "a weight computed from the state": lambda x: flat(
        F.conv2d(x, CONV.weight.to(x.dtype) * x.mean().tanh()).tanh()
    ),
    "a bias computed from the state": lambda x: flat(
        F.conv2d(x, CONV.weight.to(x.dtype), x.mean().expand(2)).tanh()
    ),
    "output padding beyond the stride": lambda x: transposed(x, dilation=2, output_padding=1),
}


@pytest.mark.parametrize(
    ("name", "start", "dtype"),
    [
        (name, start, (torch.float32, torch.float64)[(i + j) % 2])
        for i, name in enumerate(ENERGIES)
        for j, start in enumerate(("random", "zeros"))
    ],
)
def test_auto_gives_autograds_chain(name: str, start: str, dtype: torch.dtype) -> None:
    """Also from zeros, where a gradient may be zero and prove nothing."""
    energy = ENERGIES[name]
    x0 = torch.full((3, 2, 4, 4), 0.6, dtype=dtype)
    if start == "random":
        x0 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    elif start == "zeros" and "filled" not in name:
        x0 = torch.zeros_like(x0)
    runs = [LangevinSampler(energy, 4, 0.05, 0.3, gradient=g) for g in ("auto", "autograd")]
    for _ in range(2):
        ends = [run(x0, seed=0) for run in runs]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


class Counted(dict[str, float]):
    T: ClassVar[float] = 1.0


@dataclasses.dataclass
class Config:
    T: float = 1.0


class Trainer:
    T = 1.0


class Callable_:
    def __call__(self, x: Tensor) -> Tensor:
        return flat(x**2)


class Effective(nn.Module):
    """It keeps a weight that each run writes, and reads in Python whether there was one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        factor = 3.0 if self.kept is None else 1.0
        self.kept = self.weight * 2
        return factor * flat(x**2)


def changed_special_method() -> None:
    Callable_.__call__ = lambda self, x: 3 * flat(x**2)  # type: ignore[method-assign]


def scaled(factor: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    return lambda x: factor() * flat(x**2)


def cases() -> dict[str, tuple[Callable[..., Any], Callable[[], Any]]]:
    """Energies, and what changes between two calls."""
    module = types.ModuleType("settings_of_a_project")
    module.T = 1.0  # type: ignore[attr-defined]
    holder = types.SimpleNamespace(cfg=module)
    normal = torch.distributions.Normal(0.0, 1.0)
    trainer, config, counted = Trainer(), Config(), Counted()
    reference, proxied = weakref.ref(trainer), {"T": 1.0}
    proxy = types.MappingProxyType(proxied)
    wide = {i: {"T": 1.0} for i in range(300)}
    local = threading.local()
    local.T = 1.0
    arrays = types.SimpleNamespace(kept=Effective())
    scale = 1.0

    def closure(x: Tensor) -> Tensor:
        return scale * flat(x**2)

    def rebind() -> None:
        nonlocal scale
        scale = 3.0

    def partial(x: Tensor, settings: Any) -> Tensor:
        return settings.T * flat(x**2)

    return {
        "a module as a value": (
            lambda x: holder.cfg.T * flat(x**2), lambda: setattr(module, "T", 3.0)
        ),
        "an object of torch": (
            lambda x: flat(-normal.log_prob(x)),
            lambda: setattr(normal, "scale", torch.tensor(0.5)),
        ),
        "a weak reference": (scaled(lambda: reference().T), lambda: setattr(trainer, "T", 3.0)),
        "a read-only mapping": (scaled(lambda: proxy["T"]), lambda: proxied.update(T=3.0)),
        "a special method": (Callable_(), changed_special_method),
        "a class of a mapping": (
            lambda x: counted.T * flat(x**2), lambda: setattr(Counted, "T", 3.0)
        ),
        "a wide container": (scaled(lambda: wide[299]["T"]), lambda: wide[299].update(T=3.0)),
        "a variable of a thread": (scaled(lambda: local.T), lambda: setattr(local, "T", 3.0)),
        "a kept weight that is removed": (
            arrays.kept, lambda: setattr(arrays.kept, "kept", None)
        ),
        "a variable of a closure": (closure, rebind),
        "an argument of a partial": (
            functools.partial(partial, settings=config), lambda: setattr(config, "T", 3.0)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_a_change_between_two_calls_is_noticed(name: str) -> None:
    energy, change = cases()[name]
    x0 = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    run = LangevinSampler(energy, 2, 0.05, 0.1)
    before = run(x0, seed=0)
    change()
    kept = getattr(energy, "kept", None)
    after = run(x0, seed=0)
    if isinstance(energy, Effective):
        energy.kept = kept
    want = LangevinSampler(energy, 2, 0.05, 0.1, gradient="autograd")(x0, seed=0)
    torch.testing.assert_close(after, want, rtol=0, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_sampler_that_is_deleted_frees_its_energy_at_once() -> None:
    energy = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 1))
    sampler = LangevinSampler(energy, 2)
    sampler(torch.randn(2, 6), seed=0)
    gone = weakref.ref(energy)
    gc.collect()
    gc.disable()
    try:
        del sampler, energy
        assert gone() is None
    finally:
        gc.enable()
