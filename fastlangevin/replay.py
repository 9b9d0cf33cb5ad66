"""ReplayBuffer: persistent chains that live on the device."""

import math
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count

KINDS = ("index", "fifo", "reservoir")
VERSION = 1
_OP = "ReplayBuffer"


class ReplayBuffer:
    """States [slots, *shape] of persistent chains: ``draw`` a batch, walk on it, ``put`` it back.

    kind: what ``put`` does with the batch, and what ``draw`` therefore finds.
        "index"      every state goes back to the slot that it was drawn from (JEM, Grathwohl et
                     al. 2020; with ``draw(index=)`` one chain per datum, as the persistent bank of
                     Nijkamp et al. 2020, "anatomy").
        "fifo"       the newest ``capacity`` states are kept (UvA deep learning tutorial 8).
        "reservoir"  a uniform sample of all states ever put is kept (Vitter 1985, algorithm R; Du
                     et al. 2021, "improved contrastive divergence").
        The latter two start empty, and until the first ``put`` every chain of a draw is a new one;
        then each is drawn on its own, so that a state may come more than once. Of an "index"
        buffer, all slots of which start as noise, a draw has no slot twice.
    reinit: probability with which each drawn chain starts anew, from U(lo, hi).
    dtype: torch.float32, or torch.uint8 for a quarter of the memory: of x is kept in which 256th of
        value_range it lies (the nearest, if outside), and a uniform point of that is drawn.
    value_range: (lo, hi) of new chains and of uint8 storage; float32 states are not clipped.
    n_classes: of an "index" buffer: slots / n_classes slots for each class, those of class 0 first;
        ``draw(y=)`` takes each chain from its label's (JEM's class-conditional samples).
    rank, world_size: this process keeps capacity / world_size slots, numbered from 0, and takes its
        numbers from fold_in(seed, rank) in place of seed, so that no two ranks share a chain (the
        sampler's noise needs ``first_chain=rank * n``). With another world size all draws are
        others, and what was saved cannot be loaded.

    An "index" buffer's first states are U(lo, hi) at the seed's initial states: in (-1, 1) the same
    numbers as the starts of ``sampler(n=capacity, seed=seed)``; give the two different seeds.

    Every choice is a function of (seed, step) or, in ``put``, of (seed, states put so far) through
    the noise contract: the same on every device, and :meth:`state_dict` is all there is to save.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        *,
        seed: int,
        kind: str = "index",
        reinit: float = 0.05,
        dtype: torch.dtype = torch.float32,
        value_range: tuple[float, float] = (-1.0, 1.0),
        n_classes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"{_OP}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if isinstance(reinit, str):
            raise TypeError(f"{_OP}: reinit must be a number, got {reinit!r}")
        if not 0 <= reinit <= 1:
            raise ValueError(f"{_OP}: reinit must be in [0, 1], got {reinit!r}")
        if dtype not in (torch.float32, torch.uint8):
            raise TypeError(f"{_OP}: dtype must be torch.float32 or torch.uint8, got {dtype}")
        if n_classes is not None and kind != "index":
            raise ValueError(f"{_OP}: n_classes needs kind='index', got kind={kind!r}")
        if not isinstance(shape, tuple | list):
            raise TypeError(f"{_OP}: shape must be a tuple of integers, got {shape!r}")
        self.capacity = check_count(_OP, "capacity", capacity)
        self.kind = kind
        self.dtype = dtype
        self.reinit = float(reinit)
        self.value_range = _check_range(value_range)
        self.n_classes = None if n_classes is None else check_count(_OP, "n_classes", n_classes)
        self.rank, self.world_size = rank, check_count(_OP, "world_size", world_size)
        self.seed = _noise.check_seed(seed)
        if rank not in range(self.world_size):
            raise ValueError(f"{_OP}: rank must be in 0..{self.world_size - 1}, got {rank!r}")
        parts = self.world_size * (self.n_classes or 1)
        if self.capacity % parts:
            raise ValueError(
                f"{_OP}: capacity must be a multiple of world_size x n_classes = {parts}, "
                f"got {self.capacity}"
            )
        self.added = 0  # states put so far, by a fifo or a reservoir
        self._seed = self.seed if self.world_size == 1 else _noise.fold_in(self.seed, rank)
        slots = (
            self.capacity // self.world_size,
            *(check_count(_OP, "shape", size) for size in shape),
        )
        if kind == "index":
            u = _noise.uniform(slots, seed=self._seed, step=0, device=device)
            self.states = self._stored(self._scaled(u))
        else:
            self.states = torch.zeros(slots, dtype=dtype, device=device or "cpu")

    def draw(
        self, n: int, step: int, y: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(slots [n] int64, states [n, ...] float32) of one step; changes nothing.

        y: labels [n] in 0..n_classes - 1, on any device: each chain comes from its label's slots,
        without repetition. index: slots [n] to take as they are, one chain per datum; of a slot
        that is there twice, ``put`` keeps the last. Neither: any slots.

        Raises ValueError if there are fewer slots than chains, in all or of one class.
        """
        capacity, device = self.states.shape[0], self.states.device
        if isinstance(n, str):
            raise TypeError(f"{_OP}: n must be an integer, got {n!r}")
        if not 1 <= n <= capacity:
            raise ValueError(f"{_OP}: n must be in 1..capacity={capacity}, got {n}")
        n = check_count(_OP, "n", n)
        if y is not None and self.n_classes is None:
            raise ValueError(f"{_OP}: y needs a buffer with n_classes, got one without")
        if index is not None and (self.kind != "index" or y is not None):
            got = "y too" if y is not None else f"kind={self.kind!r}"
            raise ValueError(f"{_OP}: index needs kind='index' and no y, got {got}")
        if index is not None:
            slots = check_numbers(_OP, "index", index, n, capacity).to(device)
        elif self.kind == "index":
            slots = self._distinct(n, step, y)
        else:
            words = _noise.words(
                (1, n), seed=self._seed, step=step, stream=_noise.ORDER, device=device
            )
            slots = words[0] * min(self.added, capacity) >> 32
        x = self.states[slots]
        # step + 1: step 0 of this stream made the slots' first states.
        u = _noise.uniform(x.shape, seed=self._seed, step=step + 1, device=device)
        if self.kind != "index" and self.added == 0:
            return slots, self._scaled(u)
        coin = _noise.uniform(
            (n, 1), seed=self._seed, step=step, stream=_noise.USER, device=device
        ).view(n, *[1] * (x.ndim - 1))
        if x.dtype == torch.uint8:
            x = self._scaled((x + u) / 256)
        return slots, torch.where(coin < self.reinit, self._scaled(u), x)

    def put(self, slots: Tensor | None, x: Tensor) -> None:
        """Take states x [n, ...] of any floating dtype, for the slots [n] that they came from.

        Only an "index" buffer reads ``slots``. Raises TypeError or ValueError, before anything is
        written, for an x of another shape, device or kind of numbers, and in uint8 for NaN.
        """
        capacity, device = self.states.shape[0], self.states.device
        if self.kind == "index":
            where = check_numbers(_OP, "slots", slots, None, capacity).to(device)
            self._check_states(x, len(where))
            rows = torch.arange(len(where), dtype=torch.int64, device=device)
        else:
            self._check_states(x, None)
            where, rows = (numbers.to(device) for numbers in self._admit(x.shape[0]))
            self.added += x.shape[0]
        write_last(self.states, where, self._stored(x.detach()[rows]))

    def to(self, device: torch.device | str) -> "ReplayBuffer":
        """This buffer, its states moved to ``device``; what it draws stays the same."""
        self.states = self.states.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """A copy of the states, the number put so far, and the settings; for ``torch.save``."""
        held = {"added": self.added, "states": self.states.clone()}
        return {"version": VERSION, **self._settings(), **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, in a buffer made alike, on any device.

        Raises ValueError, before anything is changed, naming what is missing or differs.
        """
        if not isinstance(state, dict):
            raise TypeError(f"{_OP}: state_dict must be a dict, got {type(state).__name__}")
        expected = {"version": VERSION, **self._settings()}
        if missing := [name for name in (*expected, "added", "states") if name not in state]:
            raise ValueError(f"{_OP}: state_dict has no {', '.join(missing)}")
        for name, want in expected.items():
            if state[name] != want:
                raise ValueError(
                    f"{_OP}: state_dict must have {name}={want!r}, as this buffer, "
                    f"got {state[name]!r}"
                )
        states = state["states"]
        if (states.shape, states.dtype) != (self.states.shape, self.dtype):
            raise ValueError(
                f"{_OP}: state_dict must have states {list(self.states.shape)} of {self.dtype}, "
                f"got {list(states.shape)} of {states.dtype}"
            )
        self.states.copy_(states)
        self.added = int(state["added"])

    def _settings(self) -> dict[str, Any]:
        names = ("kind", "capacity", "n_classes", "reinit", "value_range", "seed", "rank",
                 "world_size")  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return settings | {"shape": tuple(self.states.shape[1:]), "dtype": str(self.dtype)}

    def _distinct(self, n: int, step: int, y: Tensor | None) -> Tensor:
        """Slots without repetition: of all, or of each label's own."""
        capacity, device = self.states.shape[0], self.states.device
        keys = _noise.words(
            (1, capacity), seed=self._seed, step=step, stream=_noise.ORDER, device=device
        )
        if y is None or self.n_classes is None:
            return keys[0].argsort(stable=True)[:n]
        y, block = check_numbers(_OP, "y", y, n, self.n_classes), capacity // self.n_classes
        order = y.argsort(stable=True)
        grouped = y[order]
        # turn: how many chains of the same label stand before this one.
        turn = torch.empty_like(y)
        rank = torch.arange(n, dtype=torch.int64, device=y.device)
        turn[order] = rank - torch.searchsorted(grouped, grouped)
        if int(turn.max()) >= block:
            raise ValueError(
                f"{_OP}: y must have each label at most {block} times, as many slots as a class "
                f"has, got one {int(turn.max()) + 1} times"
            )
        y, turn = y.to(device), turn.to(device)
        return y * block + keys.view(self.n_classes, block).argsort(stable=True)[y, turn]

    def _admit(self, n: int) -> tuple[Tensor, Tensor]:
        """(slots, rows) of those of the next n states that are kept.

        On the CPU: how many they are would have to be waited for on a device.
        """
        capacity = self.states.shape[0]
        rows = torch.arange(n, dtype=torch.int64, device="cpu")
        count = self.added + rows
        if self.kind == "fifo":
            return count % capacity, rows
        # Addressed by the state's own number: how many are put at a time changes nothing. Chain 0
        # is the draws'. A word's 31 upper bits times up to 2**32 states stay below 2**63.
        words = _noise.words(
            (n, 1), seed=self._seed, step=0, stream=_noise.ORDER, first_chain=1 + self.added,
            device="cpu",
        )[:, 0]  # fmt: skip
        drawn = (words >> 1) * (count + 1) >> 31
        slots = torch.where(count < capacity, count, drawn)
        return slots[slots < capacity], rows[slots < capacity]

    def _scaled(self, u: Tensor) -> Tensor:
        """From [0, 1) to value_range."""
        lo, hi = self.value_range
        return (hi - lo) * u + lo

    def _stored(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        if self.dtype == torch.float32:
            return x
        lo, hi = self.value_range
        return ((x - lo) * (256 / (hi - lo))).floor().clamp(0, 255).to(torch.uint8)

    def _check_states(self, x: Tensor, n: int | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: x must be a tensor, got {type(x).__name__}")
        if n is None:
            n = x.shape[0] if x.ndim else 0
        if x.shape != (n, *self.states.shape[1:]):
            expected = [n, *self.states.shape[1:]]
            raise ValueError(f"{_OP}: x must have shape {expected}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{_OP}: x must be of floating dtype, got {x.dtype}")
        if x.device != self.states.device:
            raise ValueError(f"{_OP}: x must be on {self.states.device}, got {x.device}")
        if n > self.states.shape[0]:
            raise ValueError(
                f"{_OP}: x must have at most capacity={self.states.shape[0]} states, got {n}"
            )
        if self.dtype == torch.uint8 and bool(x.isnan().any()):
            raise ValueError(f"{_OP}: x must not be NaN, which uint8 cannot hold")


def write_last(states: Tensor, slots: Tensor, x: Tensor) -> None:
    """states[slots] = x; of rows for one slot the last is written, on every device."""
    last = torch.zeros(len(states), dtype=torch.int64, device=slots.device)
    rows = torch.arange(len(slots), dtype=torch.int64, device=slots.device)
    last.scatter_reduce_(0, slots, rows, "amax")
    states[slots] = x[last[slots]]


def check_numbers(op: str, name: str, value: Any, n: int | None, bound: int) -> Tensor:
    """Integers in 0..bound - 1, n of them or any number, as int64."""
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    if kind not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{op}: {name} must be a tensor of integers, got {kind}")
    if value.ndim != 1 or (n is not None and len(value) != n):
        expected = "n" if n is None else n
        raise ValueError(f"{op}: {name} must have shape [{expected}], got {list(value.shape)}")
    wrong = (value < 0) | (value >= bound)
    if bool(wrong.any()):
        got = int(value[wrong][0])
        raise ValueError(f"{op}: {name} must be in 0..{bound - 1}, got {got}")
    return value.long()


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    try:
        lo, hi = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise TypeError(f"{_OP}: value_range must be a pair (lo, hi), got {value!r}") from None
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"{_OP}: value_range must be finite with lo < hi, got ({lo}, {hi})")
    return lo, hi
