"""Take one step of the paper's networks in the GPU's fused engine, in one process per network.

    python -m benchmarks.fused_step [--widths 64 32] [--batches 64] [--precisions fp16 tf32]
        [--odd] [--quick]

The processes compile at the same time and leave the kernels in Triton's cache, where later
benchmarks find them. A profiler can be run on one width and precision, which then need no other
process. Without a GPU, the kernels are interpreted if TRITON_INTERPRET=1.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

import fastlangevin as fl
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.fused_gpu_plan import DTYPES
from fastlangevin.gradients.graph.conv_stack import ConvStack, conv_stack
from fastlangevin.gradients.graph.record import recognise

OPTIONS = {"step_size": 1.0, "noise_std": 0.01, "seed": 0, "step": 0, "first_chain": 0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_step")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--precisions", nargs="+", default=["fp16", "tf32"])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--odd", action="store_true", help="also the networks of device_checks")
    parser.add_argument("--quick", action="store_true", help="one tiny network")
    options = parser.parse_args(arguments)
    device = options.device
    jobs: list[tuple[Any, ...]] = [
        (step, w, n, p, device)
        for w, n, p in itertools.product(options.widths, options.batches, options.precisions)
    ]
    if options.odd:
        jobs += [(odd_step, name, p, device) for name in NETS for p in DTYPES]
    if options.quick:
        jobs = [(step, 2, 2, options.precisions[0], device)]
    if len(jobs) == 1:
        run, *values = jobs[0]
        print(run(*values))
        return
    failed = False
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), get_context("spawn")) as pool:
        futures = {pool.submit(*job): job[1:] for job in jobs}
        for future in as_completed(futures):
            error = future.exception()
            failed |= error is not None
            print(future.result() if error is None else f"{futures[future]}: {error}", flush=True)
    if failed:
        raise SystemExit(1)


def step(width: int, batch: int, precision: str, device: str) -> str:
    """Take a step with a leaky_relu network, and say what was launched."""
    size = 32 if device == "cuda" else 8
    torch.manual_seed(0)
    energy = fl.ConvEnergy(size=size, width=width).to(device)
    score = engine(energy, (3, size, size), batch, precision)
    x = torch.rand(batch, 3, size, size, device=device)
    score.step_(x, **OPTIONS)
    if not bool(torch.isfinite(x).all()):
        raise AssertionError(f"width {width}, batch {batch}, {precision}: the state is not finite")
    return f"width {width}, batch {batch}, {precision}: {score.plan()}"


def odd_step(name: str, precision: str, device: str) -> str:
    """Take a step with one of NETS, and compute its gradient and energies alone."""
    make, shape = NETS[name]
    x = torch.rand(BATCH, *shape, device=device)
    score = engine(make().to(device), shape, BATCH, precision)
    score(x, want_energies=True)
    score.step_(x, want_energies=True, **OPTIONS)
    if not bool(torch.isfinite(x).all()):
        raise AssertionError(f"{name}, {precision}: the state is not finite")
    return f"{name}, {precision}: {score.plan()}"


def engine(energy: nn.Module, shape: tuple[int, ...], batch: int, precision: str) -> FusedGradient:
    """The fused engine of an energy; AssertionError if its graph is no stack of convolutions."""
    device = next(energy.parameters()).device
    graph = recognise(energy, torch.zeros(1, *shape, device=device))
    stack = graph if isinstance(graph, str) else conv_stack(graph)
    assert isinstance(stack, ConvStack), stack
    return FusedGradient(stack, batch, device, precision)


def paper() -> nn.Module:
    torch.manual_seed(0)
    return fl.ConvEnergy(size=8, width=8, activation="silu")


def odd() -> nn.Module:
    """Nothing a multiple of anything: strides and paddings per axis, a dilation, unread pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 20, 3, (1, 2), (0, 1)),
        nn.SiLU(),
        nn.Conv2d(20, 33, (3, 2), (2, 1), (1, 0), bias=False),
        nn.Softplus(2.0, 1.0),
        nn.Conv2d(33, 16, 2, 1, 2, dilation=(1, 2)),
        nn.ELU(0.7),
        nn.Conv2d(16, 7, 1, (2, 3)),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(7 * 4 * 2, 1),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "paper": (paper, (3, 8, 8)),
    "odd": (odd, (2, 9, 7)),
}
BATCH = 5  # of these networks


if __name__ == "__main__":
    main()
