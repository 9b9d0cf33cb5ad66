"""Is it the same chain? A loop and what replaces it, run with the same noise, step by step."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count
from fastlangevin.presets.common import gradient_points, watching
from fastlangevin.sampler import LangevinSampler
from fastlangevin.scores.general import kept_generators, modules_of
from fastlangevin.states import Allocations
from fastlangevin.trace import leaves_of, nodes_of

_OP = "compare"


class Comparison(NamedTuple):
    """What :func:`compare` found; ``print`` it."""

    same: bool
    verdict: str
    differences: list[float]  # the largest where each gradient is taken, and last at the end
    tolerances: list[float]  # what rounding may make at each of them
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

    States count as the same within 32 eps (1 + k)^2 max(1, |x|) after k steps: eps is the dtype's,
    the growth allows for networks that part from rounding. On the CPU the bytes are those of
    tensors that torch makes, on CUDA those that its allocator holds. Modes, flags, .grads, buffers
    and torch's generators are as before. Raises TypeError or ValueError naming the argument.
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

        def own(run: Callable[..., Any], noise: Tensor | None = None) -> Any:
            put_back()
            return run(x0, noise=noise, **model_kwargs)

        fresh = _fresh(sampler)  # what it keeps for its next calls counts too
        peak = _peak_bytes(loop, x0.device), _peak_bytes(lambda: own(fresh), x0.device)
        ours, our_points = _ours(sampler, own, x0, z, model_kwargs)
        theirs, record = _theirs(loop, z, ours)
        seconds = _times((loop, lambda: own(sampler)), x0.device, rounds)
    pairs = [*zip(record.points, our_points, strict=False), (theirs, ours)]
    numbers = [*range(len(pairs) - 1), steps]
    differences = [_distance(a, b) for a, b in pairs]
    scale = max(1.0, *(float(b.abs().nan_to_num().max()) for _, b in pairs))
    tolerances = [32 * torch.finfo(x0.dtype).eps * (1 + k) ** 2 * scale for k in numbers]
    parted = any(not d <= t for d, t in zip(differences, tolerances, strict=True))
    ends_alone = not record.points
    if parted and len(record.points) != steps and differences[-1] <= tolerances[-1]:
        # Inner loops take gradients too: the k-th need not be step k's.
        ends_alone, numbers = True, numbers[-1:]
        differences, tolerances = differences[-1:], tolerances[-1:]
    same, verdict = _verdict(differences, tolerances, numbers, record, our_points, z)
    ratios = [loop / own for loop, own in zip(*seconds, strict=True)]
    return Comparison(
        same=same,
        verdict=verdict,
        differences=differences,
        tolerances=tolerances,
        draws=record.draws,
        gradients=len(record.points),
        steps=steps,
        seconds=(statistics.median(seconds[0]), statistics.median(seconds[1])),
        speedup=statistics.median(ratios),
        peak_bytes=peak,
        shape=tuple(x0.shape),
        dtype=x0.dtype,
        notes=_notes(record, steps, ends_alone),
    )


class _Record(TorchFunctionMode):
    """Gives a loop its normal numbers and notes where it takes its gradients."""

    def __init__(self, z: Tensor, skip: int) -> None:
        super().__init__()
        self.z, self.shape, self.skip = z, z.shape[1:], skip
        self.draws = 0
        self.points: list[Tensor] = []
        self.first_grad: Tensor | None = None

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
        if not isinstance(out, Tensor) or out.shape != self.shape:
            return
        k, self.draws = self.draws - self.skip, self.draws + 1
        if not 0 <= k < len(self.z):
            return
        mean, std = 0.0, 1.0
        if name.startswith("normal"):
            given = args[name == "normal_" :]
            mean = kwargs.get("mean", given[0] if given else mean)
            std = kwargs.get("std", given[1] if len(given) > 1 else std)
        with torch.no_grad():
            out.copy_(self.z[k].to(out.dtype) * std + mean)

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
        if self.first_grad is None and grad is not None:
            self.first_grad = grad.detach().clone()


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


def _ours(
    sampler: Callable[..., Any],
    own: Callable[..., Any],
    x0: Tensor,
    z: Tensor,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Sequence[Tensor]]:
    """(x_K, the states at which gradients were taken)."""
    if isinstance(sampler, LangevinSampler):
        taken = gradient_points(sampler, x0, noise=z, **kwargs)
        return own(sampler, z), list(taken)
    with watching() as chains:
        out = own(sampler, z)
    points = [x for chain in chains if chain.shape[1:] == x0.shape for x in chain]
    return _state(out, x0.shape), points[: len(z)]


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
    differences: list[float],
    tolerances: list[float],
    numbers: list[int],
    record: _Record,
    points: Sequence[Tensor],
    z: Tensor,
) -> tuple[bool, str]:
    beyond = [i for i, d in enumerate(differences) if not d <= tolerances[i]]
    if not beyond:
        i = max(range(len(differences)), key=lambda i: differences[i])
        return True, (
            f"the same chain: the largest difference is {differences[i]:.1e}, after step "
            f"{numbers[i]}, where rounding may make {tolerances[i]:.1e}"
        )
    i = beyond[0]
    text = f"another chain: after step {numbers[i]} the difference is {differences[i]:.1e}, where "
    text += f"rounding may make {tolerances[i]:.1e}"
    if record.draws not in (0, len(z)) and record.skip == 0:
        text += f"; the loop drew noise {record.draws} times, the sampler {len(z)} times"
    if numbers[i] == 0:
        return False, text + (
            "; the first gradients are taken at different states: is the noise added before the "
            "gradient in one of them (noise_order), or x0 clamped?"
        )
    if numbers[i] == 1 and record.first_grad is not None:
        ends = (record.points[1:2], points[1:2])
        moves = [_move(points[0], end[0], record.first_grad, z) for end in ends if len(end)]
        if len(moves) == 2:
            return False, text + f"; step 1 of the loop is {moves[0]}, of the sampler {moves[1]}"
    elif z.dtype == torch.float32:
        text += "; with dtype=torch.float64 it is seen whether that is rounding which grew"
    return False, text


def _move(start: Tensor, end: Tensor, grad: Tensor, z: Tensor) -> str:
    """A step in terms of the gradient and the noise, by least squares."""
    parts = {"gradient": grad, **{f"noise[{k}]": z[k] for k in range(min(2, len(z)))}}
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


def _notes(record: _Record, steps: int, ends_alone: bool) -> tuple[str, ...]:
    notes = []
    if record.skip:
        notes.append(
            f"the loop drew normals {record.draws} times for {steps} steps; the first "
            f"{record.skip} were left to itself"
        )
    elif record.draws != steps:
        notes.append(f"the loop drew normals of x0's shape {record.draws} times for {steps} steps")
    if len(record.points) != steps:
        notes.append(
            f"the loop took {len(record.points)} gradients by autograd in {steps} steps"
            + (": only the ends were compared" if ends_alone else "")
        )
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
