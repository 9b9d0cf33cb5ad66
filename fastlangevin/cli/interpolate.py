from pathlib import Path
from typing import Annotated

from fastlangevin.cli.options import Chains, Count, OnCorrupt, Run, ShortFitOptions, belong, more
from fastlangevin.cli.outputs import Result, note, table
from fastlangevin.cli.progress_bar import started


def interpolate(
    run: Run, /, *, n: Count | None = None, out: Path | None = None, frames: Count | None = None,
    images: str | None = None, on_corrupt: OnCorrupt = None, noise: str = "off",
    chains: Chains = Chains(),
    fit: Annotated[ShortFitOptions | None, more("Fit (--images)")] = None,
) -> Result:  # fmt: skip
    """Run chains from points between two starting points.

    The points between z1 and z2 are rho z1 + sqrt(1 - rho^2) z2. By default, z1 and z2 are random.
    With --images, they are fitted to a pair of images, as by reconstruct, so that the first and the
    last frame are reconstructions. The kernel distance of features to the run's data says whether
    the frames between are as near to the data as the ends are, and nearer than crossfades.

    Args:
        n: Number of pairs, 1 or more (default: 8, or all that there are).
        out: A .png, a .gif, or a .npy of shape [frames, n, C, H, W] (default: interpolated.png, or
            interpolated-2.png, ... if that exists).
        frames: Frames of each pair, 2 or more, including the ends (default: 9; 25 in a .gif).
        images: Source of images to interpolate between (default: random starting points).
        noise: Noise in the chain: off, or frozen (always the same).
    """
    from fastlangevin.learn.tasks.run_tasks import feature_rows, interpolate_run

    if images is None:
        belong(fit or (), "--images")
    elif noise != "off":
        raise ValueError("--noise belongs to random starts: --images has them fitted without noise")
    sampler, out = chains.open(run, out, "interpolated.png", ".png", ".gif", ".npy")
    frames = frames or (25 if out.suffix == ".gif" else 9)
    with started(f"{frames} frames of {n or 8} pairs", sampler, n or 8, out) as show:
        result = interpolate_run(
            run, sampler, n=n, frames=frames, images=images, on_corrupt=on_corrupt,
            noise=noise, seed=chains.seed, report=show, **fit or {},
        )  # fmt: skip
    result.save(out, chains.tile)  # before the features, which may fail
    return Result(table(*result.rows, *feature_rows(run, result.arrays, note)), [out])
