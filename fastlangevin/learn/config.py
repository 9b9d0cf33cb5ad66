"""Training settings: a config, changed by a file and by options, resolved to a TrainConfig."""

import dataclasses
import functools
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastlangevin._version import __version__
from fastlangevin.learn.atomic import save_text
from fastlangevin.learn.bounded_yaml import parse_yaml
from fastlangevin.learn.data.load import SOURCES
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import as_json, brief, called, read_text, reading
from fastlangevin.names import did_you_mean
from fastlangevin.train_config import FIELDS, NETWORK, TYPES, TrainConfig

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
        settings = _parse_config(config_text(name)) | _cast_all(changes, str(config))
    except ValueError as error:
        raise error if not changes else _error_in_file(str(config), error) from error
    settings = _cast_all(settings | _cast_all(overrides or {}, "options"), "configs")
    for field, names in (("data", SOURCES), ("start", ())):
        # A resumed run must find its data and its start from any working directory.
        if settings[field] and settings[field] not in names and os.path.exists(settings[field]):
            settings[field] = str(Path(settings[field]).absolute())
    try:
        if settings["energy"] is not None:
            given = {**changes, **(overrides or {})}
            if useless := [name for name in NETWORK if given.get(name) is not None]:
                raise ValueError(
                    f"{', '.join(useless)} {'is' if len(useless) == 1 else 'are'} of ConvEnergy "
                    f"alone, and energy is {settings['energy']}: leave out one or the other"
                )
            settings |= dict.fromkeys(NETWORK)
        return TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise error if overrides or not changes else _error_in_file(str(config), error) from error


def read_config(config: str | Path | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name of the config in the package to start from, and a file's changes to it."""
    if config is None or str(config) in config_names():
        return str(config or "digits"), {}
    if not (Path(config).suffix or os.path.exists(config)):
        config_text(str(config))  # raises an error that lists the names
    changes = read_settings(config)
    if is_of_run(Path(config)):
        changes = of_its_version(changes)
    name = changes.pop("config", None)
    if name is not None:
        try:
            config_text(name)  # raises an error for an unknown name
        except ValueError as error:
            raise _error_in_file(str(config), error) from error
    return name or "digits", changes


def is_of_run(file: Path) -> bool:
    """Return whether a file is the config.yaml of a run, which states every setting."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(MARK.encode())) == MARK.encode()


def of_its_version(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, with a value for each setting that is newer than the run.

    The learning step of earlier versions had torch's own precision, whatever that of the chain. A
    resumed run keeps it.
    """
    before = None if saved.get("precision") == "bf16" else "auto"
    return {"learn_precision": before, "start": None, **saved}


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
        config = resolve(overrides=of_its_version(saved))
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
    save_text(file, MARK + yaml.safe_dump(as_json(dataclasses.asdict(config)), sort_keys=False))


def _error_in_file(file: str | Path, error: Exception) -> FileError:
    text = str(error)
    return FileError(text if text.startswith(str(file)) else f"{file}: {text}")


def no_setting(source: str, names: Sequence[Any], known: Collection[str] = FIELDS) -> str:
    """Return the error text for ``names``, which are not among the ``known`` settings."""
    text = f"{source}: no setting is called {', '.join(map(called, names[:_MOST_NAMED]))}"
    hint = did_you_mean(names[0], known) if len(names) == 1 else ""
    return text + (hint or f"; the settings are {', '.join(known)}")


def _cast_all(changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Convert settings to the types of their fields; ValueError for an unknown name."""
    if others := [name for name in changes if name not in FIELDS]:
        raise ValueError(no_setting(source, others))
    return {name: _cast(name, value) for name, value in changes.items()}


def _cast(name: str, value: Any) -> Any:
    """Convert a setting to the type of its field, and text such as YAML's 1e-4 to a number."""
    is_union = typing.get_origin(TYPES[name]) in (typing.Union, types.UnionType)
    kinds = typing.get_args(TYPES[name]) if is_union else (TYPES[name],)
    kind, optional = kinds[0], type(None) in kinds
    try:
        if optional and (value is None or (isinstance(value, str) and value == "none")):
            return None  # TOML has no null, and options say none
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
