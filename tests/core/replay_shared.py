"""Buffers and numbers that the tests of the replay buffer share."""

from typing import Any

import torch

import fastlangevin as fl

SHAPE = (1, 3, 5)
KINDS = ("index", "fifo", "reservoir")
DTYPES = (torch.float32, torch.uint8)


def buffer(capacity: int = 16, shape: tuple[int, ...] = SHAPE, **options: Any) -> fl.ReplayBuffer:
    return fl.ReplayBuffer(capacity, shape, **{"seed": 7, "reinit": 0.0} | options)
