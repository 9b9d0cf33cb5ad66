"""A replayed CUDA graph is the chain, and one that differs is never used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlangevin import step
from fastlangevin.chain import cuda_graphs as graphs
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients import select as choice
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.ir import Graph
from tests.chain.shared import (
    CHANGES,
    OnCuda,
    Rerun,
    Tape,
    as_on_cuda,
    branched,
    by_optimiser,
    is_chain,
    line,
    made,
    net,
    numbers,
    plain,
    recorded,
    taped_step_,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"noise_order": "before", "clamp": (-0.8, 0.8), "maximize": True},
    {"noise_order": "last", "grad_clip": 0.02, "step_size": [0.5, 0.4, 0.3]},
    {"grad_clip": ("chain_norm", 0.1), "noise_std": [0.1, 0.0, 0.2]},
    {"grad_clip": ("batch_norm", 0.1), "noise_std": 0.0},
    {"maximize": True, "steps": 1},
]


@as_on_cuda
@pytest.mark.parametrize(
    ("activation", "options"),
    [(("silu", "leaky_relu")[i % 2], each) for i, each in enumerate(OPTIONS)],
    ids=str,
)
def test_a_replayed_graph_gives_the_chain_of_the_loop(
    activation: str, options: dict[str, Any]
) -> None:
    energy = net(activation)
    run, want = recorded(energy, **options), plain(energy, **options)
    for call, seed in enumerate((0, 0, 2**64 - 1)):
        x = numbers(call)
        assert torch.equal(run(x, seed=seed, first_step=9 * call),
                           want(x, seed=seed, first_step=9 * call))  # fmt: skip
        assert made(run) == min(call, 1)
    assert line(run, x).startswith(f"yes: all {run.steps} steps are replayed as one; recorded in ")
    assert line(run, x).endswith(", 2 MiB")  # a MiB of the chain, and one of the weights' packing


@as_on_cuda
@pytest.mark.parametrize("make", [net, branched])
def test_weights_are_read_at_every_replay(make: Callable[[], nn.Module]) -> None:
    energy, x = make(), numbers()
    run, want = recorded(energy), plain(energy)
    for _ in range(2):
        before = run(x, seed=0)
    for change in CHANGES.values():
        change(energy)
        after = run(x, seed=0)
        assert torch.equal(after, want(x, seed=0))
        assert not torch.allclose(after, before)
        before = after
    assert len(run._graphs._recordings()) == made(run) == 1  # used all along


@as_on_cuda
@pytest.mark.parametrize("make", [net, branched])
def test_weights_are_packed_by_a_graph_while_they_stay_where_they_are(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    energy, x = make(), numbers()
    run, want = recorded(energy), plain(energy)
    for seed in range(2):
        run(x, seed=seed)
    (recording,) = run._graphs._recordings()
    begin, packs = recording.engine.begin, []
    monkeypatch.setattr(recording.engine, "begin", lambda: packs.append(begin()))
    by_optimiser(energy)
    assert torch.equal(run(x, seed=0), want(x, seed=0))
    assert not packs
    next(energy.parameters()).data = next(energy.parameters()).data * 0.5
    assert torch.equal(run(x, seed=0), want(x, seed=0))
    assert packs


@as_on_cuda
@pytest.mark.parametrize("fault", ["raises", "writes something else"])
def test_a_packing_that_cannot_be_recorded_is_left_to_python(fault: str) -> None:
    class Faulty(Tape):
        def __call__(self, run: Callable[[], None], device: torch.device, shared_with: Any) -> Any:
            if not is_chain(run):
                if fault == "raises":
                    raise RuntimeError("operation not permitted when stream is capturing")
                return Rerun()(lambda: None, device, shared_with)
            return super().__call__(run, device, shared_with)

    energy, x = net(), numbers()
    run, want = recorded(energy, Faulty()), plain(energy)
    for seed in range(4):
        by_optimiser(energy)
        assert torch.equal(run(x, seed=seed), want(x, seed=seed))
    assert made(run) == 1
    assert line(run, x).endswith("weights are packed one by one")


class Gain(nn.Module):
    """A factor and a beta of Swish, which the steps read where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3)
        self.gain, self.beta = (nn.Parameter(torch.tensor(value)) for value in (1.5, 0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x) * self.gain
        return (h * torch.sigmoid(self.beta * h)).sum((1, 2, 3))


@as_on_cuda
@pytest.mark.parametrize("name", ["gain", "beta"])
def test_a_number_that_moves_leads_to_a_new_recording(name: str) -> None:
    torch.manual_seed(0)
    energy, x = Gain(), numbers()
    run, want = recorded(energy), plain(energy)
    for seed in range(3):
        assert torch.equal(run(x, seed=seed), want(x, seed=seed))
    assert made(run) == 1
    parameter = getattr(energy, name)
    before = run(x, seed=0)
    parameter.data = parameter.data * 0.5
    for seed in range(3):
        assert torch.equal(run(x, seed=seed), want(x, seed=seed))
    assert not torch.allclose(run(x, seed=0), before)
    assert made(run) == 2


@as_on_cuda
def test_another_energy_gets_its_own_graph() -> None:
    energy, x = nn.Sequential(net()), numbers()
    run = recorded(energy)
    for count, activation in ((1, "silu"), (2, "elu"), (3, "leaky_relu")):
        energy[0] = net(activation)
        for _ in range(3):
            assert torch.equal(run(x, seed=0), plain(energy)(x, seed=0))
        assert made(run) == count


@as_on_cuda
def test_a_score_that_has_moved_is_recorded_anew() -> None:
    run, x = recorded(net()), numbers()
    for _ in range(2):
        want = run(x, seed=0)
    (recording,) = run._graphs._recordings()
    layer = next(iter(recording.engine._weighted.values()))
    layer.weight = layer.weight.clone()
    for count in (1, 2, 2):
        assert torch.equal(run(x, seed=0), want)
        assert made(run) == count


@as_on_cuda
def test_a_replayed_fused_gradient_gives_the_chain_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastlangevin.calls.check_precision", lambda *_: None)
    monkeypatch.setattr(conv_plan, "_MULTIPROCESSORS", 1)
    for tiles in ("_TILES", "_NARROW_TILES", "_FLAT_TILES", "_IEEE_TILES"):
        monkeypatch.setattr(conv_plan, tiles, (conv_plan.Tile(512, 32, 4, 3),))

    def fused(graph: Graph, x: Tensor, precision: str, cache: Any, by_name: bool) -> FusedGradient:
        stack = conv_stack(graph)
        make = lambda: FusedGradient(stack, x.shape[0], x.device, precision)  # noqa: E731
        return cache.engine(make, graph, "triton", precision)

    monkeypatch.setattr(choice, "_fused", fused)
    energy = net()
    options = {"gradient": "fused", "precision": "fp16", "clamp": (-1.0, 1.0), "steps": 1}
    run, x = recorded(energy, Rerun(), **options), numbers()
    want = plain(energy, **options)
    for seed in (0, 5):
        assert torch.equal(run(x, seed=seed, first_step=seed), want(x, seed=seed, first_step=seed))
    by_optimiser(energy)
    assert torch.equal(run(x, seed=0), want(x, seed=0))
    assert len(run._graphs._recordings()) == made(run) == 1
    energy.layers[2].weight.data.mul_(1e7)
    with pytest.raises(FloatingPointError, match='precision="fp16" the gradient is not finite'):
        run(x, seed=0)


@as_on_cuda
def test_an_overflow_is_noticed_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlangevin.calls.check_precision", lambda *_: None)
    energy, x = net("leaky_relu"), numbers()
    run = recorded(energy, precision="fp16", clamp=(-1.0, 1.0))
    for _ in range(3):
        want = run(x, seed=0)
    energy.layers[2].weight.data.mul_(2.0**24)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match='with precision="fp16" at step 0'):
            run(x, seed=0)
    energy.layers[2].weight.data.mul_(2.0**-24)
    assert torch.equal(run(x, seed=0), want)
    assert made(run) == 1


@as_on_cuda
def test_chains_that_are_not_finite() -> None:
    energy, x = net(), numbers()
    run = recorded(energy)
    lost = x.clone()
    lost[1, 0, 0, 0] = float("nan")
    for _ in range(3):  # nothing is recorded from a chain that proves nothing
        with pytest.raises(FloatingPointError, match="1 of 2 chains"):
            run(lost, seed=0)
        assert made(run) == 0
    run(x, seed=0)
    assert made(run) == 1
    with pytest.raises(FloatingPointError, match="1 of 2 chains"):
        run(lost, seed=0)
    energy.layers[-1].bias.data.fill_(float("nan"))  # which the energies alone can tell
    with pytest.raises(FloatingPointError, match="2 of 2 chains"):
        run(x, seed=0)
    assert made(run) == 1


@as_on_cuda
def test_a_failed_recording_is_tried_again_at_ever_longer_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    class Failing(Tape):
        def __call__(self, run: Callable[[], None], device: torch.device, shared_with: Any) -> Any:
            if is_chain(run):
                tries.append(call)
            if len(tries) <= 2:
                raise RuntimeError("CUDA out of memory\nof the device")
            return super().__call__(run, device, shared_with)

    monkeypatch.setattr(graphs, "_CALLS_BEFORE_RETRY", 2)
    energy, x = net(), numbers()
    run, want = recorded(energy, Failing()), plain(energy)
    for call in range(1, 10):
        assert torch.equal(run(x, seed=call), want(x, seed=call))
        if call == 5:
            reason = "its launches could not be recorded: RuntimeError: CUDA out of memory"
            assert line(run, x) == f"no: {reason}; the next try is in 3 calls"
    assert tries == [2, 4, 8]
    assert line(run, x).startswith("yes: all 3 steps are replayed")


@as_on_cuda
def test_an_energy_that_reads_values_on_the_host_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = OnCuda.forward

    def looks(self: OnCuda, x: Tensor) -> Tensor | None:
        bool(x.isfinite().all())
        return forward(self, x)

    monkeypatch.setattr(OnCuda, "forward", looks)
    run, x = recorded(net()), numbers()
    for seed in range(3):
        assert torch.equal(run(x, seed=seed), plain(run.energy)(x, seed=seed))
    assert "not permitted when stream is capturing" in line(run, x)


class Wrong(Tape):
    """A tape that leaves something out."""

    def __init__(self, drop: Callable[[Any], bool]) -> None:
        super().__init__()
        self.drop = drop

    def __call__(self, run: Callable[[], None], device: torch.device, shared_with: Any) -> Any:
        tape, size = super().__call__(run, device, shared_with)
        count = len(tape.calls)
        tape.calls = [call for call in tape.calls if not self.drop(call)]
        assert len(tape.calls) < count
        return tape, size


@as_on_cuda
@pytest.mark.parametrize(
    "drop",
    [lambda call: call[0] is taped_step_, lambda call: "convolution" in str(call[0])],
    ids=["steps", "convolutions"],
)
def test_a_replay_that_differs_is_never_used(drop: Callable[[Any], bool]) -> None:
    run, x = recorded(net(), Wrong(drop)), numbers()
    for seed in range(4):
        assert torch.equal(run(x, seed=seed), plain(run.energy)(x, seed=seed))
    assert line(run, x).startswith("no: its replay differs from the chain run step by step")
    assert made(run) == 1


@as_on_cuda
@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_that_is_not_read_from_memory_shows(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf_step_(*args: Any, rng_state: Tensor | None = None, **kwargs: Any) -> Tensor:
        return taped_step_(*args, **kwargs)

    monkeypatch.setitem(step._STEPS, "triton", deaf_step_)
    run, x = recorded(net()), numbers()
    for _ in range(2):
        run(x, seed=seed)
    assert "its replay differs" in line(run, x)
