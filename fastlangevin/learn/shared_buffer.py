"""SharedBuffer: the persistent chains of a job, with the slots divided among its processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlangevin.distributed import Group, Shard, shard
from fastlangevin.replay import ReplayBuffer, write_last


class SharedBuffer:
    """A ReplayBuffer whose slots are divided among the processes.

    It draws and stores the same chains as the buffer would in a single process. Every process
    computes the numbers of their slots. The states travel between the processes that hold the slots
    and the processes that run the chains, which are ``chains`` of each rank. ``buffer`` loses its
    states.
    """

    def __init__(
        self, buffer: ReplayBuffer, group: Group, chains: Sequence[Shard], device: torch.device
    ) -> None:
        if buffer.world_size != 1:
            raise ValueError(
                f"SharedBuffer: buffer must have world_size 1, got {buffer.world_size}"
            )
        self.kind, self.capacity = buffer.kind, buffer.capacity
        self._held = [shard(buffer.capacity, r, group.world_size) for r in range(group.world_size)]
        self._own = self._held[group.rank]
        self.states = buffer.states[self._own.rows()].to(device, copy=True)
        # A view would keep all states. The numbers of slots are computed on the CPU.
        buffer.states = torch.empty(
            (0, *buffer.states.shape[1:]), dtype=buffer.states.dtype, device="cpu"
        )
        self._buffer, self._group, self._chains = buffer, group, chains

    @property
    def added(self) -> int:
        """The number of states put so far, by a fifo or a reservoir."""
        return self._buffer.added

    def draw(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """Return (slots [n] of the whole batch, states of this process's chains)."""
        slots = self._buffer.choose(n, step)
        holders, runners = _ranks(self._held)[slots], _ranks(self._chains)
        wanted = slots[holders == self._group.rank] - self._own.first_chain
        what = f"the persistent chains of iteration {step + 1}"
        stored = self._move(self.states[wanted.to(self._device)], holders, runners, what)
        return slots, self._buffer.start(stored, step, self._chains[self._group.rank].first_chain)

    def put(self, slots: Tensor, x: Tensor) -> None:
        """Store the states x of this process's chains, which were drawn from their ``slots``."""
        slots, rows = self._buffer.admit(slots, len(slots))
        runners, holders = _ranks(self._chains)[rows], _ranks(self._held)[slots]
        own = rows[runners == self._group.rank] - self._chains[self._group.rank].first_chain
        stored = self._buffer.stored(x)[own.to(self._device)]
        received = self._move(stored, runners, holders, "the persistent chains to store")
        targets = slots[holders == self._group.rank] - self._own.first_chain
        write_last(self.states, targets.to(self._device), received)

    def gather(self) -> Tensor:
        """Return the states of all slots on rank 0, on the CPU, and none on other ranks."""
        group = self._group
        others = [0] * (group.world_size - 1)
        expected = [h.n if group.rank == 0 else 0 for h in self._held]
        what = "the persistent chains of a checkpoint"
        return group.all_to_all(self.states, [len(self.states), *others], expected, what).cpu()

    def load(self, states: Tensor, added: int) -> None:
        """Restore this process's slots from the states of all slots."""
        self.states.copy_(states[self._own.rows()])
        self._buffer.added = added

    @property
    def _device(self) -> torch.device:
        return self.states.device

    def _move(self, values: Tensor, sources: Tensor, targets: Tensor, what: str) -> Tensor:
        """Move value i from rank sources[i] to rank targets[i], for all i, in ascending order."""
        rank, world_size = self._group.rank, self._group.world_size
        to, origin = targets[sources == rank], sources[targets == rank]
        counts, expected = (r.bincount(minlength=world_size).tolist() for r in (to, origin))
        sent = values[to.argsort(stable=True).to(values.device)]
        received = self._group.all_to_all(sent, counts, expected, what)
        ordered = torch.empty_like(received)
        ordered[origin.argsort(stable=True).to(values.device)] = received
        return ordered


def _ranks(shards: Sequence[Shard]) -> Tensor:
    """Return the rank of each element of consecutive shards."""
    counts = torch.tensor([s.n for s in shards], dtype=torch.int64, device="cpu")
    return torch.arange(len(shards), dtype=torch.int64, device="cpu").repeat_interleave(counts)
