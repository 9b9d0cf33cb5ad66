"""The errors of replay buffers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.replay_shared import SHAPE, buffer

ERRORS = [
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"capacity": -4}, ValueError, "capacity must be at least 1, got -4"),
    ({"capacity": 2.5}, TypeError, "capacity must be an integer, got 2.5"),
    ({"reinit": "a"}, TypeError, "reinit must be a number, got 'a'"),
    ({"reinit": 2}, ValueError, r"reinit must be in \[0, 1\], got 2"),
    ({"reinit": -0.1}, ValueError, r"reinit must be in \[0, 1\], got -0.1"),
    ({"reinit": math.nan}, ValueError, r"reinit must be in \[0, 1\], got nan"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"kind": "lifo"}, ValueError, "kind must be one of index, fifo, reservoir, got 'lifo'"),
    ({"dtype": torch.float16}, TypeError, "must be torch.float32 or torch.uint8, got torch.float1"),
    ({"value_range": (1, 0)}, ValueError, r"value_range must be .* lo < hi, got \(1.0, 0.0\)"),
    ({"value_range": (0, math.inf)}, ValueError, r"value_range must be finite .*\(0.0, inf\)"),
    ({"value_range": 1.0}, TypeError, r"value_range must be a pair \(lo, hi\), got 1.0"),
    ({"shape": 5}, TypeError, "shape must be a tuple of integers, got 5"),
    ({"shape": (3, -1)}, ValueError, "shape must be at least 1, got -1"),
    ({"shape": (3, 0.5)}, TypeError, "shape must be an integer, got 0.5"),
    ({"n_classes": 0}, ValueError, "n_classes must be at least 1, got 0"),
    ({"n_classes": 3}, ValueError, "multiple of world_size x n_classes = 3, got 16"),
    ({"n_classes": 2, "kind": "fifo"}, ValueError, "n_classes needs kind='index', got kind='fifo'"),
    ({"world_size": 3}, ValueError, "multiple of world_size x n_classes = 3, got 16"),
    ({"n_classes": 4, "world_size": 8}, ValueError, "world_size x n_classes = 32, got 16"),
    ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
    ({"rank": 2, "world_size": 2}, ValueError, r"rank must be in 0\.\.1, got 2"),
    ({"rank": -1, "world_size": 2}, ValueError, r"rank must be in 0\.\.1, got -1"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_wrong_buffer_arguments_are_named(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        buffer(**wrong)


@pytest.mark.parametrize("n", [0, -1, 17])
def test_more_chains_than_slots(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n must be in 1\.\.capacity=16, got {n}"):
        buffer().draw(n, 0)


@pytest.mark.parametrize("shape", [(4, 1, 3, 6), (4, 3, 5), (3, 1, 3, 5), (1, 1, 3, 5)], ids=str)
def test_putting_states_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    chains = buffer()
    slots, before = chains.draw(4, 0)[0], chains.states.clone()
    with pytest.raises(ValueError, match=r"x must have shape \[4, 1, 3, 5\], got \[") as caught:
        chains.put(slots, torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
    assert torch.equal(chains.states, before)


def ask(y: Any = None, index: Any = None, n: int = 3, **options: Any) -> Callable[[], object]:
    return lambda: buffer(**options).draw(n, 0, y=y, index=index)


def write(slots: Any, x: Tensor, **options: Any) -> Callable[[], object]:
    def call() -> None:
        chains = buffer(**options)
        before = chains.state_dict()
        try:
            chains.put(slots, x)
        finally:
            after = chains.state_dict()
            assert torch.equal(after["states"], before["states"])
            assert after["added"] == before["added"]

    return call


T, NAN = torch.tensor, torch.full((3, *SHAPE), math.nan)
THREE = torch.zeros(3, *SHAPE)
CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (ask(n=9, world_size=2), ValueError, r"n must be in 1\.\.capacity=8, got 9"),
    (ask(n=17, kind="fifo"), ValueError, r"n must be in 1\.\.capacity=16, got 17"),
    (ask(n=2.5), TypeError, "n must be an integer, got 2.5"),
    (ask(T([0, 4, 1]), n_classes=4), ValueError, r"y must be in 0\.\.3, got 4"),
    (ask(T([0, -1, 1]), n_classes=4), ValueError, r"y must be in 0\.\.3, got -1"),
    (ask(T([0, 1]), n_classes=4), ValueError, r"y must have shape \[3\], got \[2\]"),
    (ask(T([[0, 1, 2]]), n_classes=4), ValueError, r"y must have shape \[3\], got \[1, 3\]"),
    (ask(T([0.0, 1.0, 1.0]), n_classes=4), TypeError, "tensor of integers, got torch.float32"),
    (ask([0, 1, 1], n_classes=4), TypeError, "y must be a tensor of integers, got list"),
    (ask(T([1] * 5), n=5, n_classes=4), ValueError, "at most 4 times, .* got one 5 times"),
    (ask(T([0, 1, 1])), ValueError, "y needs a buffer with n_classes, got one without"),
    (ask(index=T([0, 16, 1])), ValueError, r"index must be in 0\.\.15, got 16"),
    (ask(index=T([0, 1])), ValueError, r"index must have shape \[3\], got \[2\]"),
    (ask(index=T([True] * 3)), TypeError, "index must be a tensor of integers, got torch.bool"),
    (ask(index=T([0, 1, 2]), kind="fifo"), ValueError, "needs kind='index' .* got kind='fifo'"),
    (ask(T([0] * 3), T([0] * 3), n_classes=4), ValueError, "index needs .* no y, got y too"),
    (write(None, THREE), TypeError, "slots must be a tensor of integers, got NoneType"),
    (write(T([0, 1, 16]), THREE), ValueError, r"slots must be in 0\.\.15, got 16"),
    (write(T([0, 1, -1]), THREE), ValueError, r"slots must be in 0\.\.15, got -1"),
    (write(T([[0, 1, 2]]), THREE), ValueError, r"slots must have shape \[n\], got \[1, 3\]"),
    (write(T([0, 1, 2]), THREE.long()), TypeError, "x must be of floating dtype, got torch.int64"),
    (write(None, THREE[0], kind="fifo"), ValueError, r"x must have shape \[1, 1, 3, 5\], got "),
    (write(None, T(0.0), kind="fifo"), ValueError, r"x must have shape \[0, 1, 3, 5\], got \[\]"),
    (write(None, torch.zeros(17, *SHAPE), kind="fifo"), ValueError, "at most capacity=16 .* 17"),
    (
        write(T([0, 1, 2]), THREE.to("meta")),
        ValueError,
        "the buffer's device cpu, got meta",
    ),
    (write(None, [1], kind="fifo"), TypeError, "x must be a tensor, got list"),
    (lambda: buffer().load_state_dict(None), TypeError, "state_dict must be a dict, got NoneType"),
    (lambda: buffer().draw("a", 0), TypeError, "n must be an integer, got 'a'"),
    (write(T([0, 1, 2]), NAN, dtype=torch.uint8), ValueError, "must not be NaN, which uint8"),
]


@pytest.mark.parametrize(("call", "error", "match"), CALLS, ids=[case[2] for case in CALLS])
def test_wrong_buffer_calls_are_named(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"ReplayBuffer: .*{match}" if match[0] != "R" else match):
        call()
