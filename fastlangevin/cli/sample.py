from pathlib import Path

from fastlangevin.cli.options import FRAMES, Chains, Count, Run, Timeout, belong
from fastlangevin.cli.outputs import Result, count_images
from fastlangevin.cli.progress_bar import progress, start_line, started


def sample(
    run: Run = Path("digits"), /, *, n: Count = 64, out: Path | None = None,
    columns: Count | None = None, per_file: Count | None = None, timeout: Timeout = 600.0,
    chains: Chains = Chains(),
) -> Result:  # fmt: skip
    """Run chains from noise through a trained model and save the images.

    A folder is for many images: several processes that torchrun has started share them, and the
    same command continues after a stop. Its files hold the images that one .npy would.

    Args:
        n: Number of images, 1 or more.
        out: A .png for a grid, a .gif of the chains, a .npy of shape [n, C, H, W], or a name
            without an ending for a folder of .npy files (default: samples.png, or samples-2.png,
            ... if that exists).
        columns: Columns of the grid, 1 or more (default: a square grid).
        per_file: Images per file of a folder, and chains that run at a time, 1 or more (default:
            512).
    """
    if out is not None and not out.suffix:
        return _sample_shards(run, n, out, per_file or 512, timeout, chains)
    belong(() if per_file is None else ("per_file",), "a folder of files, a name without an ending")
    from fastlangevin.distributed import read_launch
    from fastlangevin.learn.images import save_arrays, save_gif, save_grid
    from fastlangevin.progress import report_steps

    if read_launch().world_size > 1:
        got = "" if out is None else f", got {out}"
        raise ValueError(
            f"several processes write a folder: give --out, a name without an ending{got}"
        )
    sampler, out = chains.open(run, out, "samples.png", ".png", ".gif", ".npy")
    with started(count_images(n), sampler, n, out) as show:
        if out.suffix == ".gif":
            states = sampler.trajectory(n=n, seed=chains.seed, every=-(-sampler.steps // FRAMES))
        else:
            x = sampler(n=n, seed=chains.seed, **report_steps(show, sampler.steps))
    if out.suffix == ".gif":
        save_gif(states, out, columns, chains.tile)
    elif out.suffix == ".png":
        save_grid(x, out, columns, chains.tile)
    else:
        save_arrays(out, x)
    return Result(files=[out])


def _sample_shards(
    run: Path, n: int, out: Path, per_file: int, timeout: float, chains: Chains
) -> Result:
    """Draw the images into a folder. The processes that torchrun has started share the work."""
    from fastlangevin.distributed import join
    from fastlangevin.learn.sample_shards import sample_shards

    with join(chains.device, timeout) as group, progress(group.rank == 0, pause=0.0) as show:
        with group.working():
            sampler = chains.load(run)
        if group.rank == 0:
            start_line(count_images(n), sampler, min(n, per_file), out)
        sample_shards(
            sampler, n, out, seed=chains.seed, per_file=per_file, group=group,
            report=lambda there, n: show("image", there, n),
        )  # fmt: skip
        return Result(files=[out] if group.rank == 0 else [])
