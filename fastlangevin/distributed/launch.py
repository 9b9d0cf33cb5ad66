"""What the launcher (torchrun, or SLURM through the same variables) tells a process."""

import os
from typing import NamedTuple

import torch

_NEEDED = ("RANK", "WORLD_SIZE")


class Launch(NamedTuple):
    """The place of this process among those that were launched together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # number of the process on its machine


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; without them the process is alone.

    Raises ValueError if only one of RANK and WORLD_SIZE is set, or if the numbers do not fit.
    """
    present = [name for name in _NEEDED if name in os.environ]
    if len(present) == 1:
        (missing,) = set(_NEEDED) - set(present)
        raise ValueError(
            f"{present[0]} is set but {missing} is not: set both, as torchrun does, or neither"
        )
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK must be less than WORLD_SIZE, got RANK={rank} and WORLD_SIZE={world_size}"
        )
    return Launch(rank, world_size, _number("LOCAL_RANK", rank))


def own_device(device: str) -> str:
    """Return the device of this process; "auto" and "cuda" become its GPU if it was launched.

    This is the GPU numbered LOCAL_RANK. A launcher such as SLURM can show each process only one
    GPU. If a process sees fewer GPUs than LOCAL_RANK needs, counting begins again at 0.
    """
    launched = "LOCAL_RANK" in os.environ or "RANK" in os.environ
    if not launched or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{read_launch().local_rank % torch.cuda.device_count()}"


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a whole number, got {text!r}")
    return int(text)
