"""What the presets share: their numbers, their samplers, and noise that comes before a chain."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlangevin import noise as _noise
from fastlangevin.arguments import GradClip
from fastlangevin.gradients.network import modules_of
from fastlangevin.sampler import Diagnostics, LangevinSampler
from fastlangevin.step import langevin_step_


class Wrapper(nn.Module):
    """A module around an energy, which may be a bound method: that one's module is looked into."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.owners = nn.ModuleList(modules_of(model))


class Labelled(Wrapper):
    """A network that takes its label as second argument, whatever that argument's name."""

    def forward(self, x: Tensor, label: Any = None) -> Tensor:
        return self.model(x, label)


class Summed(Wrapper):
    """An energy of any output shape, read as by a loop that differentiates ``model(x).sum()``."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return sum_to_chains(self.model(x, **given), len(x))


def sum_to_chains(out: Any, n: int) -> Any:
    """Values [n] with the sum of ``out``, and so with its gradient.

    Of [n, ...] each chain's values are added up. Of another shape, such as a mean over the batch,
    every chain gets an equal share of the sum. What is no tensor is left to the sampler's checks.
    """
    if not isinstance(out, Tensor) or n == 0:
        return out
    if out.ndim == 0 or out.shape[0] != n:
        return out if out.numel() == n == 1 else (out.sum() / n).expand(n)
    return out if out.numel() == n else out.flatten(1).sum(1)


class Samplers:
    """The sampler of a function that is handed its energy and settings anew at every call.

    The last one is kept: it remembers what it found out about its energy. sums: whether energies
    may have any shape, as the originals add up what the energy returns (:class:`Summed`).
    """

    def __init__(self, sums: bool = True) -> None:
        self._sums = sums
        self._last: tuple[Any, dict[str, Any], LangevinSampler] | None = None

    def __call__(
        self, energy: Callable[..., Tensor], wrap: tuple[Any, ...] | None = None, **settings: Any
    ) -> LangevinSampler:
        """wrap: (make, *arguments), where the sampler's energy is make(energy, *arguments)."""
        key = settings | {"wrap": wrap}
        if self._last is None or self._last[0] is not energy or not _alike(self._last[1], key):
            own = energy if wrap is None else wrap[0](energy, *wrap[1:])
            if self._sums and settings.get("gradient") != "network":
                own = Summed(own)
            self._last = energy, key, LangevinSampler(own, **settings)
        return self._last[2]


def _alike(a: Any, b: Any) -> bool:
    """a == b of settings, in which tensors are the same where they are one and unchanged."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(np.all(a == b))


def measure(sampler: LangevinSampler, x: Tensor, **options: Any) -> Diagnostics:
    """sampler.diagnose(x, **options); FloatingPointError, as of a call, for lost chains."""
    found = sampler.diagnose(x, **options)
    check_finite(found.x, sampler.steps)
    return found


def check_finite(x: Tensor, steps: int) -> None:
    """FloatingPointError unless all chains are finite at their end."""
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(
            f"LangevinSampler: chains are not finite after {steps} steps; a smaller step_size, "
            "clamp or grad_clip may help"
        )


def kick(
    x0: Tensor,
    noise_std: float,
    seed: int,
    noise: Tensor | None,
    first_chain: int = 0,
    k: int = 0,
) -> Tensor:
    """x0 + noise_std z_k in float32 or wider, a copy; z_k = noise[k] where noise is given."""
    x = x0.detach().to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    z = None if noise is None else noise[k]
    langevin_step_(
        x, None, step_size=0.0, noise_std=noise_std, seed=seed, step=k, noise=z,
        first_chain=first_chain,
    )  # fmt: skip
    return x


def run_noise_first(
    sampler: LangevinSampler,
    x0: Tensor,
    noise_std: float,
    seed: int,
    noise: Tensor | None,
    **options: Any,
) -> Tensor:
    """The chain whose noise comes before the gradient, and whose clamp comes only after the move.

        x <- x + b_k z_k,    x <- clamp(x - a clip(g(x)))

    is b_0 z_0 added to x0 and then, step by step, the move, its clamp and the next step's noise:
    ``sampler`` has noise_order="last" and the schedule (b_1, ..., b_{K-1}, 0).
    """
    x = kick(x0, noise_std, seed, noise, options.get("first_chain", 0))
    later = None if noise is None else noise.roll(-1, 0)
    return sampler(x, seed=seed, first_step=1, noise=later, **options)


def noise_first_settings(
    steps: int,
    step_size: float,
    noise_std: Sequence[float],
    clamp: tuple[float, float],
    grad_clip: GradClip | None = None,
) -> dict[str, Any]:
    """Settings of the sampler for :func:`run_noise_first`; noise_std: b_0, ..., b_{K-1}."""
    return {
        "steps": steps,
        "step_size": step_size,
        "noise_std": [*noise_std[1:], 0.0],
        "clamp": clamp,
        "grad_clip": grad_clip,
        "noise_order": "last",
    }


def labelled(
    model: Callable[..., Tensor], label: Any
) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """(wrap, model_kwargs) for an energy called model(x, label), or without a label model(x).

    Without, it may be recognised, and then has a faster gradient. One that cannot do without a
    second argument is called model(x, None).
    """
    if label is not None:
        return (Labelled,), {"label": label}
    return ((Labelled,) if _needs_two(model) else None), {}


def _needs_two(model: Callable[..., Tensor]) -> bool:
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        signature.bind(None, None)
    except (TypeError, ValueError):  # it takes one argument, or does not tell
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


def draw_slots(n: int, size: int, seed: int, first_chain: int = 0) -> Tensor:
    """n slots of 0..size-1, drawn with repetition."""
    words = _noise.words((n, 1), seed=seed, step=0, stream=_noise.ORDER, first_chain=first_chain)
    return words[:, 0] * size >> 32


def draw_distinct(n: int, size: int, seed: int, first_chain: int = 0) -> Tensor:
    """n slots of 0..size-1, no two alike."""
    words = _noise.words((1, size), seed=seed, step=0, stream=_noise.ORDER, first_chain=first_chain)
    return words[0].argsort(stable=True)[:n]


def draw_coins(n: int, rate: float, seed: int, device: Any = None, first_chain: int = 0) -> Tensor:
    """n coins [n], True with probability ``rate``."""
    u = _noise.uniform(
        (n, 1), seed=seed, step=0, stream=_noise.USER, device=device, first_chain=first_chain
    )
    return u[:, 0] < rate


def take_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call: given, or drawn from the generator, by default torch's."""
    if seed is not None and generator is not None:
        raise ValueError("presets: give seed or generator, not both")
    return _noise.draw_seed(generator) if seed is None else _noise.check_seed(seed)


@contextlib.contextmanager
def in_eval_mode(energy: Callable[..., Tensor]) -> Iterator[None]:
    """Put an energy's modules in eval mode, and each back as it was, also on an error."""
    training = [
        module
        for module in itertools.chain(*(root.modules() for root in modules_of(energy)))
        if getattr(module, "training", False)  # torch.jit.freeze leaves no mode
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
