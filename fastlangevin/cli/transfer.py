"""transfer: chains of one domain's model that start at images of another."""

from pathlib import Path
from typing import Any

from fastlangevin.cli.inputs import some
from fastlangevin.cli.options import Chains, Count, Run, belong
from fastlangevin.cli.outputs import Result, check_out, note, squares, table

_FAR = 3.0  # times the bounds of images: chains that end beyond it have left them
_FRAMES = 50  # at most so many in a GIF, beside the start


def transfer(
    run: Run,
    /,
    *,
    images: str,
    n: Count = 8,
    out: Path = Path("transferred.png"),
    content: Count | None = None,
    zeta: float | None = None,
    style: str | None = None,
    weight: float | None = None,
    statistics: str | None = None,
    chains: Chains = Chains(),
) -> Result:
    """Start the chains of one domain's model at images of another.

    RUN is the model of the target domain. The picture has rows of source images and of the images
    that their chains ended at.

    Args:
        images: The source images.
        n: Number of images, 1 or more.
        out: A .png, a .gif of the chains, or a .npy of shape [n, C, H, W].
        content: Hold the source's means over squares of this side, 1 or more; 1 holds its pixels.
        zeta: Scale of the content's term |A x0 - A x|^2 / zeta^2 (default: |A| sqrt(2 a)).
        style: Images whose statistics guide the chains.
        weight: Weight of the style's term in the energy (default: 1.0).
        statistics: Statistics of the style: gram or mean-std (default: gram).
    """
    import torch

    from fastlangevin.learn.data.load import load_images
    from fastlangevin.learn.images import save_arrays, save_gif, save_rows
    from fastlangevin.learn.tasks.measurements import Downsample, identity
    from fastlangevin.learn.tasks.transfer import guide

    check_out(out, ".png", ".gif", ".npy")
    options = {"zeta": zeta, "weight": weight, "statistics": statistics}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if content is None:
        belong(given.keys() & {"zeta"}, "--content")
    if style is None:
        belong(given.keys() & {"weight", "statistics"}, "--style")
    sampler = chains.load(run)
    channels, size, _ = sampler.energy.shape
    sources = load_images(images, size=size, channels=channels)
    x0 = some(sources, n, sampler)
    pattern = None
    if style is not None:
        patterns = load_images(style, size=size, channels=channels)
        pattern = some(patterns, len(patterns), sampler)
    held = None if content is None else identity if content == 1 else Downsample(content)
    guided = guide(sampler, x0, content=held, style=pattern, **given)
    if out.suffix == ".gif":
        states = guided.trajectory(x0, seed=chains.seed, every=-(-guided.steps // _FRAMES))
        save_gif(states, out, None, chains.tile)
        x = states[-1]
    else:
        x = guided(x0, seed=chains.seed)
    if out.suffix == ".png":
        save_rows(out, chains.tile, x0, x)
    elif out.suffix == ".npy":
        save_arrays(out, x)
    with torch.no_grad():
        before, after = (sampler.energy(at).mean().item() for at in (x0, x))
    if (reached := float(x.abs().max())) > _FAR:
        note(f"warning: chains ended at up to {reached:.3g}, but images lie in [-1, 1]")
    text = table(
        ("images", f"{n} of {sources.name}"),
        ("energy", f"{before:+.4f} at the source, {after:+.4f} after {sampler.steps} steps"),
        ("change", f"{squares(x0, x).mean():.5f}   mean square per element, in [-1, 1]"),
    )
    return Result(text, [out])
