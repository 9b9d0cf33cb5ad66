from pathlib import Path
from typing import Annotated

from fastlangevin.cli.options import (
    Chains,
    Count,
    FitOptions,
    Int,
    Int2,
    OnCorrupt,
    Run,
    belong,
    given,
    more,
)
from fastlangevin.cli.outputs import Result, count_images
from fastlangevin.cli.progress_bar import started


def restore(
    run: Run, /, *, operator: str = "mask", method: str = "moments", n: Count | None = None,
    answers: Count = 4, measurement_noise: float = 0.0, samples: Int2 | None = None,
    out: Path | None = None, images: str | None = None, on_corrupt: OnCorrupt = None,
    mask: str | None = None, factor: Int | None = None, sigma: float | None = None,
    zeta: float | None = None, chains: Chains = Chains(),
    fit: Annotated[FitOptions | None, more("Fit (--method latent)")] = None,
) -> Result:  # fmt: skip
    """Restore held-out images from linear measurements, several answers for each.

    The measurements are y = A x + noise. The picture has a row per image, with the image, its
    measurement, the mean of all answers, and the answers.

    Args:
        operator: The measurement A: mask, downsample, blur or grey.
        method: Method: moments (the moments of the model's samples, conditioned on y), posterior
            (chains guided by y), clamped (for masks) or latent (fitted starting points).
        n: Number of images, 1 or more (default: 8, or all if there are fewer).
        answers: Answers per image, 1 or more.
        measurement_noise: Standard deviation of the noise that is added to the measurements.
        samples: Number of chains whose moments are estimated, for --method moments (default: 512).
        out: A .png, or a .npz of images, y, mean, and x of shape [n, answers, C, H, W] (default:
            restored.png, or restored-2.png, ... if that exists).
        images: Source of the images: a picture, a folder, a file of arrays or a data set (default:
            those that the run held out).
        mask: The mask: box, half, or a picture or .npy in which 0 marks hidden pixels (default:
            box).
        factor: Factor of downsample (default: 2).
        sigma: Standard deviation of blur, in pixels (default: 1.0).
        zeta: Scale of the posterior's term |y - A x|^2 / zeta^2 (default: |A| sqrt(2 a)).
    """
    from fastlangevin.learn.tasks.measurements import make_operator
    from fastlangevin.learn.tasks.restore import SAMPLES
    from fastlangevin.learn.tasks.run_tasks import restore_run

    options = given(mask=mask, factor=factor, sigma=sigma)
    setting = {"mask": "mask", "downsample": "factor", "blur": "sigma"}.get(operator)
    belong(options.keys() - {setting}, f"another operator than {operator}")
    if method != "latent":
        belong(fit or (), f"--method latent, got {method!r}")
    if method != "moments":
        belong(given(samples=samples), f"--method moments, got {method!r}")
    sampler, out = chains.open(run, out, "restored.png", ".png", ".npz")
    measure = make_operator(operator, sampler.energy.shape, **options)
    work = f"{answers} answers, {method}, for {operator} of {count_images(n or 8)}"
    count = max(answers * (n or 8), (samples or SAMPLES) if method == "moments" else 0)
    with started(work, sampler, count, out) as show:
        result = restore_run(
            run, sampler, measure, n=n, images=images, on_corrupt=on_corrupt, method=method,
            answers=answers, measurement_noise=measurement_noise, seed=chains.seed, report=show,
            **given(zeta=zeta, samples=samples), **fit or {},
        )  # fmt: skip
    return chains.save(result, out)
