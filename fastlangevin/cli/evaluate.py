from pathlib import Path

from fastlangevin.cli.options import Count, Device, Flag, Int, Int8, OnCorrupt, Run, Timeout
from fastlangevin.cli.outputs import Result, announce_replacing, check_folder, choose_out, note
from fastlangevin.cli.progress_bar import progress


def evaluate(
    run: Run, /, *, n: Int8 | None = None, samples: str | None = None, features: str = "auto",
    reference: Int8 = 2048, noise: list[float] | None = None, quantise: bool = True, k: Count = 3,
    seed: Int = 1, out: Path | None = None, data: str | None = None, images: str | None = None,
    on_corrupt: OnCorrupt = None, device: Device = "auto", averaged: bool = True,
    timeout: Timeout = 600.0, overwrite: Flag = False,
) -> Result:  # fmt: skip
    """Compare samples with held-out data, noisy data and uniform noise.

    The table shows the Frechet and kernel distances, precision and recall, the inception score, and
    the distance to the nearest training image. Every figure depends on the features, so the table
    names them. The Frechet distance is FID only with the features of Inception. Images are clamped
    to [-1, 1], and the table shows what fraction of each set's elements was outside. Several
    processes that torchrun has started share the work.

    Args:
        n: Number of images per set, 8 or more (default: all that are held out, at most 2048).
        samples: Folder of pictures or of samples, .npy or .npz to read the samples from (default:
            the run's model draws them).
        features: Features to compare: auto, pixels, classifier, efficientnet-lite0, inception or
            module:attribute.
        reference: Number of training images to compare with, 8 or more.
        noise: Standard deviation of the noise on the noisy data; repeatable (default: 0.3).
        quantise: Round all images to 256 levels, as in picture files.
        k: Neighbours counted for precision and recall, 1 or more.
        seed: Seed of the samples, the noise and the choice of the data.
        out: JSON file for the figures (default: evaluate.json in the run's folder; none for a model
            without a run or with --samples).
        data: Source of the training images (default: the run's).
        images: Source of the held-out images (default: those that the run held out).
        averaged: Use the moving average of the weights, if there is one.
        overwrite: Replace the file of --out if it exists.
    """
    from fastlangevin.distributed import join
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.evaluation.evaluate_run import evaluate_run
    from fastlangevin.learn.run_data import load_training

    if out is not None:
        choose_out(out, "", overwrite)
    elif run.is_dir():
        check_folder(run)
    if samples is not None and not averaged:
        raise ValueError("--no-averaged belongs to samples that the model draws, not --samples")
    with join(device, timeout) as group, progress(group.rank == 0) as show:
        with group.working():
            config, training = load_training(run, data, on_corrupt=on_corrupt)
        if group.rank == 0:
            device = str(choose_device(device))
            note(f"{samples or run} against {training.name}: features {features}, {device}")
        evaluated = evaluate_run(
            run, config, training, n=n, samples=samples, images=images, features=features,
            reference=reference, noise=noise or (0.3,), quantise=quantise, k=k, seed=seed,
            device=device, averaged=averaged, group=group, report=show,
        )  # fmt: skip
        if group.rank > 0:
            return Result()
        if out is None and evaluated.folder is not None:
            out = evaluated.folder / "evaluate.json"
            announce_replacing(out)
        if out is None:
            return Result(evaluated.text())
        evaluated.save(out)
        return Result(evaluated.text(), [out])
