"""Describes operators as nodes of a graph.

Each function takes the recorder, the operator's name, its arguments by name and its output. It
returns the operator's node, or None for an operator that changes neither values nor their order.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlangevin.gradients.graph.ir import Constant, Node


class Operands(Protocol):
    """The recorder, as the functions of this module use it."""

    def refuse(self, reason: str) -> Exception:
        """Note why the energy cannot be recorded, and return the error to raise."""

    def value(self, tensor: Any, name: str) -> int:
        """Return the number of a value that is computed from the states; refuse other tensors."""

    def constant(
        self, tensor: Any, name: str, dtype: torch.dtype | None = None, shared: bool = True
    ) -> Constant | None:
        """Return the constant of a tensor that is not computed from the states, and None for None.

        ``dtype`` is the one that it must have, if not that of the states. What the energy computes
        has a base in memory only if it is ``shared`` by the chains.
        """

    def is_value(self, tensor: Any) -> bool:
        """Return whether an argument is a tensor that is computed from the states."""

    def is_of_arguments(self, tensor: Tensor) -> bool:
        """Return whether a tensor is an argument of the call, or computed from one."""

    nodes: list[Node]  # those that have been described; node k makes value k + 1


def _conv(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    dims = out.ndim - 2
    if dims not in (1, 2):
        raise operands.refuse("only 1-D and 2-D convolutions are supported")
    kind, names = "conv", ["stride", "padding", "dilation"]
    if a["transposed"]:
        kind, names = "transposed", ["stride", "padding", "output_padding", "dilation"]
    sizes = (tuple(a[k]) for k in names)
    settings = (*(s * dims if len(s) == 1 else s for s in sizes), a["groups"])
    constants = operands.constant(a["weight"], name), operands.constant(a["bias"], name)
    return Node(kind, (operands.value(a["input"], name),), _shape(out), settings, constants)


def _upsample(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    rest = tuple(a[k] for k in ("align_corners", "scales_h", "scales_w") if k in a)
    return Node("upsample", (operands.value(a["self"], name),), _shape(out), (name, *rest))


def _matmul(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    value = operands.value(a["mat1"] if name == "addmm" else a["self"], name)
    return Node("linear", (value,), _shape(out), (), weight_and_bias(operands, name, a))


def weight_and_bias(
    operands: Operands, name: str, a: dict[str, Any]
) -> tuple[Constant, Constant | None]:
    """Return the constants of a product with a matrix, by mm, addmm or bmm."""
    matrix, bias = a["mat2"], None
    weight = operands.constant(matrix, name)
    assert weight is not None
    if name == "bmm":
        if matrix.shape[0] != 1 and matrix.stride(0) != 0:
            raise operands.refuse("bmm is supported only with the same matrix for all rows")
        weight = replace(weight, size=weight.size[1:], stride=weight.stride[1:])
    if name == "addmm":
        if a["beta"] != 1 or a["alpha"] != 1:
            raise operands.refuse("addmm with factors is not supported")
        bias = operands.constant(a["self"], name)
        if bias is None or bias.size != (weight.size[1],):
            raise operands.refuse("addmm with a bias that differs between chains is not supported")
    return replace(weight, size=weight.size[::-1], stride=weight.stride[::-1]), bias


def _view(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node | None:
    tensor = a["self"]
    if out.numel() != tensor.numel() or out.dtype != tensor.dtype or out.device != tensor.device:
        raise operands.refuse(f"{name} is supported only if it keeps all elements and their dtype")
    if _shape(out) == _shape(tensor):
        return None
    return Node("view", (operands.value(tensor, name),), _shape(out))


def _permute(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node | None:
    dims = list(range(out.ndim))
    if name == "permute":
        dims = [d % out.ndim for d in a["dims"]]
    elif name == "transpose" and dims:
        one, two = a["dim0"], a["dim1"]
        dims[one], dims[two] = dims[two], dims[one]
    else:
        dims.reverse()  # t, of a matrix or vector
    if dims == sorted(dims):
        return None
    if dims[0] != 0:
        raise operands.refuse(f"{name} mixes chains")
    x = operands.value(a["self"], name)
    return Node("permute", (x,), _shape(out), tuple(d - 1 for d in dims[1:]))


def _reduce(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    tensor = a["self"]
    dims = tuple(sorted(d % max(tensor.ndim, 1) for d in a.get("dim") or ()))
    if not dims or 0 in dims:
        raise operands.refuse(f"{name} mixes chains")
    if out.dtype != tensor.dtype:
        raise operands.refuse(f"{name} to another dtype is not supported")
    return Node(name, (operands.value(tensor, name),), _shape(out), (dims, bool(a["keepdim"])))


def _avg_pool(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    kernel, padding = _pair(a["kernel_size"]), _pair(a["padding"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    rest = a["ceil_mode"], a["count_include_pad"], a["divisor_override"]
    settings = (kernel, stride, padding, *rest)
    return Node("avg_pool", (operands.value(a["self"], name),), _shape(out), settings)


def _adaptive_pool(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    read, written = a["self"].shape[-2:], out.shape[-2:]
    if read[0] % written[0] or read[1] % written[1]:
        raise operands.refuse(f"{name} from {list(read)} to {list(written)} is not supported")
    kernel = read[0] // written[0], read[1] // written[1]
    settings = (kernel, kernel, (0, 0), False, True, None)
    return Node("avg_pool", (operands.value(a["self"], name),), _shape(out), settings)


def _max_pool(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    kernel, padding, dilation = (_pair(a[k]) for k in ("kernel_size", "padding", "dilation"))
    stride = _pair(a["stride"]) if a["stride"] else kernel
    settings = kernel, stride, padding, dilation, a["ceil_mode"]
    return Node("max_pool", (operands.value(a["self"], name),), _shape(out), settings)


def _group_norm(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    groups = a.get("group", 1)
    if name == "native_layer_norm" and (
        len(a["normalized_shape"]) != out.ndim - 1 or (out.ndim > 2 and a["weight"] is not None)
    ):
        raise operands.refuse("layer_norm is supported only over vectors, or all of an image")
    constants = operands.constant(a["weight"], name), operands.constant(a["bias"], name)
    settings = groups, float(a["eps"])
    x = operands.value(a["input"], name)
    return Node("group_norm", (x,), _shape(out), settings, constants)


def _scale(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    factors = [a["self"], a.get("other")]
    if name.startswith("mul") and not operands.is_value(factors[0]):
        factors.reverse()
    tensor, factor = factors if not name.startswith("neg") else (a["self"], -1.0)
    if a.get("rounding_mode") is not None:
        raise operands.refuse(f"{name} with rounding is not supported")
    if name.startswith("mul") and isinstance(factor, Tensor):
        return _product(operands, name, tensor, factor, out)
    if not isinstance(factor, (int, float)):
        raise operands.refuse(f"{name} is supported only with a number")
    if name.startswith("div"):
        factor = 1 / factor if factor else math.inf
    return Node("scale", (operands.value(tensor, name),), _shape(out), (float(factor),))


def _product(operands: Operands, name: str, one: Tensor, two: Tensor, out: Tensor) -> Node:
    """Describe the product of two values, or of a value and a constant."""
    shape = tuple(out.shape)
    if not operands.is_value(two):
        if one.shape != out.shape:
            raise operands.refuse(f"{name} by a constant of more dimensions is not supported")
        differs = two.shape[:1] != (1,) or operands.is_of_arguments(two)
        if two.ndim == out.ndim and differs:
            inputs = operands.value(one, name), _of_chains(operands, name, two, out)
            return Node("mul", inputs, shape[1:])
        factor = operands.constant(two, name)
        assert factor is not None
        return Node("scale", (operands.value(one, name),), shape[1:], (1.0,), (factor,))
    values = operands.value(one, name), operands.value(two, name)
    if one.shape != two.shape or one.dtype != two.dtype:
        raise operands.refuse(f"{name} of two shapes or dtypes is not supported")
    for x, gate in (values, values[::-1]):
        swish = _swish(operands.nodes, x, gate)
        if swish is not None:
            return swish
    return Node("mul", values, shape[1:])


def _of_chains(
    operands: Operands, name: str, tensor: Tensor, out: Tensor, each_pixel: bool = False
) -> int:
    """Add a constant node, and return its value.

    Its shape is that of the result unless the tensor has the same numbers at all pixels. Then it
    has a single pixel, except with ``each_pixel``.
    """
    constant = operands.constant(tensor, name, shared=False)
    assert constant is not None
    missing = out.ndim - tensor.ndim
    sizes = (1,) * missing + constant.size
    strides = (0,) * missing + constant.stride
    whole = each_pixel or any(size != 1 for size in sizes[2:])
    target = (*out.shape[:2], *(out.shape[2:] if whole else sizes[2:]))
    if missing < 0 or any(s not in (1, t) for s, t in zip(sizes, target, strict=True)):
        raise operands.refuse(f"{name} by a constant of more dimensions is not supported")
    strides = tuple(0 if s == 1 else step for s, step in zip(sizes, strides, strict=True))
    constant = replace(constant, size=target, stride=strides)
    operands.nodes.append(Node("constant", (), target[1:], (), (constant,)))
    return len(operands.nodes)


def _gather(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    """Describe a logit of each chain as the sum of all logits times zeros and a one."""
    tensor, index = a["self"], a["index"]
    if tensor.ndim != 2 or a["dim"] % 2 != 1 or tuple(out.shape) != (len(tensor), 1):
        raise operands.refuse("gather is supported only of one number from each vector")
    logits = operands.value(tensor, name)
    classes = operands.constant(index, name, torch.int64, False)
    shape = _shape(tensor)
    operands.nodes.append(Node("constant", (), shape, ("one_hot",), (classes,)))
    operands.nodes.append(Node("mul", (logits, len(operands.nodes)), shape))
    return Node("sum", (len(operands.nodes),), (1,), ((1,), True))


def _cat(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    if a["dim"] % out.ndim != 1 or any(part.ndim != out.ndim for part in a["tensors"]):
        raise operands.refuse("cat is supported only along the first dimension of a chain")
    inputs = tuple(
        operands.value(part, name)
        if operands.is_value(part)
        else _of_chains(operands, name, part, part, each_pixel=True)
        for part in a["tensors"]
    )
    sizes = tuple(part.shape[1] for part in a["tensors"])
    return Node("cat", inputs, _shape(out), sizes)


def _square(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    if isinstance(a["exponent"], Tensor) or a["exponent"] != 2:
        raise operands.refuse(f"{name} is supported only as a square")
    return _product(operands, name, a["self"], a["self"], out)


def _swish(nodes: list[Node], x: int, gate: int) -> Node | None:
    """Return x gate as one node if gate is sigmoid(beta x)."""
    if gate == 0 or nodes[gate - 1].kind != "sigmoid":
        return None
    shape, (read,) = nodes[gate - 1].shape, nodes[gate - 1].inputs
    if read == x:
        return Node("silu", (x,), shape)
    scaled = nodes[read - 1]
    if read == 0 or scaled.kind != "scale" or scaled.inputs != (x,):
        return None
    if any(c is None or math.prod(c.size) != 1 for c in scaled.constants):
        return None
    return Node("silu", (x,), shape, scaled.settings, scaled.constants)


def _batch_norm(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    if a.get("training") or a["running_mean"] is None or a["running_var"] is None:
        raise operands.refuse("a batch norm in train mode mixes chains")
    constants = tuple(
        operands.constant(a[key], name) for key in ("weight", "bias", "running_mean", "running_var")
    )
    eps = a["eps"] if "eps" in a else a["epsilon"]
    x = operands.value(a["input"], name)
    return Node("batch_norm", (x,), _shape(out), (float(eps),), constants)


def _add(operands: Operands, name: str, a: dict[str, Any], out: Tensor) -> Node:
    one, two = a["self"], a["other"]
    alpha = float(a["alpha"])
    if name.startswith("add") and alpha == 1 and not operands.is_value(one):
        one, two = two, one
    if isinstance(two, Tensor) and two.ndim and not operands.is_value(two):
        if one.shape != out.shape:
            raise operands.refuse(f"{name} of a constant of more dimensions is not supported")
        biased = _biased(operands, name, one, two) if alpha == 1 else None
        if biased is not None:
            return biased
        values = operands.value(one, name), _of_chains(operands, name, two, out)
        return Node("add", values, _shape(out), (-alpha if name.startswith("sub") else alpha,))
    values = operands.value(one, name), operands.value(two, name)
    if one.shape != two.shape or one.dtype != two.dtype:
        raise operands.refuse(f"{name} of two shapes or dtypes is not supported")
    return Node("add", values, _shape(out), (-alpha if name.startswith("sub") else alpha,))


def _biased(operands: Operands, name: str, tensor: Tensor, bias: Tensor) -> Node | None:
    """Return tensor + bias as one linear layer if tensor is the result of one without a bias."""
    value = operands.value(tensor, name)
    node = operands.nodes[value - 1] if value else None
    if node is None or node.kind != "linear" or node.constants[1] is not None:
        return None
    if tuple(bias.shape) != node.shape[-1:] or operands.is_of_arguments(bias):
        return None
    return replace(node, constants=(node.constants[0], operands.constant(bias, name)))


def _activation(
    operands: Operands,
    name: str,
    a: dict[str, Any],
    out: Tensor,
    settings: Callable[[dict[str, Any]], tuple[float, ...] | None] = lambda a: (),
) -> Node:
    numbers = settings(a)
    if numbers is None:
        raise operands.refuse(f"{name} with these settings is not supported")
    kind = name.removesuffix("_")
    return Node(kind, (operands.value(a["self"], name),), _shape(out), numbers)


def _leaky(a: dict[str, Any]) -> tuple[float, ...] | None:
    # With a negative slope the output does not have the sign of the input.
    return (float(a["negative_slope"]),) if a["negative_slope"] >= 0 else None


def _elu(a: dict[str, Any]) -> tuple[float, ...] | None:
    plain = a["scale"] == 1 and a["input_scale"] == 1 and a["alpha"] >= 0
    return (float(a["alpha"]),) if plain else None


def _shape(out: Tensor) -> tuple[int, ...]:
    return tuple(out.shape[1:])


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1]) if isinstance(value, (list, tuple)) else (value, value)


ACTIVATIONS: dict[str, Callable[[dict[str, Any]], tuple[float, ...] | None]] = {
    "leaky_relu": _leaky,
    "relu": lambda a: (),
    "silu": lambda a: (),
    "softplus": lambda a: (float(a["beta"]), float(a["threshold"])),
    "elu": _elu,
    "gelu": lambda a: (float(a["approximate"] == "tanh"),),
    "tanh": lambda a: (),
    "sigmoid": lambda a: (),
}
# If only other operators follow a value, its gradient is the same in every chain.
NONLINEAR = {*ACTIVATIONS, "logsumexp", "mul", "max_pool", "group_norm", "constant"}
# Operators that keep the order of the elements, if they keep all.
VIEWS = (
    "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "select", "slice",
    "alias", "expand", "clone", "contiguous", "_to_copy", "_reshape_alias",
)  # fmt: skip
OPERATORS: dict[str, Callable[..., Node | None]] = (
    {"convolution": _conv, "addmm": _matmul, "mm": _matmul, "avg_pool2d": _avg_pool}
    | {"permute": _permute, "transpose": _permute, "t": _permute}
    | {"_adaptive_avg_pool2d": _adaptive_pool, "mean": _reduce, "sum": _reduce}
    | {"logsumexp": _reduce, "max_pool2d_with_indices": _max_pool}
    | {"native_group_norm": _group_norm, "native_layer_norm": _group_norm}
    | dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        _batch_norm,
    )
    | dict.fromkeys(VIEWS, _view)
    | dict.fromkeys(("mul", "mul_", "div", "div_", "neg", "neg_"), _scale)
    | dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), _upsample)
    | {"pow": _square, "gather": _gather, "cat": _cat}
    | dict.fromkeys(("add", "add_", "sub", "sub_"), _add)
    | {
        name + suffix: functools.partial(_activation, settings=settings)
        for name, settings in ACTIVATIONS.items()
        for suffix in ("", "_")
    }
)
