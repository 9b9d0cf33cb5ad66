"""What commands read: a run's settings and model, and the images that it learned from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fastlangevin.learn.config import TrainConfig
    from fastlangevin.learn.data.load import ImageData
    from fastlangevin.sampler import LangevinSampler


@contextlib.contextmanager
def unless_given(option: str, value: str | None) -> Iterator[None]:
    """If a run's own data cannot be read, the error names the option that replaces them."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if value is not None:
            raise
        raise ValueError(f"{error}; {option} names others") from error


def run_config(run: Path, data: str | None = None) -> tuple["TrainConfig", dict[str, Any]]:
    """The settings of a run, with ``data`` in place of its own, and the header of its checkpoint.

    Raises ValueError for a checkpoint that names no data, FileError for one that is damaged or of
    another version.
    """
    from fastlangevin.learn.checkpoint import iteration_of, read_checkpoint
    from fastlangevin.learn.config import resolve_saved

    info = read_checkpoint(run)[1]
    if info.get("config") is None:
        raise ValueError(f"{run} was not made by `fastlangevin train`: it names no data")
    config = resolve_saved(info, run, {} if data is None else {"data": data})
    iteration_of(info, run)
    return config, info


def training(run: Path, data: str | None) -> "tuple[TrainConfig, ImageData]":
    """The settings of a run and its training images, or those of ``data``."""
    from fastlangevin.learn.build import load_data

    config, _ = run_config(run, data)
    with unless_given("--data", data):
        return config, load_data(config)


def held_out(config: "TrainConfig", sampler: Any, source: str | None) -> "ImageData":
    """The images of ``source``, or those that the run held out."""
    from fastlangevin.learn.build import load_held_out

    with unless_given("--images", source):
        return load_held_out(config, sampler.energy.shape, source)


def some(data: "ImageData", n: int, sampler: "LangevinSampler", each: int = 1) -> "Tensor":
    """n times ``each`` images spread evenly over the data, on the sampler's device."""
    from fastlangevin.gradients.network import device_of

    if n * each > len(data):
        most = f"{len(data) // each}" + (f", of {each} images each" if each > 1 else "")
        raise ValueError(f"--n must be at most {most}, the images of {data.name}, got {n}")
    n *= each
    return data.batch([i * len(data) // n for i in range(n)]).to(device_of(sampler.energy))
