"""On a CUDA device: the native kernels, held to the same kernels on the CPU bit for bit, and
recorded chains, held to the chains run step by step."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.chain import cuda_graphs as graphs
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.trace.replay_engine import ReplayGradient
from fastlangevin.kernels import native, triton_backend
from tests.chain.nets import NETS, Labelled, Residual, opaque, seeded

CUDA = torch.device("cuda", 0)
REASON = native.available(CUDA) if torch.cuda.is_available() else "there is no CUDA device here"
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native on CUDA: {REASON}")

SHAPES = [(3, 1), (5, 3), (4, 1023), (2, 3, 5, 7), (64, 3, 32, 32)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"noise_std": 0.0},
    {"clamp": (-0.5, 0.5), "grad_clip": 0.3, "maximize": True},
    {"clamp": (-0.5, 0.5), "noise_last": True},
]


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_(x: Tensor, grad: Tensor | None, **options: Any) -> Tensor:
    defaults = {"step_size": 0.7, "noise_std": 0.1, "seed": 2**63 + 5, "step": 9}
    return fl.langevin_step_(x, grad, **defaults | options, backend="native")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, Any]
) -> None:
    x, grad = numbers(shape, 0, dtype), numbers(shape, 1, grad_dtype)
    got = step_(x.to(CUDA), grad.to(CUDA), **options)
    assert torch.equal(got.cpu(), step_(x, grad, **options))


def test_layouts_and_values_per_chain() -> None:
    x, grad = numbers((6, 3, 8, 8), 0), numbers((6, 3, 8, 8), 1)
    each = {"step_size": torch.linspace(0, 1, 6), "noise_std": torch.linspace(0, 0.2, 6)}
    want = step_(x.clone(), grad, **each)
    for form in (torch.contiguous_format, torch.channels_last):
        y = x.to(CUDA).contiguous(memory_format=form)
        got = step_(y, grad.to(CUDA), **{name: value.to(CUDA) for name, value in each.items()})
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise(draw: Any, shape: tuple[int, ...]) -> None:
    address = {"seed": 3, "step": 2**32 - 1, "first_chain": 7}
    assert torch.equal(draw(shape, **address, device=CUDA).cpu(), draw(shape, **address))


def test_a_stream_of_the_users() -> None:
    x, grad = numbers((64, 3, 32, 32), 0), numbers((64, 3, 32, 32), 1)
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):
        got = step_(x.to(CUDA), grad.to(CUDA))
    stream.synchronize()
    assert torch.equal(got.cpu(), step_(x, grad))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 1, 1, 1, 1, 1, 1, 3)])
def test_a_seed_in_memory_is_not_ignored(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=CUDA)
    x = x.double() if x.dim() == 2 else x
    state = torch.zeros(2, dtype=torch.int64, device=CUDA)
    options = {"step_size": 0.7, "noise_std": 0.1, "seed": 0, "step": 0, "first_chain": 0}
    with pytest.raises(ValueError, match=r"rng_state cannot be used: x of .* to the reference"):
        native.step_(x, None, None, rng_state=state, **options)


def test_a_graph_is_replayed_with_another_seed_and_step() -> None:
    x, grad = numbers((8, 3, 16, 16), 0), numbers((8, 3, 16, 16), 1)
    y, g = x.to(CUDA), grad.to(CUDA)
    state = torch.zeros(2, dtype=torch.int64, device=CUDA)
    options = {"clamp": None, "grad_clip": None, "maximize": False, "noise_last": False}
    fixed = {"step_size": 0.7, "noise_std": 0.1, "first_chain": 0} | options

    def run() -> None:
        native.step_(y, g, None, seed=0, step=2, rng_state=state, **fixed)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, first_step in ((5, 0), (6, 40)):
        y.copy_(x)
        state.copy_(torch.tensor([seed, first_step]))
        graph.replay()
        want = step_(x.clone(), grad, seed=seed, step=2 + first_step)
        assert torch.equal(y.cpu(), want)


# Recorded chains ---------------------------------------------------------------------------------

TRITON = triton_backend.available(CUDA) if REASON is None else REASON
GRADIENTS = [
    "explicit",
    pytest.param("fused", marks=pytest.mark.skipif(TRITON is not None, reason=f"triton: {TRITON}")),
]
CHAINS: list[dict[str, Any]] = [
    {},
    {"clamp": (-1.0, 1.0), "noise_order": "before", "maximize": True},
    {"clamp": (-1.0, 1.0), "noise_order": "last", "grad_clip": 0.01},
    {"grad_clip": ("chain_norm", 0.1), "step_size": [0.1 * k for k in range(1, 9)]},
    {"precision": "fp16", "clamp": (-1.0, 1.0)},
    {"precision": "bf16", "noise_std": 0.0},
    {"precision": "tf32"},
]


@pytest.fixture
def _the_same_sums() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


same_sums = pytest.mark.usefixtures("_the_same_sums")


def chain(gradient: str, activation: str = "leaky_relu", **options: Any) -> fl.LangevinSampler:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = fl.ConvEnergy(size=16, width=16, activation=activation).to(CUDA)
    defaults = {"steps": 8, "step_size": 0.5, "noise_std": 0.05, "precision": "fp32"}
    return fl.LangevinSampler(energy, **defaults | {"gradient": gradient} | options)


def step_by_step(run: fl.LangevinSampler, x: Tensor, **address: Any) -> Tensor:
    return run.trajectory(x, every=run.steps, **address)[-1]


def graph_line(run: fl.LangevinSampler, x: Tensor) -> str:
    return next(row for row in run.explain(x).split("\n") if row.startswith("graph "))


@same_sums
@pytest.mark.parametrize(
    ("activation", "form", "options"),
    [
        *(("leaky_relu", torch.contiguous_format, options) for options in CHAINS),
        ("silu", torch.channels_last, {}),  # one more alone: Triton compiles anew for each
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_replay_is_the_chain(
    gradient: str, activation: str, form: torch.memory_format, options: dict[str, Any]
) -> None:
    run = chain(gradient, activation, **options)
    for call, seed in enumerate((0, 0, 0, 5, 2**64 - 1)):
        x = numbers((4, 3, 16, 16), call).to(CUDA).contiguous(memory_format=form)
        before = x.clone()
        got = run(x, seed=seed, first_step=7 * call, first_chain=3)
        assert torch.equal(got, step_by_step(run, x, seed=seed, first_step=7 * call, first_chain=3))
        assert got.stride() == x.stride()
        assert torch.equal(x, before)
    assert len(run._graphs._recordings()) == 1, [k.reason for k in run._graphs._kinds.values()]


@pytest.mark.parametrize("precision", [None, "tf32", "fp16", "bf16"])
def test_the_rounding_of_a_precision_does_not_keep_a_network_from_an_engine(
    precision: str | None,
) -> None:
    """In TF32, kinks alone turn 1 % of the gradients of this network."""
    energy = fl.ConvEnergy(size=32, width=32).to(CUDA)
    run = fl.LangevinSampler(energy, 4, precision=precision)
    assert "gradient   autograd" not in run.explain(numbers((64, 3, 32, 32), 0).to(CUDA))


@pytest.mark.skipif(TRITON is not None, reason=f"triton: {TRITON}")
@pytest.mark.parametrize("wrong", [-1.0, 0.5, float("nan"), "raises"])
def test_kernels_with_another_gradient_are_not_used(
    wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FusedGradient.__call__

    def call(self: FusedGradient, x: Tensor, want_energies: bool = False) -> Any:
        if wrong == "raises":
            raise RuntimeError("out of resource: shared memory")
        energies, grad = right(self, x, want_energies)
        return energies, grad * wrong

    energy, x = fl.ConvEnergy(size=16, width=16).to(CUDA), numbers((4, 3, 16, 16), 0).to(CUDA)
    want = fl.LangevinSampler(energy, 3, gradient="explicit", precision="tf32")(x, seed=0)
    monkeypatch.setattr(FusedGradient, "__call__", call)
    run = fl.LangevinSampler(energy, 3, precision="tf32")
    torch.testing.assert_close(run(x, seed=0), want)
    said = run.explain(x)
    assert "gradient   explicit" in said
    assert ("shared memory" if wrong == "raises" else "differs from autograd's") in said
    with pytest.raises(RuntimeError, match='"fused" cannot run'):
        fl.LangevinSampler(energy, 3, gradient="fused", precision="tf32")(x, seed=0)


@same_sums
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weights_of_the_moment_without_a_new_recording(gradient: str) -> None:
    run, x = chain(gradient), numbers((4, 3, 16, 16), 0).to(CUDA)
    for _ in range(2):
        before = run(x, seed=0)
    (recording,) = run._graphs._recordings()
    optimiser = torch.optim.Adam(run.energy.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        run.energy(x).sum().backward()
        optimiser.step()
        after = run(x, seed=0)
        assert torch.equal(after, step_by_step(run, x, seed=0))
        assert not torch.allclose(after, before)
        before = after
    assert recording.has_packing()
    for parameter in run.energy.parameters():
        parameter.data = parameter.data.clone() * 0.9
    assert torch.equal(run(x, seed=0), step_by_step(run, x, seed=0))
    assert run._graphs._recordings() == [recording]


@same_sums
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_shapes_take_turns_in_one_memory(gradient: str) -> None:
    run = chain(gradient)
    batches = [numbers((n, 3, 16, 16), n).to(CUDA) for n in (5, 8)]
    for seed in range(5):
        for x in batches:
            assert torch.equal(run(x, seed=seed), step_by_step(run, x, seed=seed))
    one, two = run._graphs._recordings()
    assert one.graph.pool() == two.graph.pool()
    assert "replayed as one" in graph_line(run, batches[0])


@pytest.mark.parametrize("gradient", [*GRADIENTS, "traced"])
def test_the_memory_of_recordings_is_bounded(gradient: str) -> None:
    run = traced(seeded(Residual)) if gradient == "traced" else chain(gradient)
    reserved = []
    for _ in range(3):
        for n in (16, 32, 48, 64):
            x = numbers((n, 3, 16, 16), n).to(CUDA)
            for seed in range(graphs._CALLS_BEFORE_DROP + 3):
                run(x, seed=seed)
            assert len(run._graphs._recordings()) <= 2
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(CUDA))
    assert reserved[2] <= reserved[0] + 2**22
    del run
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(CUDA) < reserved[2]


def test_an_overflow_is_noticed_in_a_replay() -> None:
    run = chain("explicit", precision="fp16", clamp=(-1.0, 1.0))
    x = numbers((4, 3, 16, 16), 0).to(CUDA)
    for _ in range(3):
        run(x, seed=0)
    assert run._graphs._recordings()
    run.energy.layers[2].weight.data.mul_(2.0**24)
    with pytest.raises(FloatingPointError, match='precision="fp16" at step 0'):
        run(x, seed=0)


@same_sums
def test_a_failed_recording_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = chain("explicit"), numbers((4, 3, 16, 16), 0).to(CUDA)
    want, score = step_by_step(run, x, seed=0), ExplicitGradient
    call = score.__call__

    def looks(self: Any, x: Tensor, want_energies: bool) -> Any:
        bool(x.isfinite().all())  # which no capture allows
        return call(self, x, want_energies)

    monkeypatch.setattr(score, "__call__", looks)
    stream = torch.cuda.current_stream(CUDA)
    for _ in range(3):
        assert torch.equal(run(x, seed=0), want)
        assert torch.cuda.current_stream(CUDA) == stream
        assert not torch.cuda.is_current_stream_capturing()
    assert "could not be recorded" in graph_line(run, x)
    # Neither the allocator nor the generator still believes that a capture is under way.
    monkeypatch.undo()
    assert torch.rand(4, device=CUDA).isfinite().all()
    other = chain("explicit")
    for _ in range(3):
        assert torch.equal(other(x, seed=0), want)
    assert other._graphs._recordings()


@same_sums
def test_replays_on_streams_of_the_users() -> None:
    run, x = chain("explicit"), numbers((4, 3, 16, 16), 0).to(CUDA)
    want = [step_by_step(run, x, seed=seed) for seed in range(6)]
    torch.cuda.synchronize()
    for seed in range(6):
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            assert torch.equal(run(x, seed=seed), want[seed])


# Recorded traces ---------------------------------------------------------------------------------


def traced(module: nn.Module, **options: Any) -> fl.LangevinSampler:
    energy: Any = opaque(module.to(CUDA))
    defaults = {"steps": 8, "step_size": 0.1, "noise_std": 0.05, "gradient": "explicit"}
    return fl.LangevinSampler(energy, **defaults | options)


def assert_replayed(run: fl.LangevinSampler) -> None:
    """All calls but the first two were replays of one recording, of a trace."""
    (kind,) = run._graphs._kinds.values()
    assert kind.recording is not None, kind.reason
    assert isinstance(kind.recording.engine, ReplayGradient)


@same_sums
@pytest.mark.parametrize("precision", [None, "fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NETS)
def test_a_replayed_trace_is_the_chain(name: str, precision: str | None) -> None:
    module = seeded(NETS[name])
    run = traced(module, precision=precision)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
    for call in range(5):
        x = numbers((4, 3, 8, 8), call).to(CUDA)
        want = step_by_step(run, x, seed=call, first_step=7 * call)
        torch.testing.assert_close(
            run(x, seed=call, first_step=7 * call), want, rtol=1e-5, atol=1e-5
        )
        optimiser.zero_grad()
        run.energy(x).sum().backward()
        optimiser.step()
    assert_replayed(run)


@same_sums
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replayed_trace_reads_the_labels_of_the_call(precision: str) -> None:
    run, ends = traced(seeded(Labelled), precision=precision), []
    x = numbers((3, 3, 8, 8), 0).to(CUDA)
    for call in range(6):
        y = torch.tensor([0, call % 4, 3], device=CUDA)
        arguments = {"y": y, "shift": numbers((3, 8), call).to(CUDA)}
        ends.append(run(x, seed=0, **arguments))
        want = step_by_step(run, x, seed=0, **arguments)
        torch.testing.assert_close(ends[-1], want, rtol=1e-5, atol=1e-5)
    assert all(not torch.allclose(a, b) for i, a in enumerate(ends) for b in ends[:i])
    assert_replayed(run)


@same_sums
def test_a_number_in_host_memory_is_read_at_every_replay() -> None:
    module = seeded(Residual).to(CUDA)
    scale = torch.tensor(1.0)
    module.register_buffer("scale", scale)
    energy: Any = lambda x: module(x * module.scale)  # noqa: E731
    run = fl.LangevinSampler(energy, steps=8, step_size=0.1, gradient="explicit")
    x = numbers((3, 3, 8, 8), 0).to(CUDA)
    for call in range(8):
        if call == 3:  # the recording is made again
            scale.mul_(1.5)
        want = step_by_step(run, x, seed=call)
        torch.testing.assert_close(run(x, seed=call), want, rtol=1e-5, atol=1e-5)
    assert_replayed(run)
