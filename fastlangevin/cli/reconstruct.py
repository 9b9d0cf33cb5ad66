from pathlib import Path
from typing import Annotated

from fastlangevin.cli.options import Chains, Count, FitOptions, OnCorrupt, Run, more
from fastlangevin.cli.outputs import Result, count_images
from fastlangevin.cli.progress_bar import started


def reconstruct(
    run: Run, /, *, n: Count | None = None, out: Path | None = None, images: str | None = None,
    on_corrupt: OnCorrupt = None, samples: Count = 64, chains: Chains = Chains(),
    fit: Annotated[FitOptions | None, more("Fit")] = None,
) -> Result:  # fmt: skip
    """Fit starting points whose chains end at held-out images.

    The picture has a row of images, a row of reconstructions, and a row of the nearest random
    samples.

    Args:
        n: Number of images, 1 or more (default: 16, or all if there are fewer).
        out: A .png, or a .npz of images, x, z and error (default: reconstructed.png, or
            reconstructed-2.png, ... if that exists).
        images: Source of the images: a picture, a folder, a file of arrays or a data set (default:
            those that the run held out).
        samples: Number of random samples, 1 or more; the nearest one is shown for comparison.
    """
    from fastlangevin.learn.tasks.run_tasks import reconstruct_run

    sampler, out = chains.open(run, out, "reconstructed.png", ".png", ".npz")
    count = n or 16
    with started(f"starting points for {count_images(count)}", sampler, count, out) as show:
        result = reconstruct_run(
            run, sampler, n=n, images=images, on_corrupt=on_corrupt, samples=samples,
            seed=chains.seed, report=show, **fit or {},
        )  # fmt: skip
    return chains.save(result, out)
