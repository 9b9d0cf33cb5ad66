"""What a step costs at least: operations, bytes, and the rates at which a machine does them."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.graph.aten_ops import ACTIVATIONS
from fastlangevin.gradients.graph.ir import Graph

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Cost(NamedTuple):
    """Of one step of one chain, and of the network that all chains share."""

    flops: int  # of the forward pass and the input gradient, a multiply-add as two
    activations: int  # elements that activations put out
    weights: int  # elements of all weights


def cost(graph: Graph) -> Cost:
    """The cost of a graph's step; what is linear after the last activation counts for nothing.

    Weights of a convolution [out, in, kh, kw] take 2 in kh kw operations for each number that it
    puts out, once forward and once in the input gradient.
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
    """FLOP/s of torch's product of two square matrices, the best of some; measured once.

    In a half precision, or in float32 where that is faster: some CPUs have no bfloat16. threads:
    torch's, a part of the key alone.
    """
    size = 1024 if device.type == "cpu" else 8192
    rates = []
    for dtype in {torch.float32, HALVES.get(precision or "", torch.float32)}:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * size**3 / _best(functools.partial(torch.mm, a, b), device))
    return max(rates)


@functools.lru_cache
def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Bytes/s that a copy of 64 MiB reads and writes together, the best of some; measured once."""
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], Tensor], device: torch.device, budget: float = 0.1) -> float:
    """The least seconds of the runs that fit in a budget, at least three."""

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
