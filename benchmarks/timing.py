"""Interleaved timing on CPU and CUDA, and copies to compare with."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Sampler = Callable[[], float]

# Steps in one CUDA graph: enough to make the launch of the graph itself, some 10 us, negligible.
MIN_GRAPH_STEPS, MAX_GRAPH_STEPS = 16, 256


def interleave(samplers: dict[str, Sampler], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each sampler. Every sampler is called once per round.

    Slow phases of a shared machine then affect all of them, and figures of one round can be divided
    by each other. The order changes from round to round, so that no sampler always runs after the
    same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(samplers)
        shuffle(order)
        for name in order:
            seconds[name].append(samplers[name]())
    return seconds


def rounds_within(samplers: dict[str, Sampler], budget: float, least: int, most: int) -> int:
    """How many rounds take about ``budget`` seconds. Runs one round, which is also the warm-up."""
    start = time.perf_counter()
    interleave(samplers, 1)
    return max(least, min(most, round(budget / (time.perf_counter() - start))))


def sampler(steps: Sequence[Callable[[], Any]], device: torch.device, least: float) -> Sampler:
    """Return a function that runs the steps for about ``least`` seconds, or once if that is longer.

    It returns seconds per step.
    """
    return (_cuda_sampler if device.type == "cuda" else _cpu_sampler)(steps, least)


def _cpu_sampler(steps: Sequence[Callable[[], Any]], least: float) -> Sampler:
    def run(loops: int) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            for step in steps:
                step()
        return (time.perf_counter() - start) / (loops * len(steps))

    run(1)
    loops = max(1, round(least / (run(1) * len(steps))))

    def sample() -> float:
        # Untimed: restores the caches and threads that other samplers have left in another state.
        run(1)
        return run(loops)

    return sample


def _cuda_sampler(steps: Sequence[Callable[[], Any]], least: float) -> Sampler:
    replay, count = capture(steps)

    def run(loops: int) -> float:
        # An untimed replay first: it keeps the launch of the timed ones out of the measurement.
        replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(loops):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (loops * count)

    loops = max(1, round(least / (run(1) * count)))
    return lambda: run(loops)


def timed(run: Callable[[], Any], device: torch.device) -> Sampler:
    """Return a function that times ``run`` as users call it, without a CUDA graph around it."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sample() -> float:
        begin = wait()
        run()
        return wait() - begin

    return sample


def capture(steps: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], int]:
    """Capture the steps in a CUDA graph. Returns its replay function and its number of steps.

    The steps run in order and are repeated to at least MIN_GRAPH_STEPS. If small steps were
    launched one by one, the measurement would be of the Python code that launches them.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            steps[0]()
    torch.cuda.current_stream().wait_stream(side)
    repeats = -(-MIN_GRAPH_STEPS // len(steps))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for step in steps:
                step()

    def replay(steps_kept_alive: Sequence[Callable[[], Any]] = steps) -> None:
        # The graph has no more than the addresses of the tensors that the steps hold.
        graph.replay()

    return replay, repeats * len(steps)


def buffer_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of buffers to use in turn, so that none is in the GPU's L2 cache when used.

    In a chain the network's activations displace x from the cache between steps. On the CPU there
    is one set: sizes that fit in a cache are timed in it, and so is the copy to compare with.
    """
    if device.type == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_GRAPH_STEPS, -(-2 * l2 // set_bytes)))


def copy_steps(bytes_moved: int, device: torch.device) -> list[Callable[[], Any]]:
    """``out.copy_(in)`` that reads and writes ``bytes_moved`` in all: the limit set by memory."""
    half = bytes_moved // 2
    sets = buffer_sets(bytes_moved, device)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(sets)]
    return [functools.partial(pair[0].copy_, pair[1]) for pair in pairs]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of samples."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    least = min(seconds)
    return {"median": middle, "q1": low, "q3": high, "min": least, "samples": len(seconds)}


def speedup(base: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Summary of how many times faster ours is, by ratios of the figures of one round each."""
    return summary([b / o for b, o in zip(base, ours, strict=True)])
