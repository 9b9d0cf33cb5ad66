from fastlangevin.cli.options import Count, Device, Int, OnCorrupt, Run
from fastlangevin.cli.outputs import Result, table
from fastlangevin.cli.progress_bar import started


def check(
    run: Run, /, *, n: Count = 256, seed: Int = 1, sure: float = 0.5, data: str | None = None,
    on_corrupt: OnCorrupt = None, device: Device = "auto",
) -> Result:  # fmt: skip
    """Check, with a classifier of the real images, whether samples are recognisable.

    The samples pass, with exit status 0, if the classifier is more than 90 % sure of enough of them
    and finds every class among them. Otherwise the exit status is 1.

    Args:
        n: Number of samples, 1 or more.
        seed: Seed of the samples.
        sure: Fraction of samples that the classifier must be sure of.
        data: Source of the images (default: the run's).
    """
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.evaluation.classifier import ClassifierCheck
    from fastlangevin.learn.model import load
    from fastlangevin.learn.run_data import load_training
    from fastlangevin.progress import report_steps

    sampler = load(run, device=choose_device(device))
    _, images = load_training(run, data, on_corrupt=on_corrupt)
    with started(f"{n} samples and a classifier of {images.name}", sampler, n) as show:
        judge = ClassifierCheck(images)
        samples = judge(sampler(n=n, seed=seed, **report_steps(show, sampler.steps)))
    noise = judge.of_noise(n)
    judged = {"real images": judge.of_data(), "samples": samples, "uniform noise": noise}
    passed = samples.sure >= sure and min(samples.classes) > 0
    lines = [(name, f"sure of {c.sure:4.0%}   per class {c.classes}") for name, c in judged.items()]
    return Result(f"{table(*lines)}\n{'pass' if passed else 'fail'}", status=0 if passed else 1)
