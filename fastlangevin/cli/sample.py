from pathlib import Path

from fastlangevin.cli.options import FRAMES, Chains, Count, Run
from fastlangevin.cli.outputs import Result


def sample(
    run: Run = Path("digits"), /, *, n: Count = 64, out: Path | None = None,
    columns: Count | None = None, chains: Chains = Chains(),
) -> Result:  # fmt: skip
    """Run chains from noise through a trained model and save the images.

    Args:
        n: Number of images, 1 or more.
        out: A .png for a grid, a .gif of the chains, or a .npy of shape [n, C, H, W] (default:
            samples.png, or samples-2.png, ... if that exists).
        columns: Columns of the grid, 1 or more (default: a square grid).
    """
    from fastlangevin.learn.images import save_arrays, save_gif, save_grid

    out = chains.choose_out(out, "samples.png", ".png", ".gif", ".npy")
    sampler = chains.load(run)
    if out.suffix == ".gif":
        states = sampler.trajectory(n=n, seed=chains.seed, every=-(-sampler.steps // FRAMES))
        save_gif(states, out, columns, chains.tile)
    elif out.suffix == ".png":
        save_grid(sampler(n=n, seed=chains.seed), out, columns, chains.tile)
    else:
        save_arrays(out, sampler(n=n, seed=chains.seed))
    return Result(files=[out])
