"""Schedules: which states of a chain to store for its backward pass, and which to recompute.

The backward pass takes the steps from last to first, and each needs the state before it. With room
for s of the K states, including x_0, Griewank & Walther's revolve (Algorithm 799, ACM TOMS 26,
2000) recomputes as few steps as any schedule can. The current state is not counted in s.

Let beta(s, r) = (s + r)! / (s! r!). This is the length of the longest chain that can be reversed if
no step is advanced over more than r times. Let r be the least number with beta(s, r) >= l. Then the
reversal of l steps takes

    t(l, s) = r l - beta(s + 1, r - 1) = min_j  j + t(l - j, s - 1) + t(j, s)

advances: j advances to the next stored state, then the reversal of the rest from there, then that
of the first j steps. The sum is least for every j for which neither part needs a larger r, that is
l - j <= beta(s - 1, r) and j <= beta(s, r - 1).
"""

import math
import operator
import re
from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple

from fastlangevin.names import did_you_mean

_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
# "auto" gives the states a quarter of the free memory; the rest of a training step needs some too.
_FREE_MEMORY_DIVISOR = 4


class Action(NamedTuple):
    """One action of a schedule. Except before "restore", the current state is x_k.

    "advance" replaces it by x_{k + 1}, "store" stores it, "restore" makes the stored x_k current,
    "drop" deletes the stored x_k, and "backward" turns d / d x_{k + 1} into d / d x_k by evaluating
    step k again.
    """

    kind: str
    k: int


class Budget(NamedTuple):
    """A number of bytes, and the text that stated it."""

    bytes: int
    text: str


class Sizes(NamedTuple):
    """Sizes in bytes: of a state, of the graph of one step, and of the backward pass of a step.

    ``again`` is the last one for a recomputed step, if that differs from ``step``.
    """

    state: int
    graph: int = 0
    step: int = 0
    again: int | None = None

    @property
    def recomputed(self) -> int:
        return self.step if self.again is None else self.again


Checkpoint = str | int | Budget


def sweep(start: int, stop: int, free_slots: int) -> Iterator[Action]:
    """From the stored x_start to x_{stop - 1}, storing up to ``free_slots`` states on the way."""
    while stop - start > 1:
        next_stored = start + _distance_to_next(stop - start, free_slots + 1)
        yield from (Action("advance", k) for k in range(start, next_stored))
        start = next_stored
        if stop - start > 1:
            yield Action("store", start)
            free_slots -= 1


def reverse(
    steps: int, states: int, stored: Sequence[int], in_hand: bool = True
) -> Iterator[Action]:
    """The backward pass of ``steps`` steps with room for ``states`` states, including x_0.

    ``stored`` lists, in ascending order, the states that ``sweep(0, steps, states - 1)`` has
    stored, or x_0 alone. ``in_hand`` says whether the sweep's last state x_{steps - 1} is current.
    """
    indices = list(stored)
    for k in range(steps - 1, -1, -1):
        if not (in_hand and k == steps - 1):
            yield Action("restore", indices[-1])
            for action in sweep(indices[-1], k + 1, states - len(indices)):
                if action.kind == "store":
                    indices.append(action.k)
                yield action
        if indices[-1] == k:
            yield Action("drop", indices.pop())
        yield Action("backward", k)


def recomputed(steps: int, states: int) -> int:
    """The number of advances in the backward pass: t(steps, states) without the first sweep."""
    states = min(states, steps)
    repeats = _fewest_repeats(steps, states)
    return repeats * steps - comb(states + repeats, repeats - 1) - (steps - 1)


def states_for(steps: int) -> int:
    """The fewest states with which no step is advanced over more than twice."""
    states = 1
    while comb(states + 2, states) < steps:
        states += 1
    return states


def _distance_to_next(steps: int, states: int) -> int:
    """The distance from a stored state to the next one to store, or to the end without room."""
    repeats = _fewest_repeats(steps, states)
    return min(comb(states + repeats - 1, states), steps - comb(states + repeats - 2, states - 1))


def _fewest_repeats(steps: int, states: int) -> int:
    """The least r with beta(states, r) >= steps."""
    repeats = 1
    while comb(states + repeats, states) < steps:
        repeats += 1
    return repeats


def check_checkpoint(op: str, checkpoint: str | int) -> Checkpoint:
    """The checkpoint as the name of a schedule, a count >= 1 or a :class:`Budget`.

    Raises TypeError or ValueError for anything else.
    """
    forms = '"none", "step", "auto", a number of states or bytes such as "512MiB"'
    if not isinstance(checkpoint, str):
        try:
            states = operator.index(checkpoint)
        except TypeError:
            raise TypeError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}") from None
        if isinstance(checkpoint, bool):
            raise TypeError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}")
        if states < 1:
            raise ValueError(f"{op}: checkpoint must store at least 1 state (x0), got {states}")
        return states
    if checkpoint in ("none", "step", "auto"):
        return checkpoint
    budget = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B\s*", checkpoint)
    if budget is None:
        near = did_you_mean(checkpoint, ("none", "step", "auto"))
        raise ValueError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}{near}")
    number, prefix = budget.groups()
    return Budget(int(float(number) * _UNITS[f"{prefix}B" if prefix else ""]), checkpoint)


def choose_states(
    op: str, checkpoint: Checkpoint, steps: int, sizes: Sizes, free_bytes: int | None, offload: bool
) -> int | None:
    """The number of states to store, or None to store the graph of every step instead.

    ``free_bytes`` is the free memory of the device, or None if it is unknown. With ``offload`` the
    states do not count towards a budget. Raises ValueError if no schedule fits the budget.
    """
    if checkpoint == "none":
        return None
    if checkpoint == "step":
        return steps
    if isinstance(checkpoint, int):
        return min(checkpoint, steps)
    if isinstance(checkpoint, Budget):
        if unrolled_bytes(steps, sizes) <= checkpoint.bytes:
            return None
        least_bytes = recomputed_bytes(1, sizes, offload)
        if least_bytes > checkpoint.bytes:
            raise ValueError(
                f'{op}: checkpoint="{checkpoint.text}" is not enough for these chains: '
                f"differentiating one step takes {text_of(sizes.recomputed)} and a state "
                f"{text_of(sizes.state)}; the least that would do is {text_of(least_bytes)}"
            )
        spare_bytes = checkpoint.bytes - least_bytes
        return steps if offload else min(1 + spare_bytes // max(sizes.state, 1), steps)
    if free_bytes is None or steps * sizes.state <= free_bytes // _FREE_MEMORY_DIVISOR:
        return steps
    return min(max(1, free_bytes // _FREE_MEMORY_DIVISOR // sizes.state), steps)


def unrolled_bytes(steps: int, sizes: Sizes) -> int:
    """The most bytes that an unrolled chain of ``steps`` steps takes."""
    return (steps - 1) * sizes.graph + sizes.step


def recomputed_bytes(states: int, sizes: Sizes, offload: bool = False) -> int:
    """The most bytes that a chain with ``states`` stored states takes; a step uses two more."""
    return sizes.recomputed + (2 + (0 if offload else states)) * sizes.state


def cost_text(steps: int, states: int | None, sizes: Sizes) -> str:
    """The cost of storing ``states`` states, or every graph if it is None, as readable text."""
    if states is None:
        return f"{steps} graphs, {steps} evaluations, {text_of(unrolled_bytes(steps, sizes))}"
    states = min(states, max(steps - 1, 1))  # the last state is current and needs no room
    evaluations = 2 * steps + recomputed(steps, states)
    size = text_of(recomputed_bytes(states, sizes))
    return f"{states} state{'s' * (states > 1)}, {evaluations} evaluations, {size}"


def text_of(size: int) -> str:
    """A number of bytes as readable text, rounded up so that it suffices as a budget."""
    power = max(i for i in range(4) if size >= 1024**i or i == 0)
    return f"{math.ceil(10 * size / 1024**power) / 10:.1f}{('', 'Ki', 'Mi', 'Gi')[power]}B"
