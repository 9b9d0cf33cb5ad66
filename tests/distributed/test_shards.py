"""The part of a batch of a process, and what a launcher says about the process."""

import pytest
import torch

import fastlangevin as fl
from fastlangevin.distributed import read_launch, shard

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 6, 64, 1023])
def test_shards_cover_the_batch_once_and_evenly(n: int, world_size: int) -> None:
    shards = [shard(n, rank, world_size) for rank in range(world_size)]
    chains = [chain for s in shards for chain in range(n)[s.rows()]]
    assert chains == list(range(n))
    sizes = [s.n for s in shards]
    assert max(sizes) - min(sizes) <= 1


def test_samples_of_all_shards_are_those_of_one_call() -> None:
    torch.manual_seed(0)
    sampler = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), steps=3)
    whole = sampler(n=13, seed=5)
    for world_size in (2, 3, 4):
        parts = [shard(13, rank, world_size) for rank in range(world_size)]
        drawn = [sampler(n=p.n, seed=5, first_chain=p.first_chain) for p in parts]
        assert torch.equal(torch.cat(drawn), whole)


def test_a_shard_is_that_of_the_launched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard(10) == (0, 10)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert fl.distributed.shard(10) == (4, 3)
    assert read_launch() == (1, 3, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert read_launch() == (1, 3, 0)


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE, got RANK=2 and"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "got RANK=0 and WORLD_SIZE=0"),
    ],
)
def test_variables_that_do_not_fit(
    variables: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        shard(4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((4, 0), "give both rank and world_size"),
        ((4, 2, 2), r"rank must be in 0\.\.1, got 2"),
        ((-1, 0, 1), "n must be at least 1, got -1"),
        ((4, 0, 0), "world_size must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit(arguments: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        shard(*arguments)
