"""Is it the same chain? A loop and what replaces it, run with the same noise, step by step."""

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlangevin import noise as _noise
from fastlangevin.arguments import at_step, check_count
from fastlangevin.chain import Chain, watching
from fastlangevin.sampler import LangevinSampler
from fastlangevin.scores.general import kept_generators, modules_of, network_dtype
from fastlangevin.states import Allocations
from fastlangevin.step import fold_norm_clip, langevin_step_
from fastlangevin.trace import leaves_of, nodes_of

_OP = "compare"


class Comparison(NamedTuple):
    """What :func:`compare` found; ``print`` it."""

    same: bool
    verdict: str
    differences: list[float]  # at the start, then of each step taken from the loop's own state
    tolerances: list[float]  # what rounding may make of each of them
    apart: list[float]  # at the same places, of the sampler left to itself: rounding's growth
    draws: int  # of standard normals of x0's shape by the loop
    gradients: int  # taken by the loop; of x0's shape
    steps: int
    seconds: tuple[float, float]  # loop, sampler: medians of the rounds
    speedup: float  # median of the rounds' ratios
    peak_bytes: tuple[int, int]  # loop, sampler: tensors made in a call, at most at a time
    shape: tuple[int, ...]
    dtype: torch.dtype
    notes: tuple[str, ...]

    def __str__(self) -> str:
        shown = sorted({0, 1, self.steps // 2} & set(range(len(self.differences) - 1)))
        marks = [f"{f'step {k}' if k else 'start'} {self.differences[k]:.1e}" for k in shown]
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
    """Run a loop and what is to replace it with the same noise, and say whether they agree.

    original: original(x0) -> x_K, the loop as it is, its energy, labels and options inside it. The
        normal numbers of x0's shape that it draws from torch (randn, randn_like, normal, normal_)
        are replaced by given ones; its states are read where it takes gradients through autograd.
        Of a tuple that it returns the first tensor of x0's shape counts, of a list the last; where
        it returns None, x0 itself.
    sampler: a :class:`LangevinSampler`; or, with ``steps`` (K) given, a function of
        (x0, noise=z [K, n, ...] or None, **model_kwargs), such as a preset's.
    x0 [n, ...]: float32 or float64; each run gets a copy.
    dtype: torch.float64 runs both in it, which tells rounding from real differences: x0 and the
        parameters and buffers of ``energy``, by default the sampler's, are converted meanwhile.
    rounds: of timing, in turns, with the loop's and the sampler's own noise.

    Every step is judged by itself: the sampler takes it from the state that the loop had reached,
    with the step's noise, and has to arrive where the loop does, within the rounding of that step's
    own terms; nothing grows with K. A step that goes further apart is taken again from states
    4 eps away, and what kinks or large steps make of that is allowed. Where the loop's gradients
    are not one a step (or not autograd's), the ends alone are compared, and what the sampler makes
    of an x0 4 eps away is the measure.

    On the CPU the bytes are those of tensors that torch makes, on CUDA those that its allocator
    holds. Modes, flags, .grads, buffers and torch's generators are as before. Raises TypeError or
    ValueError naming the argument.
    """
    steps = _check_steps(sampler, steps)
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_OP}: x0 must be a float32 or float64 tensor, got {_kind(x0)}")
    rounds = check_count(_OP, "rounds", rounds)
    energy = sampler.energy if energy is None and isinstance(sampler, LangevinSampler) else energy
    modules = () if energy is None else modules_of(energy)
    if dtype is not None and not modules:
        raise ValueError(f"{_OP}: dtype converts an energy's module; give it as energy=")
    x0 = x0.detach().to(dtype or x0.dtype)
    z = torch.stack(
        [
            _noise.normal(
                x0.shape, seed=seed, step=k, stream=_noise.USER, device=x0.device, dtype=x0.dtype
            )
            for k in range(steps)
        ]
    )
    with (
        kept_generators(x0.device),
        _left_alone(modules, dtype) as put_back,
        torch.enable_grad(),
    ):

        def loop() -> Any:
            put_back()  # no run finds what another has left behind
            x = x0.clone()
            out = original(x)
            return x if out is None else out

        def own(run: Callable[..., Any], noise: Tensor | None = None, start: Tensor = x0) -> Any:
            put_back()
            return run(start, noise=noise, **model_kwargs)

        fresh = _fresh(sampler)  # what it keeps for its next calls counts too
        peak = _peak_bytes(loop, x0.device), _peak_bytes(lambda: own(fresh), x0.device)
        with watching() as runs:
            ours = _state(own(sampler, z), x0.shape)
        walk = _Walk(runs, x0, steps)
        theirs, record = _theirs(loop, z, ours)
        put_back()
        by_step = len(record.points) == steps == len(walk.places)
        if by_step:
            found = walk.judge([*record.points, theirs], ours)
        else:
            found = _Found([], [_distance(theirs, ours)], [0.0], [_distance(theirs, ours)])
        if not (by_step and walk.ends_in(ours)):
            found.tolerances[-1] = _spread(lambda x: own(sampler, z, x), x0, ours, steps)
            found.differences[-1] = found.apart[-1]
        seconds = _times((loop, lambda: own(sampler)), x0.device, rounds)
    same, verdict = _verdict(found, steps, record, theirs, z)
    ratios = [loop / own for loop, own in zip(*seconds, strict=True)]
    return Comparison(
        same=same,
        verdict=verdict,
        differences=found.differences,
        tolerances=found.tolerances,
        apart=found.apart,
        draws=record.draws,
        gradients=len(record.points),
        steps=steps,
        seconds=(statistics.median(seconds[0]), statistics.median(seconds[1])),
        speedup=statistics.median(ratios),
        peak_bytes=peak,
        shape=tuple(x0.shape),
        dtype=x0.dtype,
        notes=_notes(record, steps, by_step),
    )


class _Record(TorchFunctionMode):
    """Gives a loop its normal numbers and notes where it takes its gradients."""

    def __init__(self, z: Tensor, skip: int) -> None:
        super().__init__()
        self.z, self.shape, self.skip = z, z.shape[1:], skip
        self.draws = 0
        self.points: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return self._grad(func, args, kwargs)
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(func, args, kwargs)
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like", "normal", "normal_"):
            self._supply(name, out, args, kwargs)
        return out

    def _supply(self, name: str, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if not isinstance(out, Tensor) or out.shape not in (self.shape, self.z.shape):
            return
        if out.shape == self.z.shape:  # all steps' at once
            self.draws += len(self.z)
            self._fill(name, out, self.z, args, kwargs)
            return
        k, self.draws = self.draws - self.skip, self.draws + 1
        if 0 <= k < len(self.z):
            self._fill(name, out, self.z[k], args, kwargs)

    def _fill(
        self, name: str, out: Tensor, z: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        mean, std = 0.0, 1.0
        if name.startswith("normal"):
            given = args[name == "normal_" :]
            mean = kwargs.get("mean", given[0] if given else mean)
            std = kwargs.get("std", given[1] if len(given) > 1 else std)
        with torch.no_grad():
            out.copy_(z.to(out.dtype) * std + mean)

    def _grad(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        at = next((i for i, x in enumerate(inputs) if x.shape == self.shape), None)
        if at is None:
            return func(*args, **kwargs)
        self.points.append(inputs[at].detach().clone())
        grads = func(*args, **kwargs)
        self._keep(grads[at])
        return grads

    def _backward(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        root = args[0] if args else kwargs["tensors"]
        roots = (root,) if isinstance(root, Tensor) else tuple(root)
        leaves = [leaf for out in roots for leaf in leaves_of(nodes_of(out))]
        x = next((leaf for leaf in leaves if leaf.shape == self.shape), None)
        if x is None:
            return func(*args, **kwargs)
        self.points.append(x.detach().clone())
        before = 0 if x.grad is None else x.grad.detach().clone()
        func(*args, **kwargs)
        assert x.grad is not None
        self._keep(x.grad.detach() - before)
        return None

    def _keep(self, grad: Tensor | None) -> None:
        self.grads.append(None if grad is None else grad.detach().clone())


def _theirs(loop: Callable[[], Any], z: Tensor, ours: Tensor) -> tuple[Tensor, _Record]:
    """(x_K, the record) of a loop.

    One that draws more often than it steps may do so before them, for a start or for memory to draw
    into; its first draws are then its own, if that agrees better.
    """
    found = []
    skip: int | None = 0
    while skip is not None:
        with _Record(z, skip) as record:
            out = loop()
        found.append((_state(out, z.shape[1:]), record))
        extra = record.draws - len(z)
        skip = extra if skip == 0 and extra > 0 else None
    return min(found, key=lambda run: _distance(run[0], ours))


class _Found(NamedTuple):
    states: list[Tensor]  # where the sampler comes from the loop's states
    differences: list[float]
    tolerances: list[float]
    apart: list[float]


class _Walk:
    """The chains of a call, step by step, from where a gradient is taken to where the next is."""

    def __init__(self, runs: list[tuple[Tensor, Tensor, Chain]], x0: Tensor, steps: int) -> None:
        runs = [run for run in runs if run[1].shape == x0.shape and run[1].dtype == x0.dtype]
        places = [(run, k) for run in runs for k in range(run[2].sampler.steps)]
        self.places, self.steps = places[:steps], steps

    def ends_in(self, ours: Tensor) -> bool:
        """Whether the last step's state is the answer, with nothing done to it after."""
        end = self.places[-1][0][0]
        return torch.equal(end.to(ours), ours)

    def judge(self, theirs: list[Tensor], ours: Tensor) -> _Found:
        """theirs: the loop's states at its gradients and its end, K + 1."""
        eps = torch.finfo(ours.dtype).eps
        begin = self._begin()
        bound = 4 * eps * torch.maximum(_largest(begin), _largest(theirs[0]))
        difference, tolerance = _worst(begin, theirs[0], bound)
        apart = _distance(theirs[0], begin)
        found = _Found([begin], [difference], [tolerance], [apart])
        free = begin
        for j, (here, there) in enumerate(itertools.pairwise(theirs)):
            end, bound = self._step(j, here)
            difference, tolerance = _worst(end, there, bound)
            if not difference <= tolerance:
                difference, tolerance = _worst(end, there, bound + self._response(j, here, end))
            free = self._step(j, free)[0] if j + 1 < self.steps else ours
            found.states.append(end)
            found.differences.append(difference)
            found.tolerances.append(tolerance)
            found.apart.append(_distance(there, free))
        return found

    def _begin(self) -> Tensor:
        (_, start, chain), _ = self.places[0]
        return _noise_before(start.clone(), chain, 0)

    def _step(self, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the state at gradient j + 1, what rounding may make of each chain) from one at j."""
        (run, k) = self.places[j]
        chain, sampler = run[2], copy.copy(run[2].sampler)
        sampler.steps = 1
        a, b = (at_step(value, k) for value in (sampler.step_size, sampler.noise_std))
        sampler.step_size, sampler.noise_std = a, b
        if sampler.noise_order == "before":  # x has that noise
            sampler.noise_order, sampler.noise_std = "after", 0.0
        one = chain._replace(
            sampler=sampler,
            first_step=chain.first_step + k,
            noise=None if chain.noise is None else chain.noise[k : k + 1],
            step_kwargs={name: value[k : k + 1] for name, value in chain.step_kwargs.items()},
        )
        end, grad = x.clone(), None
        for step in one.walk(end):
            grad = step.grad
        eps = torch.finfo(x.dtype).eps
        bound = 4 * eps * torch.maximum(_largest(x), _largest(end))
        if grad is None:
            bound = bound + 32 * eps * _largest(end - x)
        else:
            a, _ = fold_norm_clip(grad, a, sampler.grad_clip)
            a = a.to(grad.device) if isinstance(a, Tensor) else a
            bound = bound + 32 * _network_eps(sampler, x) * a * _largest(grad.to(x.dtype))
        if j + 1 < len(self.places):
            (_, _, chain), k = self.places[j + 1]
            end = _noise_before(end, chain, k)
        return end, bound

    def _response(self, j: int, x: Tensor, end: Tensor) -> Tensor:
        """Four times what a step makes of an x a few eps away, beyond that distance itself [n]."""
        sampler = self.places[j][0][2].sampler
        size = 4 * _network_eps(sampler, x) * _largest(x)
        found = [
            _largest(self._step(j, x + _like(size, x) * _signs(x, trial))[0] - end) - size
            for trial in range(4)
        ]
        return 4 * torch.stack(found).amax(0).clamp(min=0)


def _noise_before(x: Tensor, chain: Chain, k: int) -> Tensor:
    """In place, what noise_order "before" does ahead of the gradient."""
    sampler = chain.sampler
    if sampler.noise_order != "before":
        return x
    return langevin_step_(
        x, None, step_size=0.0, noise_std=at_step(sampler.noise_std, k), seed=chain.seed,
        step=chain.first_step + k, first_chain=chain.first_chain, clamp=sampler.clamp,
        noise=None if chain.noise is None else chain.noise[k],
    )  # fmt: skip


def _network_eps(sampler: LangevinSampler, x: Tensor) -> float:
    """The coarsest of the state's dtype and the network's."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(sampler.precision or "")
    dtypes = [x.dtype, network_dtype(sampler.energy, x.dtype)] + [half] * (half is not None)
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)


def _spread(run: Callable[[Tensor], Any], x0: Tensor, ours: Tensor, steps: int) -> float:
    """What rounding may make of the ends: each step's of the state, and what x0's grows to."""
    eps = torch.finfo(x0.dtype).eps
    size = 4 * eps * _largest(x0)
    moved = [
        _distance(_state(run(x0 + _like(size, x0) * _signs(x0, trial)), x0.shape), ours)
        for trial in range(2)
    ]
    scale = max(float(_largest(x).nan_to_num().max()) for x in (x0, ours))
    return 4 * (steps * eps * scale + max(moved))


def _worst(a: Tensor, b: Tensor, bound: Tensor) -> tuple[float, float]:
    """(difference, bound) of the chain that goes furthest beyond its bound [n]."""
    found = (a.to(b.device, torch.float64) - b.to(torch.float64)).abs()
    found = _largest(found.nan_to_num(nan=torch.inf))
    bound = bound.to(found).expand_as(found)
    i = int((found / bound.clamp(min=1e-300)).argmax())
    return float(found[i]), float(bound[i])


def _largest(x: Tensor) -> Tensor:
    """Of each chain, [n]."""
    return x.detach().abs().reshape(len(x), -1).amax(1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def _signs(x: Tensor, trial: int) -> Tensor:
    u = _noise.uniform(x.shape, seed=trial, step=0, device=x.device, dtype=x.dtype)
    return 2 * (u < 0.5) - 1


def _state(out: Any, shape: Sequence[int]) -> Tensor:
    """The last state in what a run returned."""
    if isinstance(out, list):
        out = out[::-1]
    for value in out if isinstance(out, list | tuple) else (out,):
        if isinstance(value, Tensor) and value.shape == shape:
            return value.detach()
        if isinstance(value, Tensor) and value.shape[1:] == shape and len(value):
            return value[-1].detach()
    raise ValueError(f"{_OP}: a run must return states of shape {list(shape)}, got {_kind(out)}")


def _verdict(
    found: _Found, steps: int, record: _Record, theirs: Tensor, z: Tensor
) -> tuple[bool, str]:
    pairs = list(zip(found.differences, found.tolerances, strict=True))
    beyond = [i for i, (d, t) in enumerate(pairs) if not d <= t]
    each = len(pairs) > 1
    if not beyond:
        i = max(range(len(pairs)), key=lambda i: pairs[i][0])
        difference, tolerance = pairs[i]
        where = f"of step {i}" if each and i else "at the start" if each else "at the end"
        return True, (
            f"the same chain: the largest difference is {difference:.1e}, {where}, where rounding "
            f"may make {tolerance:.1e}"
        )
    i = beyond[0]
    difference, tolerance = pairs[i]
    k = i if each else steps
    text = f"another chain: after step {k} the difference is {difference:.1e}, where rounding may "
    text += f"make {tolerance:.1e}"
    if record.draws == 0:
        text = "no draws of x0's shape were seen, the loop's noise is its own; " + text
    elif record.draws != len(z) and record.skip == 0:
        text += f"; the loop drew noise {record.draws} times, the sampler {len(z)} times"
    if not each:
        if z.dtype == torch.float32:
            text += "; with dtype=torch.float64 it is seen whether that is rounding which grew"
        return False, text
    if k == 0:
        return False, text + (
            "; the first gradients are taken at different states: is the noise added before the "
            "gradient in one of them (noise_order), or x0 clamped?"
        )
    grad, start = record.grads[k - 1], record.points[k - 1]
    if grad is not None:
        ends = ([*record.points, theirs][k], found.states[k])
        moves = [_move(start, end, grad, z, k - 1) for end in ends]
        text += f"; step {k} of the loop is {moves[0]}, of the sampler {moves[1]}"
    return False, text


def _move(start: Tensor, end: Tensor, grad: Tensor, z: Tensor, k: int) -> str:
    """A step in terms of the gradient and the noise, by least squares."""
    noises = {f"noise[{i}]": z[i] for i in range(k, min(k + 2, len(z)))}
    parts = {"gradient": grad, **noises}
    columns = torch.stack([part.double().flatten() for part in parts.values()], dim=1)
    move = (end - start).double().flatten()
    if not bool(torch.isfinite(columns).all() & torch.isfinite(move).all()):
        return "not finite"
    found = torch.linalg.lstsq(columns.cpu(), move.cpu()[:, None]).solution[:, 0]
    shares = found.abs() * columns.cpu().norm(dim=0) / move.norm().cpu().clamp(min=1e-300)
    terms = [
        f"{c:+.4g} {name}"
        for c, name, share in zip(found.tolist(), parts, shares, strict=True)
        if share > 1e-3
    ]
    left = (columns.cpu() @ found - move.cpu()).norm() / move.norm().cpu().clamp(min=1e-300)
    return " ".join(terms or ["nothing"]) + (
        f" and {left:.0%} else (clipped or clamped)" if left > 0.01 else ""
    )


def _notes(record: _Record, steps: int, by_step: bool) -> tuple[str, ...]:
    notes = []
    if record.skip:
        notes.append(
            f"the loop drew normals {record.draws} times for {steps} steps; the first "
            f"{record.skip} were left to itself"
        )
    elif record.draws != steps:
        notes.append(f"the loop drew normals of x0's shape {record.draws} times for {steps} steps")
    if len(record.points) != steps:
        notes.append(f"the loop took {len(record.points)} gradients by autograd in {steps} steps")
    if not by_step:
        notes.append("only the ends were compared")
    return tuple(notes)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where only one is not a number, or both are not."""
    found = (a.to(b.device, torch.float64) - b.to(torch.float64)).abs()
    return float(found.nan_to_num(nan=torch.inf).max()) if found.numel() else 0.0


def _times(
    runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, taken in turns: a machine's slow phases fall on both."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for run, found in zip(runs, seconds, strict=True):
            begin = _now(device)
            run()
            found.append(_now(device) - begin)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        with Allocations() as made:
            run()
        return made.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


@contextlib.contextmanager
def _left_alone(
    modules: Sequence[nn.Module], dtype: torch.dtype | None
) -> Iterator[Callable[[], None]]:
    """Put modules back as they were; meanwhile in a dtype, if one is given.

    Yields what puts flags, modes, .grads and buffers back in between.
    """
    parameters = [p for m in modules for p in m.parameters()]
    buffers = [b for m in modules for b in m.buffers()]
    found = [(p, p.data, p.requires_grad, p.grad) for p in parameters if p.is_leaf]
    values = [(b, b.data, b.detach().clone()) for b in buffers]
    modes = [(m, m.training) for root in modules for m in root.modules()]

    def put_back() -> None:
        for parameter, _, requires_grad, _ in found:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for buffer, _, value in values:
            buffer.data.copy_(value)
        for module, training in modes:
            module.training = training

    for tensor, data in [(p, data) for p, data, _, _ in found] + [(b, d) for b, d, _ in values]:
        tensor.grad = None  # torch holds a .grad to its tensor's dtype
        if dtype is not None and data.is_floating_point():
            tensor.data = data.to(dtype)
    try:
        yield put_back
    finally:
        put_back()
        for buffer, data, value in values:
            buffer.data = data.copy_(value)
        for parameter, data, _, grad in found:
            parameter.data = data
            parameter.grad = grad


def _fresh(sampler: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(sampler, LangevinSampler):
        return LangevinSampler(sampler.energy, **sampler.settings())
    return sampler


def _check_steps(sampler: Callable[..., Any], steps: int | None) -> int:
    if isinstance(sampler, LangevinSampler):
        if steps not in (None, sampler.steps):
            raise ValueError(f"{_OP}: steps must be the sampler's {sampler.steps}, got {steps}")
        return sampler.steps
    if not callable(sampler):
        raise TypeError(f"{_OP}: sampler must be callable, got {type(sampler).__name__}")
    if steps is None:
        raise TypeError(f"{_OP}: give steps, the number of them that a function takes")
    return check_count(_OP, "steps", steps)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return type(value).__name__
