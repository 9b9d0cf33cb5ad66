"""What a step costs at least: operations, bytes, and the rates at which a machine does them."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlangevin.network import Graph
from fastlangevin.operators import ACTIVATIONS
from fastlangevin.scores import Choice

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# Part of the rate of torch's matrix products that a chain reaches, in float32 and on the CPU, as
# benchmarks/results has it for the paper's networks of width 16 to 64 at batch 64.
_EXPECTED = {"general": (0.3, 0.55), "lean": (0.4, 0.7), "fused": (0.55, 0.8)}


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


def explain_cost(choice: Choice, x: Tensor, precision: str | None) -> list[str]:
    """Lines of a plan: work and memory of a step of these states, and the machine's limit."""
    lines = []
    graph, chains, threads = choice.graph, x.shape[0], torch.get_num_threads()
    if graph is not None:
        each = cost(graph)
        item = 2 if precision in _DTYPES else graph.dtype.itemsize
        flops = each.flops * chains
        # Weights once each way; the state and its gradient read, the state written.
        least = 2 * item * each.weights + 3 * 4 * x.numel()
        rate = matrix_rate(x.device, precision, threads if x.device.type == "cpu" else 0)
        limit = max(flops / rate, least / copy_bandwidth(x.device, threads))
        text = (
            f"work       {flops / 1e9:.3g} GFLOP a step, at least {least / 2**20:.3g} MiB to move; "
            f"at this machine's {rate / 1e9:.3g} GFLOP/s (torch's matrix product) "
            f"{limit * 1e3:.3g} ms"
        )
        lines.append(text)
        expected = _EXPECTED.get(choice.name) if x.device.type == "cpu" else None
        if expected is None or precision in _DTYPES:
            lines.append(
                "           distance from that limit: not measured; fastlangevin bench does"
            )
        else:
            low, high = expected
            lines.append(
                f"           expected {limit / high * 1e3:.3g} to {limit / low * 1e3:.3g} ms, "
                "as seen elsewhere; fastlangevin bench measures it here"
            )
    held = None if choice.run is None else choice.run.held_bytes()
    if held is None and graph is not None and choice.run is None:
        # Autograd keeps what every activation reads and what it puts out.
        held = 2 * each.activations * chains * graph.dtype.itemsize
    if held is not None:
        lines.append(f"memory     about {held / 2**20:.3g} MiB held by the score")
    return lines


@functools.lru_cache
def matrix_rate(device: torch.device, precision: str | None, threads: int) -> float:
    """FLOP/s of torch's product of two square matrices, the best of some; measured once.

    In a half precision, or in float32 where that is faster: some CPUs have no bfloat16. threads:
    torch's, a part of the key alone.
    """
    size = 1024 if device.type == "cpu" else 8192
    rates = []
    for dtype in {torch.float32, _DTYPES.get(precision or "", torch.float32)}:
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
