"""Which states of a chain to keep for its backward pass, and which to compute again.

The backward pass takes the steps last to first, and each needs the state before it. With room for
s of K states, x_0 among them, Griewank & Walther's revolve (Algorithm 799, ACM TOMS 26, 2000)
computes the fewest steps again that any schedule can. The state in hand takes no place.

Let beta(s, r) = (s + r)! / (s! r!), the longest chain that can be reversed when no step is advanced
over more than r times, and r the least with beta(s, r) >= l. Then reversing l steps takes

    t(l, s) = r l - beta(s + 1, r - 1) = min_j  j + t(l - j, s - 1) + t(j, s)

advances: j to the next state that is kept, the rest from there, then the first j. The sum is least
for every j that lets both parts keep to their r: l - j <= beta(s - 1, r), j <= beta(s, r - 1).
"""

import math
import operator
import re
from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple

_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
# Of free memory, what "auto" lets the states have: the rest of a training step needs some as well.
_SHARE = 4


class Action(NamedTuple):
    """One thing to do about state k: the state in hand is x_k, but before "restore".

    advance: x_{k + 1} in its place. store: keep it. restore: take the one kept. drop: keep it no
    longer. backward: d / d x_{k + 1} becomes d / d x_k by evaluating step k again.
    """

    kind: str
    k: int


class Budget(NamedTuple):
    """A number of bytes, as it was written."""

    bytes: int
    text: str


class Sizes(NamedTuple):
    """Bytes: of a chain's state, of one step's graph, and of all its backward pass needs beside.

    again: that of a step that is computed again, where it is another than ``step``.
    """

    state: int
    graph: int = 0
    step: int = 0
    again: int | None = None

    @property
    def recomputed(self) -> int:
        return self.step if self.again is None else self.again


Checkpoint = str | int | Budget


def sweep(start: int, stop: int, free: int) -> Iterator[Action]:
    """From x_start, which is kept, to x_{stop - 1}, storing up to ``free`` states on the way."""
    while stop - start > 1:
        ahead = start + _split(stop - start, free + 1)
        yield from (Action("advance", k) for k in range(start, ahead))
        start = ahead
        if stop - start > 1:
            yield Action("store", start)
            free -= 1


def reverse(
    steps: int, states: int, stored: Sequence[int], in_hand: bool = True
) -> Iterator[Action]:
    """The backward pass of ``steps`` steps in room for ``states`` states, x_0 among them.

    stored: those that ``sweep(0, steps, states - 1)`` has kept, or x_0 alone, in ascending order.
    in_hand: whether the sweep's last state, x_{steps - 1}, is at hand.
    """
    kept = list(stored)
    for k in range(steps - 1, -1, -1):
        if not (in_hand and k == steps - 1):
            yield Action("restore", kept[-1])
            for action in sweep(kept[-1], k + 1, states - len(kept)):
                if action.kind == "store":
                    kept.append(action.k)
                yield action
        if kept[-1] == k:
            yield Action("drop", kept.pop())
        yield Action("backward", k)


def recomputed(steps: int, states: int) -> int:
    """How many advances the backward pass repeats: t(steps, states) less the first sweep's."""
    states = min(states, steps)
    repeats = _repeats(steps, states)
    return repeats * steps - comb(states + repeats, repeats - 1) - (steps - 1)


def states_for(steps: int, repeats: int = 2) -> int:
    """The least room in which no step is advanced over more than ``repeats`` times."""
    states = 1
    while comb(states + repeats, states) < steps:
        states += 1
    return states


def _split(steps: int, states: int) -> int:
    """How far ahead of a kept state to keep the next; all the way, where there is no room."""
    repeats = _repeats(steps, states)
    return min(
        comb(states + repeats - 1, states),
        steps - comb(states + repeats - 2, states - 1),
    )


def _repeats(steps: int, states: int) -> int:
    repeats = 1
    while comb(states + repeats, states) < steps:
        repeats += 1
    return repeats


def check_checkpoint(op: str, checkpoint: str | int) -> Checkpoint:
    """A schedule's name, a count >= 1, or a :class:`Budget`; else TypeError or ValueError."""
    forms = '"none", "step", "auto", a number of states or bytes such as "512MiB"'
    if not isinstance(checkpoint, str):
        try:
            states = operator.index(checkpoint)
        except TypeError:
            raise TypeError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}") from None
        if isinstance(checkpoint, bool):
            raise TypeError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}")
        if states < 1:
            raise ValueError(f"{op}: checkpoint must keep at least 1 state (x0), got {states}")
        return states
    if checkpoint in ("none", "step", "auto"):
        return checkpoint
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B\s*", checkpoint)
    if found is None:
        raise ValueError(f"{op}: checkpoint must be {forms}, got {checkpoint!r}")
    number, prefix = found.groups()
    return Budget(int(float(number) * _UNITS[f"{prefix}B" if prefix else ""]), checkpoint)


def choose_states(
    op: str, checkpoint: Checkpoint, steps: int, sizes: Sizes, free: int | None, offload: bool
) -> int | None:
    """How many states to keep, or None to keep every step's graph instead.

    free: bytes of memory that are free where states are kept, None where that cannot be known.
    offload: states are kept elsewhere than a budget is about. Raises ValueError for a budget in
    which no schedule fits.
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
        if kept_bytes(1, sizes, offload) > checkpoint.bytes:
            least = text_of(kept_bytes(1, sizes, offload))
            raise ValueError(
                f'{op}: checkpoint="{checkpoint.text}" is not enough for these chains: '
                f"differentiating one step takes {text_of(sizes.recomputed)} and a state "
                f"{text_of(sizes.state)}; the least that would do is {least}"
            )
        left = checkpoint.bytes - kept_bytes(1, sizes, offload)
        return steps if offload else min(1 + left // max(sizes.state, 1), steps)
    if free is None or steps * sizes.state <= free // _SHARE:
        return steps
    return min(max(1, free // _SHARE // sizes.state), steps)


def unrolled_bytes(steps: int, sizes: Sizes) -> int:
    """What an unrolled chain of ``steps`` steps takes, at most."""
    return (steps - 1) * sizes.graph + sizes.step


def kept_bytes(states: int, sizes: Sizes, offload: bool = False) -> int:
    """What a chain takes with so many states kept, at most; two are in the hands of a step."""
    return sizes.recomputed + (2 + (0 if offload else states)) * sizes.state


def cost_text(steps: int, states: int | None, sizes: Sizes) -> str:
    """What keeping so many states, or every graph, takes, to read."""
    if states is None:
        return f"{steps} graphs, {steps} evaluations, {text_of(unrolled_bytes(steps, sizes))}"
    states = min(states, max(steps - 1, 1))  # the last one is in hand
    evaluations = 2 * steps + recomputed(steps, states)
    size = text_of(kept_bytes(states, sizes))
    return f"{states} state{'s' * (states > 1)}, {evaluations} evaluations, {size}"


def text_of(size: int) -> str:
    """A number of bytes to read; rounded up, so that a budget of it is enough."""
    power = max(i for i in range(4) if size >= 1024**i or i == 0)
    return f"{math.ceil(10 * size / 1024**power) / 10:.1f}{('', 'Ki', 'Mi', 'Gi')[power]}B"
