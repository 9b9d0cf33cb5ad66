"""The types of options, and the options that several commands share."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number
from typing_extensions import TypedDict

from fastlangevin.cli.outputs import Result, choose_out, table

FRAMES = 50  # the largest number of frames of a GIF after the first


def convert(kind: Any, tokens: "tuple[Token, ...]") -> Any:
    """Convert the text of an option; cyclopts alone would round 2.5 to a whole number."""
    text, kinds = tokens[0].value, get_args(kind) or (kind,)
    try:
        return int(text) if int in kinds else float(text) if float in kinds else text
    except ValueError:
        what = "a whole number" if int in kinds else "a number"
        raise ValueError(f"expected {what}, got {text!r}") from None


Int = Annotated[int, Parameter(converter=convert)]
Count = Annotated[Int, Parameter(validator=Number(gte=1))]
Natural = Annotated[Int, Parameter(validator=Number(gte=0))]
Int2 = Annotated[Int, Parameter(validator=Number(gte=2))]
Int8 = Annotated[Int, Parameter(validator=Number(gte=8))]
Int16 = Annotated[Int, Parameter(validator=Number(gte=16))]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

Run = Annotated[
    Path,
    Parameter(
        help="A run's folder, a checkpoint, a model in the package (digits, cifar10, faces), or "
        "hf:owner/name."
    ),
]
Timeout = Annotated[
    float, Parameter(help="Longest wait for another process of the job, in seconds.")
]
OnCorrupt = Annotated[
    str | None,
    Parameter(
        help="What to do with pictures that cannot be decoded: error or skip (default: the run's)."
    ),
]
Device = Annotated[str, Parameter(help="Where to compute: auto, cpu, cuda or cuda:N.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Chains:
    """Options for running a model's chains and showing the images.

    Args:
        seed: Seed of the starting points and the noise.
        steps: Number of Langevin steps, 1 or more (default: the run's). Like the cooldown, this is
            for the run's own chains, and not for those of the models that they start from.
        cooldown: Steps without noise to add to every chain. Their size falls from half of the step
            size to a twentieth, which makes samples cleaner.
        tile: Enlarge small images to about this many pixels per side.
        averaged: Use the moving average of the weights, if there is one.
        overwrite: Replace the file if it exists.
    """

    seed: Int = 0
    steps: Count | None = None
    cooldown: Natural = 0
    tile: Count = 32
    device: Device = "auto"
    averaged: bool = True
    overwrite: Flag = False

    def load(self, run: Path) -> Any:
        """Load the sampler of a run, a checkpoint or a model in the package."""
        from fastlangevin.anneal import cooldown
        from fastlangevin.learn.build import choose_device
        from fastlangevin.learn.model import load

        changes: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
        sampler = load(run, device=choose_device(self.device), averaged=self.averaged, **changes)
        if not self.cooldown:
            return sampler
        return type(sampler)(sampler.energy, **cooldown(sampler.settings(), self.cooldown))

    def open(self, run: Path, out: Path | None, default: str, *suffixes: str) -> tuple[Any, Path]:
        """Return the sampler of :meth:`load`, and the file to write as :func:`choose_out` does."""
        out = choose_out(out, default, self.overwrite, *suffixes)
        return self.load(run), out

    def save(self, result: Any, out: Path) -> Result:
        """Save the result of a task, and return its rows as the command's."""
        result.save(out, self.tile)
        return Result(table(*result.rows), [out])


class ShortFitOptions(TypedDict, total=False):
    """Options of a fit of starting points, as far as the user gave them."""

    restarts: Annotated[
        Count, Parameter(help="Fits per image; the best one counts (default: 4; restore: 1).")
    ]
    iterations: Annotated[Count, Parameter(help="Descent steps of a fit (default: 200).")]


class FitOptions(ShortFitOptions, total=False):
    """All options of a fit of starting points, as far as the user gave them.

    Args:
        optimizer: Method of the descent: adam, or gd for plain gradient descent (default: adam).
        lr: Learning rate of the descent (default: 0.1 for adam, 0.05 for gd).
        noise: Noise in the chain: off, or frozen (always the same) (default: off).
        grad_through: Gradient of the chain: exact, through all its steps, or straight, with the
            derivative taken as 1 (default: exact).
        checkpoint: States kept for the gradient: none, step, auto, a number of states, or a size
            such as 2GiB (default: auto).
    """

    optimizer: str
    lr: float
    noise: str
    grad_through: str
    checkpoint: int | str


def more(group: str) -> Parameter:
    """Make each key of a TypedDict an option, in a group of the help."""
    return Parameter(name="*", group=Group(group, sort_key=2))


def settings_options(lists: bool = False) -> Any:
    """Return a TypedDict of the fields of TrainConfig, which makes each an option.

    lists: whether the options are texts that hold lists of values, as for a sweep.
    """
    from fastlangevin.train_config import FIELDS, NETWORK, TYPES

    options = {}
    for name, field in FIELDS.items():
        kind, text = TYPES[name], field.metadata["help"]
        if name in NETWORK:
            kind = get_args(kind)[0]
        text = text[0].upper() + text[1:]
        parameter = Parameter(help=f"{text}.")
        if lists:
            kind = str
        elif type(None) in get_args(kind) and name != "clamp":
            parameter = Parameter(
                help=f"{text}; or none.",  # "none" unsets the value of the config
                converter=lambda *args: None if args[1][0].value == "none" else convert(*args),
            )
        elif kind is int:
            kind = Int
        options[name] = Annotated[kind, parameter]
    return TypedDict("Settings", options, total=False) | None  # type: ignore[operator]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the user gave, which are not None."""
    return {name: value for name, value in options.items() if value is not None}


def belong(names: Iterable[str], owner: str) -> None:
    """Raise ValueError if any options are named, because they need ``owner``, which is missing."""
    if options := ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names)):
        raise ValueError(f"{options} {'belong' if ',' in options else 'belongs'} to {owner}")
