"""Code shared by the presets: random numbers, energies as the originals call them, samplers."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import fastlangevin.noise as _noise
from fastlangevin.gradients.modules import module_of, submodules_of
from fastlangevin.inputs import choose_seed
from fastlangevin.names import unknown_keyword
from fastlangevin.sampler import LangevinSampler
from fastlangevin.step import langevin_step_

T = TypeVar("T")


class Randomness(NamedTuple):
    """The random numbers of one call.

    noise: standard normals [K, n, ...] that replace those of the seed, or None. first_chain: the
    number of the first chain, which tells processes that share a seed apart.
    """

    seed: int
    noise: Tensor | None = None
    first_chain: int = 0


def random_keywords(call: Callable[..., T]) -> Callable[..., T]:
    """Add the keywords ``seed``, ``generator``, ``noise`` and ``first_chain`` to a function.

    ``call`` receives them as one keyword, ``random``, a :class:`Randomness`.
    """

    @functools.wraps(call)
    def with_keywords(
        *args: Any,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
        **kwargs: Any,
    ) -> T:
        for name in kwargs:
            if name not in names:
                raise unknown_keyword(call.__qualname__.partition(".")[0], name, names)
        random = Randomness(choose_seed("presets", seed, generator), noise, first_chain)
        return call(*args, random=random, **kwargs)

    signature = inspect.signature(call)
    shown = [p for p in signature.parameters.values() if p.name != "random"]
    added = inspect.signature(with_keywords, follow_wrapped=False).parameters.values()
    shown += [p for p in added if p.kind is p.KEYWORD_ONLY]
    names = [p.name for p in shown if p.name != "self"]
    with_keywords.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return with_keywords


def draw_slots(n: int, size: int, seed: int, first_chain: int = 0) -> Tensor:
    """Draw n of the slots 0..size-1 with repetition."""
    words = _noise.words((n, 1), seed=seed, step=0, stream=_noise.ORDER, first_chain=first_chain)
    return words[:, 0] * size >> 32


class Wrapper(nn.Module):
    """A module around an energy. If the energy is a bound method, its module is a submodule."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.owner = module_of(model)


class Labelled(Wrapper):
    """A network that takes its label as the second positional argument."""

    def forward(self, x: Tensor, label: Any = None) -> Tensor:
        return self.model(x, label)


class Summed(Wrapper):
    """An energy of any output shape, as a loop that differentiates ``model(x).sum()`` reads it."""

    def forward(self, x: Tensor, **model_kwargs: Any) -> Tensor:
        return sum_to_chains(self.model(x, **model_kwargs), len(x))


def sum_to_chains(out: Any, n: int) -> Any:
    """Reduce ``out`` to one value per chain [n], with the same sum and so the same gradient.

    An output [n, ...] is summed over each chain's values. Any other shape, such as a mean over the
    batch, is divided equally among the chains. The sampler's checks reject what is not a tensor.
    """
    if not isinstance(out, Tensor) or n == 0:
        return out
    if out.ndim == 0 or out.shape[0] != n:
        return out if out.numel() == n == 1 else (out.sum() / n).expand(n)
    return out if out.numel() == n else out.flatten(1).sum(1)


def labelled(
    model: Callable[..., Tensor], label: Any
) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """(wrap, model_kwargs) for an energy called model(x, label), or model(x) without a label.

    Without a label the energy is left unwrapped, so that it can be recognised and get a faster
    gradient. An energy that requires a second argument is called model(x, None).
    """
    if label is not None:
        return (Labelled,), {"label": label}
    return ((Labelled,) if _requires_label(model) else None), {}


def _requires_label(model: Callable[..., Tensor]) -> bool:
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        signature.bind(None, None)
    except (TypeError, ValueError):  # it takes one argument, or has no signature
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


@contextlib.contextmanager
def in_eval_mode(energy: Callable[..., Tensor]) -> Iterator[None]:
    """Put an energy's modules in eval mode, and restore each one's mode, also after an error."""
    # torch.jit.freeze removes the attribute.
    training = [m for m in submodules_of(energy) if getattr(m, "training", False)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Samplers:
    """Makes the sampler of a function that receives its energy and settings at every call.

    It keeps the last sampler, because a sampler remembers what it has learned about its energy.
    sums: whether energies may have any output shape, because the original sums what the energy
    returns (:class:`Summed`).
    """

    def __init__(self, sums: bool = True) -> None:
        self._sums = sums
        self._last: tuple[Any, dict[str, Any], LangevinSampler] | None = None

    def __call__(
        self, energy: Callable[..., Tensor], wrap: tuple[Any, ...] | None = None, **settings: Any
    ) -> LangevinSampler:
        """wrap: (make, *arguments); the sampler's energy is then make(energy, *arguments)."""
        key = settings | {"wrap": wrap}
        last = self._last
        if last is None or last[0] is not energy or not _same_settings(last[1], key):
            wrapped = energy if wrap is None else wrap[0](energy, *wrap[1:])
            if self._sums and settings.get("gradient") != "network":
                wrapped = Summed(wrapped)
            self._last = last = energy, key, LangevinSampler(wrapped, **settings)
        return last[2]


def _same_settings(a: Any, b: Any) -> bool:
    """Whether settings are equal. Tensors are equal only if they are the same object."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_settings(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same_settings, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(np.all(a == b))


def kick(x0: Tensor, noise_std: float, random: Randomness, k: int = 0) -> Tensor:
    """x0 + noise_std z_k as a copy in float32 or wider; z_k is noise[k] if noise is given."""
    x = x0.detach().to(torch.promote_types(x0.dtype, torch.float32), copy=True)
    z = None if random.noise is None else random.noise[k]
    langevin_step_(
        x, None, step_size=0.0, noise_std=noise_std, seed=random.seed, step=k, noise=z,
        first_chain=random.first_chain,
    )  # fmt: skip
    return x


def run_noise_first(
    sampler: LangevinSampler, x0: Tensor, noise_std: float, random: Randomness, **options: Any
) -> Tensor:
    """Run a chain that adds noise before it takes the gradient, and clamps only after the move.

        x <- x + b_k z_k,    x <- clamp(x - a clip(g(x)))

    noise_std is b_0. This adds b_0 z_0 to x0. Each step then makes its move, clamps, and adds the
    next step's noise: ``sampler`` has the settings of :func:`noise_after_move`.
    """
    x = kick(x0, noise_std, random)
    if random.noise is not None:
        random = random._replace(noise=random.noise.roll(-1, 0))
    return sampler(x, first_step=1, **random._asdict(), **options)


def noise_after_move(noise_std: Sequence[float]) -> dict[str, Any]:
    """Settings of noise for the sampler of :func:`run_noise_first`, from b_0, ..., b_{K-1}."""
    return {"noise_std": [*noise_std[1:], 0.0], "noise_order": "last"}
