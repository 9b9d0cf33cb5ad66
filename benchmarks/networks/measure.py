"""Time, error and memory of a step of a chain on one energy, ours and the plain loop's."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastlangevin as fl
from benchmarks import timing
from benchmarks.chain import peak_bytes
from benchmarks.networks.cases import Built, Case
from benchmarks.report_networks import LOOP
from fastlangevin.bench import plain_loop
from fastlangevin.explain import rejected
from fastlangevin.gradients.precision import network_autocast, network_precision

LEAST_SECONDS = 0.05  # of one measurement
LEAST_ROUNDS, MOST_ROUNDS = 5, 60
# A step of this size is rounded as the gradient is: x hardly counts in x - a dE/dx.
_LARGE_STEP = 2.0**40
_MEMORY_BATCH = 32

Row = dict[str, Any]


def measure(
    case: Case, precision: str, gradients: list[str], seconds: float, memory: bool
) -> list[Row]:
    """Time the loop and a sampler with each of ``gradients``; returns a row for each of them.

    A sampler that cannot run has a row with its "error". A loop that cannot run has one, too, and
    then nothing is timed.
    """
    built = case.build()
    about = {"energy": case.name, "precision": precision, "threads": torch.get_num_threads()}
    exact = exact_gradient(case)
    rows: dict[str, Row] = {LOOP: about | {"gradient": LOOP}}
    runs: dict[str, Callable[[], Tensor]] = {}
    try:
        rows[LOOP]["gradient_error"] = error(loop_gradient(built, precision), exact)
        runs[LOOP] = loop_of(case, built, precision)
    except RuntimeError as refusal:
        return [rows[LOOP] | {"error": reason(refusal)}]
    samplers: dict[str, fl.LangevinSampler] = {}
    for gradient in gradients:
        rows[gradient] = about | {"gradient": gradient}
        sampler = sampler_of(case, built, precision, gradient)
        try:
            rows[gradient] |= engine_of(sampler, built)
            found = our_gradient(case, built, precision, gradient)
            rows[gradient]["gradient_error"] = error(found, exact)
            run = call_of(sampler, built)
            run()
            runs[gradient], samplers[gradient] = run, sampler
        except (ArithmeticError, RuntimeError, ValueError) as refusal:
            rows[gradient]["error"] = reason(refusal)
    try:
        timed(rows, runs, case, built, seconds)
    except (ArithmeticError, RuntimeError) as failure:  # the other energies can still be timed
        return [rows[LOOP] | {"error": reason(failure)}]
    for name in runs:
        if name in samplers and case.device.type == "cuda":
            rows[name]["cuda_graph"] = cuda_graph(samplers[name], built)
        if memory:
            rows[name]["peak_bytes"] = step_bytes(case, precision, name)
    return list(rows.values())


def timed(
    rows: dict[str, Row], runs: dict[str, Callable[[], Tensor]], case: Case, built: Built,
    seconds: float,
) -> None:  # fmt: skip
    """Time the runs in turn, and write times and ratios to the loop's into the rows."""
    timers = {name: chain_timer(run, built, case.steps) for name, run in runs.items()}
    rounds = timing.rounds_within(timers, seconds, LEAST_ROUNDS, MOST_ROUNDS)
    times = timing.interleave(timers, rounds)
    for name, samples in times.items():
        ratios = timing.speedup(times[LOOP], samples)
        rows[name] |= {"seconds": timing.summary(samples), "speedup": ratios}


def reason(refusal: Exception) -> str:
    """Why something cannot run, on one line."""
    return str(refusal).split("cannot run: ")[-1].partition("\n")[0]


def loop_of(case: Case, built: Built, precision: str) -> Callable[[], Tensor]:
    """The five-line loop, in the same precision."""

    def loop() -> Tensor:
        energy = functools.partial(built.energy, **built.kwargs)
        with torchs(precision, built.x.device):
            return plain_loop(energy, built.x, case.steps, case.step_size, case.noise_std)

    return loop


def sampler_of(case: Case, built: Built, precision: str, gradient: str) -> fl.LangevinSampler:
    return fl.LangevinSampler(
        built.energy, case.steps, case.step_size, case.noise_std,
        precision=None if precision == "fp32" and built.x.device.type == "cpu" else precision,
        gradient=gradient,
    )  # fmt: skip


def call_of(sampler: fl.LangevinSampler, built: Built) -> Callable[[], Tensor]:
    return lambda: sampler(built.x, **built.kwargs)


@contextlib.contextmanager
def torchs(precision: str, device: torch.device) -> Iterator[None]:
    """Torch in a precision: under autocast in a half precision, strict in fp32 on CUDA."""
    if device.type == "cpu" and precision == "fp32":
        yield
        return
    with network_precision(precision, device), network_autocast(precision, device):
        yield


def engine_of(sampler: fl.LangevinSampler, built: Built) -> Row:
    """The engine of a call, and why each faster one was rejected."""
    choice = sampler.choose_engine(built.x, dict(built.kwargs))
    return {"engine": choice.name, "why_not": rejected(choice)}


def cuda_graph(sampler: fl.LangevinSampler, built: Built) -> str:
    """Whether the chains were replayed as a CUDA graph, or why not."""
    lines = sampler.explain(built.x, **built.kwargs).split("\n")
    return next(line for line in lines if line.startswith("graph ")).removeprefix("graph").strip()


def chain_timer(run: Callable[[], Any], built: Built, steps: int) -> timing.Sampler:
    """Time whole chains of ``steps`` as a training loop runs them.

    Before each chain, outside its time, all parameters are written to, as an optimiser does, and
    the energy's arguments become new tensors, as those of another batch are. What an engine
    prepares for weights and arguments therefore counts. On a CPU the clock is the processor time of
    the process with one thread, which other work on the machine disturbs little, else wall time. On
    CUDA it is wall time, until the device has finished.
    """
    on_cuda = built.x.is_cuda
    one_thread = torch.get_num_threads() == 1 and not on_cuda
    clock = time.process_time if one_thread else time.perf_counter

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        return clock()

    def chain() -> float:
        with torch.no_grad():
            for parameter in built.module.parameters():
                parameter.mul_(1.0)
        built.kwargs.update({name: value.clone() for name, value in built.kwargs.items()})
        start = now()
        run()
        return now() - start

    first = chain()
    chains = 1 if first > 1 else max(1, round(LEAST_SECONDS / max(chain(), 1e-6)))
    return lambda: sum(chain() for _ in range(chains)) / (chains * steps)


def exact_gradient(case: Case) -> Tensor:
    """The gradient at the start in float64, at the float32 values of states and weights."""
    single, double = case.build(), case.build(torch.float64)
    x = single.x.double().requires_grad_()
    kwargs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in single.kwargs.items()
    }
    (grad,) = torch.autograd.grad(double.energy(x, **kwargs).sum(), x)
    return grad


def loop_gradient(built: Built, precision: str) -> Tensor:
    x = built.x.clone().requires_grad_()
    with torchs(precision, x.device):
        (grad,) = torch.autograd.grad(built.energy(x, **built.kwargs).sum(), x)
    return grad


def our_gradient(case: Case, built: Built, precision: str, gradient: str) -> Tensor:
    """The gradient of a sampler's step, from a step without noise."""
    step = case._replace(steps=1, step_size=_LARGE_STEP, noise_std=0.0)
    x = sampler_of(step, built, precision, gradient)(built.x, seed=0, **built.kwargs)
    return (built.x.double() - x.double()) / _LARGE_STEP


def error(grad: Tensor, exact: Tensor) -> float:
    """The distance of a gradient from the exact one, as a fraction of its norm."""
    return float((grad.double() - exact).norm() / exact.norm())


def step_bytes(case: Case, precision: str, name: str) -> int:
    """The most memory that a first step of a new energy holds, without weights and arguments.

    The batch has at least 32 chains, except for networks that are too large for as many.
    """
    if case.batch > 2:
        case = case._replace(batch=max(case.batch, _MEMORY_BATCH))
    case = case._replace(steps=1)
    built = case.build()
    if name == LOOP:
        return peak_bytes(loop_of(case, built, precision))
    return peak_bytes(call_of(sampler_of(case, built, precision, name), built))
