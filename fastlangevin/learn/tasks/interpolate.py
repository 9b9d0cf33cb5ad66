"""Interpolate: run chains from points between two starts."""

import math
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.coarse import enlarged, start_seed
from fastlangevin.gradients.modules import device_of
from fastlangevin.learn.tasks.reconstruct import NOISES, check_batch, with_noise
from fastlangevin.names import check_name, keywords_checked
from fastlangevin.progress import Report, silent
from fastlangevin.sampler import LangevinSampler


@keywords_checked
def interpolate(
    sampler: LangevinSampler,
    z1: Tensor,
    z2: Tensor,
    frames: int = 9,
    *,
    noise: str = "off",
    first: bool = False,
    seed: int = 0,
    report: Report = silent,
) -> Tensor:
    """Run chains from points between two starts: [frames, n, ...], from M(z1) to M(z2).

    M(z) is the end of the chain from z. The points are

        z_rho = rho z1 + sqrt(1 - rho^2) z2,    rho = cos(t pi / 2),    t = 0 .. 1 in equal steps

    Args:
        z1, z2: Starts [n, ...]. If they are independent draws from p0, every z_rho has the variance
            of p0, 1/3, but not its distribution: its elements reach sqrt(2).
        frames: Number of points, 2 or more, including both ends.
        noise: Noise in the chain, "off" or "frozen". Frozen noise of chain i is the same in all
            frames.
        first: If the sampler's chains start from a model of smaller images (``start``), whether z1
            and z2 are starts of the first of these models. Its chains then run first, and those
            of every further model begin at their enlarged ends.
        seed: Seed of the noise.
        report: Called as report("frame", done, frames) after every frame.

    Raises TypeError or ValueError naming the argument. Source: arXiv 1904.09770.
    """
    op = "interpolate"
    check_count(op, "frames", frames)
    if frames < 2:
        raise ValueError(f"{op}: frames must be at least 2, got {frames}")
    for name, z in (("z1", z1), ("z2", z2)):
        check_batch(op, name, z)
    if z1.shape != z2.shape:
        raise ValueError(f"{op}: z2 must have z1's shape {list(z1.shape)}, got {list(z2.shape)}")
    check_name(f"{op}: noise", noise, NOISES)
    angles = [math.pi / 2 * k / (frames - 1) for k in range(frames)]
    weights = [(1.0, 0.0), *((math.cos(a), math.sin(a)) for a in angles[1:-1]), (0.0, 1.0)]
    ends = []
    for a, b in weights:
        ends.append(_run_chains(sampler, a * z1 + b * z2, noise, first, seed))
        report("frame", len(ends), frames)
    return torch.stack(ends)


def _run_chains(sampler: LangevinSampler, z: Tensor, noise: str, first: bool, seed: int) -> Tensor:
    """Run the sampler's chains from z, or those of all its models from a start of the first."""
    if first and sampler.start is not None:
        small = _run_chains(sampler.start, z, noise, first, start_seed(seed))
        energy: Any = sampler.energy
        z = enlarged(small, energy.shape).to(device_of(energy) or small.device)
    return with_noise("interpolate", sampler, noise)(z, seed=seed)
