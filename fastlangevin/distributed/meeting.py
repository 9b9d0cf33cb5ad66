"""join: the processes of a launcher meet and become a Group."""

import contextlib
import platform
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastlangevin.distributed.group import TIMEOUT, DistributedError, Group, brief, named
from fastlangevin.distributed.launch import Launch, own_device, read_launch


@contextlib.contextmanager
def join(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[Group]:
    """Join the processes of a launcher for the duration of the context, and yield their Group.

    A process that no launcher has started, or that is the only one, is a group of its own. Others
    initialise torch.distributed with NCCL if ``device`` is a GPU, and with Gloo otherwise. "auto"
    and "cuda" mean the GPU numbered LOCAL_RANK, which becomes the current one.

    timeout: the longest wait for another process, in seconds.

    Raises ValueError for environment variables that do not fit, and DistributedError if processes
    do not come within the time-out or are on different kinds of devices.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be greater than 0, got {timeout}")
    launch = read_launch()
    if launch.world_size == 1:
        yield Group()
        return
    place = torch.device(own_device(device) if device != "auto" else _auto())
    if place.type == "cuda":
        torch.cuda.set_device(place)
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"start: rank {launch.rank} did not meet the other processes of WORLD_SIZE="
            f"{launch.world_size} within {timeout:g} s: {brief(error)}"
        ) from error
    store = dist.PrefixStore(meet(store, launch, timeout), store)
    own = dist.PrefixStore("fastlangevin", store)
    group = Group(launch.rank, launch.world_size, store=own, device=place, timeout=timeout)
    initialised = False
    try:
        group.compare({"the kind of device": place.type}, "start")
        _check_own_gpus(group, place)
        with group.timed("start"):
            dist.init_process_group(
                "nccl" if place.type == "cuda" else "gloo",
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=limit,
            )
        initialised = True
        yield group
        # No process may end, and with it perhaps the store, while another still needs it.
        group.all_gather(torch.zeros(1, dtype=torch.float32, device=place), "the end of the job")
    except BaseException as error:
        group.leave(error)
        raise
    finally:
        if initialised:
            dist.destroy_process_group()


def meet(store: Any, launch: Launch, timeout: float) -> str:
    """Return a new name that all processes share: rank 0's, which the others can only get from it.

    torchrun keeps its store when it restarts the processes, with the keys of the dead ones. The
    names of the processes are therefore new each time, and rank 0 answers each name by its own.
    """
    own, rank = secrets.token_hex(8), launch.rank
    others = [str(r) for r in range(1, launch.world_size)]
    deadline, pause = time.monotonic() + timeout, 0.001
    missing: list[int] = []
    try:
        store.set(f"name/{rank}", own)
        while time.monotonic() < deadline:
            if rank > 0 and store.check([f"answer/{own}"]):
                name = store.get(f"answer/{own}").decode()
                store.set(f"met/{name}/{rank}", "")
                return name
            if rank == 0:
                for r in others:
                    if store.check([f"name/{r}"]):
                        store.set(f"answer/{store.get(f'name/{r}').decode()}", own)
                missing = [int(r) for r in others if not store.check([f"met/{own}/{r}"])]
                if not missing:
                    return own
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
    except RuntimeError as error:
        raise DistributedError(f"start: rank {rank} lost the store: {brief(error)}") from error
    raise DistributedError(
        f"start: no answer to rank {rank} from {named(missing or [0])} within {timeout:g} s"
    )


def _check_own_gpus(group: Group, place: torch.device) -> None:
    """Raise DistributedError if two processes are on one GPU, which NCCL does not support."""
    if place.type != "cuda":
        return
    places = [tuple(p) for p in group.share([platform.node(), str(place)], "start")]
    shared = [rank for rank, where in enumerate(places) if places.count(where) > 1]
    if shared:
        host, gpu = places[shared[0]]
        both = [rank for rank in shared if places[rank] == places[shared[0]]]
        raise DistributedError(f"start: {named(both)} are all on {gpu} of {host}; use device auto")


def _auto() -> str:
    return own_device("auto") if torch.cuda.is_available() else "cpu"
