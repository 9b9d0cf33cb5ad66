"""The figure and the table of docs/theory.md: the paper's identities on laws known exactly.

    python -m benchmarks.theory [--plots docs/]

prints the table, and draws theory.svg (needs matplotlib). It times nothing and takes a minute on
one core.
"""

import argparse
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks.tables import pyplot, save_plot, table
from benchmarks.theory_laws import (
    Grid,
    entropy,
    fit_moments,
    gibbs,
    kl,
    short_run,
    solve,
    stationary,
    transition,
)

STEP = {"step_size": 0.02, "noise_std": 0.2}  # T = 1
LINE, PLANE = Grid(-4, 4, 320), Grid(-3, 3, 36, dim=2)
LENGTHS = 5, 10, 20, 40, 80
SHOWN = 20


class Polynomial(nn.Module):
    """f = <theta, h(x)>, where h are all monomials of degree 1 to 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        powers = [p for p in itertools.product(range(5), repeat=dim) if 1 <= sum(p) <= 4]
        self.powers = torch.tensor(powers)
        self.theta = nn.Parameter(torch.zeros(len(powers), dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        return x[:, None].pow(self.powers).prod(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x.double()) @ self.theta


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory")
    parser.add_argument("--plots", type=Path, help="folder to write the figure to")
    options = parser.parse_args(arguments)
    data = mixture(LINE, [(0.65, (1.0,), 0.4), (0.35, (-1.2,), 0.3)])
    laws = learned(LINE, data)
    print(table(HEADER, [row(steps, LINE, data, *law) for steps, law in laws.items()]))
    if options.plots:
        plot(data, laws, options.plots / "theory.svg")


def mixture(grid: Grid, modes: Sequence[tuple[float, Sequence[float], float]]) -> Tensor:
    """Masses of Gaussians (weight, mean, standard deviation)."""
    density = torch.zeros(len(grid.points), dtype=torch.float64)
    for weight, mean, std in modes:
        squared = (grid.points - torch.tensor(mean)).square().sum(1)
        density += weight * (-squared / (2 * std * std)).exp() / std**grid.dim
    return density / density.sum()


def learned(
    grid: Grid, data: Tensor, lengths: Sequence[int] = LENGTHS
) -> dict[int, tuple[Any, Tensor, Tensor, Tensor]]:
    """For each K: the sampler at the learner's fixed point, q, p_theta and p_MLE."""
    energy, laws = Polynomial(grid.dim), {}
    h = energy.features(grid.points)
    mle, _ = fit_moments(h, data @ h, grid)
    for steps in lengths:
        energy = copy.deepcopy(energy)  # the next K starts from this one's parameters
        sampler = fl.LangevinSampler(energy, steps, maximize=True, **STEP)
        q = solve(sampler, grid, grid.points, data)
        laws[steps] = sampler, q, gibbs(sampler, grid), mle
    return laws


HEADER = (
    "K", "moments off by", "KL(q, p_theta)", "KL(q, p_MLE) + KL(p_MLE, p_theta)", "KL(q, p_MLE)",
    "H(p_MLE) - H(q)",
)  # fmt: skip


def row(
    steps: int, grid: Grid, data: Tensor, sampler: Any, q: Tensor, p: Tensor, mle: Tensor
) -> list[str]:
    h = sampler.energy.features(grid.points)
    off = float((q @ h - data @ h).abs().max())
    values = kl(q, p), kl(q, mle) + kl(mle, p), kl(q, mle), entropy(mle, grid) - entropy(q, grid)
    return [str(steps), f"{off:.0e}", *(f"{value:.6f}" for value in values)]


def rough(x: Tensor) -> Tensor:
    """A double well with bumps."""
    return (x.square() - 1).square().sum(1) - 0.3 * x.sum(1) + 0.2 * torch.sin(3 * x).sum(1)


def plot(data: Tensor, laws: dict[int, tuple[Any, Tensor, Tensor, Tensor]], path: Path) -> None:
    figure = pyplot().figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    _laws(axes[0, 0], data, *laws[SHOWN])
    _divergences(axes[0, 1], laws)
    _kernels(axes[0, 2])
    _planes(axes[1])
    save_plot(figure, path)


def _laws(axes: Any, data: Tensor, sampler: Any, q: Tensor, p: Tensor, mle: Tensor) -> None:
    x, h = LINE.points[:, 0], LINE.spacing
    axes.fill_between(x, data / h, color="0.85", label="data")
    axes.plot(x, LINE.uniform() / h, color="0.6", lw=1, label="p_0")
    axes.plot(x, p / h, "C1", label="p_theta, discarded")
    axes.plot(x, mle / h, "C2--", label="p_MLE")
    axes.plot(x, q / h, "C0", label=f"q = p_0 after {SHOWN} steps")
    x0 = 2 * fl.noise.uniform((100_000, 1), seed=0, step=0) - 1
    chains = sampler(x0, seed=0)[:, 0]
    counts = torch.histc(chains, 80, LINE.lo, LINE.hi) / len(chains) / 0.1
    axes.plot(torch.arange(-3.95, 4, 0.1)[:80], counts, "C0.", ms=4, label="100,000 sampled chains")
    axes.set(title="A. the learner's fixed point", xlabel="x", ylabel="density", xlim=(-3, 3))
    axes.legend(fontsize="small")


def _divergences(axes: Any, laws: dict[int, tuple[Any, Tensor, Tensor, Tensor]]) -> None:
    lengths = list(laws)
    q_p = [kl(q, p) for _, q, p, _ in laws.values()]
    q_mle = [kl(q, mle) for _, q, _, mle in laws.values()]
    mle_p = [kl(mle, p) for _, _, p, mle in laws.values()]
    gain = [entropy(mle, LINE) - entropy(q, LINE) for _, q, _, mle in laws.values()]
    axes.loglog(lengths, q_p, "C1o", ms=9, mfc="none", label="KL(q | p_theta)")
    sums = [a + b for a, b in zip(q_mle, mle_p, strict=True)]
    axes.loglog(lengths, sums, "C3.-", label="KL(q | p_MLE) + KL(p_MLE | p_theta)")
    axes.loglog(lengths, gain, "C0o", ms=9, mfc="none", label="H(p_MLE) - H(q)")
    axes.loglog(lengths, q_mle, "C2.-", label="KL(q | p_MLE)")
    axes.set(title="B. generalised moment matching", xlabel="K", ylabel="nats")
    axes.set_xticks(lengths, [str(k) for k in lengths])
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="center right")


def _kernels(axes: Any) -> None:
    grid, steps, a = Grid(-3, 3, 150), 200, 0.06
    sampler = fl.LangevinSampler(rough, steps, step_size=a, noise_std=(2 * a) ** 0.5)
    p = gibbs(sampler, grid)
    for metropolis, name, colour in ((True, "adjusted", "C0"), (False, "unadjusted", "C1")):
        for start, start_name, line_style in ((grid.uniform(), "p_0", "-"), (p, "p_theta", "--")):
            divergences = [
                max(kl(law, p), 1e-16) for law in short_run(sampler, grid, start, metropolis)
            ]
            axes.semilogy(divergences, colour + line_style, label=f"{name}, from {start_name}")
    floor = kl(stationary(transition(sampler, grid)), p)
    axes.axhline(floor, color="0.5", lw=0.8, label="unadjusted, stationary")
    axes.set(title="C. KL(p_K | p_theta)", xlabel="K", ylim=(1e-6, 1))
    axes.legend(fontsize="small")


def _planes(axes: Any) -> None:
    data = mixture(
        PLANE, [(0.4, (1.0, 0.3), 0.4), (0.3, (-0.8, 0.9), 0.3), (0.3, (-0.3, -1.0), 0.4)]
    )
    ((steps, (_, q, p, mle)),) = learned(PLANE, data, [10]).items()
    shown = (
        (data, "D. data on a plane"),
        (q, f"q, K = {steps}: KL(q | p_MLE) = {kl(q, mle):.4f}"),
        (p, f"p_theta: KL(p_MLE | p_theta) = {kl(mle, p):.3f}"),
    )
    top = float(torch.stack([law for law, _ in shown]).max())
    for plane, (law, title) in zip(axes, shown, strict=True):
        plane.imshow(
            law.view(PLANE.n, -1).T, origin="lower", extent=(-3, 3, -3, 3), vmin=0, vmax=top
        )
        plane.set_title(title)


if __name__ == "__main__":
    main()
