"""The cost of a step in operations, and the rate of matrix products that a machine reaches."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.precision import HALVES, network_precision
from fastlangevin.timing import seconds_in_turns


class Cost(NamedTuple):
    """The operations and the activations of a step of one chain."""

    flops: int  # in the forward pass and the input gradient; a multiply-add counts as two
    activations: int  # elements of the outputs of all activations


def cost(graph: Graph) -> Cost:
    """Return the cost of a step of a graph.

    A convolution with weights [out, in, kh, kw] takes 2 in kh kw operations per output element, in
    the forward pass and again in the input gradient. A transposed one takes as many per input
    element. The linear part after the last activation is not counted.
    """
    last = max((k for k, n in enumerate(graph.nodes) if n.kind in ACTIVATIONS), default=-1)
    flops = activations = 0
    for k, node in enumerate(graph.nodes):
        if node.kind in ACTIVATIONS:
            activations += math.prod(node.shape)
        elif k < last and node.kind != "constant" and node.constants and node.constants[0]:
            shape = graph.input_shape(node) if node.kind == "transposed" else node.shape
            flops += 4 * math.prod(shape) * math.prod(node.constants[0].size[1:])
    return Cost(flops, activations)


@functools.lru_cache
def matrix_rate(device: torch.device, precision: str | None, threads: int) -> float:
    """Return the FLOP/s of torch's product of two square matrices, the best of several runs.

    The matrices hold random numbers: constant ones switch fewer transistors, so that GPUs and AMX
    run faster on them than on any real data. In a half precision, float32 counts too if it is
    faster, since some CPUs lack bfloat16. On CUDA None is TF32, torch's default for convolutions.
    The rate is measured once per set of arguments. ``threads`` is torch's number of threads, on
    which the rate depends; it is not set here.
    """
    size = 1024 if device.type == "cpu" else 8192
    if device.type == "cuda" and precision is None:
        precision = "tf32"
    rates = []
    for dtype in {torch.float32, HALVES.get(precision or "", torch.float32)}:
        a, b = (_operand(size, dtype, device, seed) for seed in range(2))
        with network_precision(precision, device):
            product = functools.partial(torch.mm, a, b)
            (seconds,) = seconds_in_turns([product], device, rounds=4, budget=0.1)
            rates.append(2 * size**3 / min(seconds))
    return max(rates)


def _operand(size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Return a square matrix of normal random numbers, without use of torch's own generators."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float32, device=device).to(
        dtype
    )
