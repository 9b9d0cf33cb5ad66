"""reconstruct: starting points whose chains end at given images."""

from pathlib import Path
from typing import Annotated

from fastlangevin.cli.inputs import held_out, run_config, some
from fastlangevin.cli.options import Chains, Count, Fit, HeldOut, Run, more
from fastlangevin.cli.outputs import Result, check_out, squares, table


def reconstruct(
    run: Run,
    /,
    *,
    n: Count = 16,
    out: Path = Path("reconstructed.png"),
    images: HeldOut = None,
    samples: Count = 64,
    chains: Chains = Chains(),
    fit: Annotated[Fit | None, more("Fit")] = None,
) -> Result:
    """Fit starting points whose chains end at held-out images.

    The picture has rows of images, of reconstructions, and of the nearest random samples.

    Args:
        n: Number of images, 1 or more.
        out: A .png, or a .npz of images, x, z and error.
        samples: Number of random samples, 1 or more; the nearest one is the yardstick.
    """
    from fastlangevin.learn.images import save_arrays, save_rows
    from fastlangevin.learn.tasks import reconstruct as task

    check_out(out, ".png", ".npz")
    sampler, (config, _) = chains.load(run), run_config(run)
    data = held_out(config, sampler, images)
    truth = some(data, n, sampler)
    fitted = task.reconstruct(sampler, truth, seed=chains.seed, **fit or {}).best()
    drawn = sampler(n=samples, seed=chains.seed)
    error_of_drawn, nearest = squares(truth[:, None], drawn[None]).min(1)
    if out.suffix == ".png":
        save_rows(out, chains.tile, truth, fitted.x, drawn[nearest])
    else:
        save_arrays(out, images=truth, x=fitted.x, z=fitted.z, error=fitted.error)
    ours, theirs = float(fitted.error.mean()), float(error_of_drawn.mean())
    text = table(
        ("images", f"{n} of {data.name}"),
        ("reconstruction", f"{ours:.5f}   mean squared error per element, in [-1, 1]"),
        (f"best of {samples}", f"{theirs:.5f}   the same of the nearest random sample"),
        ("ratio", f"{ours / theirs:.3f}"),
    )
    return Result(text, [out])
