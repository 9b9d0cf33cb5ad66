"""join: the processes of a launcher meet and become a Group."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastlangevin.distributed.group import Group
from fastlangevin.distributed.launch import Launch, own_device, read_launch
from fastlangevin.distributed.store import DeadlineError, StoreError, TimedStore, brief, within
from fastlangevin.distributed.time_limits import GRACE, TIMEOUT, DistributedError, named


@contextlib.contextmanager
def join(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[Group]:
    """Join the processes of a launcher for the duration of the context, and yield their Group.

    A process that no launcher has started, or that is the only one, is a group of its own. Several
    processes initialise torch.distributed, with NCCL if ``device`` is a GPU, and with Gloo
    otherwise. "auto" and "cuda" mean the GPU numbered LOCAL_RANK, which becomes the current one. If
    fewer GPUs are visible, for example one per task of SLURM, counting begins again at 0.

    timeout: the longest wait for another process, in seconds.

    Raises ValueError for environment variables that do not fit, and DistributedError if processes
    do not come within the time-out, are on different kinds of devices, or are on one GPU, or if
    torch.distributed is initialised already.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be greater than 0, got {timeout}")
    launch = read_launch()
    # torchrun's own process holds the store, which outlives the processes that it starts.
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.world_size == 1 and not elastic:
        yield Group()
        return
    if dist.is_initialized():
        raise DistributedError("start: torch.distributed is initialised already, and join does so")
    device = own_device(device)
    place = torch.device("cpu" if device == "auto" else device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store = dist.PrefixStore("fastlangevin", _rendezvous(launch, timeout))
    shared = TimedStore(store, timeout, holder=not elastic)
    start = meet(shared, launch, timeout)
    try:
        job = shared.propose("job", secrets.token_hex(8)) if elastic else None
    except StoreError as error:
        raise DistributedError(f"start: {error}") from error
    if launch.world_size == 1:
        yield Group(job=job, start=start)
        return
    store = dist.PrefixStore(start, store)
    group = Group(
        launch.rank, launch.world_size, store=dist.PrefixStore("group", store),
        device=place, timeout=timeout, holder=not elastic, job=job, start=start,
    )  # fmt: skip
    try:
        with group.membership():
            check_devices(group, place)
            _connect(group, store)
            yield group
    except BaseException:
        _abort()
        raise
    dist.destroy_process_group()


def _abort() -> None:
    """End torch.distributed without waiting for collectives that can no longer end."""
    if dist.is_initialized():
        # An error here must not replace the reason for the end. This is a private function of
        # torch, and builds without NCCL may lack names that it uses.
        with contextlib.suppress(Exception):
            within(GRACE, lambda: dist.distributed_c10d._abort_process_group())


def _rendezvous(launch: Launch, timeout: float) -> Any:
    """Return the store at MASTER_ADDR and MASTER_PORT."""
    limit = timedelta(seconds=timeout)
    try:
        # torch's own limit has no effect if the other process is stopped after it has connected.
        store, _, _ = within(
            timeout + GRACE, lambda: next(dist.rendezvous("env://", timeout=limit))
        )
    except (RuntimeError, ValueError, DeadlineError) as error:
        raise DistributedError(
            f"start: rank {launch.rank} did not meet the other processes of WORLD_SIZE="
            f"{launch.world_size} within {timeout:g} s: {brief(error)}"
        ) from error
    return store


def meet(store: TimedStore, launch: Launch, timeout: float) -> str:
    """Return a new name that all processes share, which rank 0 makes and sends to the others.

    torchrun keeps its store when it restarts the processes, with the keys of the dead ones. Each
    process therefore makes a new name, and rank 0 answers each of these names with its own.
    """
    own, rank = secrets.token_hex(8), launch.rank
    others = [str(r) for r in range(1, launch.world_size)]
    deadline, pause = time.monotonic() + timeout, 0.001
    missing: list[int] = []
    try:
        store.set(f"name/{rank}", own)
        while time.monotonic() < deadline:
            if rank > 0 and store.check([f"answer/{own}"]):
                name = store.get(f"answer/{own}")
                store.set(f"met/{name}/{rank}", "")
                return name
            if rank == 0:
                for r in others:
                    if store.check([f"name/{r}"]):
                        store.set(f"answer/{store.get(f'name/{r}')}", own)
                missing = [int(r) for r in others if not store.check([f"met/{own}/{r}"])]
                if not missing:
                    return own
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
    except StoreError as error:
        raise DistributedError(f"start: {error}") from error
    raise DistributedError(
        f"start: no answer to rank {rank} from {named(missing or [0])} within {timeout:g} s"
    )


def check_devices(group: Group, place: torch.device) -> None:
    """Raise DistributedError unless all processes are on one kind of device, each on its own GPU.

    NCCL supports one process per GPU. The numbers of GPUs do not tell them apart, because each
    process may see only its own.
    """
    group.compare({"the kind of device": place.type}, "start")
    if place.type != "cuda":
        return
    gpus = group.share(_identity(place), "start")
    shared = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if shared:
        both = [rank for rank in shared if gpus[rank] == gpus[shared[0]]]
        raise DistributedError(
            f"start: {named(both)} are all on GPU {gpus[shared[0]]}; start at most one process per "
            "GPU, with device auto, or give the device cpu"
        )


def _identity(place: torch.device) -> str:
    return str(torch.cuda.get_device_properties(place).uuid)


def _connect(group: Group, store: Any) -> None:
    """Initialise torch.distributed, and run the first collectives, in which NCCL connects."""
    cuda = group.device.type == "cuda"
    # Gloo cannot give up an operation before its own limit. NCCL's ends the process, so it must
    # not be reached before the Group has told the reason to the other processes. NCCL also ends
    # the process if it loses the connection to another. TORCH_NCCL_ASYNC_ERROR_HANDLING=0 would
    # prevent this, but a collective that has failed would then count as complete.
    limit = 3 * group.timeout + 60 if cuda else group.timeout

    def connect() -> None:
        if cuda:
            torch.cuda.set_device(group.device)  # the current device is one of a thread
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=group.rank,
            world_size=group.world_size, timeout=timedelta(seconds=limit),
        )  # fmt: skip
        numbers = torch.zeros(group.world_size, dtype=torch.float32, device=group.device)
        dist.all_to_all_single(torch.empty_like(numbers), numbers)
        dist.all_gather([torch.empty_like(numbers) for _ in range(group.world_size)], numbers)
        dist.broadcast(numbers, 0)
        if cuda:
            torch.cuda.synchronize()

    group.connect(connect)
