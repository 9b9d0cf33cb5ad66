"""ReplayBuffer: persistent chains, stored on the device."""

import math
from typing import Any

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.arguments import (
    check_count,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
)
from fastlangevin.kernels.devices import check_device_exists
from fastlangevin.names import check_name, keywords_checked

KINDS = ("index", "fifo", "reservoir")
VERSION = 1
_OP = "ReplayBuffer"


class ReplayBuffer:
    """Stores the states [slots, *shape] of persistent chains between training steps.

    ``draw`` returns a batch of states; after the chains have moved on, ``put`` stores them. Every
    choice and every number is a pure function of the seed and the step or, in ``put``, of the seed
    and the number of states put so far. It is therefore the same on every device, and
    :meth:`state_dict` saves everything.

    Args:
        capacity: The number of slots, over all processes.
        shape: The shape of one chain's state.
        seed: Seed of all choices and new chains. Use another seed for the sampler: in (-1, 1) the
            first states of an "index" buffer are those of ``sampler(n=capacity, seed=seed)``.
        kind: What ``put`` does with a batch.

            - "index" writes every state to the slot that it was drawn from (JEM, Grathwohl et al.
              2020; with ``draw(index=)`` there is one chain per datum, as in the persistent bank
              of Nijkamp et al. 2020, "anatomy"). All slots start as U(lo, hi), and a draw takes no
              slot twice.
            - "fifo" keeps the newest ``capacity`` states (UvA deep learning tutorial 8).
            - "reservoir" keeps a uniform sample of all states ever put (Vitter 1985, algorithm R;
              Du et al. 2021, "improved contrastive divergence").

            The last two start empty: before the first ``put`` every drawn chain is new. After it,
            chains are drawn independently, so that a draw may return a state twice.
        reinit: The probability with which each drawn chain restarts from U(lo, hi).
        dtype: torch.float32, or torch.uint8 to use a quarter of the memory. In uint8 the buffer
            stores which 256th of ``value_range`` x lies in (the nearest one if x is outside), and a
            draw returns a uniform point of it.
        value_range: (lo, hi), the range of new chains and of uint8 storage. float32 states are not
            clipped.
        n_classes: For an "index" buffer, divides the slots into equal blocks, one for each class
            and class 0 first; ``draw(y=)`` takes each chain from its label's block (JEM's
            class-conditional samples).
        rank, world_size: This process holds capacity / world_size slots, numbered from 0, and uses
            the seed fold_in(seed, rank), so that no two ranks share a chain (the sampler's noise
            also needs ``first_chain=rank * n``). With another world size every draw differs, and a
            saved buffer cannot be loaded.
        device: Where the states are; by default the CPU.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
    """

    @keywords_checked
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
        check_name(f"{_OP}: kind", kind, KINDS)
        check_device_exists(_OP, device)
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
        self.slots = self.capacity // self.world_size  # of this process
        states = (self.slots, *(check_count(_OP, "shape", size) for size in shape))
        if kind == "index":
            u = _noise.uniform(states, seed=self._seed, step=0, device=device)
            self.states = self.stored(self._scaled(u))
        else:
            self.states = torch.zeros(states, dtype=dtype, device=device or "cpu")

    def draw(
        self, n: int, step: int, y: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws a batch of chains for one training step, and changes nothing.

        Args:
            n: The number of chains.
            step: The number of the training step.
            y: Labels [n] in 0..n_classes - 1 on any device; each chain comes from its label's
                slots, without repetition.
            index: The slots [n] to take, one chain per datum. If a slot is there twice, ``put``
                keeps the last state for it. Without y and index any slots are drawn.

        Returns:
            (slots [n] in int64, states [n, ...] in float32).

        Raises:
            TypeError, ValueError: An argument does not fit, or there are fewer slots than chains,
                in total or for a class.
        """
        slots = self.choose(n, step, y, index)
        return slots, self.start(self.states[slots], step)

    def choose(
        self, n: int, step: int, y: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The slots [n] of :meth:`draw`, with its arguments and errors."""
        slots, device = self.slots, self.states.device
        if isinstance(n, str):
            raise TypeError(f"{_OP}: n must be an integer, got {n!r}")
        if not 1 <= n <= slots:
            raise ValueError(f"{_OP}: n must be in 1..capacity={slots}, got {n}")
        n = check_count(_OP, "n", n)
        if y is not None and self.n_classes is None:
            raise ValueError(f"{_OP}: y needs a buffer with n_classes, got one without")
        if index is not None and (self.kind != "index" or y is not None):
            got = "y too" if y is not None else f"kind={self.kind!r}"
            raise ValueError(f"{_OP}: index needs kind='index' and no y, got {got}")
        if index is not None:
            return check_numbers(_OP, "index", index, n, slots).to(device)
        if self.kind == "index":
            return self._distinct(n, step, y)
        words = _noise.words((1, n), seed=self._seed, step=step, stream=_noise.ORDER, device=device)
        return words[0] * min(self.added, slots) >> 32

    def start(self, stored: Tensor, step: int, first_chain: int = 0) -> Tensor:
        """The states from which drawn chains go on: float32, and new for a share of ``reinit``.

        Args:
            stored: States [n, ...] as they are stored.
            step: The number of the training step.
            first_chain: Which of the drawn chains the first one is.
        """
        n, device = len(stored), stored.device
        # Step 0 of this stream made the first states of the slots, hence step + 1.
        u = _noise.uniform(
            stored.shape, seed=self._seed, step=step + 1, first_chain=first_chain, device=device
        )
        if self.kind != "index" and self.added == 0:
            return self._scaled(u)
        coin = _noise.uniform(
            (n, 1), seed=self._seed, step=step, stream=_noise.USER, first_chain=first_chain,
            device=device,
        ).view(n, *[1] * (stored.ndim - 1))  # fmt: skip
        x = self._scaled((stored + u) / 256) if stored.dtype == torch.uint8 else stored
        return torch.where(coin < self.reinit, self._scaled(u), x)

    def put(self, slots: Tensor | None, x: Tensor) -> None:
        """Stores a batch of states.

        Args:
            slots: The slots [n] that the states were drawn from. Only an "index" buffer reads them.
            x: The states [n, ...], of any floating dtype.

        Raises:
            TypeError, ValueError: x has another shape, another device or no floating dtype, or is
                NaN for a uint8 buffer. Nothing has been written.
        """
        if self.kind == "index":
            slots = check_numbers(_OP, "slots", slots, None, self.slots)
            self._check_states(x, len(slots))
        else:
            self._check_states(x, None)
        slots, rows = (numbers.to(x.device) for numbers in self.admit(slots, len(x)))
        write_last(self.states, slots, self.stored(x[rows]))

    def admit(self, slots: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """(slots, rows): where :meth:`put` stores which of n states, which count as put.

        An "index" buffer stores all of them in the ``slots`` that they were drawn from.
        """
        if self.kind == "index":
            assert slots is not None
            return slots, torch.arange(n, dtype=torch.int64, device=slots.device)
        admitted = self._admit(n)
        self.added += n
        return admitted

    def stored(self, x: Tensor) -> Tensor:
        """States in the dtype in which the buffer stores them."""
        x = x.detach().to(torch.float32)
        if self.dtype == torch.float32:
            return x
        lo, hi = self.value_range
        return ((x - lo) * (256 / (hi - lo))).floor().clamp(0, 255).to(torch.uint8)

    def to(self, device: torch.device | str) -> "ReplayBuffer":
        """Moves the states to a device and returns the buffer. Its draws stay the same."""
        check_device_exists(_OP, device)
        self.states = self.states.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the states, the number put so far and the settings, to be saved."""
        contents = {"added": self.added, "states": self.states.clone()}
        return {"version": VERSION, **self._settings(), **contents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned for a buffer with equal settings.

        The buffer may be on another device. Raises TypeError or ValueError, before anything is
        changed, and names what is missing or differs.
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
        self.load(states, int(state["added"]))

    def gather(self) -> Tensor:
        """Returns the states themselves, as a buffer of several processes collects them."""
        return self.states

    def load(self, states: Tensor, added: int) -> None:
        """Restores the states and the number put so far."""
        self.states.copy_(states)
        self.added = added

    def _settings(self) -> dict[str, Any]:
        names = ("kind", "capacity", "n_classes", "reinit", "value_range", "seed", "rank",
                 "world_size")  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return settings | {"shape": tuple(self.states.shape[1:]), "dtype": str(self.dtype)}

    def _distinct(self, n: int, step: int, y: Tensor | None) -> Tensor:
        """n slots without repetition, from all slots or from the block of each label."""
        capacity, device = self.slots, self.states.device
        keys = _noise.words(
            (1, capacity), seed=self._seed, step=step, stream=_noise.ORDER, device=device
        )
        if y is None or self.n_classes is None:
            return keys[0].argsort(stable=True)[:n]
        y, block = check_numbers(_OP, "y", y, n, self.n_classes), capacity // self.n_classes
        order = y.argsort(stable=True)
        grouped = y[order]
        # turn: how many chains before this one have the same label.
        turn = torch.empty_like(y)
        rank = torch.arange(n, dtype=torch.int64, device=y.device)
        turn[order] = rank - torch.searchsorted(grouped, grouped)
        if int(turn.max()) >= block:
            raise ValueError(
                f"{_OP}: y must have each label at most {block} times, since a class has {block} "
                f"slots, got one {int(turn.max()) + 1} times"
            )
        y, turn = y.to(device), turn.to(device)
        return y * block + keys.view(self.n_classes, block).argsort(stable=True)[y, turn]

    def _admit(self, n: int) -> tuple[Tensor, Tensor]:
        """(slots, rows) of the next n states that the buffer keeps.

        Computed on the CPU: the host would have to wait for a device to know how many there are.
        """
        capacity = self.slots
        rows = torch.arange(n, dtype=torch.int64, device="cpu")
        count = self.added + rows
        if self.kind == "fifo":
            return count % capacity, rows
        # The address is the number of the state, so that the size of a batch does not matter. Chain
        # 0 belongs to the draws. The upper 31 bits of a word times up to 2**32 states fit 2**63.
        words = _noise.words(
            (n, 1), seed=self._seed, step=0, stream=_noise.ORDER, first_chain=1 + self.added,
            device="cpu",
        )[:, 0]  # fmt: skip
        drawn = (words >> 1) * (count + 1) >> 31
        slots = torch.where(count < capacity, count, drawn)
        return slots[slots < capacity], rows[slots < capacity]

    def _scaled(self, u: Tensor) -> Tensor:
        """Maps [0, 1) to value_range."""
        lo, hi = self.value_range
        return (hi - lo) * u + lo

    def _check_states(self, x: Tensor, n: int | None) -> None:
        check_tensor(_OP, "x", x)
        if n is None:
            n = x.shape[0] if x.ndim else 0
        check_shape(_OP, "x", x, (n, *self.states.shape[1:]))
        check_floating(_OP, "x", x)
        check_device(_OP, "x", x, self.states.device, "the buffer")
        if n > self.slots:
            raise ValueError(f"{_OP}: x must have at most capacity={self.slots} states, got {n}")
        if self.dtype == torch.uint8 and bool(x.isnan().any()):
            raise ValueError(f"{_OP}: x must not be NaN, which uint8 cannot hold")


def write_last(states: Tensor, slots: Tensor, x: Tensor) -> None:
    """states[slots] = x, where the last of several rows for one slot wins on every device."""
    last = torch.zeros(len(states), dtype=torch.int64, device=slots.device)
    rows = torch.arange(len(slots), dtype=torch.int64, device=slots.device)
    last.scatter_reduce_(0, slots, rows, "amax")
    states[slots] = x[last[slots]]


def check_numbers(op: str, name: str, value: Any, n: int | None, bound: int) -> Tensor:
    """The value as int64 [n], or of any length if n is None, with numbers in 0..bound - 1."""
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
