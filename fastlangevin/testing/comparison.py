"""Compare a sampling loop with its replacement, step by step, on the same noise."""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count
from fastlangevin.chain.chain import watching
from fastlangevin.gradients.draws import kept_generators
from fastlangevin.gradients.modules import submodules_of
from fastlangevin.gradients.train_mode import effect_of_train_mode
from fastlangevin.sampler import LangevinSampler
from fastlangevin.testing.loop import OP, Record, described, distance, follow, snapshot, state
from fastlangevin.testing.measure import peak_bytes, restored_modules
from fastlangevin.testing.step_by_step import Judgement, StepByStep, final_rounding
from fastlangevin.timing import seconds_in_turns


class Comparison(NamedTuple):
    """The result of :func:`compare`; ``print`` it."""

    same: bool
    verdict: str
    differences: list[float]  #: at the start, then after each step from the loop's own state
    tolerances: list[float]  #: the largest difference that rounding may cause, for each of them
    apart: list[float]  #: the same differences for a whole run of the sampler, where rounding grows
    draws: int  #: how often the loop drew standard normals of x0's shape
    gradients: int  #: how many gradients of x0's shape the loop took
    steps: int
    seconds: tuple[float, float]  #: loop, sampler: medians of the rounds
    speedup: float  #: median of the rounds' ratios
    peak_bytes: tuple[int, int]  #: loop, sampler: the most that a call's tensors take at a time
    shape: tuple[int, ...]
    dtype: torch.dtype
    notes: tuple[str, ...]

    def __str__(self) -> str:
        shown_steps = sorted({0, 1, self.steps // 2} & set(range(len(self.differences) - 1)))
        marks = [f"{f'step {k}' if k else 'start'} {self.differences[k]:.1e}" for k in shown_steps]
        states = ", ".join([*marks, f"end {self.differences[-1]:.1e}"])
        times = [f"{1e3 * seconds:.4g} ms" for seconds in self.seconds]
        memory = [f"{size / 2**20:.4g} MiB" for size in self.peak_bytes]
        share = self.peak_bytes[1] / max(self.peak_bytes[0], 1)
        lines = [
            self.verdict,
            f"chains      {self.steps} steps of {list(self.shape)}, {self.dtype}",
            f"difference  {states}",
            f"on its own  {max(self.apart):.1e} at most, {self.apart[-1]:.1e} at the end",
            f"time        loop {times[0]}, sampler {times[1]}: {self.speedup:.2f}x as fast",
            f"memory      loop {memory[0]}, sampler {memory[1]}: {share:.2f}x as much",
            *(f"note        {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def compare(
    original: Callable[[Tensor], Any],
    sampler: Callable[..., Any],
    x0: Tensor,
    *,
    steps: int | None = None,
    energy: Callable[..., Tensor] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    rounds: int = 3,
    **model_kwargs: Any,
) -> Comparison:
    """Run a loop and its replacement with the same noise, and report whether they agree.

    Args:
        original: original(x0) -> x_K, the unmodified loop, with its energy, labels and options
            inside. Normal numbers of x0's shape that it draws from torch (randn, randn_like,
            normal, normal_) are replaced. Its states are read where it takes gradients by autograd.
            If it returns a tuple, the first tensor of x0's shape is its result; of a list, the last
            one; if it returns None, x0 itself.
        sampler: A :class:`LangevinSampler`; or, together with ``steps`` (K), a function of (x0,
            noise=z [K, n, ...] or None, **model_kwargs), such as one that calls a preset.
        x0: [n, ...], float32 or float64; each run gets a copy.
        energy: The energy whose modules are restored after each run; by default the sampler's.
        dtype: torch.float64 runs both in it, which separates rounding from real differences: x0 and
            the energy's parameters and buffers are converted for the duration of the call.
        rounds: How many times both are timed, in turns, each with its own noise.

    Every step is judged by itself: the sampler takes it from the state that the loop had reached,
    with the step's noise, and must end where the loop does, within the rounding of that step's own
    terms, so tolerances do not grow with K. Buffers that a module changes in eval mode (as
    handwritten spectral norm may) then have the loop's values of that step. If a step differs by
    more, it is repeated from states 4 eps away, and what kinks or large steps make of that is
    added to its tolerance. If the loop does not take one gradient a step by autograd, only the
    final states are compared; the tolerance is then the sampler's response to an x0 4 eps away.

    On the CPU, bytes are those of the tensors that torch allocates; on CUDA, those that its
    allocator holds. Modes, flags, .grads, buffers and torch's generators are restored. Raises
    TypeError or ValueError naming the argument.
    """
    steps = _check_steps(sampler, steps)
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{OP}: x0 must be a float32 or float64 tensor, got {described(x0)}")
    rounds = check_count(OP, "rounds", rounds)
    energy = sampler.energy if energy is None and isinstance(sampler, LangevinSampler) else energy
    modules = [] if energy is None else submodules_of(energy)
    if dtype is not None and not modules:
        raise ValueError(f"{OP}: dtype converts an energy's modules; give the energy as energy=")
    x0 = x0.detach().to(dtype or x0.dtype)
    draw = functools.partial(
        _noise.normal, x0.shape, seed=seed, stream=_noise.USER, device=x0.device, dtype=x0.dtype
    )
    z = torch.stack([draw(step=k) for k in range(steps)])
    with (
        kept_generators(x0.device),
        restored_modules(modules, dtype) as restore,
        torch.enable_grad(),
    ):

        def loop() -> Any:
            restore()  # each run starts from the same modules
            x = x0.clone()
            out = original(x)
            return x if out is None else out

        def replacement(
            run: Callable[..., Any], noise: Tensor | None = None, start: Tensor = x0
        ) -> Any:
            restore()
            return run(start, noise=noise, **model_kwargs)

        fresh = sampler
        if isinstance(sampler, LangevinSampler):  # what it keeps for later calls counts, too
            fresh = LangevinSampler(sampler.energy, **sampler.settings())
        peak = peak_bytes(loop, x0.device), peak_bytes(lambda: replacement(fresh), x0.device)
        with watching() as runs:
            ours = state(replacement(sampler, z), x0.shape)
        by_steps = StepByStep(runs, x0, steps)
        restore()
        first = snapshot(modules)
        theirs, record = follow(loop, z, ours, modules)
        restore()
        by_step = len(record.points) == steps == len(by_steps.chain_steps)
        if by_step:
            judgement = by_steps.judge([*record.points, theirs], ours, [first, *record.buffers])
        else:
            judgement = Judgement([], [distance(theirs, ours)], [0.0], [distance(theirs, ours)])
        if not (by_step and by_steps.ends_in(ours)):
            judgement.tolerances[-1] = final_rounding(
                lambda x: replacement(sampler, z, x), x0, ours, steps
            )
            judgement.differences[-1] = judgement.apart[-1]
        seconds = seconds_in_turns((loop, lambda: replacement(sampler)), x0.device, rounds)
    same, verdict = _verdict(judgement, steps, record, theirs, z)
    notes = _notes(record, steps, by_step)
    if trained := None if energy is None else effect_of_train_mode(energy):
        trained += "; energy.eval() before both samples from the energy itself"
        verdict, notes = (verdict, (trained, *notes)) if same else (f"{trained}; {verdict}", notes)
    ratios = [loop / ours for loop, ours in zip(*seconds, strict=True)]
    return Comparison(
        same=same,
        verdict=verdict,
        differences=judgement.differences,
        tolerances=judgement.tolerances,
        apart=judgement.apart,
        draws=record.draws,
        gradients=len(record.points),
        steps=steps,
        seconds=(statistics.median(seconds[0]), statistics.median(seconds[1])),
        speedup=statistics.median(ratios),
        peak_bytes=peak,
        shape=tuple(x0.shape),
        dtype=x0.dtype,
        notes=notes,
    )


def _verdict(
    judgement: Judgement, steps: int, record: Record, theirs: Tensor, z: Tensor
) -> tuple[bool, str]:
    pairs = list(zip(judgement.differences, judgement.tolerances, strict=True))
    beyond = [i for i, (d, t) in enumerate(pairs) if not d <= t]
    by_step = len(pairs) > 1
    if not beyond:
        i = max(range(len(pairs)), key=lambda i: pairs[i][0])
        difference, tolerance = pairs[i]
        where = f"of step {i}" if by_step and i else "at the start" if by_step else "at the end"
        return True, (
            f"the same chain: the largest difference is {difference:.1e}, {where}; rounding may "
            f"cause up to {tolerance:.1e}"
        )
    i = beyond[0]
    difference, tolerance = pairs[i]
    k = i if by_step else steps
    text = f"another chain: after step {k} the difference is {difference:.1e}; rounding may "
    text += f"cause up to {tolerance:.1e}"
    if record.draws == 0:
        text = "no draws of x0's shape were seen, so the loop used its own noise; " + text
    elif record.draws != len(z) and record.skip == 0:
        text += f"; the loop drew noise {record.draws} times, the sampler {len(z)} times"
    if not by_step:
        if z.dtype == torch.float32:
            text += "; dtype=torch.float64 shows whether this is accumulated rounding"
        return False, text
    if k == 0:
        return False, text + (
            "; the first gradients are taken at different states: does one of them add noise "
            "before the gradient (noise_order), or clamp x0?"
        )
    grad, start = record.grads[k - 1], record.points[k - 1]
    if grad is not None:
        ends = ([*record.points, theirs][k], judgement.states[k])
        moves = [_move(start, end, grad, z, k - 1) for end in ends]
        text += f"; step {k} of the loop is {moves[0]}, of the sampler {moves[1]}"
    return False, text


def _move(start: Tensor, end: Tensor, grad: Tensor, z: Tensor, k: int) -> str:
    """Describe a step in terms of the gradient and the noise, by least squares."""
    noises = {f"noise[{i}]": z[i] for i in range(k, min(k + 2, len(z)))}
    parts = {"gradient": grad, **noises}
    columns = torch.stack([part.double().flatten() for part in parts.values()], dim=1)
    move = (end - start).double().flatten()
    if not bool(torch.isfinite(columns).all() & torch.isfinite(move).all()):
        return "not finite"
    solution = torch.linalg.lstsq(columns.cpu(), move.cpu()[:, None]).solution[:, 0]
    shares = solution.abs() * columns.cpu().norm(dim=0) / move.norm().cpu().clamp(min=1e-300)
    terms = [
        f"{c:+.4g} {name}"
        for c, name, share in zip(solution.tolist(), parts, shares, strict=True)
        if share > 1e-3
    ]
    residual = (columns.cpu() @ solution - move.cpu()).norm() / move.norm().cpu().clamp(min=1e-300)
    return " ".join(terms or ["nothing"]) + (
        f" and {residual:.0%} else (clipped or clamped)" if residual > 0.01 else ""
    )


def _notes(record: Record, steps: int, by_step: bool) -> tuple[str, ...]:
    notes = []
    if record.skip:
        notes.append(
            f"the loop drew normals {record.draws} times for {steps} steps; the first "
            f"{record.skip} draws were not replaced"
        )
    elif record.draws != steps:
        notes.append(f"the loop drew normals of x0's shape {record.draws} times for {steps} steps")
    if len(record.points) != steps:
        notes.append(f"the loop took {len(record.points)} gradients by autograd in {steps} steps")
    if not by_step:
        notes.append("only the ends were compared")
    return tuple(notes)


def _check_steps(sampler: Callable[..., Any], steps: int | None) -> int:
    if isinstance(sampler, LangevinSampler):
        if steps not in (None, sampler.steps):
            raise ValueError(f"{OP}: steps must be the sampler's {sampler.steps}, got {steps}")
        return sampler.steps
    if not callable(sampler):
        raise TypeError(f"{OP}: sampler must be callable, got {type(sampler).__name__}")
    if steps is None:
        raise TypeError(f"{OP}: give steps, because sampler is a function")
    return check_count(OP, "steps", steps)
