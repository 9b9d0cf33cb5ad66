"""Times a step of a chain with every engine, and with a plain loop for comparison."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.gradients.precision import check_precision
from fastlangevin.roofline import cost, matrix_rate
from fastlangevin.sampler import LangevinSampler
from fastlangevin.timing import seconds_in_turns

NAIVE = "plain loop"
_ENGINES = ("autograd", "explicit", "fused")


class Row(NamedTuple):
    """The timing of one way to run a step."""

    name: str
    precision: str | None
    seconds: float  # median time of a step
    speedup: float  # over the plain loop: the median of the ratios in each round
    of_limit: float | None  # time at the rate of torch's matrix product, over this time
    why_not: str | None = None  # why the engine cannot run


def plain_loop(
    energy: Callable[..., Tensor], x: Tensor, steps: int, step_size: float, noise_std: float
) -> Tensor:
    """Run the paper's loop, x <- x - a dE/dx + b z, with autograd and torch's random numbers."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        x.data += -step_size * grad + noise_std * torch.randn_like(x)
    return x.detach()


def bench(
    energy: Callable[..., Tensor],
    x: Tensor,
    precisions: Sequence[str | None] = (None,),
    steps: int = 4,
    seconds: float = 10.0,
    **settings: Any,
) -> list[Row]:
    """Time chains of ``steps`` from x [n, ...] with the plain loop and every engine that can run.

    All of them run in turns, round after round for about ``seconds``, so that slow phases of the
    machine affect all of them. ``settings`` are those of :class:`LangevinSampler`. An engine that
    cannot run has a row that says why.
    """
    step_size, noise_std = settings.get("step_size", 1.0), settings.get("noise_std", 0.01)
    runs: dict[tuple[str, str | None], Callable[[], Any]] = {
        (NAIVE, None): lambda: plain_loop(energy, x, steps, step_size, noise_std)
    }
    refused = []
    for precision in precisions:
        check_precision(precision, x.device)
    for precision in precisions:
        for engine in _ENGINES:
            options = settings | {"steps": steps, "gradient": engine, "precision": precision}
            try:
                sampler = LangevinSampler(energy, **options)
                sampler(x, seed=0)
            except (ArithmeticError, RuntimeError, ValueError) as error:
                reason = str(error).split("cannot run: ")[-1]
                refused.append(Row(engine, precision, float("nan"), float("nan"), None, reason))
                continue
            runs[engine, precision] = lambda sampler=sampler: sampler(x, seed=0)  # type: ignore[misc]
    times = seconds_in_turns(list(runs.values()), x.device, budget=seconds)
    graph = recognise(energy, x)
    rows = []
    for (name, precision), seconds_per_run in zip(runs, times, strict=True):
        median = statistics.median(seconds_per_run) / steps
        ratios = [plain / this for plain, this in zip(times[0], seconds_per_run, strict=True)]
        limit = None if isinstance(graph, str) else _least_seconds(graph, x, precision) / median
        rows.append(Row(name, precision, median, statistics.median(ratios), limit))
    return rows + refused


def to_text(rows: Sequence[Row]) -> str:
    """Return the rows as a table of text."""
    lines = [f"{'engine':<12}{'precision':<12}{'ms a step':>10}{'speedup':>9}{'of the limit':>14}"]
    for row in rows:
        name = f"{row.name:<12}{row.precision or 'as set':<12}"
        if row.why_not is not None:
            lines.append(f"{name}no: {row.why_not}")
            continue
        limit = "" if row.of_limit is None else f"{row.of_limit:.0%}"
        lines.append(f"{name}{1e3 * row.seconds:>10.3g}{row.speedup:>8.2f}x{limit:>14}")
    return "\n".join(lines)


def _least_seconds(graph: Graph, x: Tensor, precision: str | None) -> float:
    """Return the seconds of a step's products at the rate of torch's matrix product."""
    threads = torch.get_num_threads() if x.device.type == "cpu" else 0
    return cost(graph).flops * x.shape[0] / matrix_rate(x.device, precision, threads)
