"""What a sampler remembers of its energy between calls: graphs, engines and proofs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastlangevin.gradients.engine import Engine
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import RecordedRun, record
from fastlangevin.gradients.precision import HALVES
from fastlangevin.gradients.proof import prove
from fastlangevin.kernels.memory import all_in_memory
from fastlangevin.locks import new_lock

NOT_IN_MEMORY = "not in memory (fake, meta, or of a torch.func transform)"
# Entries of each kind that are remembered. Every engine holds a copy of the weights.
_ENTRIES = 4


class EnergyCall(NamedTuple):
    """An energy, the states x [n, ...] that it is called with, and the settings of the call."""

    energy: Callable[..., Tensor]
    x: Tensor
    precision: str | None
    model_kwargs: dict[str, Any]


class EngineCache:
    """The graphs recorded of an energy, the engines made from them, and which have been proved.

    ``warned`` is whether the energy's modules have been checked for train mode. A copy or a pickle
    of the cache is empty.
    """

    def __init__(self) -> None:
        # Keys contain ids, so each entry holds the graph that keeps the objects behind them alive.
        self._graphs: dict[tuple[Any, ...], Graph] = {}  # by the shape of a batch
        self._engines: dict[tuple[Any, ...], tuple[Graph | None, Engine]] = {}
        self._proved: dict[tuple[Any, ...], Graph] = {}
        self._lock = new_lock()
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineCache, ()

    def graph(self, call: EnergyCall) -> tuple[Graph, RecordedRun | None] | str:
        """Return the graph of the energy on its states, or the reason why there is none.

        The energy is run unless a remembered graph is still current; the run comes with the graph.
        """
        energy, x, _, model_kwargs = call
        shape = tuple(x.shape)
        cached = self._graphs.get(shape)
        if cached is not None and not model_kwargs and cached.is_current(energy, x):
            return cached, None
        run = record(energy, x, model_kwargs)
        if isinstance(run, str):
            return run
        if not all_in_memory(*run.graph.bases):
            return f"a parameter or buffer is {NOT_IN_MEMORY}"
        cached = self._graphs.get(shape)
        if cached is not None and cached.key != run.graph.key:
            with self._lock:
                self._engines = {k: v for k, v in self._engines.items() if k[-1] != cached.key}
        self._remember(self._graphs, shape, run.graph)
        return run.graph, run

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
        graph: Graph,
        run: RecordedRun | None,
        call: EnergyCall,
    ) -> str | None:
        """Return why an engine is not to be used, or None if its gradient is autograd's.

        An engine that has been proved is not compared again. In half precision the comparison is
        with the explicit engine in the network's own dtype, which proves the graph. ``run`` is the
        run that the graph was recorded from, if it took place in this call.
        """
        energy, x, precision, model_kwargs = call
        key = name, precision, graph.key
        if key in self._proved or not x.shape[0]:
            return None
        engine = ExplicitGradient(graph, x, "fp32") if precision in HALVES else make()
        recorded = run or record(energy, x, model_kwargs)
        if isinstance(recorded, str):
            return recorded
        verdict = prove(recorded, engine, x)
        if verdict.reason is None and verdict.shown:
            self._remember(self._proved, key, graph)
        return verdict.reason

    def _remember(self, entries: dict[Any, Any], key: Any, value: Any) -> None:
        """Make an entry the most recent one, and drop the oldest if there are too many."""
        with self._lock:
            entries.pop(key, None)
            entries[key] = value
            if len(entries) > _ENTRIES:
                entries.pop(next(iter(entries)))
