"""Whether an engine's gradient is the one that autograd takes of the energy's own code."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.graph.record import Recording, no_hooks

# How far two gradients of a chain may be apart, over their norm. In float32 a unit within rounding
# of a kink may take the other slope, and moves a gradient by some 1 / sqrt(units): 0.3 % in a
# network of 10^5 units, where it happens often. What a proof is to find is as large as a gradient.
_BOUNDS = {torch.float64: 1e-6, torch.float32: 0.05}
_HALF = 0.3


class Verdict(NamedTuple):
    """reason: why the engine is not to be used, or None. shown: whether any chain had a gradient to
    compare; where all are zero or not finite, other states may tell more."""

    reason: str | None
    shown: bool


def prove(found: Recording, engine: Engine, x: Tensor) -> Verdict:
    """Compare an engine's energies and gradients at x with autograd's, chain by chain."""
    with torch.enable_grad(), no_hooks():
        energies = found.out.reshape(-1)
        (grad,) = torch.autograd.grad(energies.sum(), found.start, allow_unused=True)
    energies = energies.detach()
    engine.begin()
    engine_energies, engine_grad = engine(x, True)
    assert engine_energies is not None
    if grad is None:
        return Verdict("autograd finds no gradient", True)
    want, got = (_rows(g) for g in (grad, engine_grad))
    norms = want.norm(dim=1)
    bound = _BOUNDS.get(found.graph.dtype, _HALF)
    away = (got - want).norm(dim=1)
    finite = norms.isfinite() & energies.isfinite()
    # An energy may be a small difference of large terms, whose size the gradient knows.
    sizes = energies.double().abs() + norms * _rows(x).norm(dim=1)
    size = torch.where(finite, sizes, 0.0).max()
    apart = (engine_energies.double() - energies.double()).abs()
    wrong = finite & ~((away <= bound * norms) & (apart <= bound * size))
    if bool(wrong.any()):
        chain = int(wrong.nonzero()[0])
        share = float(away[chain] / norms[chain])
        return Verdict(
            f"its gradient differs from autograd's by {share:.2g} of the norm in chain {chain}",
            True,
        )
    return Verdict(None, bool((finite & (norms > 0)).any()))


def _rows(values: Tensor) -> Tensor:
    return values.detach().reshape(len(values), -1).double()
