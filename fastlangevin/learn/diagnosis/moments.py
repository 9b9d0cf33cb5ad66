"""Do the samples have the data's moments? Residuals, each beside what chance alone would leave.

A converged learner has E_data[dE/dtheta] = E_q[dE/dtheta]; for E = -<theta, h> that is
E_data[h] = E_q[h]. Source: arXiv 1904.09770, section 4.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin.gradients.network import call_network
from fastlangevin.gradients.untouched import left_as_found

_FEWEST = 16


class Residual(NamedTuple):
    """How far a vector's means over data and samples are apart, in the vector's own units."""

    name: str
    elements: int
    residual: float  # |E_data h - E_samples h|, L2
    floor: float  # its root mean square if the means were equal: two halves of one set, in effect
    scale: float  # |E_data h| + |E_samples h|

    @property
    def excess(self) -> float:
        """residual / floor: about 1 where nothing but chance is seen."""
        return self.residual / self.floor if self.floor else math.inf if self.residual else 1.0


class _Mean(NamedTuple):
    mean: Tensor
    noise: float  # the mean's expected squared error


def layer_residuals(energy: nn.Module, data: Tensor, samples: Tensor) -> list[Residual]:
    """Residuals of every layer's output, in the order of the forward pass.

    data and samples [n, ...], 16 or more of each. The floor is sqrt(s_data / n_data + s_samples /
    n_samples), s the variances summed over a layer: what the difference of two halves of one set,
    over all ways to halve it, amounts to at these counts. A module used more than once counts by
    its last use. Raises TypeError or ValueError naming the argument; leaves the energy as it was.
    """
    check_sets(energy, data, samples)
    of_data, of_samples = _layers(energy, data), _layers(energy, samples)
    return [_residual(name, of_data[name], of_samples[name]) for name in of_data]


def parameter_residuals(
    energy: nn.Module, data: Tensor, samples: Tensor, groups: int = 8
) -> list[Residual]:
    """Residuals of dE / dtheta, per parameter: of the estimating equation itself.

    The floor comes from the means of ``groups`` groups of each set, in all of which a parameter's
    gradient is computed once. Arguments and errors as for :func:`layer_residuals`.
    """
    check_sets(energy, data, samples)
    with left_as_found(energy, data.device):
        of_data, of_samples = (_gradients(energy, x, groups) for x in (data, samples))
    return [_residual(name, of_data[name], of_samples[name]) for name in of_data]


def top_layer(layers: list[Residual], energy: nn.Module) -> Residual | None:
    """The features that the last layer with weights is linear in: the literal h of <theta, h>."""
    weighted = {name.rpartition(".")[0] for name, _ in energy.named_parameters()}
    last = max((i for i, layer in enumerate(layers) if layer.name in weighted), default=0)
    return layers[last - 1] if last else None


def check_sets(energy: Any, data: Tensor, samples: Tensor) -> nn.Module:
    """The energy; TypeError or ValueError unless the sets can be compared, and a floor be told."""
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
                f"diagnose: {name} must be {_FEWEST} or more for a noise floor, got {len(value)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"diagnose: {name} must be finite, it holds NaN or infinity")
    return energy


def _layers(energy: nn.Module, x: Tensor) -> dict[str, _Mean]:
    found: dict[str, _Mean] = {}

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim > 0 and len(out) == len(x):
                rows = out.detach().reshape(len(x), -1).float()
                variance, mean = torch.var_mean(rows, 0)
                found[name] = _Mean(mean, float(variance.sum(dtype=torch.float64)) / len(x))

        return look

    leaves = [(name, m) for name, m in energy.named_modules() if name and not any(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        with left_as_found(energy, x.device), torch.no_grad():
            call_network(energy, x, {})
    finally:
        for handle in handles:
            handle.remove()
    return found


def _gradients(energy: nn.Module, x: Tensor, groups: int) -> dict[str, _Mean]:
    """Of every parameter that requires grad; of the groups' gradients only sums are kept."""
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
    found = {}
    for name, total in sums.items():
        mean = total / groups
        spread = squares[name] - groups * float(mean.double().square().sum())
        found[name] = _Mean(mean, max(spread, 0.0) / (groups - 1) / groups)
    return found


def _residual(name: str, data: _Mean, samples: _Mean) -> Residual:
    return Residual(
        name,
        data.mean.numel(),
        float((data.mean - samples.mean).norm()),
        math.sqrt(data.noise + samples.noise),
        float(data.mean.norm() + samples.mean.norm()),
    )
