"""Which states a schedule keeps, how often it evaluates, and the memory that it takes."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.adjoint.schedules import Budget, Sizes, choose_states, recomputed, reverse, sweep
from fastlangevin.adjoint.storage import Allocations
from tests.adjoint.shared import (
    Calls,
    assert_close,
    gradients,
    make_net,
    numbers,
    sampler,
    starts,
)


@functools.cache
def fewest_advances(steps: int, states: int) -> int:
    """By trying every place for the next state: Griewank & Walther's recursion as it is written."""
    if steps == 1:
        return 0
    if states == 1:
        return steps * (steps - 1) // 2
    return min(
        j + fewest_advances(steps - j, states - 1) + fewest_advances(j, states)
        for j in range(1, steps)
    )


PAIRS = [*itertools.product((1, 2, 3, 5, 8, 13, 34), (1, 2, 3, 5, 8)), (50, 4), (34, 34)]


def test_schedules_recompute_the_least_possible() -> None:
    for steps, states in PAIRS:
        check_schedule(steps, states)


def check_schedule(steps: int, states: int) -> None:
    """The count, and that of a run of the actions in which each finds what it needs."""
    want = fewest_advances(steps, states) - (steps - 1)
    assert recomputed(steps, states) == want
    in_hand, kept, done, again = 0, {0}, steps, 0
    for kind, k in sweep(0, steps, states - 1):
        assert k == in_hand
        if kind == "store":
            kept.add(k)
        else:
            in_hand += 1
    assert in_hand == steps - 1
    for kind, k in reverse(steps, states, sorted(kept)):
        if kind == "restore":
            assert k in kept
            in_hand = k
        elif kind == "drop":
            kept.remove(k)
        else:
            assert k == in_hand
            in_hand += kind == "advance"
            again += kind == "advance"
            if kind == "store":
                kept.add(k)
            if kind == "backward":
                assert k == done - 1
                done = k
        assert len(kept) <= states
    assert (done, again, kept) == (0, want, set())


@pytest.mark.parametrize(("steps", "states"), [(1, 1), (2, 1), (7, 2), (5, 4), (6, 1)])
def test_evaluations_match_the_schedules_count(steps: int, states: int) -> None:
    net, x0 = make_net(), starts()
    calls = Calls(net)
    out = sampler(net, steps=steps)(x0, seed=0, differentiable=True, checkpoint=states)
    assert calls.since() == steps
    want = gradients(out, [x0])
    assert calls.since() == steps + fewest_advances(steps, states) - (steps - 1)
    out = sampler(net, steps=steps)(x0, seed=0, differentiable=True, checkpoint=states)
    weight = numbers(out.shape, 2)
    (first,) = torch.autograd.grad(out, x0, weight, retain_graph=True)
    calls.since()
    (second,) = torch.autograd.grad(out, x0, weight)
    # The first backward pass has used up all states but x0.
    assert calls.since() == steps + fewest_advances(steps, states)
    assert_close([first, second], want * 2, 1e-12)


def peak(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    with Allocations() as memory:
        torch.autograd.grad(run().sum(), leaves, allow_unused=True)
    assert memory.live == 0
    return memory.peak


def chain_peak(net: nn.Module, steps: int, checkpoint: Any) -> int:
    x0 = torch.zeros(2, *net.shape, requires_grad=True)
    run = fl.LangevinSampler(net, steps=steps)
    call = functools.partial(run, x0, seed=0, differentiable=True, checkpoint=checkpoint)
    return peak(call, [x0, *net.parameters()])


@pytest.mark.slow
def test_step_checkpoints_take_a_25th_of_the_memory_of_a_plain_unroll() -> None:
    """The network has half of the benchmark's width, so states are large beside a graph."""
    net = fl.ConvEnergy(width=16, activation="silu")
    assert chain_peak(net, 100, "none") >= 25 * chain_peak(net, 100, "step")


def test_memory_does_not_grow_with_the_chain() -> None:
    net = fl.ConvEnergy(size=8, width=4, activation="silu")
    assert chain_peak(net, 24, 6) <= 1.3 * chain_peak(net, 6, "step")


STEPS = 7
LEAST = [(activation, 0.0, "least") for activation in ("leaky_relu", "silu")]
MORE = [("relu", (0.5, "states")), ("silu", (0.5, "states")), ("relu", (1.5, "graphs"))]


@pytest.mark.parametrize(
    ("activation", "share", "schedule"), [*LEAST, *((name, *more) for name, more in MORE)]
)
def test_peak_memory_stays_within_a_byte_budget(
    activation: str, share: float, schedule: str
) -> None:
    net, x0 = make_net(activation, torch.float32), starts(torch.float32)
    run = sampler(net, steps=STEPS)
    calls = Calls(net)
    with pytest.raises(ValueError, match="the least that would do is") as error:
        run(x0, seed=0, differentiable=True, checkpoint="1B")
    least = str(error.value).rsplit(" ", 1)[1]
    unrolled = peak(
        lambda: run(x0, seed=0, differentiable=True, checkpoint="none"), [x0, *net.parameters()]
    )
    budget = least if share == 0 else f"{int(share * unrolled)}B"
    size = float(least[:-3]) * 1024 if share == 0 else share * unrolled
    calls.since()
    used = peak(
        lambda: run(x0, seed=0, differentiable=True, checkpoint=budget), [x0, *net.parameters()]
    )
    assert used <= size
    # Measuring takes two evaluations, or three where the graphs are kept.
    assert (
        calls.since()
        in {
            "least": {2 + 2 * STEPS + recomputed(STEPS, states) for states in (1, 2)},
            "states": {2 + 2 * STEPS + recomputed(STEPS, states) for states in range(2, STEPS + 1)},
            "graphs": {3 + STEPS},
        }[schedule]
    )


def test_auto_takes_a_quarter_of_free_memory() -> None:
    sizes = Sizes(state=100, graph=1000, step=1500)
    choose = functools.partial(choose_states, "op", steps=10, sizes=sizes, offload=False)
    assert choose("auto", free_bytes=None) == 10
    assert choose("auto", free_bytes=4000) == 10
    assert choose("auto", free_bytes=3600) == 9
    assert choose("auto", free_bytes=3) == 1
    assert choose(Budget(10499, "10499B"), free_bytes=3) == 10
    assert choose(Budget(10500, "10500B"), free_bytes=3) is None
    assert choose(Budget(2499, "2499B"), free_bytes=3) == 7
    assert choose_states("op", Budget(1700, "1700B"), 10, sizes, 3, offload=True) == 10


def test_explain_says_what_each_schedule_takes() -> None:
    net, x0 = make_net(), starts()
    text = sampler(net, steps=100).explain(x0)
    for line in (
        "checkpoint 'none': 100 graphs, 100 evaluations",
        "checkpoint 'step': 99 states, 200 evaluations",
        f"checkpoint 13: 13 states, {200 + recomputed(100, 13)} evaluations",
        "checkpoint 1: 1 state, 5051 evaluations",
        "checkpoint 'auto': 99 states",
    ):
        assert line in text
    assert "identity" not in text
    text = sampler(make_net("relu").requires_grad_(False)).explain(x0)
    assert "d x_K / d x_0 is the identity except where a clamp held" in text
    assert "gradients  not with this energy" in sampler(lambda x, y: x.sum(1)).explain(x0)
