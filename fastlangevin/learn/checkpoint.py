"""Checkpoints: one safetensors file each, with its JSON in the header; never pickle."""

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlangevin._version import __version__
from fastlangevin.energies import ConvEnergy
from fastlangevin.learn.files import replacing
from fastlangevin.learn.folder import is_run
from fastlangevin.sampler import LangevinSampler
from fastlangevin.scores.general import check_precision
from fastlangevin.step import choose_backend

FORMAT = "fastlangevin checkpoint"
VERSION = 1
_SUFFIX = ".safetensors"
_SETTINGS = inspect.signature(LangevinSampler).parameters
_MODELS = Path(__file__).parents[1] / "models"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not the one asked for."""


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Write tensors by name and JSON-ready ``info``, atomically.

    Whatever stops it, a file that was at ``path`` before stays whole until the new one is. Raises
    OSError, with the reason, if the disk does not take it.
    """
    path = Path(path)
    header = {"format": FORMAT, "version": VERSION, **info}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in held.items():
        # The format has no shared memory: tied weights are written once each.
        if tensor.untyped_storage().data_ptr() in seen:
            held[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata={"fastlangevin": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"checkpoint {path} could not be written: {error}") from error


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, info) of a file; CheckpointError if it is truncated, foreign or of a later version.

    ``path`` may be a run's folder, which stands for its newest checkpoint.
    """
    path = find_checkpoint(path)
    try:
        # The library makes tensors on torch's default device.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("fastlangevin")
            if header is None:
                raise CheckpointError(f"{path} is a safetensors file, but not a {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        info = dict(json.loads(header))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if info.get("format") != FORMAT or info.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a {info.get('format')!r} of version {info.get('version')}; "
            f"this fastlangevin reads version {VERSION}"
        )
    return tensors, info


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, the newest checkpoint of a run's folder, or the model of that name.

    Files and runs stand before the names of models that come with the package. FileNotFoundError
    if there is none of these.
    """
    path = Path(path)
    if path.is_file():
        return path
    if found := list_checkpoints(path):
        return found[-1]
    models = shipped()
    if str(path) in models:
        return models[str(path)]
    what = "holds no checkpoint yet" if path.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{path} {what} (looked for {path / 'checkpoints'}/*{_SUFFIX}); models that come with the "
        f"package: {', '.join(models)}"
    )


def shipped() -> dict[str, Path]:
    """The models that come with the package, by name; how each was made lies beside it in YAML."""
    return {path.stem: path for path in sorted(_MODELS.glob(f"*{_SUFFIX}"))}


def run_folder(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in; None for a shipped or an exported model."""
    # A bare file name has no parents but the working folder's.
    inside = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return inside.parent if inside.name == "checkpoints" and is_run(inside.parent) else None


def export(run: str | Path, out: str | Path) -> None:
    """Write what sampling needs of a run, to be kept or passed on, as a checkpoint.

    The weights, averaged where the run kept an average, the sampler's settings and the run's; not
    what resuming needs. CheckpointError as :func:`read_checkpoint`.
    """
    tensors, info = read_checkpoint(run)
    prefix = "ema." if any(name.startswith("ema.") for name in tensors) else "model."
    kept = {
        f"model.{name.removeprefix(prefix)}": tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    kept |= {name: tensor for name, tensor in tensors.items() if name.startswith("sampler.")}
    save_checkpoint(out, kept, {k: v for k, v in info.items() if k not in ("format", "version")})


def list_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("[0-9]" * 8 + _SUFFIX))


def checkpoint_path(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"{iteration:08d}{_SUFFIX}"


def load(
    path: str | Path,
    *,
    energy: nn.Module | None = None,
    device: torch.device | str = "cpu",
    averaged: bool = True,
    **changes: Any,
) -> LangevinSampler:
    """The sampler of a training run, ready to call, from its folder or one of its checkpoints.

    A name stands for a model that comes with the package: ``load("digits")``.

    The energy is a ConvEnergy in eval mode with the run's weights, their moving average where the
    run kept one (``averaged=False``: the weights themselves). It is on ``device`` and in the file's
    dtype, whatever torch's defaults are. A run on an energy of your own needs it as ``energy``.
    ``changes`` replace settings of the sampler, such as ``steps=200``.

    Raises FileNotFoundError, or CheckpointError for a file that is truncated, not ours, or of
    another architecture.
    """
    tensors, info = read_checkpoint(path)
    built = energy is None
    if energy is None:
        if info.get("energy") is None:
            raise CheckpointError(f"{path} was trained on an energy of its own: give energy=")
        try:
            with torch.device("meta"):  # it takes the tensors of the file as they are
                energy = ConvEnergy(**info["energy"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is of another architecture: {error}") from error
    if not isinstance(info.get("sampler"), dict):
        raise CheckpointError(f"{path} has a damaged header: no sampler in it")
    if unknown := [name for name in info["sampler"] if name not in _SETTINGS]:
        raise CheckpointError(
            f"{path} has settings of a sampler that fastlangevin {__version__} does not know, "
            f"perhaps another version's: {', '.join(unknown)}"
        )
    settings = info["sampler"] | changes
    for name in settings:
        if name not in changes and f"sampler.{name}" in tensors:
            settings[name] = tensors[f"sampler.{name}"].to(device)
    prefix = "ema." if averaged and any(name.startswith("ema.") for name in tensors) else "model."
    load_weights(energy, tensors, prefix, path, assign=built)
    sampler = LangevinSampler(energy.to(device).eval(), **settings)
    _serve(sampler, torch.device(device), changes)
    return sampler


def _serve(sampler: LangevinSampler, device: torch.device, chosen: Mapping[str, Any]) -> None:
    """Replace a precision or backend of the run that does not serve here, and warn."""
    for name, check, instead in (
        ("precision", check_precision, None),
        ("backend", choose_backend, "auto"),
    ):
        try:
            check(getattr(sampler, name), device)
        except (RuntimeError, ValueError) as error:
            if name in chosen:
                raise
            warnings.warn(f"load: {error}; using {instead!r} instead", stacklevel=3)
            setattr(sampler, name, instead)


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Any, assign: bool = False
) -> None:
    """Copy the tensors under ``prefix`` into a module; CheckpointError unless they are its own.

    With ``assign`` copies of them take the place of the module's, in their own dtype.
    """
    held = module.state_dict()
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for name in held.keys() | found.keys():
        want = list(held[name].shape) if name in held else "nothing"
        got = list(found[name].shape) if name in found else "nothing"
        if want != got:
            raise CheckpointError(
                f"{path} is of another architecture: {type(module).__name__}.{name} "
                f"needs {want}, the file has {got}"
            )
    if assign:
        if any(not tensor.is_floating_point() for tensor in found.values()):
            raise CheckpointError(f"{path} has weights that are not of a floating dtype")
        # The file's own may be read from it only when they are used.
        found = {name: tensor.clone() for name, tensor in found.items()}
    module.load_state_dict(found, assign=assign)
