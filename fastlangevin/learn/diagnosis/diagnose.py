"""Diagnose a learned energy: its learning, its moments, and its chains.

Short-run chains need not converge. But learning must neither diverge nor stall, samples must have
the moments of the data and, for x_0 to act as a latent variable, x_K must depend on x_0 more than
on the noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import at_step, check_count
from fastlangevin.chain.chain import norms
from fastlangevin.learn.data.datasets import Images
from fastlangevin.learn.diagnosis.correlations import FEWEST, Correlations, correlations, series_of
from fastlangevin.learn.diagnosis.residuals import (
    Residual,
    check_sets,
    layer_residuals,
    parameter_residuals,
    top_layer,
)
from fastlangevin.progress import Report, silent
from fastlangevin.sampler import LangevinSampler


class Reach(NamedTuple):
    """How far chains move: L2 norms over the elements of a chain, averaged over chains."""

    moved: float  # |x_K - x_0|
    path: float  # sum over steps of |x after - x before|
    drift: float  # sum over steps of |a dE/dx|
    noise: float  # b sqrt(K elements), the distance that noise alone would give
    data: float  # |x_data - x_0|, the distance to the data


class LongRun(NamedTuple):
    """Records of chains that run beyond K steps, every K steps. Energies are the model's output."""

    steps: list[int]
    energy: list[float]  # mean over chains
    saturation: list[float]  # fraction of elements at or beyond the clamp, by default (-1, 1)
    grad_norm: list[float]
    data_energy: float
    data_std: float  # standard deviation of the energy over the data
    data_saturation: float
    verdict: str  # "steady", "drifts", "saturates" or "diverges"

    @property
    def shift(self) -> float:
        """Change of the mean energy from step K to the last step, in units of ``data_std``."""
        return (self.energy[-1] - self.energy[0]) / (self.data_std or 1.0)


class Mixing(NamedTuple):
    """Shares of the variance of x_K, summed over elements. They add up to 1."""

    start: float  # share of x_0 = z alone
    noise: float  # share of the noise u alone
    both: float  # share of their interaction, an effect of the noise that depends on the start


class Diagnosis(NamedTuple):
    """All results. Correlations are None if the log is too short."""

    every: Correlations | None  # of d_s and |x_K - x_0|, at every iteration
    measured: Correlations | None  # of d_s and r_s, at the logged iterations
    layers: list[Residual]
    top: Residual | None
    parameters: list[Residual]
    reach: Reach
    long_run: LongRun
    mixing: Mixing


def diagnose(
    sampler: LangevinSampler,
    data: Tensor,
    records: Sequence[Mapping[str, Any]] = (),
    series: Sequence[Mapping[str, Any]] = (),
    *,
    seed: int = 0,
    long: int = 10,
    starts: int = 16,
    lags: int = 15,
    report: Report = silent,
) -> Diagnosis:
    """Diagnose a sampler with as many chains as there are data.

    Args:
        sampler: A sampler on an nn.Module.
        data: [n, ...] with n >= 16, including the noise that learning adds to the data.
        records, series: The log of the run, from ``read_records`` and ``read_series``.
        seed: Seed of the starts and the noise.
        long: Length of the long run, in units of the number of steps K.
        starts: Number of starts, and of noises, for :func:`mixing`.
        lags: Most lags of the correlations.
        report: Called as report("chains", done, total) after every K steps of chains.

    Raises TypeError or ValueError naming the argument, and FloatingPointError if chains are not
    finite after K steps.
    """
    energy = check_sets(sampler.energy, data, data)
    check_count("diagnose", "long", long)
    logs = series_of(series, "reach", sampler), series_of(records, "grad_norm", sampler)
    every, measured = (
        correlations(*log, lags=lags) if len(log[0]) >= FEWEST else None for log in logs
    )
    total = 2 + long + starts

    def report_after(earlier: int) -> Report:
        return lambda _, done, __: report("chains", earlier + done, total)

    x0 = _starts(sampler, data, seed)
    samples = sampler(x0, seed=seed)
    report("chains", 1, total)
    layers = layer_residuals(energy, data, samples)
    moved = reach(sampler, data, seed)
    report("chains", 2, total)
    return Diagnosis(
        every=every, measured=measured, layers=layers, top=top_layer(layers, energy),
        parameters=parameter_residuals(energy, data, samples), reach=moved,
        long_run=long_run(sampler, data, seed, long, report_after(2)),
        mixing=mixing(sampler, data.shape[1:], seed, starts, data.device, report_after(2 + long)),
    )  # fmt: skip


def reach(sampler: LangevinSampler, data: Tensor, seed: int = 0) -> Reach:
    """Return the :class:`Reach` of chains from the sampler's starts, as many as there are data."""
    x0 = _starts(sampler, data, seed)
    chain = sampler.diagnose(x0, seed=seed)
    sizes = [at_step(sampler.step_size, k) for k in range(sampler.steps)]
    noises = [
        torch.as_tensor(at_step(sampler.noise_std, k), dtype=torch.float64, device="cpu")
        for k in range(sampler.steps)
    ]
    drift = torch.stack([a * g for a, g in zip(sizes, chain.grad_norm, strict=True)])
    squared = torch.stack([b.square().mean() for b in noises]).sum()
    return Reach(
        float(norms(chain.x - x0).mean()),
        float(chain.displacement.sum(0).mean()),
        float(drift.sum(0).mean()),
        math.sqrt(float(squared) * data[0].numel()),
        float(norms(data - x0).mean()),
    )


def long_run(
    sampler: LangevinSampler, data: Tensor, seed: int = 0, long: int = 10, report: Report = silent
) -> LongRun:
    """Return the :class:`LongRun` of ``long`` times K steps from the sampler's starts.

    Its verdict is one of:

    diverges     an energy or a state is not finite
    saturates    the saturation grew by more than 0.1 after step K
    drifts       the mean energy changed by more than 2 standard deviations of the data's energies
    steady       none of these
    """
    check_count("diagnose", "long", long)
    lo, hi = sampler.clamp or (-1.0, 1.0)
    x = _starts(sampler, data, seed)
    first = {name: at_step(getattr(sampler, name), 0) for name in ("step_size", "noise_std")}
    of_data = LangevinSampler(sampler.energy, **sampler.settings() | first | {"steps": 1})
    energies = of_data.diagnose(data, seed=seed).energy[0]
    rows: list[list[float]] = []
    for i in range(long):
        chain = sampler.diagnose(x, seed=seed, first_step=i * sampler.steps)
        x = chain.x
        last = (chain.energy[-1], chain.saturation[-1], chain.grad_norm[-1])
        rows.append([float(value.mean()) for value in last])
        report("chains", i + 1, long)
        if not math.isfinite(rows[-1][0]):
            break
    energy, saturation, grad_norm = (list(column) for column in zip(*rows, strict=True))
    record = LongRun(
        steps=[(i + 1) * sampler.steps for i in range(len(rows))], energy=energy,
        saturation=saturation, grad_norm=grad_norm, data_energy=float(energies.mean()),
        data_std=float(energies.std()), verdict="steady",
        data_saturation=float(((data <= lo) | (data >= hi)).float().mean()),
    )  # fmt: skip
    if not (math.isfinite(energy[-1]) and bool(x.isfinite().all())):
        return record._replace(verdict="diverges")
    if saturation[-1] > saturation[0] + 0.1:
        return record._replace(verdict="saturates")
    return record._replace(verdict="drifts") if abs(record.shift) > 2 else record


def mixing(
    sampler: LangevinSampler,
    shape: Sequence[int],
    seed: int = 0,
    starts: int = 16,
    device: torch.device | None = None,
    report: Report = silent,
) -> Mixing:
    """Return the :class:`Mixing` of chains from ``starts`` starts z, each with ``starts`` noises u.

    It is a two-way analysis of variance of x_K(z, u):

        Var = V_z + V_u + V_zu,    V_z = (MS_z - MS_zu) / starts,   V_zu = MS_zu

    The estimates are unbiased except that negative shares are set to 0.
    """
    if check_count("diagnose", "starts", starts) < 2:
        raise ValueError(f"diagnose: starts must be 2 or more, got {starts}")
    z = sampler.starts(starts, shape=shape, seed=seed).to(device)
    ends = []
    for u in range(starts):
        normals = [
            _noise.normal(
                (1, *shape), seed=seed, step=k, stream=_noise.USER, first_chain=u, device=device
            )
            for k in range(sampler.steps)
        ]
        # All chains share this noise; by default each chain has its own.
        noise = torch.stack(normals).expand(-1, starts, *shape)
        ends.append(sampler(z, seed=seed, noise=noise).flatten(1))
        report("chains", u + 1, starts)
    x = torch.stack(ends, 1).double()  # [z, u, elements]
    mean, of_z, of_u = x.mean((0, 1)), x.mean(1), x.mean(0)
    degrees = starts - 1
    ms_z = starts * float((of_z - mean).square().sum()) / degrees
    ms_u = starts * float((of_u - mean).square().sum()) / degrees
    residual = x - of_z[:, None] - of_u + mean
    ms_both = float(residual.square().sum()) / degrees**2
    parts = [max(0.0, (ms - ms_both) / starts) for ms in (ms_z, ms_u)] + [ms_both]
    total = sum(parts) or 1.0
    return Mixing(*(part / total for part in parts))


def noisy_batch(
    data: Images, n: int, data_noise: float, seed: int = 0, device: torch.device | None = None
) -> Tensor:
    """Draw n different images, or all if there are fewer, and add the noise that learning adds.

    Raises ValueError if there are fewer than 16.
    """
    order = torch.argsort(_noise.words((len(data),), seed=seed, step=0, stream=_noise.ORDER))
    images = data.batch(order[:n]).to(device)
    if len(images) < 16:
        raise ValueError(f"diagnose: needs 16 images or more, the data have {len(images)}")
    return images + data_noise * _noise.normal(
        images.shape, seed=seed, step=0, stream=_noise.DATA, device=device
    )


def _starts(sampler: LangevinSampler, data: Tensor, seed: int) -> Tensor:
    """Draw as many of the sampler's starts x_0 as there are data, in their shape."""
    return sampler.starts(len(data), shape=data.shape[1:], seed=seed).to(data.device)
