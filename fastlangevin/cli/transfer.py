from pathlib import Path

from fastlangevin.cli.options import FRAMES, Chains, Count, OnCorrupt, Run, belong, given
from fastlangevin.cli.outputs import Result, count_images
from fastlangevin.cli.progress_bar import started


def transfer(
    run: Run, /, *, images: str, on_corrupt: OnCorrupt = None, n: Count | None = None,
    out: Path | None = None, content: Count | None = None, zeta: float | None = None,
    style: str | None = None, weight: float | None = None, statistics: str | None = None,
    chains: Chains = Chains(),
) -> Result:  # fmt: skip
    """Start the chains of one domain's model at images of another.

    RUN is the model of the target domain. The picture has a row of source images and a row of the
    ends of their chains.

    Args:
        images: The source images: a picture, a folder, a file of arrays or a data set.
        n: Number of images, 1 or more (default: 8, or all if there are fewer).
        out: A .png, a .gif of the chains, or a .npy of shape [n, C, H, W] (default:
            transferred.png, or transferred-2.png, ... if that exists).
        content: Preserve the means of the source over squares of this side, 1 or more; 1 preserves
            its pixels.
        zeta: Scale of the content term |A x0 - A x|^2 / zeta^2 (default: |A| sqrt(2 a)).
        style: Images whose statistics guide the chains.
        weight: Weight of the style term in the energy (default: 1.0).
        statistics: Statistics of the style: gram or mean-std (default: gram).
    """
    from fastlangevin.learn.tasks.run_tasks import transfer_images

    options = given(zeta=zeta, weight=weight, statistics=statistics)
    if content is None:
        belong(options.keys() & {"zeta"}, "--content")
    if style is None:
        belong(options.keys() & {"weight", "statistics"}, "--style")
    sampler, out = chains.open(run, out, "transferred.png", ".png", ".gif", ".npy")
    frames = FRAMES if out.suffix == ".gif" else 1
    count = n or 8
    with started(f"chains from {count_images(count)} of {images}", sampler, count, out) as show:
        result = transfer_images(
            sampler, images, on_corrupt=on_corrupt, n=n, content=content, style=style,
            frames=frames, seed=chains.seed, report=show, **options,
        )  # fmt: skip
    return chains.save(result, out)
