"""Samplers as files: save one with its weights, and load it again."""

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin.anneal as _anneal
from fastlangevin._version import __version__
from fastlangevin.energies import ConvEnergy
from fastlangevin.gradients.modules import device_of
from fastlangevin.gradients.precision import check_precision
from fastlangevin.kernels.devices import check_device_exists
from fastlangevin.learn.checkpoint import (
    CheckpointError,
    check_weights,
    checksum,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    run_folder,
    save_checkpoint,
)
from fastlangevin.learn.custom_energy import open_energy
from fastlangevin.learn.hub import is_hub_name
from fastlangevin.reprs import short
from fastlangevin.sampler import LangevinSampler
from fastlangevin.step import choose_backend

_SETTINGS = inspect.signature(LangevinSampler).parameters
_SUFFIX = ".safetensors"
START = "start."  # before the names of the tensors of the sampler that chains start from
_MOST_STARTS = 8  # one from the other, in a file


def save(sampler: LangevinSampler, path: str | Path) -> None:
    """Write a sampler as one safetensors file: its energy's weights and its own settings.

    Args:
        sampler: A LangevinSampler on an nn.Module, with weights of any dtype that safetensors has.
        path: The file, which must end in .safetensors. As with ``torch.save``, an existing file
            is replaced without a warning; it stays whole until the new one is complete.

    The file also holds the sampler that chains start from, which must be on a ConvEnergy. It names
    the energy's class but holds no code. :func:`load` builds a ConvEnergy from it,
    and needs any other energy as an argument. Raises TypeError for an energy that is not an
    nn.Module, or has a state that is not a tensor; ValueError for another ending of ``path``; and
    OSError if the file cannot be written.
    """
    if not isinstance(sampler, LangevinSampler):
        swapped = "; give the sampler first" if isinstance(path, LangevinSampler) else ""
        raise TypeError(
            f"save: sampler must be a LangevinSampler, got {type(sampler).__name__}{swapped}"
        )
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"save: path must end in {_SUFFIX}, got {path}")
    if not isinstance(sampler.energy, nn.Module):
        raise TypeError(
            "save: the sampler's energy must be an nn.Module, whose weights can be saved, got "
            f"{short(sampler.energy)}"
        )
    check_state("save", sampler.energy)
    save_checkpoint(path, *_describe_whole(sampler))


def describe(sampler: LangevinSampler) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON header that describe a sampler without its weights.

    An energy other than a ConvEnergy is described by the name of its class alone. The sampler of
    smaller images that chains start from is described with its weights.
    """
    tensors: dict[str, Tensor] = {}
    settings, energy = sampler.settings(), sampler.energy
    start = settings.pop("start")
    for name, value in settings.items():
        if isinstance(value, Tensor):
            tensors[f"sampler.{name}"], settings[name] = value, None
    header = {
        "energy": energy.settings() if isinstance(energy, ConvEnergy) else None,
        "energy_class": class_name(energy),
        "sampler": settings,
    }
    if start is not None:
        if not isinstance(start.energy, ConvEnergy):
            raise TypeError(
                "save: the energy of a start must be a ConvEnergy, which a file can describe, got "
                f"{short(start.energy)}"
            )
        of_start, header["start"] = _describe_whole(start)
        tensors |= {f"{START}{name}": value for name, value in of_start.items()}
    return tensors, header


def digest_of_start(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str | None:
    """Return a digest of the sampler that chains start from, of what :func:`describe` returned or a
    checkpoint holds; None if they start from noise."""
    if "start" not in header:
        return None
    own = {k: v for k, v in tensors.items() if k.startswith(START)}
    return checksum(json.dumps(header["start"], sort_keys=True), own)


def _describe_whole(sampler: LangevinSampler) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, weights included, and the header of a sampler on an nn.Module."""
    tensors, header = describe(sampler)
    energy: Any = sampler.energy
    return {f"model.{k}": v for k, v in energy.state_dict().items()} | tensors, header


def class_name(energy: Any) -> str:
    """Return "module:Class" of an energy."""
    kind = type(energy)
    return f"{kind.__module__}:{kind.__qualname__}"


def check_state(op: str, energy: nn.Module) -> None:
    """Raise TypeError or ValueError unless a checkpoint can hold the energy's state."""
    for name, value in energy.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: the energy's state_dict holds {name} of type {type(value).__name__}, and "
                "checkpoints can hold only tensors; make its module's get_extra_state return a "
                "tensor, for example of uint8"
            )
        if torch.nn.parameter.is_lazy(value):
            raise ValueError(
                f"{op}: the energy's {name} has no shape yet, because its module is lazy; "
                "call energy(x0) once first"
            )


def load(
    path: str | Path,
    *,
    energy: nn.Module | None = None,
    device: torch.device | str | None = None,
    averaged: bool = True,
    **changes: Any,
) -> LangevinSampler:
    """Return the sampler of a trained model, ready to call.

    Args:
        path: What :func:`save` wrote, a run's folder or a checkpoint; the name of a model in the
            package, as in ``load("digits")``; or a model on the Hugging Face hub,
            ``"hf:owner/name"`` or ``"hf:owner/name@revision"``, which needs huggingface_hub. A file
            is data alone: no code in it is run.
        energy: The nn.Module to load the weights into, for an energy of your own. It keeps its
            dtype, and is changed. By default, a ConvEnergy is built from the file, with the dtype
            of the file. For the folder of a run that was trained with
            ``energy="module:attribute"``, the default is that energy, and its module is imported:
            load only runs that you trust.
        device: Device of the energy (default: the one where ``energy`` is, else the CPU).
        averaged: Use the moving average of the weights if the run kept one, else the weights.
        changes: Settings of the sampler to replace, such as ``steps=200``. With ``start=None``,
            chains start from noise also if the file holds the sampler that they start from.

    The energy is in eval mode. Warns if the file names another class than that of ``energy``.
    Raises FileNotFoundError; ValueError for a checkpoint of an energy of your own without
    ``energy``, and for other ``steps`` than the model's schedules have; and CheckpointError (a
    ValueError) for a file that is truncated, not a checkpoint, or of another architecture. The
    error lists the weights that the file lacks, those that the energy does not have, and those of
    another shape. For a model on the hub, raises ImportError without huggingface_hub, and OSError
    if the file cannot be downloaded.
    """
    check_device_exists("load", device)
    if not isinstance(energy, nn.Module | None):
        raise TypeError(f"load: energy must be an nn.Module, got {short(energy)}")
    tensors, info = read_checkpoint(path)
    return _load(tensors, info, path, energy, device, averaged, changes)


def _load(
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    path: str | Path,
    energy: nn.Module | None,
    device: torch.device | str | None,
    averaged: bool,
    changes: Mapping[str, Any],
    level: int = 0,
) -> LangevinSampler:
    """Return the sampler in a checkpoint. ``level`` counts the samplers it is the start of."""
    prefix = "ema." if averaged and any(name.startswith("ema.") for name in tensors) else "model."
    if energy is None and level == 0:
        energy = _energy_of_run(info, path)
    built = energy is None
    if energy is None:
        energy = _build_energy(info, tensors, prefix, path)
    if device is None:
        device = "cpu" if built else device_of(energy) or "cpu"
    device = torch.device(device)
    settings = _saved_settings(info, tensors, device, path)
    if "start" in info and "start" not in changes:
        settings["start"] = start_in(tensors, info, path, device, level + 1)
    load_weights(energy, tensors, prefix, path, assign=built)
    _warn_of_class(info.get("energy_class"), class_name(energy), path, level)
    energy.to(device).eval()
    try:
        sampler = LangevinSampler(energy, **settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} has invalid settings of the sampler: {error}") from error
    _check_steps(sampler, changes)
    if changes:
        sampler = LangevinSampler(energy, **{**settings, **changes})
    _replace_unavailable(sampler, device, changes, level)
    return sampler


def start_in(
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    path: str | Path,
    device: torch.device,
    level: int = 1,
) -> LangevinSampler:
    """Return the sampler that a checkpoint's chains start from.

    ``level`` counts the samplers from that of the checkpoint's own chains to this one, up to 8.
    """
    if not isinstance(info["start"], dict):
        raise CheckpointError(f"{path} has a damaged header: its start is no model")
    if level > _MOST_STARTS:
        raise CheckpointError(f"{path} has more than {_MOST_STARTS} models that start from others")
    own = {k.removeprefix(START): v for k, v in tensors.items() if k.startswith(START)}
    return _load(own, info["start"], path, None, device, True, {}, level)


def _saved_settings(
    info: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, path: Any
) -> dict[str, Any]:
    """Return the sampler's settings in a checkpoint; CheckpointError for those not known here."""
    saved = dict(_sampler_header(info, path))
    if "score" in saved and "gradient" not in saved:  # the name and the values of earlier versions
        name = saved.pop("score")
        saved["gradient"] = {"general": "autograd", "lean": "explicit"}.get(name, name)
    if unknown := [name for name in saved if name not in _SETTINGS]:
        raise CheckpointError(
            f"{path} has settings of a sampler that fastlangevin {__version__} does not know, "
            f"perhaps from another version: {', '.join(unknown)}"
        )
    return {
        name: tensors[f"sampler.{name}"].to(device) if f"sampler.{name}" in tensors else value
        for name, value in saved.items()
    }


def _sampler_header(info: Mapping[str, Any], path: Any) -> dict[str, Any]:
    if not isinstance(info.get("sampler"), dict):
        raise CheckpointError(f"{path} has a damaged header: no sampler in it")
    return info["sampler"]


def _warn_of_class(saved: Any, current: str, path: Any, level: int) -> None:
    """Warn the caller of :func:`load` of weights that were saved from another class of energy."""
    # A module that was saved by the script that defines it has another name when it is imported.
    if isinstance(saved, str) and saved.split(":")[-1] != current.split(":")[-1]:
        warnings.warn(
            f"load: {path} has the weights of an energy of the class {saved}, and they are "
            f"now in one of {current}, whose forward pass may differ",
            stacklevel=4 + 2 * level,
        )


def _check_steps(sampler: LangevinSampler, changes: Mapping[str, Any]) -> None:
    """Raise ValueError if the number of steps changes, but not the schedules with it."""
    schedules = [
        name
        for name, value in sampler.settings().items()
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim == 2)
    ]
    other_steps = changes.get("steps", sampler.steps) != sampler.steps
    if other_steps and not changes.keys() >= set(schedules):
        raise ValueError(
            f"load: steps cannot be {changes['steps']}: the model has schedules of {sampler.steps} "
            f"steps in {', '.join(schedules)}; give these too"
        )


def _energy_of_run(info: Mapping[str, Any], path: str | Path) -> nn.Module | None:
    """Import the energy that a run was trained with, if a setting of the run names one.

    This runs code that is installed or in the working directory. It is therefore done only for a
    checkpoint in the folder of its run, not for a file alone, which may come from anywhere.
    """
    config, data = info.get("config"), info.get("data")
    target = config.get("energy") if isinstance(config, dict) else None
    if not isinstance(target, str) or is_hub_name(path) or not run_folder(find_checkpoint(path)):
        return None
    shape = data.get("shape") if isinstance(data, dict) else None
    if not (isinstance(shape, list) and shape and all(type(size) is int for size in shape)):
        raise CheckpointError(f"{path} has a damaged header: no shape of the data in it")
    return open_energy(target, shape)


def _build_energy(
    info: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, path: Any
) -> ConvEnergy:
    """Build the energy that a header describes, on the meta device."""
    settings, kind = info.get("energy"), info.get("energy_class")
    if settings is None:
        of = f" of the class {kind}" if isinstance(kind, str) else ""
        raise CheckpointError(
            f"{path} has the weights of a custom energy{of}: pass it as energy=, as in "
            "load(path, energy=MyEnergy())"
        )
    try:
        # The meta device allocates no memory. A header of a few bytes can describe terabytes, so
        # its shapes are first compared with the weights in the file.
        with torch.device("meta"):
            energy = ConvEnergy(**settings)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} is of another architecture: {error}") from error
    check_weights(energy, tensors, prefix, path)
    return energy


def _replace_unavailable(
    sampler: LangevinSampler, device: torch.device, chosen: Mapping[str, Any], level: int
) -> None:
    """Replace the run's precision or backend, with a warning, if this machine does not have it."""
    for name, check, instead in (
        ("precision", check_precision, None),
        ("backend", choose_backend, "auto"),
    ):
        try:
            check(getattr(sampler, name), device)
        except (RuntimeError, ValueError) as error:
            if name in chosen:
                raise
            warnings.warn(f"load: {error}; using {instead!r} instead", stacklevel=4 + 2 * level)
            setattr(sampler, name, instead)


def export(run: str | Path, out: str | Path, cooldown: int = 0) -> None:
    """Write a small checkpoint that can be sampled from but not resumed.

    It holds the averaged weights (the weights themselves if the run kept no average), the sampler's
    settings and the run's settings. ``cooldown`` steps without noise are added to its chain, see
    :func:`fastlangevin.anneal.cooldown`. Raises CheckpointError as :func:`read_checkpoint` does,
    and ValueError if ``cooldown`` does not fit.
    """
    tensors, info = read_checkpoint(run)
    if cooldown:
        saved = _sampler_header(info, run)
        try:
            info["sampler"] = _anneal.cooldown(saved, cooldown)
        except (KeyError, TypeError) as error:
            raise ValueError(f"export: {run} cannot be given a cooldown: {error}") from error
    prefix = "ema." if any(name.startswith("ema.") for name in tensors) else "model."
    weights = {
        f"model.{name.removeprefix(prefix)}": tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    kept = ("sampler.", START)
    weights |= {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}
    save_checkpoint(out, weights, {k: v for k, v in info.items() if k not in ("format", "version")})
