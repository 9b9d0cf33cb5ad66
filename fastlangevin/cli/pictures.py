"""What commands on images share: the model, the images, and what they write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlangevin.cli.app import unless_given

if TYPE_CHECKING:
    from torch import Tensor

    from fastlangevin.learn.config import TrainConfig
    from fastlangevin.learn.data.load import ImageData
    from fastlangevin.sampler import LangevinSampler

_COLUMNS = 16


def load_model(run: Path, device: str, steps: int | None, averaged: bool) -> Any:
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.checkpoint import load

    changes: dict[str, Any] = {} if steps is None else {"steps": steps}
    return load(run, device=choose_device(device), averaged=averaged, **changes)


def held_out(config: "TrainConfig", sampler: Any, source: str | None) -> "ImageData":
    from fastlangevin.learn.build import load_held_out

    with unless_given("--images", source):
        return load_held_out(config, sampler.energy.shape, source)


def some(data: "ImageData", n: int, sampler: "LangevinSampler", each: int = 1) -> "Tensor":
    """n times ``each`` images spread evenly over the data, on the sampler's device."""
    from fastlangevin.gradients.autograd import device_of

    if n * each > len(data):
        most = f"{len(data) // each}" + (f", of {each} images each" if each > 1 else "")
        raise ValueError(f"--n must be at most {most}, the images of {data.name}, got {n}")
    n *= each
    return data.batch([i * len(data) // n for i in range(n)]).to(device_of(sampler.energy))


def squares(a: "Tensor", b: "Tensor") -> "Tensor":
    """Mean squared difference per element: [..., C, H, W] -> [...]."""
    return (a - b).square().mean((-3, -2, -1))


def save_rows(out: Path, tile: int, *rows: "Tensor") -> None:
    """A picture of bands of rows, in each what belongs together one above the other."""
    import torch

    bands = []
    for parts in zip(*(row.split(_COLUMNS) for row in rows), strict=True):
        width = min(len(rows[0]), _COLUMNS)
        for part in parts:  # the last band's rows are filled up with white
            white = part.new_ones((width - len(part), *part.shape[1:]))
            bands.append(torch.cat([part, white]))
    save_tiles(out, torch.cat(bands), width, tile)


def save_tiles(out: Path, images: "Tensor", columns: int, tile: int) -> None:
    from fastlangevin.learn.images import save_grid

    save_grid(images, out, columns, tile)


def save_array(out: Path, array: "Tensor") -> None:
    import numpy as np

    from fastlangevin.learn.atomic import replacing

    with replacing(out) as temporary, temporary.open("wb") as file:
        np.save(file, array.detach().cpu().numpy())


def save_arrays(out: Path, **arrays: "Tensor") -> None:
    import numpy as np

    from fastlangevin.learn.atomic import replacing

    found = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]
