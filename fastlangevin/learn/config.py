"""Training settings: a config, changed by a file and by options, resolved to a TrainConfig."""

import dataclasses
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
from fastlangevin.names import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The first line of a run's config.yaml. A folder without it is not considered a run.
MARK = "# The settings of a fastlangevin run.\n"
_CONFIGS = Path(__file__).parent / "configs"
_SETTINGS_BYTES = 2**16
_MOST_DOTS = 300  # in a line of TOML
_MOST_NAMED = 20  # unknown settings in an error message


def _option(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. A config states every field; files and options change some."""

    # data
    data: str | None = _option(
        "images: digits, mnist5k, fashion-mnist, hub:NAME, or a folder, .npy, .npz or parquet"
    )
    size: int | None = _option(
        "crop and resize the images to this power of two; unset keeps their size"
    )
    channels: int | None = _option("convert the images to 1 (grey) or 3 (colour) channels")
    limit: int | None = _option("use the first LIMIT images only")
    flip: bool = _option("mirror half of the images")
    on_corrupt: str = _option("what to do with images that cannot be decoded: error or skip")
    # energy
    width: int = _option("channels of the first convolution, the paper's n_f")
    activation: str = _option("activation: leaky_relu, relu, silu, softplus or elu")
    leak: float = _option("negative slope of leaky_relu")
    # chain
    steps: int = _option("Langevin steps K")
    step_size: float = _option("step size a, which multiplies the gradient")
    noise_std: float = _option("standard deviation b of the noise added per step")
    clamp: tuple[float, float] | None = _option("lower and upper bound of the state, two numbers")
    grad_clip: float | None = _option("elementwise bound on the gradient")
    noise_order: str = _option(
        "when noise is added, relative to the gradient step: after, before or last"
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
    buffer_size: int = _option("number of persistent chains; 0 starts every chain from noise")
    buffer_kind: str = _option(
        "where chains are stored: where they came from (index), or in place of the oldest (fifo) "
        "or of random ones (reservoir)"
    )
    reinit: float = _option("fraction of persistent chains that restart from noise")
    max_energy: float = _option("stop the run as diverged if |energy| exceeds this")
    max_saturation: float = _option(
        "stop the run as diverged if more than this fraction of the sample elements stays at the "
        "bounds"
    )
    # run
    seed: int = _option("seed of the weights, the data order and all noise")
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
    """Return the names of the configs in the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def config_text(name: str) -> str:
    """Return the YAML text of a config in the package, with its comments."""
    names = config_names()
    if name not in names:
        raise ValueError(
            f"config must be one of {', '.join(names)}, or a file, got {brief(name)}"
            f"{did_you_mean(name, names)}"
        )
    return (_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def _config(name: str) -> dict[str, Any]:
    return dict(_parse_config(config_text(name)))


@functools.cache
def _parse_config(text: str) -> dict[str, Any]:
    """Parse a config, once: a sweep resolves its config hundreds of times, at 20 ms each."""
    return dict(yaml.safe_load(text))


def resolve(
    config: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Return the settings of a config, changed by ``overrides``.

    Args:
        config: The name of a config in the package (default: "digits"), or a YAML, TOML or JSON
            file. The settings in a file change the config that the file names as ``config``
            (default: "digits").

    Raises ValueError naming the field and what was expected, and FileError, whose message begins
    with the path, if the file is at fault.
    """
    name, changes = read_config(config)
    try:
        settings = _config(name) | _cast_all(changes, str(config))
    except ValueError as error:
        raise error if not changes else _of_file(str(config), error) from error
    settings = _cast_all(settings | _cast_all(overrides or {}, "options"), "configs")
    if settings["data"] and settings["data"] not in SOURCES and os.path.exists(settings["data"]):
        # A resumed run must find its data from any working directory.
        settings["data"] = str(Path(settings["data"]).absolute())
    try:
        return TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise error if overrides or not changes else _of_file(str(config), error) from error


def read_config(config: str | Path | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name of the config in the package to start from, and a file's changes to it."""
    if config is None or str(config) in config_names():
        return str(config or "digits"), {}
    if not (Path(config).suffix or os.path.exists(config)):
        config_text(str(config))  # raises an error that lists the names
    changes = read_settings(config)
    name = changes.pop("config", None)
    if name is not None and name not in config_names():
        try:
            config_text(name)
        except ValueError as error:
            raise _of_file(str(config), error) from error
    return name or "digits", changes


def read_settings(file: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML, TOML or JSON file; FileError if it holds anything else."""
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
    """Return the settings in a checkpoint's header, changed by ``changes``.

    Raises FileError, naming ``source``, if the header's settings are invalid.
    """
    saved = info.get("config")
    if not isinstance(saved, dict):
        raise FileError(
            f"{source} has a damaged header: config must hold settings by name, "
            f"got {type(saved).__name__}"
        )
    if unknown := [called(name) for name in saved if name not in FIELDS]:
        raise FileError(
            f"{source} has settings that fastlangevin {__version__} does not know, perhaps from "
            f"another version: {', '.join(unknown[:_MOST_NAMED])}"
        )
    try:
        config = resolve(overrides=saved)
    except (TypeError, ValueError) as error:
        raise FileError(f"{source} has invalid settings: {error}") from error
    return resolve(overrides=dataclasses.asdict(config) | dict(changes)) if changes else config


def _parse_toml(text: str) -> dict[str, Any]:
    # A dotted key of n parts takes memory in proportion to n^2: one of 60 KB took 3.6 GB.
    if max(line.count(".") for line in text.splitlines() or [""]) > _MOST_DOTS:
        raise ValueError(f"a line has more than {_MOST_DOTS} dots")
    return tomllib.loads(text)


def save_config(config: TrainConfig, file: Path) -> None:
    """Write all settings as YAML, atomically."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    with replacing(file) as temporary:
        temporary.write_text(MARK + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _of_file(file: str | Path, error: Exception) -> FileError:
    text = str(error)
    return FileError(text if text.startswith(str(file)) else f"{file}: {text}")


def _cast_all(changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Convert settings to the types of their fields; ValueError for an unknown name."""
    others = [name for name in changes if name not in FIELDS]
    if others:
        unknown = [called(name) for name in others[:_MOST_NAMED]]
        hint = did_you_mean(others[0], FIELDS) if len(others) == 1 else ""
        raise ValueError(
            f"{source}: no setting is called {', '.join(unknown)}"
            f"{hint or '; the settings are ' + ', '.join(FIELDS)}"
        )
    return {name: _cast(name, value) for name, value in changes.items()}


def _cast(name: str, value: Any) -> Any:
    """Convert a setting to the type of its field. Text such as YAML's 1e-4 becomes a number."""
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
    """Convert a number, or the text of one, to int or float; ValueError for anything else."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        value = int(value)  # float would round large seeds
    number = value if isinstance(value, int) else float(value)
    if math.isnan(number) or (kind is int and number != int(number)):
        raise ValueError
    if kind is int and abs(number) >= 2**64:  # larger than any seed or count
        raise ValueError
    return kind(number)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
