"""Chains as CUDA graphs: the launches of all K steps are recorded once, and repeated by one call.

A graph repeats launches as they were, on the memory that they were given. What may change from call
to call is therefore in memory that stays: the state, the packed weights, and the seed and first
step, which the kernels of the step read there. All else is part of a recording's key. A recording
is made when a kind of chain comes for the second time, as a single call would pay for it and gain
nothing, and is used only once it has repeated a chain that was also run step by step.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient
from fastlangevin.chain.chain import Chain, Overflow, check_overflow
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.precision import switches
from fastlangevin.gradients.select import EngineChoice
from fastlangevin.locks import new_lock
from fastlangevin.step import choose_backend

# A recording holds its chain's state, and the network's values for the time of a step.
_RECORDINGS = 2
# A recording gives way to another kind of chain only after so many calls without it: kinds that
# take turns would else be recorded at every call, which takes longer than running them.
_RESTED = 8
# Kinds of chains that are remembered, recorded or not.
_KINDS = 16
# Some 25 launches a step, of a kilobyte or two each and 10 us to instantiate.
_MAX_STEPS = 1024
# Equal bits are expected, except where cuDNN sums in an order that changes from run to run.
_TOLERANCE = 1e-5
# CUDA graphs may be captured by one thread of a process at a time.
_CAPTURING = new_lock()


class Recorder(Protocol):
    """Records what ``run`` launches; :class:`CudaRecorder`, and in tests one for the CPU."""

    device_type: str

    def __call__(
        self, run: Callable[[], None], device: torch.device, beside: Any
    ) -> tuple[Any, int]:
        """(what has replay(), bytes of memory that it took); ``beside``: one to share it with."""


class CudaRecorder:
    """``run`` as a CUDA graph, after a run that compiles and loads what it needs.

    On one stream per device: cuBLAS keeps a workspace, of 32 MiB on newer GPUs, for every stream.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(
        self, run: Callable[[], None], device: torch.device, beside: Any
    ) -> tuple[Any, int]:
        # The inner context puts the stream back, which torch does not where a capture fails.
        with (
            _CAPTURING,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            side = self._streams.setdefault(device, torch.cuda.Stream())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Between replays nothing lives in a graph's own memory, so that two may share it.
            pool = None if beside is None else beside.pool()
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                run()
            return graph, max(0, torch.cuda.memory_reserved() - before)


def refusal(
    *,
    device: torch.device,
    dtype: torch.dtype,
    chains: int,
    engine: str,
    backend: str,
    steps: int,
    step_size: Coefficient | list[float],
    noise_std: Coefficient | list[float],
    noise: Tensor | None = None,
    metropolis: bool = False,
    device_type: str = "cuda",
) -> str | None:
    """None where a chain may be recorded, else why not.

    device, dtype and chains: of the state. engine and backend: names as chosen, not "auto".
    """
    if device.type != device_type:
        return f"the states are on {device}; only CUDA has graphs"
    if not chains:
        return "the batch is empty"
    if dtype == torch.float64:
        return "float64 states are updated by the reference, which reads no seed from memory"
    if metropolis:
        return "steps are accepted by uniforms whose seed is not read from memory"
    if engine == "autograd":
        return "autograd runs the energy's own code, whose branches a graph cannot follow"
    if engine not in ("explicit", "fused"):
        return f"the {engine} engine is not recorded"
    if backend not in ("native", "triton"):
        return f"backend {backend} reads no seed from memory"
    if noise is not None:
        return "noise is given"
    for name, value in (("step_size", step_size), ("noise_std", noise_std)):
        if isinstance(value, Tensor):
            return f"{name} is a tensor, whose values may change; numbers are recorded"
    if steps > _MAX_STEPS:
        return f"{steps} steps; up to {_MAX_STEPS} are recorded"
    return None


def kind_of(chain: Chain, x: Tensor) -> tuple[Any, ...]:
    """What a recording holds fixed: all but the chain's engine, x, seed and step."""
    settings = chain.settings._replace(backend=choose_backend(chain.settings.backend, x.device))
    values = (tuple(v) if isinstance(v, list) else v for v in settings)
    place = x.shape, x.stride(), x.dtype, x.device
    return (*place, chain.first_chain, *values, *_torch_settings(x.device.type))


def _torch_settings(device_type: str) -> tuple[Any, ...]:
    """Those by which torch chooses its kernels."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        *switches(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
    )


class Recording:
    """A chain's launches, from any state, seed and first step, with the weights of the moment."""

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        engine: ExplicitGradient | FusedGradient,
        record: Recorder,
        beside: Any,
    ) -> None:
        begin = time.perf_counter()
        self.engine = engine
        self.overflow = Overflow(x.device) if chain.settings.precision == "fp16" else None
        self.x = x.clone()
        self.rng_state = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.energies: Tensor | None = None
        # Numbers other than the first replay's, which is checked: were they used, it would show.
        other = chain._replace(
            seed=(chain.seed + 1) % 2**64, first_step=0, rng_state=self.rng_state
        )

        def run() -> None:
            energies = None
            if self.overflow is not None:
                self.overflow.begin()
            for step in other.stride(engine, self.x, self.overflow):
                energies = step.energies
            assert energies is not None
            if self.energies is None:
                self.energies = torch.empty_like(energies)
            self.energies.copy_(energies)

        engine.begin()
        self.graph, self.bytes = record(run, x.device, beside)
        self.addresses = _addresses(engine)
        self.seconds = time.perf_counter() - begin

    def replay(self, chain: Chain, x: Tensor) -> Tensor | None:
        """The chain, in place on x, and its last energies. None, and x untouched, where the engine
        has moved to other memory. Returns when the device is done."""
        self.engine.begin()
        if _addresses(self.engine) != self.addresses:
            return None
        assert self.energies is not None
        seed = chain.seed if chain.seed < 2**63 else chain.seed - 2**64
        for place, number in zip(self.rng_state, (seed, chain.first_step), strict=True):
            place.fill_(number)
        self.x.copy_(x)
        self.graph.replay()
        x.copy_(self.x)
        energies = self.energies.clone()
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        check_overflow(self.engine, self.overflow)
        return energies


def _addresses(engine: ExplicitGradient | FusedGradient) -> list[int]:
    return [buffer.data_ptr() for buffer in engine.buffers()]


@dataclass
class _Kind:
    """What is known of a kind of chain."""

    engine: "weakref.ref[Any]"
    used: int = 0  # the number of the last call
    recording: Recording | None = None
    reason: str | None = None  # why it is not to be recorded


class Graphs:
    """A sampler's recordings. A copy of a sampler starts anew.

    One thread at a time records or replays, until the device is done: another thread's stream
    would write to the same memory.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._lock = new_lock()
        self._kinds: dict[tuple[Any, ...], _Kind] = {}  # the last used last
        self._calls = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def run(self, chain: Chain, x: Tensor, choice: EngineChoice) -> Tensor | None:
        """The chain, in place on x, and its last energies; None, and x untouched, where it is to be
        run step by step. choice: the chain's, for this x."""
        if x.device.type != self._record.device_type or not x.shape[0]:
            return None
        with self._lock:
            engine = choice.engine
            if self._refusal(chain, x, choice) is not None:
                return None
            assert isinstance(engine, ExplicitGradient | FusedGradient)
            self._calls += 1
            key = kind_of(chain, x)
            kind = self._kinds.pop(key, None)
            again = kind is not None and kind.engine() is engine
            if kind is None or not again:
                kind = _Kind(weakref.ref(engine))
            self._kinds[key] = kind
            kind.used = self._calls
            if len(self._kinds) > _KINDS:
                self._kinds.pop(next(iter(self._kinds)))
            if kind.recording is not None:
                energies = kind.recording.replay(chain, x)
                if energies is None:
                    kind.recording = None
                return energies
            if not again or kind.reason is not None or not self._make_room():
                return None
            return self._run_and_record(chain, x, choice, kind)

    def _run_and_record(
        self, chain: Chain, x: Tensor, choice: EngineChoice, kind: _Kind
    ) -> Tensor | None:
        engine = choice.engine
        assert isinstance(engine, ExplicitGradient | FusedGradient)
        start, energies = x.clone(), None
        for step in chain.walk(x, choice=choice):
            energies = step.energies
        if not bool(torch.isfinite(x).all()):
            return energies  # of which the caller will tell; there is nothing to compare with
        beside = next((r.graph for r in self._recordings()), None)
        try:
            recording = Recording(chain, start, engine, self._record, beside)
            found = recording.replay(chain, start)
            if found is not None and _alike(start, x) and _alike(found, energies):
                kind.recording = recording
            else:
                kind.reason = "its replay differs from the chain run step by step"
        except Exception as error:  # whatever it is, the chain has been run
            first: BaseException = error
            while first.__context__ is not None:  # the end of a capture raises an error of its own
                first = first.__context__
            text = str(first).strip().split("\n")[0]
            kind.reason = f"its launches could not be recorded: {type(first).__name__}: {text}"
        return energies

    def _recordings(self) -> list[Recording]:
        return [k.recording for k in self._kinds.values() if k.recording is not None]

    def _make_room(self) -> bool:
        """Whether there is room for one more recording, the least recently used being dropped."""
        recorded = [kind for kind in self._kinds.values() if kind.recording is not None]
        if len(recorded) < _RECORDINGS:
            return True
        if self._calls - recorded[0].used <= _RESTED:
            return False
        recorded[0].recording = None
        return True

    def _refusal(self, chain: Chain, x: Tensor, choice: EngineChoice) -> str | None:
        settings = chain.settings
        return refusal(
            device=x.device,
            dtype=x.dtype,
            chains=x.shape[0],
            engine=choice.name,
            backend=choose_backend(settings.backend, x.device),
            steps=settings.steps,
            step_size=settings.step_size,
            noise_std=settings.noise_std,
            noise=chain.noise,
            metropolis=settings.metropolis,
            device_type=self._record.device_type,
        )

    def explain(self, chain: Chain, x: Tensor, choice: EngineChoice) -> str:
        """Whether calls like this one are replayed, why not, and what that costs."""
        reason = self._refusal(chain, x, choice)
        if reason is not None:
            return f"no: {reason}"
        with self._lock:
            kind = self._kinds.get(kind_of(chain, x))
            if kind is not None and kind.engine() is not choice.engine:
                kind = None
            if kind is not None and kind.reason is not None:
                return f"no: {kind.reason}"
            if kind is not None and kind.recording is not None:
                made = kind.recording
                return (
                    f"yes: all {chain.settings.steps} steps replayed as one; recorded in "
                    f"{made.seconds:.2g} s, {made.bytes / 2**20:.3g} MiB"
                )
            if len(self._recordings()) == _RECORDINGS:
                return f"not now: {_RECORDINGS} kinds of chains are held, until one rests"
            return "yes: all steps recorded at the second call of a kind, then replayed as one"


def _alike(a: Tensor, b: Tensor | None) -> bool:
    if b is None:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
