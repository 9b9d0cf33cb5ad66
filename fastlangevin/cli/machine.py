"""bench, presets, doctor, version: what is installed and how fast it is here."""

import sys
from typing import Annotated, Any

import typer

from fastlangevin import _version
from fastlangevin.cli.app import app, errors


@app.command()
def bench(
    target: Annotated[
        str, typer.Argument(help="A preset, or an energy of your own as module:attribute.")
    ] = "digits",
    shape: Annotated[
        str | None,
        typer.Option(help="Of one chain's state, as 3,32,32.", show_default="the energy's shape"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Chains.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of the chains that are timed.")] = 4,
    seconds: Annotated[float, typer.Option(min=0, help="To spend, about.")] = 10.0,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Time this one too: bf16, fp16, tf32, fp32.", show_default="none"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Time a step of an energy's chain: the plain loop, and every score that serves.

    An attribute may be a module, or a function or class that makes one.
    """
    import torch

    from fastlangevin import bench as benchmark
    from fastlangevin.learn.build import choose_device
    from fastlangevin.sampler import LangevinSampler

    with errors():
        energy = _energy(target).to(choose_device(device))
        sizes = getattr(energy, "shape", None) if shape is None else _sizes(shape)
        if sizes is None:
            raise ValueError(f"{target} has no attribute shape: give --shape, as in 3,32,32")
        place = choose_device(device)
        x = 2 * torch.rand((batch, *sizes), dtype=torch.float32, device=place) - 1
        typer.echo(LangevinSampler(energy, steps=steps).explain(x) + "\n")
        rows = benchmark.bench(energy, x, (None, *(precision or ())), steps, seconds)
        typer.echo(benchmark.table(rows))


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one, every number.")] = None,
) -> None:
    """List the presets, or print one as a YAML file to start your own from."""
    from fastlangevin.learn.config import preset_names, preset_text

    with errors():
        typer.echo(preset_text(name) if name else "\n".join(preset_names()))


@app.command()
def doctor() -> None:
    """Say what is installed, which backends serve this machine, and why the others do not."""
    from fastlangevin.doctor import report

    typer.echo(report())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(_version.__version__)


def _energy(target: str) -> Any:
    """A preset's energy, or what module:attribute is or makes."""
    import importlib

    from torch import nn

    from fastlangevin.learn.build import build_energy, load_data
    from fastlangevin.learn.config import preset_names, resolve

    if ":" not in target:
        if target not in preset_names():
            names = ", ".join(preset_names())
            raise ValueError(f"give a preset ({names}) or module:attribute, got {target!r}")
        config = resolve(target)
        return build_energy(config, load_data(config))
    module, _, attribute = target.partition(":")
    sys.path.insert(0, "")  # as `python -m` would find it
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{module} has no attribute {attribute!r}")
        found = getattr(found, name)
    energy = found if isinstance(found, nn.Module) else found()
    if not isinstance(energy, nn.Module):
        raise TypeError(f"{target} must be or make an nn.Module, got {type(energy).__name__}")
    return energy


def _sizes(shape: str) -> tuple[int, ...]:
    parts = shape.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--shape must be positive integers like 3,32,32, got {shape!r}")
    return tuple(map(int, parts))
