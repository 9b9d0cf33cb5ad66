"""The explicit engine's gradient as a differentiable function of the state and the weights.

The backward pass through g = dE/dx needs, for a vector v, the gradients of <v, g> with respect to
x and the weights. Let h be the output of a convolution that reads a, let hbar = dE/dh, and let
dot{u} be the derivative of u in the direction v of x. Then

    d<v, g>/dx = dot{xbar} = H v,    d<v, g>/dW = corr(dot{a}, hbar) + corr(a, dot{hbar}).

This takes a forward pass of tangents and a backward pass of the tangents of gradients (Pearlmutter,
Neural Computation 6, 1994). Curved activations are the only source of the latter. In a piecewise
linear network they are all zero: H v is zero, and a is not saved.
"""

from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.conv_layers import Conv
from fastlangevin.gradients.derivatives import derivatives
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.aten_ops import NONLINEAR
from fastlangevin.gradients.graph.ir import Constant, Graph
from fastlangevin.gradients.layers import (
    Activation,
    BatchNorm,
    Linear,
    LogSumExp,
    broadcast,
    laid_out,
)
from fastlangevin.gradients.passes import Dataflow, Passes, Weighted, deliver, total
from fastlangevin.gradients.precision import HALVES, network_precision

_CURVED = NONLINEAR - {"relu", "leaky_relu"}


def refusal(graph: Graph, precision: str | None) -> str | None:
    """Return why :class:`SecondOrderGradient` cannot run a graph, or None if it can."""
    if precision in HALVES or graph.dtype not in (torch.float32, torch.float64):
        return "the network runs in half precision"
    if graph.computed is not None:
        return "weights are computed from other weights"
    for node in graph.nodes:
        if node.kind in ("mul", "max_pool", "group_norm"):
            return f"{node.kind} has no second-order rule"
        if node.kind not in ("conv", "linear") and any(
            constant is not None and constant.base.requires_grad for constant in node.constants
        ):
            return f"the weights of {node.kind} have no second-order rule"
    return None


class SecondOrderGradient(ExplicitGradient):
    """An explicit engine whose gradient :meth:`differentiable` lets autograd differentiate."""

    def __init__(self, graph: Graph, x: Tensor, precision: str | None = None) -> None:
        super().__init__(graph, x, precision, inplace=False)
        # By node and operand (0 weight, 1 bias). A bias of the linear part does not affect g.
        self._trained: dict[tuple[int, int], Constant] = {
            (k, operand): constant
            for k, layer in self._weighted.items()
            if isinstance(layer, Conv | Linear)
            for operand, constant in enumerate(graph.nodes[k - 1].constants)
            if constant is not None
            and constant.base.requires_grad
            and not (operand == 1 and self._flow.constant[k])
        }
        self._second = _Second(self._flow, self._weighted, self.chains, set(self._trained))

    def differentiable(self, x: Tensor, straight: bool = False) -> tuple[Tensor, Tensor]:
        """Return (energies [n], d energy / d x); the latter can be differentiated once.

        With ``straight`` it is differentiable with respect to the weights only, and not to x.
        """
        weights = [constant.tensor(detach=False) for constant in self._trained.values()]
        energies, grad = _Gradient.apply(self, x.detach() if straight else x, *weights)
        return energies, grad

    def first(self, x: Tensor) -> tuple[Tensor, Tensor, "_Saved"]:
        """Return the energies, their gradient, and what the second pass needs."""
        saved = _Saved(self._heads)
        with network_precision(self.precision, x.device):
            energies = self._second.values(broadcast(x.to(self.dtype), x.shape), saved)
            grad = self._second.gradients(self._offsets, saved)
        return energies, grad.to(x.dtype), saved

    def second(self, saved: "_Saved", v: Tensor, want_x: bool) -> list[Tensor | None]:
        """Return the gradients of <v, g> with respect to x and each weight of ``_trained``."""
        device = v.device
        with network_precision(self.precision, device), torch.autocast(device.type, enabled=False):
            self._second.tangents(broadcast(v.to(self.dtype), v.shape), saved)
            hessian_v = self._second.gradient_tangents(saved, want_x)
        weight_grads = [
            saved.weight_grads[key]
            if key in saved.weight_grads
            else torch.zeros_like(constant.tensor())
            for key, constant in self._trained.items()
        ]
        return [None if hessian_v is None else hessian_v.to(v.dtype), *weight_grads]


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, engine: SecondOrderGradient, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        energies, grad, saved = engine.first(x)
        ctx.engine, ctx.saved = engine, saved
        ctx.mark_non_differentiable(energies)
        return energies, grad

    @staticmethod
    def backward(ctx: Any, _: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        saved, ctx.saved = ctx.saved, None
        return None, *ctx.engine.second(saved, v, ctx.needs_input_grad[1])


class _Saved:
    """What the four passes of a step hand on; each pass frees what no later one reads."""

    def __init__(self, heads: dict[int, Tensor]) -> None:
        self.inputs: dict[int, Tensor] = {}  # by trained node: a
        self.grads = dict(heads)  # by trained node: hbar
        self.slopes: dict[int, Tensor] = {}  # by activation: its derivative, or its signs
        self.curvatures: dict[int, Tensor] = {}  # its second derivative times its output's gradient
        self.weight_grads: dict[tuple[int, int], Tensor] = {}  # by node and operand

    def add(self, k: int, operand: int, part: Tensor) -> None:
        grad = self.weight_grads.get((k, operand))
        self.weight_grads[k, operand] = part if grad is None else grad.add_(part)


class _Second(Passes):
    """The passes of one step, in order: values, gradients, tangents, gradient_tangents."""

    def __init__(
        self,
        flow: Dataflow,
        weighted: dict[int, Weighted],
        chains: int,
        trained: set[tuple[int, int]],
    ) -> None:
        nodes, count = flow.graph.nodes, len(flow.graph.nodes) + 1
        self.trained = trained
        # Per value: whether its gradient has a tangent, and whether its own tangent is read.
        grad_varies, read = [False] * count, [False] * count
        curved = [False, *(node.kind in _CURVED for node in nodes)]
        for k in range(count - 1, -1, -1):
            for r in flow.readers[k]:
                grad_varies[k] |= curved[r] or grad_varies[r]
                read[k] |= curved[r] or (r, 0) in trained or read[r]
        self.grad_varies, self.read, self.curved = grad_varies, read, curved
        protected = {
            nodes[k - 1].inputs[0] for k, operand in trained if operand == 0 and grad_varies[k]
        }
        super().__init__(flow, weighted, chains, True, protected)
        # An activation that is the last to read a tangent may change it in place.
        self.last_readers = {
            k
            for k, layer in self.layers.items()
            if isinstance(layer, Activation) and flow.is_last_reader(k, flow.readers)
        }

    def values(self, x: Tensor, saved: _Saved) -> Tensor:
        """Return the energies [n], and save a of the trained nodes."""
        values: list[Any] = [None] * self._count
        values[0] = x
        for k, run, inputs, dead, _ in self._forward:
            if (k, 0) in self.trained and self.grad_varies[k]:
                saved.inputs[k] = values[inputs[0]]
            values[k] = run(*[values[value] for value in inputs])
            for value in dead:
                values[value] = None
        energies: Tensor = values[-1].reshape(self.chains)
        return energies

    def gradients(self, offsets: list[Tensor | None], saved: _Saved) -> Tensor:
        """Return g = dE/dx, and save hbar of the trained nodes and the activations' slopes."""
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, shape in self._backward:
            grad = total(grads[k], offsets[k], shape)
            grads[k] = None
            if (k, 0) in self.trained:
                saved.grads[k] = grad
            if isinstance(layer, LogSumExp):
                slope, layer.softmax = layer.softmax, None
                assert slope is not None
                grad = grad.reshape(grad.shape[0], *layer.reduced)
                saved.slopes[k], saved.curvatures[k] = slope, grad
                deliver(grads, inputs, slope * grad)
            elif self.curved[k]:
                assert isinstance(layer, Activation)
                slope, curvature = derivatives(layer)
                saved.slopes[k], saved.curvatures[k] = slope, curvature.mul_(grad)
                deliver(grads, inputs, grad.mul_(slope))
            else:
                if isinstance(layer, Activation) and layer.saved is not None:
                    saved.slopes[k] = layer.saved
                deliver(grads, inputs, layer.backward(grad))
        return total(grads[0], offsets[0], self._shape)

    def tangents(self, v: Tensor, saved: _Saved) -> None:
        """Compute the tangents of the values in the direction v of x, and corr(dot{a}, hbar)."""
        values: list[Any] = [None] * self._count
        values[0] = v
        for k, _, inputs, dead, _ in self._forward:
            layer = self.layers[k]
            if (k, 0) in self.trained:
                assert isinstance(layer, Conv | Linear)
                a, grad = values[inputs[0]], saved.grads.pop(k)
                # In the linear part all chains share one gradient, which is stored once.
                a = a.sum(0, keepdim=True) if grad.shape[0] != a.shape[0] else a
                saved.weight_grads[k, 0] = layer.weight_grad(laid_out(a), grad)
            if self.read[k] or self.curved[k]:
                values[k] = self._tangent(k, layer, [values[v] for v in inputs], saved)
            for value in dead:
                values[value] = None

    def _tangent(self, k: int, layer: Any, tangents: list[Tensor], saved: _Saved) -> Tensor:
        (x, *_) = tangents
        if isinstance(layer, BatchNorm | Conv | Linear):
            return layer.tangent(x)
        if isinstance(layer, LogSumExp):
            softmax = saved.slopes[k]
            mean = (softmax * x).sum(layer.dims, keepdim=True)
            saved.curvatures[k] = (x - mean).mul_(softmax).mul_(saved.curvatures[k])
            return mean if layer.keepdim else laid_out(mean.squeeze(layer.dims))
        if not isinstance(layer, Activation):
            out: Tensor = layer.forward(*tangents)
            return out
        if k in saved.curvatures:
            saved.curvatures[k].mul_(x)
            return x.mul_(saved.slopes[k]) if k in self.last_readers else x * saved.slopes[k]
        return layer.scale_(x if k in self.last_readers else x.clone(), saved.slopes[k])

    def gradient_tangents(self, saved: _Saved, want_x: bool) -> Tensor | None:
        """Compute the tangents of the gradients and corr(a, dot{hbar}); return H v."""
        grads: list[Tensor | None] = [None] * self._count
        for k, layer, inputs, _ in self._backward:
            grad, grads[k] = grads[k], None
            curvature = saved.curvatures.pop(k, None)
            if curvature is not None:
                slope = saved.slopes.pop(k)
                if grad is not None and isinstance(layer, LogSumExp):
                    grad = grad.reshape(grad.shape[0], *layer.reduced)
                deliver(
                    grads, inputs, curvature if grad is None else curvature.addcmul_(slope, grad)
                )
                continue
            if grad is None:
                continue
            if isinstance(layer, Activation):
                deliver(grads, inputs, layer.scale_(grad, saved.slopes.pop(k)))
                continue
            if isinstance(layer, Conv | Linear):
                if (k, 0) in self.trained:
                    saved.add(k, 0, layer.weight_grad(saved.inputs.pop(k), grad))
                if (k, 1) in self.trained:
                    saved.add(k, 1, grad.sum([d for d in range(grad.ndim) if d != 1]))
            if want_x or inputs != (0,):
                deliver(grads, inputs, layer.backward(grad))
        return grads[0] if want_x else None
