"""The plan of a sweep: its runs, their settings and their seeds."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlangevin.learn.bounded_yaml import parse_yaml
from fastlangevin.learn.config import FIELDS, TrainConfig, no_setting, read_config, resolve
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import as_json, brief
from fastlangevin.train_config import NETWORK

VERSION = 1
# lr and data_noise change linearly to a final value during a run. A sweep scales both values.
_FINAL = {"lr": "lr_final", "data_noise": "data_noise_final"}

_MOST_RUNS = 10_000

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str  # name of its folder
    settings: Settings  # values of the swept fields
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """Defines the runs of a sweep.

    centre: the settings that are not swept.
    axes: lists of values by field of TrainConfig. Each axis is swept on its own, with the other
        fields at the centre.
    seeds: number of runs of each point, with the seeds centre.seed, centre.seed + 1, ...
    grid: sweep all combinations of the axes instead.
    features: name of the features by which samples are also compared with the data, as for
        ``evaluate``; None for none.
    together: fields that change with an axis, by that axis: {"steps": {"data_noise": [0.15, 0.1]}}
        holds one value for each of steps.

    If lr or data_noise changes, its final value is scaled in proportion, unless that is given too.
    Raises ValueError naming the field and the invalid value.
    """

    centre: TrainConfig
    axes: dict[str, list[Any]]
    seeds: int = 3
    grid: bool = False
    features: str | None = None
    together: dict[str, dict[str, list[Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.seeds, int) or isinstance(self.seeds, bool) or self.seeds < 1:
            raise ValueError(f"sweep: seeds must be at least 1, got {brief(self.seeds)}")
        if not isinstance(self.grid, bool):
            raise ValueError(f"sweep: grid must be true or false, got {brief(self.grid)}")
        if not isinstance(self.features, str | None):
            raise ValueError(f"sweep: features must be a name, got {brief(self.features)}")
        if not isinstance(self.axes, Mapping) or not self.axes:
            raise ValueError("sweep: no field is swept; give some field two or more values")
        axes = {name: self._cast_axis(name, values) for name, values in self.axes.items()}
        lengths = [len(values) for values in axes.values()]
        count = self.seeds * (math.prod(lengths) if self.grid else sum(lengths))
        if count > _MOST_RUNS:
            raise ValueError(f"sweep: must have at most {_MOST_RUNS} runs, got {brief(count)}")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "together", self._cast_together())

    def _cast_together(self) -> dict[str, dict[str, list[Any]]]:
        """Return ``together`` in the types of its fields; ValueError for invalid values."""
        if not isinstance(self.together, Mapping):
            raise ValueError(
                f"sweep: together must hold lists by field by axis, got {brief(self.together)}"
            )
        cast: dict[str, dict[str, list[Any]]] = {}
        axis_of: dict[str, str] = {}
        for axis, fields in self.together.items():
            if axis not in self.axes:
                raise ValueError(f"sweep: together has {axis}, which is not swept")
            if not isinstance(fields, Mapping):
                raise ValueError(
                    f"sweep: together.{axis} must hold lists by field, got {brief(fields)}"
                )
            for name, values in fields.items():
                if name in self.axes:
                    raise ValueError(f"sweep: {name} is swept, and cannot change with {axis}")
                if axis_of.setdefault(name, axis) != axis:
                    raise ValueError(
                        f"sweep: {name} cannot change with both {axis_of[name]} and {axis}"
                    )
                cast_values = self._cast_values(name, values)
                if len(cast_values) != len(self.axes[axis]):
                    raise ValueError(
                        f"sweep: {name} must have a value for each of the {len(self.axes[axis])} "
                        f"values of {axis}, got {len(cast_values)}"
                    )
                cast.setdefault(axis, {})[name] = cast_values
        return cast

    def _cast_axis(self, name: str, values: Any) -> list[Any]:
        cast = self._cast_values(name, values)
        for value in cast:
            if cast.count(value) > 1:
                raise ValueError(f"sweep: {name} must have distinct values, got {value} twice")
        return cast

    def _cast_values(self, name: str, values: Any) -> list[Any]:
        """Return the values of a field in its type; ValueError for invalid ones."""
        if name not in FIELDS:
            raise ValueError(no_setting("sweep", [name]))
        if name == "seed":
            raise ValueError("sweep: seed cannot be an axis; set seeds, the number per point")
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"sweep: {name} must have a list of values, got {brief(values)}")
        if not values:
            raise ValueError(f"sweep: {name} must have one value or more, got none")
        return [getattr(self._config({name: value}), name) for value in values]

    def lines(self, name: str) -> list[list[Settings]]:
        """Return the points along an axis: a line through the centre, or all lines of the grid."""
        others = {other: [getattr(self.centre, other)] for other in self.axes}
        if self.grid:
            others = self.axes
        other_axes = [[(other, v) for v in others[other]] for other in self.axes if other != name]
        return [
            [{other: (dict(fixed) | {name: value})[other] for other in self.axes}
             for value in self.axes[name]]
            for fixed in itertools.product(*other_axes)
        ]  # fmt: skip

    def points(self) -> list[Settings]:
        """Return each combination of the swept fields once."""
        points: list[Settings] = []
        for name in self.axes:
            for point in itertools.chain(*self.lines(name)):
                if point not in points:
                    points.append(point)
        return points

    def runs(self) -> list[Run]:
        """Return all runs in a fixed order, with the seeds of a point next to each other."""
        runs: list[Run] = []
        for point in self.points():
            for seed in range(self.centre.seed, self.centre.seed + self.seeds):
                words = [f"{name}={value}" for name, value in point.items()]
                label = re.sub(r"[^\w.+=-]+", "_", "-".join([*words, f"seed={seed}"]))
                config = dataclasses.replace(self._config(self._with_together(point)), seed=seed)
                runs.append(Run(f"{len(runs):03d}-{label[:120]}", point, config))
        return runs

    def plan(self) -> dict[str, Any]:
        """Return the sweep, JSON-ready."""
        return dict(as_json({"version": VERSION, **dataclasses.asdict(self)}))

    def _with_together(self, point: Settings) -> Settings:
        """Return a point with the fields that change together with its axes."""
        settings = dict(point)
        for axis, fields in self.together.items():
            if point[axis] in self.axes[axis]:  # the centre need not be one of them
                index = self.axes[axis].index(point[axis])
                settings |= {name: values[index] for name, values in fields.items()}
        return settings

    def _config(self, point: Settings) -> TrainConfig:
        settings = dataclasses.asdict(self.centre)
        if point.get("energy") is not None:  # it replaces the ConvEnergy of the centre
            settings |= dict.fromkeys(NETWORK)
        try:
            config = resolve(overrides=settings | point)
        except ValueError as error:
            raise ValueError(f"sweep: at {describe(point)}: {error}") from error
        for name, final in _FINAL.items():
            start, end = getattr(self.centre, name), getattr(self.centre, final)
            value = getattr(config, name)
            if value != start and final not in point:
                follows = value if start == end else value * end / start if start else end
                config = dataclasses.replace(config, **{final: follows})
        return config


def read_sweep(
    config: str | Path | None = None,
    lists: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | None = None,
    grid: bool | None = None,
    features: str | None = None,
) -> Sweep:
    """Make a sweep from a config, as for :func:`resolve`, and lists of values by field.

    A file may also hold ``axes`` (lists by field), ``seeds``, ``grid`` and ``features``, which the
    arguments replace, and ``together``. A list of one value sets the centre; longer lists are axes.
    An axis that is replaced by one value loses the fields that change together with it.

    Raises ValueError naming the invalid setting, and FileError, whose message begins with the path,
    if the file is at fault.
    """
    base, changes = read_config(config)
    axes, together = changes.pop("axes", None), changes.pop("together", None)
    if not isinstance(axes, dict | None):
        raise FileError(f"{config}: axes must hold lists of values by setting, got {brief(axes)}")
    if not isinstance(together, dict | None):
        raise FileError(
            f"{config}: together must hold lists by field by axis, got {brief(together)}"
        )
    axes, together = axes or {}, together or {}
    file_seeds, file_grid = changes.pop("seeds", 3), changes.pop("grid", False)
    seeds = file_seeds if seeds is None else seeds
    grid = file_grid if grid is None else grid
    file_features = changes.pop("features", None)
    features = file_features if features is None else features
    for name in changes:
        if name not in FIELDS:
            allowed = [*FIELDS, "axes", "seeds", "grid", "features", "together", "config"]
            raise FileError(no_setting(str(config), [name], allowed))
    for name, values in (lists or {}).items():
        if not values:
            raise ValueError(f"sweep: {name} must have one value or more, got none")
        for axis, fields in together.items():
            if isinstance(fields, dict) and name in fields:
                raise ValueError(f"sweep: {name} changes together with {axis} in {config}")
        if len(values) == 1:
            changes[name] = values[0]
            axes.pop(name, None)
            together.pop(name, None)
        else:
            axes[name] = values
    try:
        return Sweep(resolve(base, changes), axes, seeds, grid, features, together)
    except ValueError as error:
        if config is None or str(config) == base or lists:
            raise
        raise FileError(f"{config}: {error}") from error


def parse_values(name: str, text: str) -> list[Any]:
    """Parse a list of values of a setting, YAML without its brackets: 5,10,25 or [-1, 1],none."""
    try:
        values: list[Any] = parse_yaml(f"[{text}]")
    except ValueError as error:
        raise ValueError(f"{name} must be values separated by commas, got {text!r}") from error
    return values


def describe(point: Settings) -> str:
    """Return a point as text, such as steps=5, width=16."""
    return ", ".join(f"{name}={value}" for name, value in point.items())
