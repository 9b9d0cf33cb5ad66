from pathlib import Path

from fastlangevin.cli.options import Count, Device, Int, Int2, Int16, OnCorrupt, Run
from fastlangevin.cli.outputs import Result, announce_replacing, check_folder
from fastlangevin.cli.progress_bar import started


def diagnose(
    run: Run, /, *, n: Int16 = 256, long: Count = 10, starts: Int2 = 16, lags: Count = 15,
    seed: Int = 1, out: Path | None = None, data: str | None = None, on_corrupt: OnCorrupt = None,
    device: Device = "auto", averaged: bool = False,
) -> Result:  # fmt: skip
    """Show how learning went, whether moments match, and what the chains do.

    Moments of the data and of samples are compared after each layer of the energy. The command
    prints a table and writes diagnose.json and, if matplotlib is installed, diagnose.png. A model
    without a run has no log and no folder, so its files are written only if --out is given.

    Args:
        n: Number of images, and of chains, to compare, 16 or more.
        long: Length of the long run, in units of the run's number of steps, 1 or more.
        starts: Number of starting points, and of noises, for the mixing, 2 or more.
        lags: Number of lags of the correlations, 1 or more.
        seed: Seed of the data, the chains and the noise.
        out: Folder for the files (default: the run's; none for a model without a run).
        data: Source of the images (default: the run's).
        averaged: Diagnose the moving average of the weights instead of the weights.
    """
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.diagnosis.diagnose_run import diagnose_run
    from fastlangevin.learn.model import load
    from fastlangevin.learn.run_data import load_training

    if out is not None or run.is_dir():
        check_folder(out or run)
    config, images = load_training(run, data, packaged=True, on_corrupt=on_corrupt)
    sampler = load(run, device=choose_device(device), averaged=averaged)
    with started(f"{n} chains against {images.name}", sampler, n, out) as show:
        diagnosed = diagnose_run(
            run, config, images, n=n, seed=seed, device=device, averaged=averaged, long=long,
            starts=starts, lags=lags, report=show,
        )  # fmt: skip
    folder = out or diagnosed.folder
    if folder is None:
        return Result(diagnosed.text())
    announce_replacing(folder / "diagnose.json")
    return Result(diagnosed.text(), diagnosed.save(folder))
