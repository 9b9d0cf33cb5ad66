"""Which calls are recorded as CUDA graphs, and the memory and copies of recordings."""

import contextlib
import copy
import math
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlangevin as fl
from fastlangevin.chain import cuda_graphs as graphs
from fastlangevin.chain.chain import Overflow, Step
from fastlangevin.chain.cuda_graphs import kind_of, refusal
from fastlangevin.chain.cuda_recording import CudaRecorder
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise
from tests.chain.shared import (
    CHANGES,
    CPU,
    SHAPE,
    K,
    Rerun,
    as_on_cuda,
    branched,
    line,
    made,
    net,
    numbers,
    plain,
    recorded,
)

FITS: dict[str, Any] = {
    "device": torch.device("cuda", 0), "dtype": torch.float32, "chains": 64, "engine": "explicit",
    "backend": "native", "steps": 100, "step_size": 1.0, "noise_std": [0.01] * 100,
}  # fmt: skip
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"device": CPU}, "the states are on cpu"),
    ({"chains": 0}, "the batch is empty"),
    ({"dtype": torch.float64}, "the reference updates float64 states"),
    ({"engine": "autograd"}, "runs the energy's own code"),
    ({"engine": "network"}, "the network engine is not recorded"),
    ({"metropolis": True}, "do not read their seed from memory"),
    ({"backend": "reference"}, "backend reference reads no seed"),
    ({"noise": torch.zeros(1)}, "noise is given as an argument"),
    ({"step_size": torch.ones(64)}, "step_size is a tensor"),
    ({"noise_std": torch.tensor(0.1)}, "noise_std is a tensor"),
    ({"steps": 1025}, "1025 steps, and at most 1024"),
]


def test_calls_that_fit_a_cuda_graph_have_no_reason_against_it() -> None:
    assert refusal(**FITS) is None
    assert refusal(**FITS | {"engine": "fused", "backend": "triton"}) is None


@pytest.mark.parametrize(("wrong", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_calls_that_do_not_fit_a_cuda_graph_say_why(wrong: dict[str, Any], reason: str) -> None:
    assert reason in str(refusal(**FITS | wrong))


def test_explain_says_why_there_is_no_graph() -> None:
    assert line(plain(net(), backend="auto"), numbers()).startswith("no: the states are on cpu")


@as_on_cuda
@pytest.mark.parametrize(
    "options",
    [{"noise": torch.zeros(K, *SHAPE)}, {"differentiable": True}],
    ids=["noise", "differentiable"],
)
def test_other_calls_are_not_recorded(options: dict[str, Any]) -> None:
    run, x = recorded(net()), numbers()
    for _ in range(3):
        run(x, seed=0, **options)
        run.trajectory(x, seed=0)
        run.diagnose(x, seed=0)
    run(x[:0], seed=0)
    assert made(run) == 0


def key(x: Tensor | None = None, seed: int = 0, first_chain: int = 0, first_step: int = 0,
        **options: Any) -> tuple[Any, ...]:  # fmt: skip
    run = fl.LangevinSampler(net(), **{"steps": K, "backend": "reference"} | options)
    return kind_of(
        run._chain(seed=seed, first_chain=first_chain, first_step=first_step),
        numbers() if x is None else x,
    )


OTHER: list[dict[str, Any]] = [
    {"steps": 4}, {"step_size": 0.5}, {"step_size": [1.0] * K}, {"noise_std": 0.02},
    {"noise_std": [0.01, 0.02, 0.03]}, {"maximize": True}, {"clamp": (-1, 1)}, {"grad_clip": 1.0},
    {"grad_clip": ("chain_norm", 1.0)}, {"noise_order": "last"}, {"precision": "bf16"},
    {"backend": "auto"}, {"gradient": "explicit"}, {"first_chain": 1}, {"x": numbers().double()},
    {"x": numbers().to(memory_format=torch.channels_last)}, {"x": numbers(shape=(3, 3, 8, 8))},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHER, ids=lambda o: str(o) if "x" not in o else "x")
def test_a_graphs_key_covers_everything_baked_into_it(other: dict[str, Any]) -> None:
    assert key(**other) != key()
    assert key(**other) == key(**other)
    assert len({key(**other), key()}) == 2


def test_a_graphs_key_ignores_values_read_from_memory() -> None:
    assert key(x=numbers(5), seed=5, first_step=7) == key()


def test_a_key_holds_torchs_own_settings() -> None:
    before = key()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        assert key() != before
    with torch.autocast("cpu"):
        assert key() != before
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        assert key() != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [net, branched])
def test_packed_weights_stay_where_they_are(make: Callable[[], nn.Module], dtype: Any) -> None:
    energy, x = make().to(dtype), numbers().to(dtype)
    # Parameters that are laid out as a score wants them could be taken as they are.
    energy.to(memory_format=torch.channels_last)
    graph = recognise(energy, x)
    assert isinstance(graph, Graph)
    score = ExplicitGradient(graph, x, inplace=True)
    score.begin()
    score(x, True)
    buffers = score.buffers()
    places = [b.data_ptr() for b in buffers]
    assert len(set(places)) == len(places) > len(list(energy.parameters()))
    for change in CHANGES.values():
        change(energy)
        held = [p.detach().clone() for p in energy.parameters()]
        score.begin()
        energies, grad = score(x, True)
        fresh = ExplicitGradient(graph, x, inplace=False)
        want_energies, want = fresh(x, True)
        assert torch.allclose(grad, want, rtol=1e-5, atol=1e-6)
        assert torch.allclose(energies, want_energies, rtol=1e-5, atol=1e-5)
        assert [b.data_ptr() for b in score.buffers()] == places
        own = {b.untyped_storage().data_ptr() for b in score.buffers()}
        for parameter, value in zip(energy.parameters(), held, strict=True):
            assert parameter.untyped_storage().data_ptr() not in own
            assert torch.equal(parameter, value)


@as_on_cuda
def test_few_recordings_are_held_and_the_least_recent_gives_way() -> None:
    run, want = recorded(net()), plain(net())
    batches = [numbers(shape=(n, 3, 8, 8)) for n in (1, 2, 3)]
    for _ in range(4):  # taking turns, two are recorded, and none is dropped for the third
        for x in batches:
            assert torch.equal(run(x, seed=0), want(x, seed=0))
    assert made(run) == 2
    assert line(run, batches[2]).startswith("not now: 2 other kinds of chains are recorded")
    assert line(run, batches[1]).startswith("yes: all 3 steps are replayed")
    run(batches[0], seed=0)
    for _ in range(graphs._CALLS_BEFORE_DROP + 1):
        assert torch.equal(run(batches[2], seed=0), want(batches[2], seed=0))
    assert made(run) == 3
    assert len(run._graphs._recordings()) == 2
    assert line(run, batches[1]).startswith("not now")  # used before batches[0] was
    assert line(run, batches[0]).startswith("yes: all 3 steps are replayed")


@as_on_cuda
def test_the_oldest_kinds_of_calls_are_forgotten() -> None:
    run, x = recorded(net(), steps=1), numbers()
    for chain in range(graphs._KINDS + 3):
        run(x, seed=0, first_chain=chain)
    assert len(run._graphs._kinds) == graphs._KINDS
    assert made(run) == 0


@as_on_cuda
def test_a_copied_sampler_has_no_cuda_graphs() -> None:
    run, x = recorded(net()), numbers()
    for _ in range(2):
        want = run(x, seed=0)
    for again in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert again._graphs is not run._graphs
        assert not again._graphs._recordings()
        assert torch.equal(again(x, seed=0), want)
    assert len(run._graphs._recordings()) == 1


@as_on_cuda
def test_threads_take_turns_at_one_cuda_graph() -> None:
    run, x = recorded(net(), Rerun()), numbers()
    for _ in range(2):
        run(x, seed=0)
    want = [plain(run.energy)(x, seed=seed) for seed in range(4)]
    got: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        got[seed] = [run(x, seed=seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, ends in got.items():
        assert all(torch.equal(end, want[seed]) for end in ends)
    assert len(got) == 4


@pytest.mark.parametrize("ends", [False, True], ids=["the capture breaks", "Python raises"])
def test_a_failed_capture_ends_for_torchs_allocator_and_generator(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what torch does in CUDAGraph.capture_begin and capture_end."""
    capturing, released = [], []

    class Capture:
        def __init__(self, graph: Any, pool: Any, **options: Any) -> None:
            self.pool = pool

        def __enter__(self) -> None:
            capturing.append((0, self.pool))

        def __exit__(self, *args: object) -> None:
            if not ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            capturing.remove((0, self.pool))

    def end(device: int, pool: Any) -> None:
        if (device, pool) not in capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        capturing.remove((device, pool))

    def run() -> None:
        if capturing:
            raise ValueError("in the capture")

    cuda, state = torch.cuda, []
    stream = SimpleNamespace(wait_stream=lambda _: None)
    generator = SimpleNamespace(clone_state=lambda: "a clone", graphsafe_set_state=state.append)
    for name, value in {
        "device": contextlib.nullcontext, "stream": contextlib.nullcontext, "graph": Capture,
        "current_stream": lambda *_: stream, "Stream": lambda: stream, "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 7), "memory_reserved": lambda: 0,
        "default_generators": (generator,),
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *pool: released.append(pool), raising=False
    )
    with pytest.raises(ValueError if ends else RuntimeError):
        CudaRecorder()(run, torch.device("cuda", 0), None)
    assert not capturing
    # A capture that has ended is released by the graph, and its generator is as it was.
    assert released == ([] if ends else [(0, (0, 7))])
    assert state == ([] if ends else ["a clone"])


def test_a_step_is_searched_for_overflows_by_one_operator() -> None:
    overflow, operators = Overflow(3), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operators.append(op)
            return op(*args, **(kwargs or {}))

    grads = [numbers(0), numbers(1), numbers(2)]
    grads[1][0, 0, 1, 1], grads[2][1, 0, 0, 0] = -math.inf, math.nan
    with Count():
        for k, grad in enumerate(grads):
            operators.clear()
            overflow.look_at(Step(k, grad, None, grad))
    launches = [op for op in operators if not op.is_view]
    assert launches == [torch.ops.aten.linalg_vector_norm.out]
    with pytest.raises(FloatingPointError, match="at step 1 the gradient is not finite"):
        overflow.check()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_is_an_overflow(value: float) -> None:
    overflow, grad = Overflow(1), numbers()
    overflow.look_at(Step(0, grad, None, grad))
    overflow.check()
    grad[1, 2, 3, 4] = value
    overflow.look_at(Step(0, grad, None, grad))
    with pytest.raises(FloatingPointError, match="at step 0"):
        overflow.check()
