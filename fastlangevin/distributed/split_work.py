"""Tensors whose rows are computed in shares, one by each process of a group."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlangevin.distributed.group import Group
from fastlangevin.distributed.shards import shard

Rows = tuple[Tensor | None, ...]


def split_rows(
    group: Group, n: int, block: int, compute: Callable[[slice], Rows], what: str
) -> Rows:
    """Return compute(slice(0, n)). Every process computes a share of it.

    Args:
        compute: Returns tensors with the rows of the slice, or None in place of a tensor. It
            is called with slices that begin at a multiple of ``block``. If it works block by block,
            the result does not depend on the number of processes, bit for bit.
        what: What the rows are, as error messages say it.
    """
    if group.world_size == 1 or n == 0:
        return compute(slice(0, n))
    shares = [shard(-(-n // block), rank, group.world_size) for rank in range(group.world_size)]
    bounds = [(s.first_chain * block, (s.first_chain + s.n) * block) for s in shares]
    slices = [slice(min(n, lo), min(n, hi)) for lo, hi in bounds]
    own_slice = slices[group.rank]
    # Ranks without rows do not know the shapes.
    with group.working():
        rows = compute(own_slice) if own_slice.start < own_slice.stop else None
    kinds = None if rows is None else [_shape_and_dtype(r) for r in rows]
    device = next((r.device for r in rows or () if r is not None), group.device)
    row_kinds = next(kinds for kinds in group.share(kinds, what) if kinds is not None)
    counts = [s.stop - s.start for s in slices]
    gathered: list[Tensor | None] = []
    for i, kind in enumerate(row_kinds):
        if kind is None:
            gathered.append(None)
            continue
        shape, dtype = kind
        padded = torch.zeros(max(counts), *shape, dtype=getattr(torch, dtype), device=device)
        if rows is not None and (values := rows[i]) is not None:
            padded[: len(values)] = values
        parts = group.all_gather(padded, what)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return tuple(gathered)


def _shape_and_dtype(rows: Tensor | None) -> tuple[list[int], str] | None:
    return None if rows is None else (list(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))
