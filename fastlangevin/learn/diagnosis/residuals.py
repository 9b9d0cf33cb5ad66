"""Compare the moments of samples and data: residuals, each with its noise floor.

After convergence, learning satisfies E_data[dE/dtheta] = E_q[dE/dtheta]. For E = -<theta, h> this
is E_data[h] = E_q[h]. Source: arXiv 1904.09770, section 4.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin.gradients.modules import call_network
from fastlangevin.gradients.untouched import left_as_found

_FEWEST = 16


class Residual(NamedTuple):
    """The distance between the means of a vector h over data and samples, in the units of h."""

    name: str
    elements: int  # number of elements of h
    residual: float  # |E_data h - E_samples h|, L2
    floor: float  # the root mean square of the residual if both means were equal
    scale: float  # |E_data h| + |E_samples h|

    @property
    def excess(self) -> float:
        """residual / floor, which is about 1 if the difference is due to chance."""
        return self.residual / self.floor if self.floor else math.inf if self.residual else 1.0


class _Mean(NamedTuple):
    mean: Tensor
    noise: float  # expected squared error of the mean


def layer_residuals(energy: nn.Module, data: Tensor, samples: Tensor) -> list[Residual]:
    """Return the residuals of the output of every layer, in the order of the forward pass.

    The floor is sqrt(s_data / n_data + s_samples / n_samples), where s is the variance summed over
    the elements of a layer. At these counts, it is the typical difference between two halves of
    one set. A module that is used more than once is measured at its last use.

    Args:
        energy: An nn.Module; it is left unchanged.
        data, samples: [n, ...], with n >= 16 for each.

    Raises TypeError or ValueError naming the argument.
    """
    check_sets(energy, data, samples)
    of_data, of_samples = _layers(energy, data), _layers(energy, samples)
    return [_residual(name, of_data[name], of_samples[name]) for name in of_data]


def parameter_residuals(
    energy: nn.Module, data: Tensor, samples: Tensor, groups: int = 8
) -> list[Residual]:
    """Return the residual of dE / dtheta for every parameter, the terms of the learning gradient.

    The floor is estimated from the mean gradients of ``groups`` groups of each set. Other
    arguments and errors are as for :func:`layer_residuals`.
    """
    check_sets(energy, data, samples)
    with left_as_found(energy, data.device):
        of_data, of_samples = (_gradients(energy, x, groups) for x in (data, samples))
    return [_residual(name, of_data[name], of_samples[name]) for name in of_data]


def top_layer(layers: list[Residual], energy: nn.Module) -> Residual | None:
    """Return the residual of the input of the last layer with weights: the h of <theta, h>."""
    weighted = {name.rpartition(".")[0] for name, _ in energy.named_parameters()}
    last = max((i for i, layer in enumerate(layers) if layer.name in weighted), default=0)
    return layers[last - 1] if last else None


def check_sets(energy: Any, data: Tensor, samples: Tensor) -> nn.Module:
    """Return the energy; TypeError or ValueError if the sets are unequal in shape or too small."""
    if not isinstance(energy, nn.Module):
        raise TypeError(f"diagnose: energy must be an nn.Module, got {type(energy).__name__}")
    for name, value in (("data", data), ("samples", samples)):
        if value.shape[1:] != data.shape[1:]:
            raise ValueError(
                f"diagnose: {name} must have the data's shape [n, "
                f"{', '.join(map(str, data.shape[1:]))}], got {list(value.shape)}"
            )
        if len(value) < _FEWEST:
            raise ValueError(
                f"diagnose: {name} must hold {_FEWEST} or more for a noise floor, got {len(value)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"diagnose: {name} must be finite, it holds NaN or infinity")
    return energy


def _layers(energy: nn.Module, x: Tensor) -> dict[str, _Mean]:
    means: dict[str, _Mean] = {}

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim > 0 and len(out) == len(x):
                rows = out.detach().reshape(len(x), -1).float()
                variance, mean = torch.var_mean(rows, 0)
                means[name] = _Mean(mean, float(variance.sum(dtype=torch.float64)) / len(x))

        return look

    leaves = [(name, m) for name, m in energy.named_modules() if name and not any(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        with left_as_found(energy, x.device), torch.no_grad():
            call_network(energy, x, {})
    finally:
        for handle in handles:
            handle.remove()
    return means


def _gradients(energy: nn.Module, x: Tensor, groups: int) -> dict[str, _Mean]:
    """Return the mean gradient of every parameter that requires one, and its noise."""
    named = {name: p for name, p in energy.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    squares: dict[str, float] = defaultdict(float)
    size = len(x) // groups
    for part in x[: size * groups].split(size):
        with torch.enable_grad():
            mean = call_network(energy, part, {}).mean()
            grads = torch.autograd.grad(mean, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                sums[name] += grad
                squares[name] += float(grad.double().square().sum())
    means = {}
    for name, total in sums.items():
        mean = total / groups
        scatter = squares[name] - groups * float(mean.double().square().sum())
        means[name] = _Mean(mean, max(scatter, 0.0) / (groups - 1) / groups)
    return means


def _residual(name: str, data: _Mean, samples: _Mean) -> Residual:
    return Residual(
        name,
        data.mean.numel(),
        float((data.mean - samples.mean).norm()),
        math.sqrt(data.noise + samples.noise),
        float(data.mean.norm() + samples.mean.norm()),
    )
