"""The lean score as a differentiable function of the state and the weights.

Backward through g = d E / d x takes, for a v, d / d x and d / d theta of <v, g>. With h the values
of the graph, hbar their gradients (of E) and a dot for a derivative in the direction v of x,

    d / d x = xbar dot = H v,    d / d W = corr(a dot, hbar) + corr(a, hbar dot)

for a convolution that reads a: a forward pass of tangents, and a backward pass of the tangents of
gradients (Pearlmutter, Neural Computation 6, 1994). These begin where an activation is curved: of
a piecewise linear net there are none, nothing to be done for x, and its a is not kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.autograd import network_precision
from fastlangevin.gradients.explicit import ExplicitGradient, Passes, Plan, deliver, whole
from fastlangevin.gradients.graph.aten_ops import NONLINEAR
from fastlangevin.gradients.graph.ir import Constant, Graph
from fastlangevin.gradients.layers import Activation, Conv, Linear, LogSumExp, laid_out, spread

_CURVED = NONLINEAR - {"relu", "leaky_relu"}


def refusal(graph: Graph, precision: str | None) -> str | None:
    """None where :class:`SecondOrderGradient` serves a graph, else why not."""
    if precision in ("fp16", "bf16") or graph.dtype not in (torch.float32, torch.float64):
        return "the network runs in half precision"
    return None


class SecondOrderGradient(ExplicitGradient):
    """A lean score with :meth:`differentiable`. It must begin before a chain, as any."""

    def __init__(self, graph: Graph, x: Tensor, precision: str | None = None) -> None:
        super().__init__(graph, x, precision, inplace=False)
        # By node and place (0 weight, 1 bias). Where all is linear from there a bias has no part.
        self._trained: dict[tuple[int, int], Constant] = {
            (k, place): constant
            for k in self._weighted
            for place, constant in enumerate(graph.nodes[k - 1].constants)
            if constant is not None
            and constant.base.requires_grad
            and not (place == 1 and self._plan.constant[k])
        }
        self._second = _Second(self._plan, self._weighted, self.chains, set(self._trained))

    def differentiable(self, x: Tensor, straight: bool = False) -> tuple[Tensor, Tensor]:
        """(energies [n], d energy / d x), of which the latter can be differentiated, once.

        ``straight``: with respect to the weights alone.
        """
        weights = [constant.tensor(detach=False) for constant in self._trained.values()]
        energies, grad = _Score.apply(self, x.detach() if straight else x, *weights)
        return energies, grad

    def first(self, x: Tensor) -> tuple[Tensor, Tensor, "_Kept"]:
        """Energies, their gradient, and what is kept of the way."""
        kept = _Kept(self._heads)
        with network_precision(self.precision, x.device):
            energies = self._second.values(spread(x.to(self.dtype), x.shape), kept)
            grad = self._second.gradients(self._offsets, kept)
        return energies, grad.to(x.dtype), kept

    def second(self, kept: "_Kept", v: Tensor, want_x: bool) -> list[Tensor | None]:
        """The gradients of <v, grad>: of x, and of each of ``_trained``."""
        device = v.device
        with network_precision(self.precision, device), torch.autocast(device.type, enabled=False):
            self._second.tangents(spread(v.to(self.dtype), v.shape), kept)
            back = self._second.curve(kept, want_x)
        found = kept.found
        parts = [
            found[place] if place in found else torch.zeros_like(constant.tensor())
            for place, constant in self._trained.items()
        ]
        return [None if back is None else back.to(v.dtype), *parts]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, score: SecondOrderGradient, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        energies, grad, kept = score.first(x)
        ctx.score, ctx.kept = score, kept
        ctx.mark_non_differentiable(energies)
        return energies, grad

    @staticmethod
    def backward(ctx: Any, _: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        return None, *ctx.score.second(kept, v, ctx.needs_input_grad[1])


class _Kept:
    """What the four passes of a step leave to one another; each frees what no later one reads."""

    def __init__(self, heads: dict[int, Tensor]) -> None:
        self.inputs: dict[int, Tensor] = {}  # by node, a of what is trained
        self.grads = dict(heads)  # hbar of what is trained
        self.slopes: dict[int, Tensor] = {}  # an activation's derivative, or its signs
        self.turns: dict[int, Tensor] = {}  # its second derivative times its output's gradient
        self.found: dict[tuple[int, int], Tensor] = {}  # gradients, by node and place

    def add(self, k: int, place: int, part: Tensor) -> None:
        known = self.found.get((k, place))
        self.found[k, place] = part if known is None else known.add_(part)


class _Second(Passes):
    """The passes of one step, in this order: values, gradients, tangents, curve."""

    def __init__(
        self,
        plan: Plan,
        weighted: dict[int, Conv | Linear],
        chains: int,
        trained: set[tuple[int, int]],
    ) -> None:
        nodes, count = plan.graph.nodes, len(plan.graph.nodes) + 1
        self.trained = trained
        # Per value: whether its gradient has a tangent, and whether its own tangent is read.
        bent, read = [False] * count, [False] * count
        curved = [False, *(node.kind in _CURVED for node in nodes)]
        for k in range(count - 1, -1, -1):
            for r in plan.readers[k]:
                bent[k] |= curved[r] or bent[r]
                read[k] |= curved[r] or (r, 0) in trained or read[r]
        self.bent, self.read, self.curved = bent, read, curved
        held = {nodes[k - 1].inputs[0] for k, place in trained if place == 0 and bent[k]}
        super().__init__(plan, weighted, chains, True, held)
        # An activation that is the last to read a tangent may change it in place.
        self.ends = {
            k
            for k, layer in self.layers.items()
            if isinstance(layer, Activation) and plan.ends(k, plan.readers)
        }

    def values(self, x: Tensor, kept: _Kept) -> Tensor:
        values: list[Any] = [None] * self._count
        values[0] = x
        for k, run, inputs, dead, _ in self._forward:
            if (k, 0) in self.trained and self.bent[k]:
                kept.inputs[k] = values[inputs[0]]
            values[k] = run(*[values[value] for value in inputs])
            for value in dead:
                values[value] = None
        energies: Tensor = values[-1].reshape(self.chains)
        return energies

    def gradients(self, offsets: list[Tensor | None], kept: _Kept) -> Tensor:
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, shape in self._backward:
            grad = whole(grads[k], offsets[k], shape)
            grads[k] = None
            if (k, 0) in self.trained:
                kept.grads[k] = grad
            if isinstance(layer, LogSumExp):
                slope, layer.softmax = layer.softmax, None
                assert slope is not None
                grad = grad.reshape(grad.shape[0], *layer.reduced)
                kept.slopes[k], kept.turns[k] = slope, grad
                deliver(grads, inputs, slope * grad)
            elif self.curved[k]:
                slope, turn = derivatives(layer)
                kept.slopes[k], kept.turns[k] = slope, turn.mul_(grad)
                deliver(grads, inputs, grad.mul_(slope))
            else:
                if isinstance(layer, Activation) and layer.kept is not None:
                    kept.slopes[k] = layer.kept
                deliver(grads, inputs, layer.backward(grad))
        return whole(grads[0], offsets[0], self._shape)

    def tangents(self, v: Tensor, kept: _Kept) -> None:
        """The values' derivatives in the direction v of x, and corr(a dot, hbar)."""
        values: list[Any] = [None] * self._count
        values[0] = v
        for k, _, inputs, dead, _ in self._forward:
            layer = self.layers[k]
            if (k, 0) in self.trained:
                assert isinstance(layer, Conv | Linear)
                a, grad = values[inputs[0]], kept.grads.pop(k)
                # A head's gradient is every chain's, and stands there once.
                a = a.sum(0, keepdim=True) if grad.shape[0] != a.shape[0] else a
                kept.found[k, 0] = layer.weight_grad(laid_out(a), grad)
            if self.read[k] or self.curved[k]:
                values[k] = self._tangent(k, layer, [values[v] for v in inputs], kept)
            for value in dead:
                values[value] = None

    def _tangent(self, k: int, layer: Any, tangents: list[Tensor], kept: _Kept) -> Tensor:
        (x, *_) = tangents
        if isinstance(layer, Conv | Linear):
            return layer.tangent(x)
        if isinstance(layer, LogSumExp):
            softmax = kept.slopes[k]
            mean = (softmax * x).sum(layer.dims, keepdim=True)
            kept.turns[k] = (x - mean).mul_(softmax).mul_(kept.turns[k])
            return mean if layer.keepdim else laid_out(mean.squeeze(layer.dims))
        if not isinstance(layer, Activation):
            out: Tensor = layer.forward(*tangents)
            return out
        if k in kept.turns:
            kept.turns[k].mul_(x)
            return x.mul_(kept.slopes[k]) if k in self.ends else x * kept.slopes[k]
        return layer.scale_(x if k in self.ends else x.clone(), kept.slopes[k])

    def curve(self, kept: _Kept, want_x: bool) -> Tensor | None:
        """The tangents of the gradients, corr(a, hbar dot), and that of x's: H v."""
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, _ in self._backward:
            grad, grads[k] = grads[k], None
            turn = kept.turns.pop(k, None)
            if turn is not None:
                slope = kept.slopes.pop(k)
                if grad is not None and isinstance(layer, LogSumExp):
                    grad = grad.reshape(grad.shape[0], *layer.reduced)
                deliver(grads, inputs, turn if grad is None else turn.addcmul_(slope, grad))
                continue
            if grad is None:
                continue
            if isinstance(layer, Activation):
                deliver(grads, inputs, layer.scale_(grad, kept.slopes.pop(k)))
                continue
            if isinstance(layer, Conv | Linear):
                if (k, 0) in self.trained:
                    kept.add(k, 0, layer.weight_grad(kept.inputs.pop(k), grad))
                if (k, 1) in self.trained:
                    kept.add(k, 1, grad.sum([d for d in range(grad.ndim) if d != 1]))
            if want_x or inputs != (0,):
                deliver(grads, inputs, layer.backward(grad))
        return grads[0] if want_x else None


def derivatives(layer: Any) -> tuple[Tensor, Tensor]:
    """(f', f'') of a curved activation where it has run, new tensors both."""
    kept, layer.kept = layer.kept, None  # its input or its output
    if layer.kind == "gelu" and layer.settings[0]:
        return _gelu_tanh(kept)
    return _DERIVATIVES[layer.kind](kept, *layer.settings)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    y = x * s
    slope = torch.addcmul(s, s, x - y)
    # (1 - s) (2 f' - y)
    return slope, y.sub_(slope, alpha=2).mul_(s.sub_(1))


def _softplus(x: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = x * beta > threshold
    s = torch.sigmoid(x * beta)
    turn = torch.addcmul(s, s, s, value=-1).mul_(beta).masked_fill_(linear, 0)
    return s.masked_fill_(linear, 1), turn


def _elu(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    slope = y + alpha
    return slope.masked_fill(y > 0, 1), slope.masked_fill_(y >= 0, 0)


def _tanh(y: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 - y * y
    return slope, (y * slope).mul_(-2)


def _gelu(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    density = (x * x).mul_(-0.5).exp_().mul_((2 * torch.pi) ** -0.5)
    slope = torch.special.ndtr(x).addcmul_(x, density)
    return slope, (2 - x * x).mul_(density)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x (1 + tanh u) / 2 with u = k (x + c x^3)."""
    k, c = (2 / torch.pi) ** 0.5, 0.044715
    square = x * x
    t = torch.tanh(k * x * (1 + c * square))
    once, twice = k * (1 + 3 * c * square), 6 * k * c * x
    rest = 1 - t * t
    slope = 0.5 * (1 + t + x * rest * once)
    return slope, rest * (once + 0.5 * x * (twice - 2 * t * once * once))


_DERIVATIVES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "softplus": _softplus,
    "elu": _elu,
    "tanh": _tanh,
    "gelu": _gelu,
}
