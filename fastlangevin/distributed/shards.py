"""The part of a batch of chains that a process runs."""

from typing import NamedTuple

import torch.distributed as dist

from fastlangevin.arguments import check_count
from fastlangevin.distributed.launch import read_launch


class Shard(NamedTuple):
    """Chains first_chain, ..., first_chain + n - 1 of a batch."""

    first_chain: int
    n: int

    def rows(self) -> slice:
        """Return the rows of the batch that belong to the shard."""
        return slice(self.first_chain, self.first_chain + self.n)


def shard(n: int, rank: int | None = None, world_size: int | None = None) -> Shard:
    """Return the chains of a batch of ``n`` that belong to a process.

        part = fl.distributed.shard(50_000)
        x = sampler(n=part.n, first_chain=part.first_chain, seed=0)

    The shards of all processes are consecutive and cover the batch, and their sizes differ by at
    most one. ``x0[part.rows()]`` are the process's rows of a batch of starting points.

    n: the number of chains of all processes together, at least 0. A shard is empty if there are
        fewer chains than processes.
    rank, world_size: the process and the number of processes; by default those of the default
        process group or, before it exists, of RANK and WORLD_SIZE. Without either, the process is
        alone.

    Raises TypeError or ValueError if the numbers do not fit.
    """
    n = 0 if n == 0 else check_count("shard", "n", n)
    if (rank is None) != (world_size is None):
        raise ValueError("shard: give both rank and world_size, or neither")
    if rank is None or world_size is None:
        joined = dist.is_available() and dist.is_initialized()
        launch = read_launch()
        rank = dist.get_rank() if joined else launch.rank
        world_size = dist.get_world_size() if joined else launch.world_size
    check_count("shard", "world_size", world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"shard: rank must be in 0..{world_size - 1}, got {rank}")
    per_rank, remainder = divmod(n, world_size)
    return Shard(rank * per_rank + min(rank, remainder), per_rank + (rank < remainder))
