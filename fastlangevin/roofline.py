"""The least cost of a step in operations and bytes, and the rates that a machine reaches."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.precision import HALVES


class Cost(NamedTuple):
    """The operations and activations of a step of one chain, and the network's weights."""

    flops: int  # in the forward pass and the input gradient; a multiply-add counts as two
    activations: int  # elements of the outputs of all activations
    weights: int  # elements of all weights


def cost(graph: Graph) -> Cost:
    """Return the cost of a step of a graph.

    A convolution with weights [out, in, kh, kw] takes 2 in kh kw operations per output element, in
    the forward pass and again in the input gradient. The linear part after the last activation is
    not counted.
    """
    last = max((k for k, n in enumerate(graph.nodes) if n.kind in ACTIVATIONS), default=-1)
    flops = activations = weights = 0
    for k, node in enumerate(graph.nodes):
        if node.kind in ACTIVATIONS:
            activations += math.prod(node.shape)
        elif node.constants and node.constants[0] is not None:
            size = node.constants[0].size
            weights += math.prod(size)
            if k < last:
                flops += 4 * math.prod(node.shape) * math.prod(size[1:])
    return Cost(flops, activations, weights)


@functools.lru_cache
def matrix_rate(device: torch.device, precision: str | None, threads: int) -> float:
    """Return the FLOP/s of torch's product of two square matrices, the best of several runs.

    In a half precision, float32 counts too if it is faster, since some CPUs lack bfloat16. The rate
    is measured once per set of arguments. ``threads`` is torch's number of threads, on which the
    rate depends; it is not set here.
    """
    size = 1024 if device.type == "cpu" else 8192
    rates = []
    for dtype in {torch.float32, HALVES.get(precision or "", torch.float32)}:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * size**3 / _best(functools.partial(torch.mm, a, b), device))
    return max(rates)


@functools.lru_cache
def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Return the bytes/s that a copy of 64 MiB reads and writes, the best of several runs.

    The bandwidth is measured once per set of arguments.
    """
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], Tensor], device: torch.device, budget: float = 0.1) -> float:
    """Return the fewest seconds of the runs that fit into a budget; there are at least three."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    start = time.perf_counter()
    seconds = [timed() for _ in range(3)]
    while time.perf_counter() - start < budget:
        seconds.append(timed())
    return min(seconds)
