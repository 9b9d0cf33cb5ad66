"""A training run's settings: a config, changed by options, resolved to one record."""

import dataclasses
import difflib
import functools
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastlangevin._version import __version__
from fastlangevin.arguments import check_count
from fastlangevin.learn.atomic import replacing
from fastlangevin.learn.bounded_yaml import parse_yaml
from fastlangevin.learn.data.load import SOURCES
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import brief, called, read_text, reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The first line of a run's config; a folder without it is not taken for a run.
MARK = "# The settings of a fastlangevin run.\n"
_CONFIGS = Path(__file__).parent / "configs"
_SETTINGS_BYTES = 2**16
_MOST_DOTS = 300  # in a line of TOML
_MOST_NAMED = 20  # unknown settings in an error message


def _option(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; configs state every field, files and options change some."""

    # data
    data: str | None = _option(
        "images: digits, mnist5k, fashion-mnist, hub:NAME, or a folder, .npy, .npz or parquet"
    )
    size: int | None = _option(
        "resize and crop the images to this power of two; as they are if unset"
    )
    channels: int | None = _option("convert the images to 1 (grey) or 3 (colour) channels")
    limit: int | None = _option("use the first LIMIT images only")
    flip: bool = _option("mirror half of the images")
    on_corrupt: str = _option("what to do about images that cannot be decoded: error or skip")
    # energy
    width: int = _option("channels of the first convolution, the paper's n_f")
    activation: str = _option("activation: leaky_relu, relu, silu, softplus or elu")
    leak: float = _option("negative slope of leaky_relu")
    # chain
    steps: int = _option("Langevin steps K")
    step_size: float = _option("step size a, which multiplies the gradient")
    noise_std: float = _option("standard deviation b of the noise added per step")
    clamp: tuple[float, float] | None = _option("bounds on the state, two numbers")
    grad_clip: float | None = _option("elementwise bound on the gradient")
    noise_order: str = _option(
        "when noise is added, as seen from the gradient step: after, before or last"
    )
    precision: str | None = _option(
        "precision of the network in the chain: fp32, tf32, fp16 or bf16"
    )
    backend: str = _option("backend of the update: auto, native, triton or reference")
    # learning
    iterations: int = _option("number of updates of the weights")
    batch_size: int = _option("images, and chains, per iteration")
    data_noise: float = _option("standard deviation sigma of the noise on the data")
    lr: float = _option("Adam's learning rate")
    beta1: float = _option("Adam's first decay rate")
    beta2: float = _option("Adam's second decay rate")
    anneal_start: float = _option(
        "fraction of the run after which lr and data noise change linearly"
    )
    lr_final: float = _option("learning rate at the end")
    data_noise_final: float = _option("data noise at the end")
    ema: float | None = _option("decay of a moving average of the weights")
    buffer_size: int = _option("persistent chains kept; 0 starts every chain from noise")
    buffer_kind: str = _option(
        "chains go back where they came from (index), or replace the oldest (fifo) or any "
        "(reservoir)"
    )
    reinit: float = _option("fraction of persistent chains started anew")
    max_energy: float = _option("stop as diverged when |energy| passes this")
    max_saturation: float = _option(
        "stop as diverged when this fraction of samples stays at the bounds"
    )
    # run
    seed: int = _option("seed of the weights, the data order and every noise")
    device: str = _option("where to compute: auto, cpu, cuda or cuda:N")
    log_every: int = _option("iterations between records")
    sample_every: int = _option("iterations between sample grids")
    save_every: int = _option("iterations between checkpoints")
    samples: int = _option("images in a grid")

    def __post_init__(self) -> None:
        for name in ("iterations", "log_every", "sample_every", "save_every", "samples"):
            check_count("train", name, getattr(self, name))
        for name in ("data_noise", "data_noise_final", "lr", "lr_final", "max_energy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train: {name} must be >= 0, got {getattr(self, name)}")
        for name in ("anneal_start", "reinit", "max_saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train: {name} must be in [0, 1], got {getattr(self, name)}")


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)


def config_names() -> list[str]:
    """The configs in the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def config_text(name: str) -> str:
    """The file of a config in the package, with its comments."""
    names = config_names()
    if name not in names:
        near = "".join(
            f"; did you mean {n}?" for n in difflib.get_close_matches(str(name), names, 1)
        )
        raise ValueError(
            f"config must be one of {', '.join(names)}, or a file, got {brief(name)}{near}"
        )
    return (_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def _config(name: str) -> dict[str, Any]:
    return dict(_parse_config(config_text(name)))


@functools.cache
def _parse_config(text: str) -> dict[str, Any]:
    """Parsed once: a sweep resolves its config hundreds of times, at 20 ms each."""
    return dict(yaml.safe_load(text))


def resolve(
    config: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """A config, changed by ``overrides``.

    config: the name of a config in the package, "digits" by default; or a YAML, TOML or JSON file,
        whose settings change the config that it names as its ``config``, again "digits" by default.

    Raises ValueError naming the field and what was expected; FileError, which begins with the
    path, where the file is at fault.
    """
    name, changes = read_config(config)
    try:
        settings = _config(name) | _cast_all(changes, str(config))
    except ValueError as error:
        raise error if not changes else _of_file(str(config), error) from error
    settings = _cast_all(settings | _cast_all(overrides or {}, "options"), "configs")
    if settings["data"] and settings["data"] not in SOURCES and os.path.exists(settings["data"]):
        # A run must find its data again, also from another folder.
        settings["data"] = str(Path(settings["data"]).absolute())
    try:
        return TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise error if overrides or not changes else _of_file(str(config), error) from error


def read_config(config: str | Path | None = None) -> tuple[str, dict[str, Any]]:
    """The name of the config in the package to start from, and what a file changes in it."""
    if config is None or str(config) in config_names():
        return str(config or "digits"), {}
    if not (Path(config).suffix or os.path.exists(config)):
        config_text(str(config))  # raises the error that says which names there are
    changes = read_settings(config)
    name = changes.pop("config", None)
    if name is not None and name not in config_names():
        try:
            config_text(name)
        except ValueError as error:
            raise _of_file(str(config), error) from error
    return name or "digits", changes


def read_settings(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML, TOML or JSON file; FileError if it is not one."""
    file = Path(file)
    parsers: dict[str, Callable[[str], Any]] = {".toml": _parse_toml, ".json": json.loads}
    parse = parsers.get(file.suffix, parse_yaml)
    text = read_text(file, _SETTINGS_BYTES)
    with reading(file, file.suffix[1:] or "yaml"):
        settings = parse(text)
    if not isinstance(settings, dict):
        raise FileError(f"{file} must hold settings by name, got {type(settings).__name__}")
    return settings


def resolve_saved(
    info: Mapping[str, Any], source: str | Path, changes: Mapping[str, Any]
) -> TrainConfig:
    """The settings in a checkpoint's header, changed by ``changes``; FileError if they are none."""
    saved = info.get("config")
    if not isinstance(saved, dict):
        raise FileError(
            f"{source} has a damaged header: config must hold settings by name, "
            f"got {type(saved).__name__}"
        )
    if unknown := [called(name) for name in saved if name not in FIELDS]:
        raise FileError(
            f"{source} has settings that fastlangevin {__version__} does not know, perhaps another "
            f"version's: {', '.join(unknown[:_MOST_NAMED])}"
        )
    try:
        config = resolve(overrides=saved)
    except (TypeError, ValueError) as error:
        raise FileError(f"{source} has settings that no run takes: {error}") from error
    return resolve(overrides=dataclasses.asdict(config) | dict(changes)) if changes else config


def _parse_toml(text: str) -> dict[str, Any]:
    # A key of n parts takes n^2 of memory: 60 KB of them took 3.6 GB.
    if max(line.count(".") for line in text.splitlines() or [""]) > _MOST_DOTS:
        raise ValueError(f"a line has more than {_MOST_DOTS} dots")
    return tomllib.loads(text)


def save_config(config: TrainConfig, file: Path) -> None:
    """Write a resolved config as YAML, atomically."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    with replacing(file) as temporary:
        temporary.write_text(MARK + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _of_file(file: str | Path, error: Exception) -> FileError:
    text = str(error)
    return FileError(text if text.startswith(str(file)) else f"{file}: {text}")


def _cast_all(changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings in their fields' types; ValueError for what is none."""
    unknown = [called(name) for name in changes if name not in FIELDS]
    if unknown:
        raise ValueError(
            f"{source}: no setting is called {', '.join(unknown[:_MOST_NAMED])}; there are "
            f"{', '.join(FIELDS)}"
        )
    return {name: _cast(name, value) for name, value in changes.items()}


def _cast(name: str, value: Any) -> Any:
    """A setting in its field's type; text that is a number, as YAML's 1e-4 is, becomes one."""
    kinds = typing.get_args(TYPES[name]) if _is_union(TYPES[name]) else (TYPES[name],)
    kind, optional = kinds[0], type(None) in kinds
    try:
        if value is None and optional:
            return None
        if kind in (bool, str):
            if isinstance(value, kind):
                return value
        elif typing.get_origin(kind) is tuple:
            lo, hi = value if isinstance(value, list | tuple) else ()
            return _number(lo, float), _number(hi, float)
        else:
            return _number(value, kind)
    except (TypeError, ValueError, OverflowError):
        pass
    expected = " | ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise ValueError(f"{name} must be {expected.replace('NoneType', 'null')}, got {brief(value)}")


def _number(value: Any, kind: type) -> Any:
    """A number, or text that is one, as float or whole int; ValueError otherwise, and for NaN."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        value = int(value)  # not through float, which rounds large seeds
    number = value if isinstance(value, int) else float(value)
    if math.isnan(number) or (kind is int and number != int(number)):
        raise ValueError
    if kind is int and abs(number) >= 2**64:  # no seed or count is as large
        raise ValueError
    return kind(number)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
