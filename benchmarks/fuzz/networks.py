"""Random energies: lists of operations, run by a module in plain torch."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": lambda x, form: F.gelu(x, approximate=form),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Op:
    """One operation. Value 0 is the state, and value k + 1 is the output of op k."""

    kind: str
    inputs: tuple[int, ...]
    settings: tuple[Any, ...] = ()


def run(op: Op, weight: Tensor | None, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """Run an operation on a batch, in the dtype of its operands."""
    x = inputs[0]
    if op.kind in ACTIVATIONS:
        return ACTIVATIONS[op.kind](x, *op.settings)
    if op.kind == "conv":
        assert weight is not None
        return (F.conv1d if x.ndim == 3 else F.conv2d)(x, weight, bias, *op.settings)
    if op.kind == "linear":
        assert weight is not None
        return F.linear(x, weight, bias)
    if op.kind == "add":
        return torch.add(x, inputs[1], alpha=op.settings[0])
    if op.kind == "scale":
        return x * op.settings[0]
    if op.kind == "avg_pool":
        return F.avg_pool2d(x, *op.settings)
    if op.kind in ("mean", "sum"):
        return getattr(torch, op.kind)(x, op.settings[0])
    assert op.kind == "flatten", op.kind
    return x.flatten(1)


class Energy(nn.Module):
    """Runs operations one after another; the output of the last one is [n] or [n, 1]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.ops: list[Op] = []
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for k, op in enumerate(self.ops):
            values.append(run(op, *self.constants(k), *(values[i] for i in op.inputs)))
        return values[-1]

    def constants(self, k: int) -> tuple[Tensor | None, Tensor | None]:
        """The weight and bias of op k, or None."""
        key = str(k)
        return self.weights.get(key), self.biases.get(key)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, ops={self.ops}"


def network_case(seed: int) -> tuple[Energy, Tensor]:
    """The energy and states x [n, ...] of a case; the same at every call."""
    draw = random.Random(seed)
    n = draw.choice([1, 2, 3, 5, 8, 33])
    style = draw.choice(["stack", "stack", "graph", "graph", "graph", "vector", "sequence"])
    if style == "vector":
        shape: tuple[int, ...] = (draw.choice([1, 2, 7, 33]),)
    elif style == "sequence":
        shape = (draw.choice([1, 2, 5]), draw.randint(1, 40))
    else:
        shape = (draw.choice([1, 2, 3, 5, 17]), draw.randint(1, 16), draw.randint(1, 16))
    whole = draw.random() < 0.25
    builder = _Builder(draw, shape, whole)
    for _ in range(draw.choice([1, 1, 2, 2, 3])):
        if style == "vector":
            builder.linear(draw.choice([1, 3, 16, 40]))
            builder.activation(_KINDS)
        elif style in ("stack", "sequence"):
            builder.conv(groups=draw.random() < 0.1)
            builder.activation(_KINDS)
        else:
            parts = [builder.block, builder.shortcut, builder.pool, builder.conv]
            draw.choice(parts)()
            builder.activation(_KINDS)
    builder.head()
    energy = builder.energy
    x = draw.choice([0.3, 1.0, 3.0]) * builder.normal(n, *shape)
    if whole:
        x = x.sign()
    if len(shape) == 3 and draw.random() < 0.4:
        x = x.contiguous(memory_format=torch.channels_last)
    return energy, x


_KINDS = tuple(ACTIVATIONS)
_MOST = 4000  # elements of a chain's value


class _Builder:
    """Builds an energy. ``at`` is the index of the last value, ``shape`` its shape in one chain.

    whole: weights are -1, 0 and 1, and mostly 0; activations multiply by no less than a half.
    """

    def __init__(self, draw: random.Random, shape: tuple[int, ...], whole: bool) -> None:
        self.draw, self.shape, self.whole, self.at = draw, shape, whole, 0
        self.energy = Energy(shape)

    def normal(self, *shape: int) -> Tensor:
        seed = self.draw.randrange(2**32)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def op(self, kind: str, *settings: Any, other: int | None = None) -> None:
        inputs = (self.at,) if other is None else (self.at, other)
        self.energy.ops.append(Op(kind, inputs, settings))
        self.at = len(self.energy.ops)

    def weigh(self, *size: int) -> None:
        """Add weights for the next op that make its outputs about as large as its inputs."""
        key, reads = str(len(self.energy.ops)), math.prod(size[1:])
        weight = self.draw.choice([0.7, 1.4]) / math.sqrt(reads) * self.normal(*size)
        bias = 0.3 * self.normal(size[0])
        if self.whole:
            # About three of the weights of an output exceed this bound and become nonzero.
            bound = 0.0 if reads <= 3 else NormalDist().inv_cdf(1 - 1.5 / reads)
            weight = weight.sign() * (self.normal(*size).abs() > bound)
            bias = bias.sign()
        self.energy.weights[key] = nn.Parameter(weight)
        if self.draw.random() < 0.8:
            self.energy.biases[key] = nn.Parameter(bias)

    def linear(self, out: int) -> None:
        self.weigh(out, self.shape[0])
        self.op("linear")
        self.shape = (out,)

    def activation(self, kinds: tuple[str, ...]) -> None:
        draw = self.draw
        kind = draw.choice((*(("leaky_relu", "relu") if self.whole else kinds), None))
        settings: tuple[Any, ...] = ()
        if kind == "leaky_relu":
            settings = (0.5 if self.whole else draw.choice([0.0, 0.05, 0.2]),)
        elif kind == "softplus":
            settings = draw.choice([(1.0, 20.0), (2.0, 20.0), (3.0, 2.0)])
        elif kind == "elu":
            settings = (draw.choice([0.5, 1.0]),)
        elif kind == "gelu":
            settings = (draw.choice(["none", "tanh"]),)
        if kind is not None:
            self.op(kind, *settings)

    def conv(self, groups: bool | None = None) -> None:
        """Add a convolution with unusual settings that leaves at least one pixel."""
        draw, (channels, *size) = self.draw, self.shape
        if draw.random() < 0.3 if groups is None else groups:
            count = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
        else:
            count = 1
        out = count * draw.choice([1, 2, 3, 8, 9, 17, 33])
        while True:
            kernel, stride, padding, dilation = (
                tuple(draw.choice(choices) for _ in size)
                for choices in ((1, 2, 3, 3, 4, 5), (1, 1, 2, 3), (0, 1, 1, 2, 4), (1, 1, 1, 2))
            )
            after = [
                (s + 2 * p - d * (k - 1) - 1) // t + 1
                for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
            ]
            if min(after) > 0 and math.prod(after) * min(out, 64) <= _MOST:
                break
        self.weigh(out, channels // count, *kernel)
        self.op("conv", stride, padding, dilation, count)
        self.shape = (out, *after)

    def block(self) -> None:
        """Add x + factor convolution(activation(convolution(x)))."""
        start, channels = self.at, self.shape[0]
        for last in (False, True):
            out = channels if last else self.draw.choice([1, 4, 9])
            kernel, dilation = self.draw.choice([1, 3, 5]), self.draw.choice([1, 2])
            self.weigh(out, self.shape[0], kernel, kernel)
            self.op("conv", (1, 1), (dilation * (kernel // 2),) * 2, (dilation,) * 2, 1)
            self.shape = (out, *self.shape[1:])
            if not last:
                self.activation(_KINDS)
        self.op("add", self.draw.choice([1, -1] if self.whole else [0.5, -1.5]), other=start)

    def shortcut(self) -> None:
        """Add convolution(x) + convolution(x), of 3 x 3 pixels and of one."""
        start, shape = self.at, self.shape
        out, stride = self.draw.choice([3, 9, 17]), self.draw.choice([1, 2])
        self.weigh(out, shape[0], 3, 3)
        self.op("conv", (stride,) * 2, (1, 1), (1, 1), 1)
        self.activation(_KINDS)
        wide, self.at = self.at, start
        self.weigh(out, shape[0], 1, 1)
        self.op("conv", (stride,) * 2, (0, 0), (1, 1), 1)
        self.op("add", 1, other=wide)
        self.shape = (out, *((size - 1) // stride + 1 for size in shape[1:]))

    def pool(self) -> None:
        draw, (channels, *size) = self.draw, self.shape
        kernel = tuple(min(draw.randint(1, 3), s) for s in size)
        stride = tuple(draw.randint(1, 3) for _ in size)
        padding = tuple(draw.randint(0, k // 2) for k in kernel)
        ceil, counted = draw.random() < 0.5, draw.random() < 0.5
        after = F.avg_pool2d(torch.zeros(1, *self.shape), kernel, stride, padding, ceil).shape
        self.op("avg_pool", kernel, stride, padding, ceil, counted)
        self.shape = (channels, *after[2:])

    def head(self) -> None:
        """Add operations that reduce the value to one number per chain."""
        draw = self.draw
        dims = len(self.shape)
        if dims > 1:
            # A mean has to be rounded, so whole energies have none.
            heads = ["flat", "flat", "mean", "sum", "global pool", "conv"]
            last = draw.choice(["flat", "sum", "sum"] if self.whole else heads)
            if last in ("mean", "sum"):
                self.op(last, tuple(range(1, dims + 1)))
                return
            if last == "global pool":
                self.op("mean", tuple(range(2, dims + 1)))
                self.shape = self.shape[:1]
            elif last == "conv":
                self.weigh(3, *self.shape)
                pixels = dims - 1
                self.op("conv", (1,) * pixels, (0,) * pixels, (1,) * pixels, 1)
                self.shape = (3, *(1,) * pixels)
            if len(self.shape) > 1:
                self.op("flatten")
                self.shape = (math.prod(self.shape),)
        if draw.random() < 0.3:
            self.linear(draw.choice([2, 9]))
            self.activation(_KINDS)
        self.linear(1)
        if draw.random() < 0.3:
            self.op("scale", -1.0 if self.whole else -0.3)
