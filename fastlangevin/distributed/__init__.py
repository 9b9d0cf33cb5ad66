"""Several processes that share the work: their part of it, and how they communicate."""

from fastlangevin.distributed.group import Group
from fastlangevin.distributed.launch import Launch, own_device, read_launch
from fastlangevin.distributed.ordered_sum import OrderedSum
from fastlangevin.distributed.rendezvous import join
from fastlangevin.distributed.shards import Shard, shard
from fastlangevin.distributed.split_work import split_rows
from fastlangevin.distributed.time_limits import DistributedError

__all__ = [
    "DistributedError",
    "Group",
    "Launch",
    "OrderedSum",
    "Shard",
    "join",
    "own_device",
    "read_launch",
    "shard",
    "split_rows",
]
