"""Checkpoints: one safetensors file each, with its JSON in the header; never pickle."""

import inspect
import json
import reprlib
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlangevin._version import __version__
from fastlangevin.energies import ConvEnergy
from fastlangevin.gradients.precision import check_precision
from fastlangevin.learn.atomic import replacing
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.run_folder import is_run
from fastlangevin.sampler import LangevinSampler
from fastlangevin.step import choose_backend

FORMAT = "fastlangevin checkpoint"
VERSION = 1
_HEADER, _CHECKSUM = "fastlangevin", "checksum"  # names in the metadata of the file
# What safetensors calls the dtypes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SUFFIX = ".safetensors"
_SETTINGS = inspect.signature(LangevinSampler).parameters
_MODELS = Path(__file__).parents[1] / "models"


class CheckpointError(FileError):
    """A checkpoint that cannot be read, or is not the one asked for."""


class DamagedCheckpointError(CheckpointError):
    """A file that does not hold what was written to it, or that no checkpoint was written to."""


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Write tensors by name and JSON-ready ``info``, atomically, with a checksum of both.

    Whatever stops it, a file that was at ``path`` before stays whole until the new one is. Raises
    OSError, with the reason, if the disk does not take it.
    """
    path = Path(path)
    header = json.dumps({"format": FORMAT, "version": VERSION, **info})
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER: header, _CHECKSUM: checksum(header, held)}
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata)
        except OSError as error:
            raise OSError(f"checkpoint {path} could not be written: {error}") from error


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors as a safetensors file; equal content gives equal bytes.

    The library's own function first copies all tensors, gives the metadata a random order, and
    writes to a temporary file that it leaves behind, under a name of its own, if it is killed.
    """
    # The format has no gaps: by falling size of their elements, all tensors are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"checkpoint {path}: {name} has dtype {tensor.dtype}, which no file has"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(tensors[name]))


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """The CRC-32 of a checkpoint's JSON and of every tensor's name, dtype, shape and bytes.

    It finds any damage that lies within 32 bits, and all but one in 2^32 of the others; it is no
    protection from forgery. 0.03 s for 100 MB on one core, a quarter of what BLAKE2b takes.
    """
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        crc = zlib.crc32(kind.encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return f"crc32:{crc:08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, info) of a file, checked against its checksum.

    ``path`` may be a run's folder, which stands for its newest checkpoint. Raises CheckpointError
    if the file is of another version, and DamagedCheckpointError if it is truncated, changed or
    foreign. Checkpoints of before there were checksums are read without that check.
    """
    file = find_checkpoint(path)
    try:
        return _read(file)
    except DamagedCheckpointError as error:
        if file == Path(path) or not (older := list_checkpoints(Path(path))[:-1]):
            raise
        raise DamagedCheckpointError(f"{error}; the one before it is {older[-1]}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # The library makes tensors on torch's default device.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Foreign files first: their tensors may be of types that torch does not have.
            if _HEADER not in metadata:
                raise DamagedCheckpointError(f"{path} is a safetensors file, but not a {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{path} is truncated or not a safetensors file: {error}"
        ) from error
    header = metadata.pop(_HEADER)
    # Any other name would be a damaged one of the checksum's.
    if metadata and metadata != {_CHECKSUM: checksum(header, tensors)}:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is not that of its content")
    try:
        info = dict(json.loads(header))
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} has a damaged header: {error}") from error
    if info.get("format") != FORMAT or info.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a {info.get('format')!r} of version {info.get('version')}; "
            f"this fastlangevin reads version {VERSION}"
        )
    return tensors, info


def iteration_of(info: Mapping[str, Any], path: str | Path) -> int:
    """The iteration in a checkpoint's info; CheckpointError if there is none."""
    iteration = info.get("iteration")
    if type(iteration) is not int or iteration < 0:
        raise CheckpointError(
            f"{path} has a damaged header: no iteration in it, got {reprlib.repr(iteration)}"
        )
    return iteration


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
    prefix = "ema." if averaged and any(name.startswith("ema.") for name in tensors) else "model."
    built = energy is None
    if energy is None:
        energy = _build_energy(info.get("energy"), tensors, prefix, path)
    if not isinstance(info.get("sampler"), dict):
        raise CheckpointError(f"{path} has a damaged header: no sampler in it")
    saved = _renamed(info["sampler"])
    if unknown := [name for name in saved if name not in _SETTINGS]:
        raise CheckpointError(
            f"{path} has settings of a sampler that fastlangevin {__version__} does not know, "
            f"perhaps another version's: {', '.join(unknown)}"
        )
    settings: dict[str, Any] = {
        name: tensors[f"sampler.{name}"].to(device) if f"sampler.{name}" in tensors else value
        for name, value in saved.items()
    }
    load_weights(energy, tensors, prefix, path, assign=built)
    energy.to(device).eval()
    try:
        sampler = LangevinSampler(energy, **settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} has settings that no sampler takes: {error}") from error
    if changes:
        sampler = LangevinSampler(energy, **settings | changes)
    _serve(sampler, torch.device(device), changes)
    return sampler


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A saved sampler's settings by today's names: ``gradient`` was called ``score``."""
    settings = dict(settings)
    if "score" in settings and "gradient" not in settings:
        name = settings.pop("score")
        settings["gradient"] = {"general": "autograd", "lean": "explicit"}.get(name, name)
    return settings


def _build_energy(
    settings: Any, tensors: Mapping[str, Tensor], prefix: str, path: Any
) -> ConvEnergy:
    """The energy that a header describes, on the meta device; CheckpointError if it cannot be."""
    if settings is None:
        raise CheckpointError(f"{path} was trained on an energy of its own: give energy=")
    try:
        # Without memory, until the shapes have proved to be those of the file's weights: a few
        # bytes of a header can describe terabytes.
        with torch.device("meta"):
            energy = ConvEnergy(**settings)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} is of another architecture: {error}") from error
    check_weights(energy, tensors, prefix, path)
    return energy


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
    weights = check_weights(module, tensors, prefix, path)
    if assign:
        if any(not tensor.is_floating_point() for tensor in weights.values()):
            raise CheckpointError(f"{path} has weights that are not of a floating dtype")
        # The file's own may be read from it only when they are used.
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    module.load_state_dict(weights, assign=assign)


def check_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Any
) -> dict[str, Tensor]:
    """The tensors under ``prefix``; CheckpointError unless they are of the module's shapes."""
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
    return found
