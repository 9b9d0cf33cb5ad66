"""The plan of a sweep: which runs, at which settings, with which seeds."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlangevin.learn.bounded_yaml import parse_yaml
from fastlangevin.learn.config import FIELDS, TrainConfig, read_config, resolve
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import brief, called

VERSION = 1
# A run's rate and data noise change linearly from one setting to another; swept, both change.
_FINAL = {"lr": "lr_final", "data_noise": "data_noise_final"}

_MOST_RUNS = 10_000

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str  # of its folder
    settings: Settings  # of the swept fields
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """Which runs a sweep makes.

    Along each axis (a field of TrainConfig and its values) the other fields are the centre's; with
    ``grid`` all combinations are run. Each is run with the seeds centre.seed, centre.seed + 1, ...
    (``seeds`` of them). A swept lr or data_noise takes its final value along in proportion, unless
    that is swept too. Raises ValueError naming the field and the value that does not serve.
    """

    centre: TrainConfig
    axes: dict[str, list[Any]]
    seeds: int = 3
    grid: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.seeds, int) or isinstance(self.seeds, bool) or self.seeds < 1:
            raise ValueError(f"sweep: seeds must be at least 1, got {brief(self.seeds)}")
        if not isinstance(self.grid, bool):
            raise ValueError(f"sweep: grid must be true or false, got {brief(self.grid)}")
        if not isinstance(self.axes, Mapping) or not self.axes:
            raise ValueError("sweep: no field is swept; give some field two or more values")
        cast: dict[str, list[Any]] = {}
        for name, values in self.axes.items():
            if name not in FIELDS:
                raise ValueError(
                    f"sweep: no setting is called {called(name)}; there are {_listed(FIELDS)}"
                )
            if name == "seed":
                raise ValueError("sweep: seed is no axis; give seeds, how many to run of each")
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ValueError(f"sweep: {name} must have a list of values, got {brief(values)}")
            if not values:
                raise ValueError(f"sweep: {name} must have one value or more, got none")
            cast[name] = [getattr(self._config({name: value}), name) for value in values]
            for value in cast[name]:
                if cast[name].count(value) > 1:
                    raise ValueError(f"sweep: {name} must have distinct values, got {value} twice")
        lengths = [len(values) for values in cast.values()]
        count = self.seeds * (math.prod(lengths) if self.grid else sum(lengths))
        if count > _MOST_RUNS:
            raise ValueError(f"sweep: must have at most {_MOST_RUNS} runs, got {brief(count)}")
        object.__setattr__(self, "axes", cast)

    def lines(self, name: str) -> list[list[Settings]]:
        """The points along an axis: one line through the centre, or all lines of the grid."""
        others = {other: [getattr(self.centre, other)] for other in self.axes}
        if self.grid:
            others = self.axes
        rest = [[(other, v) for v in others[other]] for other in self.axes if other != name]
        return [
            [{other: (dict(fixed) | {name: value})[other] for other in self.axes}
             for value in self.axes[name]]
            for fixed in itertools.product(*rest)
        ]  # fmt: skip

    def points(self) -> list[Settings]:
        """The settings of the swept fields, each combination once."""
        found: list[Settings] = []
        for name in self.axes:
            for point in itertools.chain(*self.lines(name)):
                if point not in found:
                    found.append(point)
        return found

    def runs(self) -> list[Run]:
        """Every run, in a fixed order, the seeds of a point side by side."""
        found: list[Run] = []
        for point in self.points():
            for seed in range(self.centre.seed, self.centre.seed + self.seeds):
                words = [f"{name}={value}" for name, value in point.items()]
                label = re.sub(r"[^\w.+=-]+", "_", "-".join([*words, f"seed={seed}"]))
                config = dataclasses.replace(self._config(point), seed=seed)
                found.append(Run(f"{len(found):03d}-{label[:120]}", point, config))
        return found

    def plan(self) -> dict[str, Any]:
        """The sweep, JSON-ready."""
        plan = {"version": VERSION, **dataclasses.asdict(self)}
        return dict(json.loads(json.dumps(plan)))

    def _config(self, point: Settings) -> TrainConfig:
        try:
            config = resolve(overrides=dataclasses.asdict(self.centre) | point)
        except ValueError as error:
            raise ValueError(f"sweep: at {describe(point)}: {error}") from error
        for name, final in _FINAL.items():
            start, end, value = (
                getattr(self.centre, name),
                getattr(self.centre, final),
                getattr(config, name),
            )
            if value != start and final not in self.axes:
                follows = value if start == end else value * end / start if start else end
                config = dataclasses.replace(config, **{final: follows})
        return config


def read_sweep(
    config: str | Path | None = None,
    lists: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | None = None,
    grid: bool | None = None,
) -> Sweep:
    """A sweep from a config and lists of values by field.

    ``config`` is that of :func:`resolve`; a file may hold ``axes`` (lists by field), ``seeds`` and
    ``grid`` beside the settings of the centre. In ``lists``, a list of one value sets the centre;
    the others are axes and replace the file's. Raises ValueError naming the setting that is wrong;
    FileError, which begins with the path, where the file is at fault.
    """
    base, given = read_config(config)
    axes = given.pop("axes", None)
    if not isinstance(axes, dict | None):
        raise FileError(f"{config}: axes must hold lists of values by setting, got {brief(axes)}")
    axes = axes or {}
    of_file = given.pop("seeds", 3), given.pop("grid", False)
    seeds = of_file[0] if seeds is None else seeds
    grid = of_file[1] if grid is None else grid
    for name in given:
        if name not in FIELDS:
            known = _listed([*FIELDS, "axes", "seeds", "grid", "config"])
            raise FileError(f"{config}: no setting is called {called(name)}; there are {known}")
    for name, values in (lists or {}).items():
        if not values:
            raise ValueError(f"sweep: {name} must have one value or more, got none")
        if len(values) == 1:
            given[name] = values[0]
            axes.pop(name, None)
        else:
            axes[name] = values
    try:
        return Sweep(resolve(base, given), axes, seeds, grid)
    except ValueError as error:
        if config is None or str(config) == base or lists:
            raise
        raise FileError(f"{config}: {error}") from error


def parse_values(name: str, text: str) -> list[Any]:
    """Parse a list of values of a setting, YAML without its brackets: 5,10,25 or [-1, 1],none."""
    try:
        values = parse_yaml(f"[{text}]")
    except ValueError as error:
        raise ValueError(f"{name} must be values separated by commas, got {text!r}") from error
    return [None if value == "none" else value for value in values]


def describe(point: Settings) -> str:
    """A point in words: steps=5, width=16."""
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
