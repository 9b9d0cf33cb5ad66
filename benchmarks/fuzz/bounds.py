"""An energy and its input gradient in float64, with bounds on an engine's rounding errors.

This is a running error analysis: every value v has a bound e on the error of the value that an
engine computes for it. A sum of n products |W| |v| adds n units of float32 for operands of any
dtype (only autocast may sum in bfloat16), and each stored result adds one unit of its dtype.
Weights and states are rounded first, as the engine rounds them, so that the bounds are about values
only. Torch's results in the engine's dtype are not used, so errors of torch are found too.

If all terms of a sum are multiples of one power of two and the sum is small, nothing is rounded in
any order of summation, and the bound does not grow. The same holds if a result has few enough
digits to be stored exactly. So energies of small whole numbers must be exact, also in bfloat16.

If a value is closer to a kink than its error, the derivative may be that of either side. The bound
of the gradient then includes their difference, and only then.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fuzz.networks import ACTIVATIONS, Energy, Op, run

SINGLE, BRAIN = 2.0**-24, 2.0**-8  # half a spacing at 1 of float32 and of bfloat16
_EVALUATION = 8 * SINGLE  # of an activation or its derivative, against 1 + |value|
_LEAST = 1e-30  # below it, results may be flushed to zero
_GRID, _LARGEST = 2.0**-10, 2.0**13  # multiples of the former up to the latter: 24 bits


@dataclass(frozen=True)
class Rounding:
    """Where an engine rounds.

    values: the unit of values and gradients between operations, of weights and of states.
    tail: the same for the linear operations after the last activation.
    sums: the unit of sums of products.
    bias: whether biases are rounded like weights.
    state: whether states are rounded before anything reads them.
    """

    values: float
    tail: float
    sums: float = SINGLE
    bias: bool = True
    state: bool = True


@dataclass
class Exact:
    """Energies [n] and the gradient, and for each element a bound on an engine's error."""

    energies: Tensor
    grad: Tensor
    energy_bound: Tensor
    grad_bound: Tensor


def evaluate(energy: Energy, x: Tensor, rounding: Rounding) -> Exact:
    """Evaluate everything in float64, whose own rounding is negligible here."""
    return _Tape(energy, x, rounding).result()


class _Tape:
    def __init__(self, energy: Energy, x: Tensor, rounding: Rounding) -> None:
        self.ops = energy.ops
        tail = _linear_tail(self.ops)
        self.units = [rounding.tail if t else rounding.values for t in tail]
        self.sums = rounding.sums
        # The unit of the gradient of each value: the tail's is rounded once more where it ends.
        self.entering = [rounding.values, *self.units]
        self.constants = [
            _rounded_constants(energy, k, unit, rounding.bias) for k, unit in enumerate(self.units)
        ]
        start = x.double()
        error = torch.zeros_like(start)
        if rounding.state:
            start = _rounded(start, rounding.values)
        else:
            error = rounding.values * start.abs()
        self.values, self.errors = [start], [error]
        for k, op in enumerate(self.ops):
            self._forward(k, op)

    def _forward(self, k: int, op: Op) -> None:
        (weight, bias), unit = self.constants[k], self.units[k]
        inputs = [self.values[i] for i in op.inputs]
        errors = [self.errors[i] for i in op.inputs]
        value = run(op, weight, bias, *inputs)
        if op.kind in ACTIVATIONS:
            error = _LIPSCHITZ[op.kind](op) * errors[0]
            if op.kind not in _PIECEWISE:
                error = error + _EVALUATION * (1 + value.abs())
            if op.kind == "softplus":
                error += _near_threshold(op, inputs[0], errors[0]) * torch.exp(
                    torch.tensor(-op.settings[1])
                )
        else:
            reach = [v.abs() + e for v, e in zip(inputs, errors, strict=True)]
            error = _magnitude(op, weight, None, *errors)
            sums = _magnitude(op, weight, bias, *reach)
            rounded = ~(_is_exact(op, weight, bias, *inputs) & (error == 0) & (sums < _LARGEST))
            error = error + rounded * _count_terms(op, weight, inputs[0]) * self.sums * sums
        self.values.append(value)
        self.errors.append(_rounding_error(value, error, unit, _count_roundings(op)))

    def result(self) -> Exact:
        n = self.values[0].shape[0]
        grads: list[Tensor | None] = [None] * len(self.values)
        errors = [torch.zeros_like(v) for v in self.values]
        grads[-1] = torch.ones_like(self.values[-1])
        for k in range(len(self.ops) - 1, -1, -1):
            grad = grads[k + 1]
            if grad is not None:
                self._backward(k, self.ops[k], grad, errors[k + 1], grads, errors)
        assert grads[0] is not None
        energies, error = (v[-1].reshape(n) for v in (self.values, self.errors))
        return Exact(energies, grads[0], error + _LEAST, errors[0] + _LEAST)

    def _backward(
        self,
        k: int,
        op: Op,
        grad: Tensor,
        error: Tensor,
        grads: list[Tensor | None],
        errors: list[Tensor],
    ) -> None:
        (weight, _), unit = self.constants[k], self.units[k]
        inputs = [self.values[i] for i in op.inputs]
        if op.kind in ACTIVATIONS:
            slope, doubt = self._slope(k, op, unit)
            parts = [grad * slope]
            bounds = [error * (slope.abs() + doubt) + grad.abs() * doubt]
        else:
            parts = _input_grads(lambda *v: run(op, weight, None, *v), inputs, grad)
            carried, sums = (
                _input_grads(lambda *v: _magnitude(op, weight, None, *v), inputs, g)
                for g in (error, grad.abs() + error)
            )
            terms = _count_terms_back(op, weight, inputs[0]) * self.sums
            whole = _is_exact(op, weight, None, grad)
            bounds = [
                c + ~(whole & (c == 0) & (total < _LARGEST)) * terms * total
                for c, total in zip(carried, sums, strict=True)
            ]
        for i, part, bound in zip(op.inputs, parts, bounds, strict=True):
            bound = _rounding_error(part, bound, unit, _count_roundings(op))
            if self.entering[i] != unit:
                bound = _rounding_error(part, bound, self.entering[i])
            before = grads[i]
            if before is not None:
                part = before + part
                bound = _rounding_error(part, errors[i] + bound, unit)
            grads[i], errors[i] = part, bound

    def _slope(self, k: int, op: Op, unit: float) -> tuple[Tensor, Tensor]:
        """An activation's derivative, and a bound on the error of the engine's value for it.

        Engines compute it from the input or from the output, or store it.
        """
        z, e = self.values[op.inputs[0]], self.errors[op.inputs[0]]
        y, d = self.values[k + 1], self.errors[k + 1]
        (slope,) = _input_grads(lambda v: run(op, None, None, v), [z], torch.ones_like(z))
        doubt = _CURVATURE[op.kind](op) * e + unit * slope.abs() + _EVALUATION * (1 + y.abs())
        if op.kind in _PIECEWISE:
            other = op.settings[0] if op.settings else 0.0
            # Engines store signs, which need no rounding. An exact 0 is on the same side in all.
            doubt = (1 - other) * ((z.abs() <= e) & (e > 0))
        elif op.kind == "softplus":
            jump = 1 / (1 + math.exp(op.settings[1]))
            doubt = doubt + jump * _near_threshold(op, z, e)
        elif op.kind == "elu":
            alpha = op.settings[0]
            doubt = doubt + d * (z - e < 0) + abs(1 - alpha) * (z.abs() <= e)
        elif op.kind == "tanh":
            doubt = doubt + 2 * y.abs() * d + d * d
        elif op.kind == "sigmoid":
            doubt = doubt + (1 - 2 * y).abs() * d + d * d
        return slope, doubt


_PIECEWISE = ("leaky_relu", "relu")
_LIPSCHITZ: dict[str, Callable[[Op], float]] = {
    "leaky_relu": lambda op: max(1.0, op.settings[0]),
    "relu": lambda op: 1.0,
    "silu": lambda op: 1.1,
    "softplus": lambda op: 1.0,
    "elu": lambda op: max(1.0, op.settings[0]),
    "gelu": lambda op: 1.13,
    "tanh": lambda op: 1.0,
    "sigmoid": lambda op: 0.25,
}
# The largest second derivatives, except at kinks.
_CURVATURE: dict[str, Callable[[Op], float]] = {
    "leaky_relu": lambda op: 0.0,
    "relu": lambda op: 0.0,
    "silu": lambda op: 0.5,
    "softplus": lambda op: op.settings[0] / 4,
    "elu": lambda op: op.settings[0],
    "gelu": lambda op: 0.8,
    "tanh": lambda op: 0.77,
    "sigmoid": lambda op: 0.1,
}


def _near_threshold(op: Op, z: Tensor, e: Tensor) -> Tensor:
    """1 where rounding may move softplus across the threshold beyond which it is the identity."""
    beta, threshold = op.settings
    return ((beta * z - threshold).abs() <= beta * e + _EVALUATION * threshold).double()


def _magnitude(op: Op, weight: Tensor | None, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """A linear operation with the absolute values of its weights and factors."""
    if op.kind in ("add", "scale"):
        op = Op(op.kind, op.inputs, (abs(op.settings[0]),))
    weight, bias = (None if v is None else v.abs() for v in (weight, bias))
    return run(op, weight, bias, *inputs)


def _is_exact(op: Op, weight: Tensor | None, *others: Tensor | None) -> bool:
    """Whether all products of an operation are multiples of one power of two."""
    if op.kind in ("mean", "avg_pool"):
        return False
    if op.kind in ("add", "scale"):
        weight = torch.tensor(op.settings[0], dtype=torch.float64)
    of_one = weight is None or bool((weight == weight.round()).all())
    scaled = [other / _GRID for other in others if other is not None]
    return of_one and all(bool((value == value.round()).all()) for value in scaled)


def _rounding_error(value: Tensor, error: Tensor, unit: float, times: int = 1) -> Tensor:
    """The error after a result has been rounded to a dtype."""
    exact = (error == 0) & (_rounded(value, unit) == value)
    return error + ~exact * (unit * times) * (value.abs() + error)


def _count_terms(op: Op, weight: Tensor | None, x: Tensor) -> int:
    """Roundings in an element of the output: its terms, the bias, and a rounded factor."""
    if weight is not None:
        return math.prod(weight.shape[1:]) + 2
    if op.kind in ("mean", "sum"):
        return math.prod(x.shape[d] for d in op.settings[0]) + 2
    if op.kind == "avg_pool":
        return math.prod(op.settings[0]) + 2
    return 2


def _count_terms_back(op: Op, weight: Tensor | None, x: Tensor) -> int:
    """Roundings in an element of the input's gradient."""
    if op.kind == "conv":
        assert weight is not None
        return weight.shape[0] // op.settings[3] * math.prod(weight.shape[2:]) + 2
    if op.kind == "linear":
        assert weight is not None
        return weight.shape[0] + 2
    return _count_terms(op, weight, x)


def _count_roundings(op: Op) -> int:
    """How often a result is rounded to its dtype: a mean may be stored as a sum first."""
    return 0 if op.kind == "flatten" else 2 if op.kind in ("mean", "sum") else 1


def _input_grads(f: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The gradients of the inputs of f for an output with the gradient ``grad``."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in inputs]
        return list(torch.autograd.grad(f(*leaves), leaves, grad))


def _linear_tail(ops: list[Op]) -> list[bool]:
    """For each operation, whether it and all that depend on it are linear."""
    tail = [False] * len(ops)
    for k in range(len(ops) - 1, -1, -1):
        readers = [r for r, op in enumerate(ops) if k + 1 in op.inputs]
        tail[k] = ops[k].kind not in ACTIVATIONS and all(tail[r] for r in readers)
    return tail


def _rounded_constants(
    energy: Energy, k: int, unit: float, round_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = (None if v is None else v.detach().double() for v in energy.constants(k))
    weight = None if weight is None else _rounded(weight, unit)
    if round_bias and bias is not None:
        bias = _rounded(bias, unit)
    return weight, bias


def _rounded(value: Tensor, unit: float) -> Tensor:
    dtype = torch.bfloat16 if unit == BRAIN else torch.float32
    return value.to(dtype).double()
