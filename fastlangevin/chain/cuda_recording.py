"""A chain's launches as a CUDA graph, and those that pack its weights as another.

A graph repeats the same launches on the same memory. Values that may change from call to call are
therefore kept in fixed memory: the state, the weights and arguments of the network or what is
computed from them alone, and the seed and first step, which the step's kernels read from there.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlangevin.chain.chain import Chain, Overflow, check_overflow
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.trace.replay_engine import ReplayGradient
from fastlangevin.locks import new_lock

# Only one thread of a process may capture a CUDA graph at a time.
_CAPTURING = new_lock()

RecordedEngine = ExplicitGradient | FusedGradient | ReplayGradient


class Recorder(Protocol):
    """Records the launches of ``run``: :class:`CudaRecorder`, or one for the CPU in tests."""

    device_type: str

    def __call__(
        self, run: Callable[[], None], device: torch.device, shared_with: Any
    ) -> tuple[Any, int]:
        """(an object with replay(), its bytes); ``shared_with`` is one to share memory with."""


class CudaRecorder:
    """Records ``run`` as a CUDA graph, after a first run that compiles and loads its kernels.

    It uses one stream per device, since cuBLAS keeps a workspace for every stream, which has 32 MiB
    on newer GPUs.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(
        self, run: Callable[[], None], device: torch.device, shared_with: Any
    ) -> tuple[Any, int]:
        # The last context restores the stream, which torch does not do if a capture fails.
        with (
            _CAPTURING,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            side_stream = self._streams.setdefault(device, torch.cuda.Stream())
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                run()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            # A graph's own memory holds nothing between replays, so that two graphs can share it.
            # The pool is named here, since a graph whose capture failed does not give its name.
            pool = torch.cuda.graph_pool_handle() if shared_with is None else shared_with.pool()
            capture = torch.cuda.graph(
                graph, pool=pool, stream=side_stream, capture_error_mode="thread_local"
            )
            try:
                with capture:
                    before = torch.cuda.memory_reserved()
                    run()
            except BaseException:
                _end_capture(device, pool)
                raise
            return graph, max(0, torch.cuda.memory_reserved() - before)


def _end_capture(device: torch.device, pool: Any) -> None:
    """Undo what torch leaves behind if a capture fails while it ends.

    CUDAGraph.capture_end raises before it tells the allocator that the capture is over. The
    allocator would then postpone frees for ever and keep the pool's memory. Up to torch 2.12 the
    default generator also stays in its capturing state, in which it draws no more numbers.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    # torch 2.6 and 2.7 have it under the second name.
    names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"
    end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
    try:
        if end is not None:
            end(index, pool)
            torch._C._cuda_releasePool(index, pool)
    except RuntimeError:
        return  # the capture itself has ended, and only ``run`` has failed
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())  # a clone is not capturing


class ChainRecording:
    """The launches of a chain.

    They are repeated for any state, seed and first step, the current weights, and the tensors among
    the network's arguments.
    """

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        engine: RecordedEngine,
        graph: Graph | None,
        record: Recorder,
        shared_with: Any,
    ) -> None:
        start = time.perf_counter()
        self.engine = engine.recordable() if isinstance(engine, ReplayGradient) else engine
        fp16 = chain.settings.precision == "fp16"
        self.overflow = Overflow(chain.settings.steps) if fp16 else None
        self.x = x.clone()
        self.rng_state = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.energies: Tensor | None = None
        # Numbers that differ from those of the first replay, whose check would detect their use.
        recorded_chain = chain._replace(
            seed=(chain.seed + 1) % 2**64, first_step=0, rng_state=self.rng_state
        )

        def run() -> None:
            energies = None
            if isinstance(self.engine, ReplayGradient):
                self.engine.forget_constants()
            for step in recorded_chain.steps_with(self.engine, self.x, self.overflow):
                energies = step.energies
            assert energies is not None
            if self.energies is None:
                self.energies = torch.empty_like(energies)
            self.energies.copy_(energies)

        self._packing: PackingLaunches | None = None
        self._begin(engine)
        self.graph, self.bytes = record(run, x.device, shared_with)
        if not isinstance(engine, ReplayGradient) and graph is not None and graph.computed is None:
            self._packing = recorded_packing(engine, graph.bases, record, x.device)
            self.bytes += 0 if self._packing is None else self._packing.bytes
        if self.engine is not engine:
            self.bytes += sum(buffer.nbytes for buffer in self.engine.buffers())
        self.addresses = _addresses(self.engine)
        self.seconds = time.perf_counter() - start

    def replay(self, chain: Chain, x: Tensor, engine: RecordedEngine) -> Tensor | None:
        """Runs the chain in place on x, waits for the device and returns the last energies.

        ``engine`` is the call's, with its arguments of the network. Returns None and leaves x
        unchanged if the engine has moved to other memory.
        """
        self._begin(engine)
        if _addresses(self.engine) != self.addresses:
            return None
        assert self.energies is not None
        seed = chain.seed if chain.seed < 2**63 else chain.seed - 2**64
        self.rng_state[0].fill_(seed)
        self.rng_state[1].fill_(chain.first_step)
        self.x.copy_(x)
        self.graph.replay()
        x.copy_(self.x)
        energies = self.energies.clone()
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        check_overflow(self.engine, self.overflow)
        return energies

    def _begin(self, engine: RecordedEngine) -> None:
        """Read the weights, and the arguments that a call's engine has."""
        if isinstance(self.engine, ReplayGradient):
            assert isinstance(engine, ReplayGradient)
            self.engine.begin_with(engine)
        elif self._packing is not None and self._packing.fits():
            self._packing.graph.replay()
        else:
            self.engine.begin()

    def has_packing(self) -> bool:
        """Whether the weights are packed by a graph too; a trace reads its inputs otherwise."""
        return self._packing is not None or isinstance(self.engine, ReplayGradient)


class PackingLaunches:
    """The launches that pack an engine's weights, some 60 of them, as one graph.

    ``weights`` are the parameters and buffers that they read.
    """

    def __init__(self, graph: Any, size: int, weights: list[Tensor]) -> None:
        self.graph, self.bytes, self.weights = graph, size, weights
        self._places = self._of_weights()

    def fits(self) -> bool:
        """Whether the weights are where the launches read them."""
        return self._of_weights() == self._places

    def _of_weights(self) -> list[tuple[Any, ...]]:
        return [(w.data_ptr(), w.dtype, w.stride()) for w in self.weights]


def recorded_packing(
    engine: ExplicitGradient | FusedGradient,
    weights: list[Tensor],
    record: Recorder,
    device: torch.device,
) -> PackingLaunches | None:
    """Returns the launches of ``engine.begin``, or None if a replay would not do the same."""
    packed = engine.packed()
    with engine.lock:
        expected = [tensor.clone() for tensor in packed]
        try:
            graph, size = record(engine.begin, device, None)
            for tensor in packed:
                tensor.mul_(2)  # which leaves the zeros that pad weights
            graph.replay()
            if all(map(torch.equal, packed, expected)):
                return PackingLaunches(graph, size, weights)
        except Exception:  # the chain itself is recorded, and begin works without a graph
            engine.begin()
            return None
        engine.begin()
    return None


def _addresses(engine: RecordedEngine) -> list[int]:
    return [buffer.data_ptr() for buffer in engine.buffers()]
