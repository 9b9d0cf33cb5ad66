"""Chains of replayed traces as CUDA graphs: weights and arguments are read at every replay."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlangevin as fl
from fastlangevin.gradients.trace.replay_engine import FixedInputs, ReplayGradient
from tests.chain.nets import NETS, Labelled, Residual, opaque, seeded
from tests.chain.shared import (
    CHANGES,
    as_on_cuda,
    line,
    made,
    numbers,
    plain,
    recorded,
)
from tests.gradients.test_trace import ENERGIES
from tests.gradients.test_trace import made as traced_energy

every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def samplers(module: nn.Module, **options: Any) -> tuple[fl.LangevinSampler, fl.LangevinSampler]:
    """A sampler whose chains are recorded, and one whose chains are not."""
    energy: Any = opaque(module)
    return recorded(energy, **options), plain(energy, **options)


@as_on_cuda
@every_net
def test_a_replayed_trace_gives_the_chain_of_the_loop(make: Callable[[], nn.Module]) -> None:
    for options in ({"steps": 1}, {"steps": 2, "noise_order": "before", "clamp": (-0.8, 0.8)}):
        run, want = samplers(seeded(make), **options)
        for call, seed in enumerate((0, 0, 2**64 - 1)):
            x = numbers(call)
            got = run(x, seed=seed, first_step=9 * call)
            assert isinstance(run.choose_engine(x, {}).engine, ReplayGradient)
            assert torch.equal(got, want(x, seed=seed, first_step=9 * call))
            assert made(run) == min(call, 1)
        assert line(run, x).startswith(f"yes: all {run.steps} steps are replayed as one")


@as_on_cuda
@pytest.mark.filterwarnings("ignore:.*in train mode:UserWarning")
@pytest.mark.parametrize("name", list(ENERGIES)[1::2])
def test_chains_of_many_operators_are_replayed(name: str) -> None:
    """Of every other energy: tests/gradients/test_trace.py runs all of them."""
    module, x, arguments = traced_energy(name, torch.float32)
    run, want = samplers(module, step_size=0.05, steps=2)
    for seed in (0, 1):
        got = run(x, seed=seed, **arguments)
        assert torch.equal(got, want(x, seed=seed, **arguments))
    (kind,) = run._graphs._kinds.values()
    assert kind.recording is not None, kind.reason


@as_on_cuda
@pytest.mark.parametrize(
    ("make", "steps"), list(zip(NETS.values(), itertools.cycle([3, 1]), strict=False)), ids=NETS
)
def test_a_replayed_trace_reads_the_weights_of_now(
    make: Callable[[], nn.Module], steps: int
) -> None:
    module, x = seeded(make), numbers()
    run, want = samplers(module, steps=steps)
    for _ in range(2):
        before = run(x, seed=0)
    for name, change in CHANGES.items():
        if "parametrizations" in str(dict(module.named_parameters()).keys()) and "loaded" in name:
            continue  # a minus sign in its state leaves the weight as it was
        change(module)
        after = run(x, seed=0)
        assert torch.equal(after, want(x, seed=0))
        assert not torch.allclose(after, before)
        before = after
    assert len(run._graphs._recordings()) == made(run) == 1  # used all along, at new addresses too


@as_on_cuda
def test_a_replayed_trace_reads_the_arguments_of_the_call() -> None:
    run, want = samplers(seeded(Labelled))
    x, ends = numbers(shape=(3, 3, 8, 8)), []
    for call in range(6):
        # On a CPU one_hot reads the least and the largest label, which are the same in all calls.
        arguments = {"y": torch.tensor([0, call % 4, 3]), "shift": numbers(call, (3, 8))}
        ends.append(run(x, seed=0, **arguments))
        assert torch.equal(ends[-1], want(x, seed=0, **arguments))
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
    assert len(run._graphs._recordings()) == made(run) == 1


@as_on_cuda
def test_arguments_of_another_shape_get_their_own_recording() -> None:
    run, want = samplers(seeded(Labelled))
    x, y = numbers(), torch.tensor([0, 3])
    for size in (8, 1):
        for call in range(3):
            arguments = {"y": y, "shift": numbers(call, (2, size))}
            assert torch.equal(run(x, seed=0, **arguments), want(x, seed=0, **arguments))
    assert made(run) == 2
    assert len(run._graphs._recordings()) == 1  # the first one's trace no longer holds


@as_on_cuda
def test_a_recording_keeps_neither_the_arguments_nor_the_values_of_a_step() -> None:
    run, _ = samplers(seeded(Labelled))
    for _ in range(3):
        run(numbers(), seed=0, y=torch.tensor([0, 1]))
    (recording,) = run._graphs._recordings()
    engine = recording.engine
    assert isinstance(engine, ReplayGradient)
    assert not engine._model_kwargs
    assert not engine._constants
    assert recording.bytes == 2**20 + sum(b.nbytes for b in engine.buffers())


@as_on_cuda
def test_a_trace_that_is_for_one_call_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlangevin.gradients.graph.record.may_be_kept", lambda *_: False)
    run, want = samplers(seeded(Residual))
    for call in range(3):
        assert torch.equal(run(numbers(call), seed=0), want(numbers(call), seed=0))
    assert made(run) == 0
    assert (
        line(run, numbers()) == "no: the energy may compute something else in the next call, "
        "unnoticed"
    )


@as_on_cuda
def test_a_network_that_draws_numbers_is_not_recorded() -> None:
    energy: Any = lambda x: (x + torch.rand_like(x)).square().sum((1, 2, 3))  # noqa: E731
    run = recorded(energy, gradient="auto")
    for _ in range(3):
        run(numbers(), seed=0)
    assert made(run) == 0
    assert "autograd runs the energy's own code" in line(run, numbers())


@as_on_cuda
def test_explain_and_differentiable_calls_leave_a_recording_in_place() -> None:
    run, _ = samplers(seeded(Residual))
    x = numbers()
    for _ in range(4):
        run(x, seed=0)
        run(x, seed=0, differentiable=True)
        run.explain(x.clone().requires_grad_())
    assert len(run._graphs._recordings()) == made(run) == 1


@as_on_cuda
def test_a_branch_by_a_label_leads_to_another_recording() -> None:
    module = seeded(Labelled)
    energy: Any = lambda x, y: (1 if y[0] > 1 else -1) * module(x, y)  # noqa: E731
    run, want = recorded(energy), plain(energy)
    x = numbers()
    for first, count in ((0, 1), (3, 2), (0, 3)):
        y = torch.tensor([first, 1])
        for seed in range(3):
            assert torch.equal(run(x, seed=seed, y=y), want(x, seed=seed, y=y))
        assert made(run) == count


@as_on_cuda
def test_a_changed_number_in_host_memory_leads_to_another_recording() -> None:
    fixed, values = FixedInputs(torch.device("meta")), {0: torch.tensor(2.0)}
    fixed.write(values)
    places = [t.data_ptr() for t in fixed.tensors.values()]
    fixed.write({0: torch.tensor(2.0)})
    assert [t.data_ptr() for t in fixed.tensors.values()] == places
    assert fixed.write({0: torch.tensor(3.0)})[0] == 3
    assert [t.data_ptr() for t in fixed.tensors.values()] != places


@as_on_cuda
def test_inputs_that_moved_lead_to_another_recording() -> None:
    run, want = samplers(seeded(Residual))
    x = numbers()
    for _ in range(2):
        run(x, seed=0)
    (recording,) = run._graphs._recordings()
    engine = recording.engine
    assert isinstance(engine, ReplayGradient)
    assert engine._fixed is not None
    engine._fixed.tensors = {n: t.clone() for n, t in engine._fixed.tensors.items()}
    for count in (1, 2, 2):
        assert torch.equal(run(x, seed=0), want(x, seed=0))
        assert made(run) == count
