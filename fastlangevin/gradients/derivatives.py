"""First and second derivatives of the curved activations."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlangevin.gradients.layers import Activation


def derivatives(layer: Activation) -> tuple[Tensor, Tensor]:
    """Return (f', f'') of a curved activation at the input of its last run, as new tensors."""
    saved, layer.saved = layer.saved, None  # its input or its output
    assert saved is not None
    if layer.kind == "gelu" and layer.settings[0]:
        return _gelu_tanh(saved)
    if layer.kind == "silu":
        slope, curvature = _silu(saved * layer.beta)
        return slope, curvature.mul_(layer.beta)
    return _DERIVATIVES[layer.kind](saved, *layer.settings)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    y = x * s
    slope = torch.addcmul(s, s, x - y)
    # (1 - s) (2 f' - y)
    return slope, y.sub_(slope, alpha=2).mul_(s.sub_(1))


def _softplus(x: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = x * beta > threshold
    s = torch.sigmoid(x * beta)
    curvature = torch.addcmul(s, s, s, value=-1).mul_(beta).masked_fill_(linear, 0)
    return s.masked_fill_(linear, 1), curvature


def _elu(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    slope = y + alpha
    return slope.masked_fill(y > 0, 1), slope.masked_fill_(y >= 0, 0)


def _tanh(y: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 - y * y
    return slope, (y * slope).mul_(-2)


def _sigmoid(y: Tensor) -> tuple[Tensor, Tensor]:
    slope = y - y * y
    return slope, slope * (1 - 2 * y)


def _gelu(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    density = (x * x).mul_(-0.5).exp_().mul_((2 * torch.pi) ** -0.5)
    slope = torch.special.ndtr(x).addcmul_(x, density)
    return slope, (2 - x * x).mul_(density)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of f = x (1 + tanh u) / 2 with u = k (x + c x^3)."""
    k, c = (2 / torch.pi) ** 0.5, 0.044715
    square = x * x
    t = torch.tanh(k * x * (1 + c * square))
    once, twice = k * (1 + 3 * c * square), 6 * k * c * x
    rest = 1 - t * t
    slope = 0.5 * (1 + t + x * rest * once)
    return slope, rest * (once + 0.5 * x * (twice - 2 * t * once * once))


_DERIVATIVES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "softplus": _softplus,
    "elu": _elu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
}
