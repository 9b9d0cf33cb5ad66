"""Presets: each original's equation, written again in plain torch and float64."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.presets.shared import CASES, K, Net, numbers


@pytest.mark.parametrize("case", CASES)
def test_every_preset_matches_the_originals_equation(case: str, net: Net) -> None:
    step, x0, preset = CASES[case]
    z, start = numbers(K, *x0.shape, seed=3), x0.clone()
    x = x0.detach()
    for k in range(K):
        x = step(net, x, z[k], k, K).detach()
    got = preset(net, x0, z)
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert (got - x).abs().max() <= 1e-10
    assert (got - x0).abs().max() > 1e-3  # the chain has moved
    assert torch.equal(x0, start)


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("igebm", "openai", "improved", "uva"))]
)
def test_the_cases_reach_their_clamps(case: str, net: Net) -> None:
    """Else the order of noise, gradient and clamp would not be seen."""
    _, x0, preset = CASES[case]
    got = preset(net, x0, numbers(K, *x0.shape, seed=3))
    lo, hi = (-1, 1) if case == "uva" else (0, 2 if "element" in case else 1)
    assert ((got == lo) | (got == hi)).sum() >= 5


@contextlib.contextmanager
def left_as_found(net: Net) -> Iterator[None]:
    """Flags, modes, BatchNorm's statistics and .grads; half in train mode and half frozen."""
    net.train()
    net.head.eval()
    net.head.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    yield
    assert flags == [p.requires_grad for p in net.parameters()]
    assert modes == [m.training for m in net.modules()]
    for before, after in zip(buffers, net.buffers(), strict=True):
        assert torch.equal(before, after)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:LangevinSampler. in train mode")
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(("nae", "ncsn"))])
def test_presets_change_nothing_outside(case: str, net: Net) -> None:
    _, x0, preset = CASES[case]
    with left_as_found(net):
        preset(net, x0, numbers(2, *x0.shape))


@pytest.mark.parametrize("case", ["jem", "igebm", "uva"])
def test_presets_run_in_eval_mode_as_the_original(case: str, net: Net) -> None:
    """Chains of a net in train mode are those of the net in eval mode, also after an error."""
    _, x0, preset = CASES[case]
    z = numbers(3, *x0.shape)
    want = preset(net, x0, z)
    net.train()
    assert torch.equal(preset(net, x0, z), want)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    net.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        preset(net, x0, z)
    assert all(m.training for m in net.modules())
