"""What a sampler remembers of its energy between calls: recordings, engines and proofs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import Recording, RunResults, record
from fastlangevin.gradients.modules import submodules_of
from fastlangevin.gradients.packing import PackedEnergy
from fastlangevin.gradients.precision import HALVES, network_precision
from fastlangevin.gradients.proof import other_states, prove, prove_kernels
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.replay_engine import Programs, ReplayGradient
from fastlangevin.kernels.memory import all_in_memory
from fastlangevin.locks import new_lock

NOT_IN_MEMORY = "not in memory (fake, meta, or of a torch.func transform)"
# Entries of each kind that are remembered. Every engine holds a copy of the weights.
_ENTRIES = 4
# After every failure, this many times more calls pass before an energy is recorded again. A run
# that keeps its first result can be recorded in a later call, while most failures are permanent.
_PATIENCE = 4


class EnergyCall(NamedTuple):
    """An energy, the states x [n, ...] that it is called with, and the settings of the call."""

    energy: Callable[..., Tensor]
    x: Tensor
    precision: str | None
    model_kwargs: dict[str, Any]


@dataclass
class _Failure:
    """A run that could not be recorded, and the calls that pass before it is tried again."""

    recording: Recording
    source: Any  # the energy, so that no other one gets its id
    skipped: int = 1
    left: int = 1


class EngineCache:
    """The recordings of an energy, the engines made from them, and which have been proved.

    ``warned`` is whether the energy's modules have been checked for train mode. A copy or a pickle
    of the cache is empty.
    """

    def __init__(self) -> None:
        # Keys contain ids, so each entry holds the graph that keeps the objects behind them alive.
        self._recordings: dict[tuple[Any, ...], Recording] = {}  # by shape and half precision
        self._failures: dict[tuple[Any, ...], _Failure] = {}
        self._engines: dict[tuple[Any, ...], tuple[Graph | None, Engine]] = {}
        self._programs: dict[int, Programs] = {}  # by the trace's id
        self._proved: dict[tuple[Any, ...], Graph | Trace] = {}
        self._lock = new_lock()
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineCache, ()

    def recording(
        self, call: EnergyCall, half: str | None = None, try_again: bool = True
    ) -> tuple[Recording, RunResults | None]:
        """Return the recording of the energy on its states, with the run's results if it ran now.

        The energy is run unless a remembered recording still holds. ``half`` is the precision of
        autocast during the run, or None. A run that cannot be recorded costs as much as a few
        steps. Without ``try_again`` it is therefore not repeated at every call: 1, 4, 16, ... calls
        pass before the next attempt, unless a module is switched between train and eval mode.
        """
        energy, x, _, model_kwargs = call
        key = tuple(x.shape), half
        kept = self._recordings.get(key)
        guard = None if kept is None else kept.guard
        if kept is not None and guard is not None and guard.holds(energy, x, model_kwargs):
            return kept, None
        # A frozen torch.jit module has no mode.
        modes = (getattr(module, "training", None) for module in submodules_of(energy))
        source, packing = energy, None
        if isinstance(energy, PackedEnergy):  # which is a new one at every call
            source, packing = energy.func, energy.packing
        attempt = *key, id(source), packing, tuple(model_kwargs), tuple(modes)
        failure = self._failures.get(attempt)
        if failure is not None and not try_again and failure.left > 0:
            failure.left -= 1
            return failure.recording, None
        with _strict(call, half):
            recording, results = record(energy, x, model_kwargs, half)
        if recording.ran and results is None:
            skipped = 1 if failure is None else _PATIENCE * failure.skipped
            self._remember(self._failures, attempt, _Failure(recording, source, skipped, skipped))
        graph = recording.graph
        if isinstance(graph, Graph) and not all_in_memory(*graph.bases):
            recording = recording._replace(graph=f"a parameter or buffer is {NOT_IN_MEMORY}")
        trace = recording.trace
        if isinstance(trace, Trace) and not all_in_memory(*trace.leaves.values()):
            recording = recording._replace(trace=f"a tensor that it reads is {NOT_IN_MEMORY}")
        if kept is not None and isinstance(kept.graph, Graph):
            stale = kept.graph.key
            if not isinstance(graph, Graph) or graph.key != stale:
                with self._lock:
                    self._engines = {k: v for k, v in self._engines.items() if k[-1] != stale}
        if recording.guard is not None:
            self._remember(self._recordings, key, recording)
        return recording, results

    def replay(self, trace: Trace, call: EnergyCall, is_kept: bool = True) -> ReplayGradient:
        """Return the engine that replays a trace with the call's keyword arguments.

        ``is_kept`` is whether later calls may replay the same trace.
        """
        programs = self._programs.get(id(trace))
        if programs is None or programs.trace is not trace:
            programs = Programs(trace)
        self._remember(self._programs, id(trace), programs)
        return ReplayGradient(trace, programs, call.model_kwargs, call.precision, is_kept)

    def engine(self, make: Callable[[], Engine], graph: Graph | None, *key: Any) -> Engine:
        """Return the engine remembered for a graph and key, or else the one that ``make`` makes."""
        key = (*key, None if graph is None else graph.key)
        with self._lock:
            entry = self._engines.get(key)
        entry = entry or (graph, make())
        self._remember(self._engines, key, entry)
        return entry[1]

    def disproof(
        self,
        name: str,
        make: Callable[[], Engine],
        recorded: Graph | Trace,
        results: RunResults | None,
        call: EnergyCall,
    ) -> str | None:
        """Return why an engine is not to be used, or None if its gradient is autograd's.

        An engine that has been proved is not compared again. On CUDA and in half precision a graph
        is compared by the explicit engine, in strict float32 or the network's own dtype, and in
        half precision a trace is compared under autocast. The fused engine's kernels on CUDA are
        compared as well, with a bound for any precision. ``results`` are those of the run that was
        recorded, if it took place in this call.
        """
        energy, x, precision, model_kwargs = call
        key = name, precision, recorded.key if isinstance(recorded, Graph) else id(recorded)
        if key in self._proved or not x.shape[0]:
            return None
        half = precision if precision in HALVES else None
        if isinstance(recorded, Graph):
            reduced = half is not None or x.is_cuda
            engine = ExplicitGradient(recorded, x, "fp32") if reduced else make()
            half = None
        else:
            half = half if recorded.is_autocast else None
            strict = x.is_cuda and half is None
            engine = self.replay(recorded, call._replace(precision="fp32")) if strict else make()
        with _strict(call, half):
            if results is None:
                results = record(energy, x, model_kwargs, half)[1]
            if results is None:
                return "its energy could not be run again for a comparison"
            verdict = prove(results, engine, x)
            if not verdict.shown:  # every gradient at x is zero, or not finite
                elsewhere = other_states(x)
                results = record(energy, elsewhere, model_kwargs, half)[1]
                if results is not None:
                    x, verdict = elsewhere, prove(results, engine, elsewhere)
        if verdict.reason is None and results is not None and x.is_cuda and name == "fused":
            verdict = prove_kernels(results, make(), x)
        if verdict.reason is None and verdict.shown:
            self._remember(self._proved, key, recorded)
        return verdict.reason

    def _remember(self, entries: dict[Any, Any], key: Any, value: Any) -> None:
        """Make an entry the most recent one, and drop the oldest if there are too many."""
        with self._lock:
            entries.pop(key, None)
            entries[key] = value
            if len(entries) > _ENTRIES:
                entries.pop(next(iter(entries)))


def _strict(call: EnergyCall, half: str | None) -> AbstractContextManager[None]:
    """Return the context in which an energy is recorded and an engine compared with it.

    Across the kinks of LeakyReLU, the rounding of TF32 alone moves a gradient by 1 %, and TF32 is
    torch's default on CUDA. There, both are computed in strict float32.
    """
    precision = call.precision
    if half is None and (precision in HALVES or call.x.is_cuda):
        precision = "fp32"
    return network_precision(precision, call.x.device)
