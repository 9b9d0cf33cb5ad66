"""Chains as CUDA graphs: the launches of all K steps are recorded once and replayed by one call.

What a recording does not read from memory of its own is part of its key. A chain is recorded when
its key occurs for the second time, since a single call would pay for the recording and gain
nothing. A recording is used only after its replay has reproduced a chain that was also run step by
step.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient
from fastlangevin.chain.chain import Chain
from fastlangevin.chain.cuda_recording import ChainRecording, CudaRecorder, RecordedEngine, Recorder
from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.precision import switches
from fastlangevin.gradients.select import EngineChoice
from fastlangevin.gradients.trace.replay_engine import ReplayGradient
from fastlangevin.locks import new_lock
from fastlangevin.step import choose_backend

# The most recordings at a time. Each holds its chain's state and the network's values in a step.
_RECORDINGS = 2
# A recording is dropped for another kind of chain only after this many calls without it. Otherwise
# kinds that alternate would be recorded at every call, which is slower than running them.
_CALLS_BEFORE_DROP = 8
# The most kinds of chains that are remembered, recorded or not.
_KINDS = 16
# A step has about 25 launches, and each takes one or two kilobytes and 10 us to instantiate.
_MAX_STEPS = 1024
# A kind whose recording failed is tried again after this many calls, and then after twice as many,
# since memory may have been short or another library may have been at work on the device.
_CALLS_BEFORE_RETRY = 32
# Equal bits are expected, except that cuDNN may sum in an order that changes from run to run.
_TOLERANCE = 1e-5


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
    is_kept: bool = True,
    device_type: str = "cuda",
) -> str | None:
    """None if a chain can be recorded, else the reason.

    ``device``, ``dtype`` and ``chains`` are those of the state; ``engine`` and ``backend`` are the
    chosen names, not "auto". ``is_kept`` is whether later calls may use the engine's operators.
    """
    if device.type != device_type:
        return f"the states are on {device}; only CUDA has graphs"
    if not chains:
        return "the batch is empty"
    if dtype == torch.float64:
        return "the reference updates float64 states, and it reads no seed from memory"
    if metropolis:
        return "the uniforms that accept or reject a step do not read their seed from memory"
    if engine == "autograd":
        return "autograd runs the energy's own code, and a graph cannot follow its branches"
    if engine not in ("explicit", "fused"):
        return f"the {engine} engine is not recorded"
    if not is_kept:
        return "the energy may compute something else in the next call, unnoticed"
    if backend not in ("native", "triton"):
        return f"backend {backend} reads no seed from memory"
    if noise is not None:
        return "noise is given as an argument"
    for name, value in (("step_size", step_size), ("noise_std", noise_std)):
        if isinstance(value, Tensor):
            return f"{name} is a tensor, whose values may change; only numbers are recorded"
    if steps > _MAX_STEPS:
        return f"the chain has {steps} steps, and at most {_MAX_STEPS} are recorded"
    return None


def kind_of(chain: Chain, x: Tensor) -> tuple[Any, ...]:
    """The key of a recording: all that it holds fixed, except the engine."""
    settings = chain.settings._replace(backend=choose_backend(chain.settings.backend, x.device))
    values = (tuple(v) if isinstance(v, list) else v for v in settings)
    layout = x.shape, x.stride(), x.dtype, x.device
    return (*layout, chain.first_chain, *values, *_torch_settings(x.device.type))


def _torch_settings(device_type: str) -> tuple[Any, ...]:
    """The settings by which torch chooses its kernels."""
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


def _source(engine: Engine | None) -> Any:
    """Returns what is the same object in all calls that a recording is for.

    An engine that replays a trace is made for one call, so its trace is returned instead.
    """
    return engine.trace if isinstance(engine, ReplayGradient) else engine


@dataclass
class _Kind:
    """What is remembered of the chains with one key."""

    source: "weakref.ref[Any]"  # the engine or its trace
    last_call: int = 0
    recording: ChainRecording | None = None
    reason: str | None = None  # why the last try to record it failed
    failures: int = 0
    next_try: int = 0  # the first call at which it is tried again

    def fail(self, reason: str, call: int) -> None:
        self.reason = reason
        self.next_try = call + (_CALLS_BEFORE_RETRY << self.failures)
        self.failures += 1


class Graphs:
    """The recordings of a sampler. A copy of a sampler starts without any.

    Only one thread at a time records or replays, and it waits for the device, since the stream of
    another thread would write to the same memory.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._lock = new_lock()
        self._kinds: dict[tuple[Any, ...], _Kind] = {}  # the most recently used one is last
        self._calls = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def run(self, chain: Chain, x: Tensor, choice: EngineChoice) -> Tensor | None:
        """Runs the chain in place on x and returns the last energies, if it can be replayed.

        Returns None and leaves x unchanged if the caller has to run it step by step. ``choice`` is
        the engine of the chain for this x.
        """
        if x.device.type != self._record.device_type or not x.shape[0]:
            return None
        with self._lock:
            engine = choice.engine
            if self._refusal(chain, x, choice) is not None:
                return None
            assert isinstance(engine, RecordedEngine)
            self._calls += 1
            key = kind_of(chain, x)
            kind = self._kinds.pop(key, None)
            seen_before = kind is not None and kind.source() is _source(engine)
            if kind is None or not seen_before:
                kind = _Kind(weakref.ref(_source(engine)))
            self._kinds[key] = kind
            kind.last_call = self._calls
            if len(self._kinds) > _KINDS:
                self._kinds.pop(next(iter(self._kinds)))
            if kind.recording is not None:
                energies = kind.recording.replay(chain, x, engine)
                if energies is None:
                    kind.recording = None
                return energies
            if not seen_before or self._calls < kind.next_try or not self._make_room():
                return None
            return self._run_and_record(chain, x, choice, kind)

    def _run_and_record(
        self, chain: Chain, x: Tensor, choice: EngineChoice, kind: _Kind
    ) -> Tensor | None:
        engine = choice.engine
        assert isinstance(engine, RecordedEngine)
        start, energies = x.clone(), None
        for step in chain.steps(x, choice=choice):
            energies = step.energies
        if not bool(torch.isfinite(x).all()):
            return energies  # the caller reports it; there is nothing to compare a replay with
        shared_with = next((r.graph for r in self._recordings()), None)
        try:
            recording = ChainRecording(
                chain, start, engine, choice.graph, self._record, shared_with
            )
            replayed = recording.replay(chain, start, engine)
            if replayed is not None and _agree(start, x) and _agree(replayed, energies):
                kind.recording, kind.reason = recording, None
            else:
                kind.fail("its replay differs from the chain run step by step", self._calls)
        except Exception as error:  # the chain itself has been run, so no error is fatal
            cause: BaseException = error
            while cause.__context__ is not None:  # leaving a failed capture raises another error
                cause = cause.__context__
            text = str(cause).strip().split("\n")[0]
            reason = f"its launches could not be recorded: {type(cause).__name__}: {text}"
            kind.fail(reason, self._calls)
        return energies

    def _recordings(self) -> list[ChainRecording]:
        return [k.recording for k in self._kinds.values() if k.recording is not None]

    def _make_room(self) -> bool:
        """Whether there is room for another recording, after dropping the least recently used."""
        recorded = [kind for kind in self._kinds.values() if kind.recording is not None]
        if len(recorded) < _RECORDINGS:
            return True
        if self._calls - recorded[0].last_call <= _CALLS_BEFORE_DROP:
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
            is_kept=not isinstance(choice.engine, ReplayGradient) or choice.engine.is_kept,
            device_type=self._record.device_type,
        )

    def explain(self, chain: Chain, x: Tensor, choice: EngineChoice) -> str:
        """A line of text: whether such calls are replayed, and what that costs or why not."""
        reason = self._refusal(chain, x, choice)
        if reason is not None:
            return f"no: {reason}"
        with self._lock:
            kind = self._kinds.get(kind_of(chain, x))
            if kind is not None and kind.source() is not _source(choice.engine):
                kind = None
            if kind is not None and kind.reason is not None:
                wait = max(1, kind.next_try - self._calls)
                return f"no: {kind.reason}; the next try is in {wait} calls"
            if kind is not None and kind.recording is not None:
                recording = kind.recording
                return (
                    f"yes: all {chain.settings.steps} steps are replayed as one; recorded in "
                    f"{recording.seconds:.2g} s, {recording.bytes / 2**20:.3g} MiB"
                    + ("" if recording.has_packing() else "; weights are packed one by one")
                )
            if len(self._recordings()) == _RECORDINGS:
                return (
                    f"not now: {_RECORDINGS} other kinds of chains are recorded, until one has not "
                    f"been run for {_CALLS_BEFORE_DROP} calls"
                )
            return "yes: the second such call records all steps, and later ones replay them as one"


def _agree(a: Tensor, b: Tensor | None) -> bool:
    if b is None:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
