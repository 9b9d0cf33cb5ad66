"""Compares an engine's gradient with the one that autograd computes from the energy's own code."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.graph.record import RunResults

# The largest distance between two gradients of a chain, relative to the norm. In float32, a unit
# within rounding of a kink may take the other slope, which moves a gradient by about
# 1 / sqrt(units): 0.3 % in a network of 10^5 units, where this is common. The errors that a proof
# must find are as large as the gradient.
_BOUNDS = {torch.float64: 1e-6, torch.float32: 0.05}
# The bound for the median chain: few chains meet a kink.
_MEDIAN_BOUND = 0.005
_HALF_BOUND = 0.3
# Converted to float64 at a time, so that a proof needs no more memory than a step.
_ELEMENTS = 512


class Verdict(NamedTuple):
    """Why an engine is not to be used (``reason``), and whether the comparison means anything.

    ``shown`` is False if every gradient is zero or not finite: other states may show more.
    """

    reason: str | None
    shown: bool


def prove_kernels(run: RunResults, engine: Engine, x: Tensor) -> Verdict:
    """Compare kernels of any precision, which a compiler makes on the spot, with autograd's."""
    try:
        return prove(run, engine, x, _HALF_BOUND)
    except Exception as error:
        return Verdict(f"its kernels raise {type(error).__name__}: {error}", True)


def prove(run: RunResults, engine: Engine, x: Tensor, bound: float | None = None) -> Verdict:
    """Compare an engine's energies and gradients at x with autograd's, chain by chain.

    ``bound`` is for an engine whose precision is lower than that of the energy's run.
    """
    energies, grad = run.energies.reshape(-1), run.grad
    if grad is None:
        return Verdict("autograd finds no gradient", True)
    engine.begin()
    engine_energies, engine_grad = engine(x, True)
    assert engine_energies is not None
    distances = _norms(engine_grad, grad)
    del engine_grad
    # Without energies an engine may run other operators.
    distances = torch.maximum(distances, _norms(engine(x, False)[1], grad))
    norms = _norms(grad)
    is_strict = run.x.dtype == torch.float32 and bound is None
    bound = bound or _BOUNDS.get(run.x.dtype, _HALF_BOUND)
    finite = norms.isfinite() & energies.isfinite()
    # An energy may be a small difference of large terms, and the gradient shows how large.
    sizes = energies.double().abs() + norms * _norms(x)
    size = torch.where(finite, sizes, 0.0).max()
    energy_errors = (engine_energies.double() - energies.double()).abs()
    wrong = finite & ~((distances <= bound * norms) & (energy_errors <= bound * size))
    if bool(wrong.any()):
        chain = int(wrong.nonzero()[0])
        share = float(distances[chain] / norms[chain])
        return Verdict(
            f"its gradient differs from autograd's by {share:.2g} of the norm in chain {chain}",
            True,
        )
    counted = finite & (norms > 0)
    if not bool(counted.any()):
        return Verdict(None, False)
    share = float((distances[counted] / norms[counted]).median())
    if share > _MEDIAN_BOUND and is_strict:
        return Verdict(f"its gradients differ from autograd's by {share:.2g} of the norm", True)
    return Verdict(None, True)


def other_states(x: Tensor) -> Tensor:
    """Return states near x, at which a gradient that is zero at x is not."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.detach() + (noise - 0.5).to(device=x.device, dtype=x.dtype)


def _norms(values: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the norm in float64 of each chain's values, minus others, a few chains at a time."""
    chains = max(1, _ELEMENTS // max(1, values[0].numel()))
    norms = []
    for first in range(0, len(values), chains):
        part = slice(first, first + chains)
        rows = _rows(values[part])
        norms.append((rows if others is None else rows - _rows(others[part])).norm(dim=1))
    return torch.cat(norms)


def _rows(values: Tensor) -> Tensor:
    return values.detach().reshape(len(values), -1).double()
