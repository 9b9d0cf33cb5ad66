"""A sum over all processes whose rounding does not depend on how many there are."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlangevin.distributed.group import Group
from fastlangevin.distributed.shards import shard

Node = tuple[int, int]  # leaves lo, ..., hi - 1 of the tree


class OrderedSum:
    """Adds one vector per leaf, along a binary tree over the leaves.

    Floating-point sums depend on the order of addition. Here the tree gives the order, and it
    depends on the number of leaves alone. Every process holds consecutive leaves. It adds up the
    subtrees that it holds completely, and sends a slice of each sum to every process. Each process
    completes the sum of its slice, and collects the slices of the others. With as many leaves as
    processes, this moves as many bytes as an all-reduce.

    leaves: the number of vectors, at least one per process.
    group: the processes; leaf i belongs to the process whose ``shard(leaves)`` holds it.
    """

    def __init__(self, leaves: int, group: Group) -> None:
        self.leaves, self.group = leaves, group
        ranks = range(group.world_size)
        self.shards = [shard(leaves, rank, group.world_size) for rank in ranks]
        self._nodes = [
            _complete_subtrees((0, leaves), (first, first + count)) for first, count in self.shards
        ]

    def __call__(
        self, vector: Callable[[int], Tensor], extra: Callable[[], Tensor], what: str
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (sum over all leaves of vector(leaf), [extra() of every process]).

        ``vector`` is called for this process's leaves, in ascending order; afterwards ``extra``
        returns a vector of the same dtype and of equal length on all processes, which travels with
        the slices.
        """

        def add(node: Node) -> Tensor:
            lo, hi = node
            return vector(lo) if hi - lo == 1 else add(_left_child(node)) + add(_right_child(node))

        group = self.group
        sums = [add(node) for node in self._nodes[group.rank]]
        if group.world_size == 1:
            return sums[0], [extra()]
        length = len(sums[0])
        width = -(-length // group.world_size)  # of a slice
        sent = sums[0].new_zeros(group.world_size, len(sums), width)
        for i, total in enumerate(sums):
            padded = torch.nn.functional.pad(total, (0, width * group.world_size - length))
            sent[:, i] = padded.view(group.world_size, width)
        counts = [len(nodes) * width for nodes in self._nodes]
        received = group.all_to_all(
            sent.flatten(), [len(sums) * width] * group.world_size, counts, what
        )
        nodes = [node for nodes in self._nodes for node in nodes]
        slices = dict(zip(nodes, received.view(len(nodes), width), strict=True))

        def complete(node: Node) -> Tensor:
            if node in slices:
                return slices[node]
            return complete(_left_child(node)) + complete(_right_child(node))

        gathered = group.all_gather(torch.cat([complete((0, self.leaves)), extra()]), what)
        return gathered[:, :width].flatten()[:length], list(gathered[:, width:])


def _left_child(node: Node) -> Node:
    """Return the left child. Its number of leaves is the largest power of two below the node's."""
    lo, hi = node
    return lo, lo + (1 << (hi - lo - 1).bit_length() - 1)


def _right_child(node: Node) -> Node:
    return _left_child(node)[1], node[1]


def _complete_subtrees(node: Node, held_leaves: Node) -> list[Node]:
    """Return the largest subtrees of ``node`` that have only leaves that are held."""
    (lo, hi), (first, last) = node, held_leaves
    if first <= lo and hi <= last:
        return [node]
    if hi <= first or last <= lo:
        return []
    return _complete_subtrees(_left_child(node), held_leaves) + _complete_subtrees(
        _right_child(node), held_leaves
    )
