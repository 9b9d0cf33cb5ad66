"""restore: images from linear measurements of them."""

from pathlib import Path
from typing import Annotated, Any

from fastlangevin.cli.inputs import held_out, run_config, some
from fastlangevin.cli.options import Chains, Count, Fit, HeldOut, Int, Run, belong, more
from fastlangevin.cli.outputs import Result, check_out, squares, table


def restore(
    run: Run,
    /,
    *,
    operator: str = "mask",
    method: str = "posterior",
    n: Count = 8,
    answers: Count = 4,
    out: Path = Path("restored.png"),
    images: HeldOut = None,
    mask: str | None = None,
    factor: Int | None = None,
    sigma: float | None = None,
    zeta: float | None = None,
    chains: Chains = Chains(),
    fit: Annotated[Fit | None, more("Fit (--method latent)")] = None,
) -> Result:
    """Restore held-out images from linear measurements, several answers for each.

    The measurements are y = A x. The picture has a row per image: the image, the measurement, the
    answers.

    Args:
        operator: What is lost: mask, downsample, blur or grey.
        method: posterior, clamped (for masks) or latent.
        n: Number of images, 1 or more.
        answers: Answers per image, 1 or more.
        out: A .png, or a .npz of images, y and x of shape [n, answers, C, H, W].
        mask: Mask: box, half, or a picture or .npy in which 0 is hidden (default: box).
        factor: Factor of downsample (default: 2).
        sigma: Standard deviation of blur, in pixels (default: 1.0).
        zeta: Scale of the posterior's term |y - A x|^2 / zeta^2 (default: |A| sqrt(2 a)).
    """
    import torch

    from fastlangevin.learn.images import save_arrays, save_grid
    from fastlangevin.learn.tasks import measurements
    from fastlangevin.learn.tasks import restore as task

    check_out(out, ".png", ".npz")
    given = {"mask": mask, "factor": factor, "sigma": sigma}
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    own = {"mask": "mask", "downsample": "factor", "blur": "sigma"}.get(operator)
    belong(options.keys() - {own}, f"another operator than {operator}")
    if method != "latent":
        belong(fit or (), f"--method latent, got {method!r}")
    sampler, (config, _) = chains.load(run), run_config(run)
    shape = sampler.energy.shape
    measure = measurements.make_operator(operator, shape, **options)
    data = held_out(config, sampler, images)
    truth = some(data, n, sampler)
    y = measure(truth)
    how: dict[str, Any] = {"method": method, "answers": answers, "zeta": zeta, **(fit or {})}
    x, residual = task.restore(sampler, y, measure, seed=chains.seed, **how)
    seen = measurements.picture(measure, y, shape)
    if out.suffix == ".png":
        rows = torch.cat([truth[:, None], seen[:, None], x], 1)
        save_grid(rows.flatten(0, 1), out, 2 + answers, chains.tile)
    else:
        save_arrays(out, images=truth, y=y, x=x)
    error, spread = squares(truth[:, None], x), x.var(1, correction=0).mean()
    text = table(
        ("images", f"{n} of {data.name}"),
        ("answers", f"{error.mean():.5f}   mean squared error per element, in [-1, 1]"),
        ("best", f"{error.amin(1).mean():.5f}   of the {answers} for each image"),
        ("their mean", f"{squares(truth, x.mean(1)).mean():.5f}"),
        ("measurement", f"{squares(truth, seen).mean():.5f}   as the picture shows it"),
        ("residual", f"{residual.mean():.5f}   mean of (y - A x)^2"),
        ("spread", f"{spread:.5f}   mean variance of an element over the answers"),
    )
    return Result(text, [out])
