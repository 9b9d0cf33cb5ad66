"""Collectives of NCCL, with the one process that a single GPU allows."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastlangevin.distributed import Group
from tests.distributed.launch import launch


def communicate_with_nccl() -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    group = Group(store=dist.HashStore(), device=device)
    sent, numbers = torch.arange(3.0, device=device), torch.empty(3, device=device)
    for begin in (
        lambda: group._all_to_all(numbers, sent, [3], [3]),
        lambda: group._all_gather([numbers], sent),
    ):
        numbers.zero_()
        group._finish(begin, "a collective")
        assert torch.equal(numbers, sent)
    group._finish(lambda: group._broadcast(sent), "a collective")
    assert torch.equal(numbers, sent)
    dist.distributed_c10d._abort_process_group()
    assert not dist.is_initialized()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_collectives_of_nccl_are_waited_for_and_given_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch(1, log, communicate_with_nccl) == [0], log.read_text()
