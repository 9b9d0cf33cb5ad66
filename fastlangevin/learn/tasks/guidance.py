"""Guide chains by terms that are added to their energy, or by clamped pixels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.arguments import check_positive
from fastlangevin.learn.tasks.measurements import Mask, Operator
from fastlangevin.names import check_name
from fastlangevin.sampler import LangevinSampler

STATISTICS = ("gram", "mean-std")
Energy = Callable[..., Tensor]


def with_term(sampler: LangevinSampler, term: Energy) -> LangevinSampler:
    """Return this sampler on energy + term, or on f - term if it maximizes f."""
    sign = -1.0 if sampler.maximize else 1.0
    return _on_energy(sampler, _Sum(sampler.energy, term, sign))


def clamped(sampler: LangevinSampler, y: Tensor, mask: Mask) -> LangevinSampler:
    """Return this sampler on the energy x -> energy(m y + (1 - m) x), with the mask m.

    The known pixels of x have no gradient, because the energy sees the pixels of y in their place.
    The hidden pixels of the chains are the same as if the known ones were reset to y before every
    step. The known pixels of the state only accumulate noise; the caller must replace them by y.
    """
    return _on_energy(sampler, _Clamped(sampler.energy, y, mask))


class DataTerm(nn.Module):
    """The energy |y - A x|^2 / zeta^2, summed over the elements of a measurement: [n, ...] -> [n].

    At the temperature of the chain, T = b^2 / (2 a), it corresponds to Gaussian noise on y with
    variance zeta^2 T / 2.
    """

    y: Tensor

    def __init__(self, y: Tensor, operator: Operator, zeta: float) -> None:
        super().__init__()
        self.operator, self.zeta = operator, zeta
        self.register_buffer("y", y)

    def forward(self, x: Tensor) -> Tensor:
        squares = (self.y - self.operator(x.to(self.y.dtype))).square()
        return squares.flatten(1).sum(1) / self.zeta**2


class StyleTerm(nn.Module):
    """An energy that is small if the statistics S(x) of x's features are near S, a style's.

        weight * sum over layers of |S(x) - S|^2 / (|S(x)|^2 + |S|^2)

    Each layer contributes between 0 and 2, whereas squared differences of Gram matrices grow with
    the fourth power of x. The energy is bounded but the chain is not: with a large weight, its
    steps can take it far outside [-1, 1].

    network: a module with an nn.Sequential called ``layers``, such as ConvEnergy. The features are
        the outputs of all its convolutions but the last.
    style: images [m >= 1, C, H, W] of the network's shape, whose statistics are averaged.
    weight: factor of the energy, above 0.
    statistics: "gram", the products of features averaged over positions (Gatys et al., 2016), or
        "mean-std", the mean and standard deviation of each channel (Huang and Belongie, 2017).

    Raises TypeError or ValueError for another network, weight or statistics. The style is checked
    by `transfer`.
    """

    def __init__(
        self, network: nn.Module, style: Tensor, weight: float, statistics: str = "gram"
    ) -> None:
        super().__init__()
        layers = getattr(network, "layers", None)
        modules = list(layers) if isinstance(layers, nn.Sequential) else []
        if sum(isinstance(layer, nn.Conv2d) for layer in modules) < 2:
            raise TypeError(
                "StyleTerm: network must have an nn.Sequential called layers, with two Conv2d or "
                f"more, got {type(network).__name__}"
            )
        self.weight = check_positive("StyleTerm", "weight", weight)
        check_name("StyleTerm: statistics", statistics, STATISTICS)
        self.layers, self.statistics = nn.Sequential(*modules), statistics
        with torch.no_grad():
            self.targets = [summary.mean(0) for summary in self._statistics(style)]

    def forward(self, x: Tensor) -> Tensor:
        distances = []
        for summary, target in zip(self._statistics(x), self.targets, strict=True):
            size = summary.square().flatten(1).sum(1) + target.square().sum()
            distances.append((summary - target).square().flatten(1).sum(1) / size)
        return self.weight * torch.stack(distances).sum(0)

    def _statistics(self, x: Tensor) -> list[Tensor]:
        convolutions = [i for i, m in enumerate(self.layers) if isinstance(m, nn.Conv2d)]
        summaries = []
        for i, layer in enumerate(list(self.layers)[: convolutions[-1]]):
            x = layer(x)
            if i in convolutions:
                summaries.append(self._summary(x.flatten(2)))
        return summaries

    def _summary(self, features: Tensor) -> Tensor:
        if self.statistics == "gram":
            return features @ features.mT / features.shape[-1]
        variance = features.var(-1, correction=0) + 1e-8  # the root is not differentiable at 0
        return torch.stack([features.mean(-1), variance.sqrt()], 1)


class _Wrapped(nn.Module):
    """An energy that wraps another one and has the same shape of state."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy
        if hasattr(energy, "shape"):
            self.shape = energy.shape
        if isinstance(energy, nn.Module):
            self.training = energy.training  # the modules of the energy keep their modes


class _Sum(_Wrapped):
    def __init__(self, energy: Energy, term: Energy, sign: float) -> None:
        super().__init__(energy)
        self.term, self.sign = term, sign

    def forward(self, x: Tensor, **model_kwargs: Any) -> Tensor:
        energies = self.energy(x, **model_kwargs).reshape(len(x))
        with torch.autocast(x.device.type, enabled=False):
            return energies + self.sign * self.term(x)


class _Clamped(_Wrapped):
    y: Tensor

    def __init__(self, energy: Energy, y: Tensor, mask: Mask) -> None:
        super().__init__(energy)
        self.register_buffer("y", y)
        self.mask = mask

    def forward(self, x: Tensor, **model_kwargs: Any) -> Tensor:
        return self.energy(self.mask.fill(x, self.y.to(x.dtype)), **model_kwargs)


def _on_energy(sampler: LangevinSampler, energy: nn.Module) -> LangevinSampler:
    # These energies read tensors that are not parameters, which only autograd supports.
    return LangevinSampler(energy, **sampler.settings() | {"gradient": "autograd"})
