"""A learner in several processes, here threads, learns what it learns alone."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin import distributed
from fastlangevin.distributed import Group
from tests.distributed.threads import run_ranks
from tests.learn.learner_shared import learner, net, same_state, sampler, state

LOCK = threading.Lock()  # networks are initialised from torch's global generator


def fresh(make: Callable[[], nn.Module] = net) -> nn.Module:
    with LOCK:
        return make()


def learn(iterations: int = 3, **options: Any) -> Any:
    """Work of a rank: (state, metrics) after some iterations of a learner on a fresh network."""

    def work(group: Group) -> tuple[dict[str, Tensor], list[Any]]:
        made = {key: value() if callable(value) else value for key, value in options.items()}
        learning = learner(sampler(fresh()), group=group, **made)
        metrics = [learning.step(measure=i == 1) for i in range(iterations)]
        return state(learning), metrics

    return work


def persistent(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return lambda: fl.ReplayBuffer(17, (1, 8, 8), seed=3, kind=kind, dtype=dtype, reinit=0.2)


EVERYTHING = {"parts": 4, "ema": 0.9, "flip": False}


@pytest.mark.parametrize(
    "buffer",
    [None, persistent("index"), persistent("reservoir", torch.uint8)],
    ids=["no buffer", "index", "reservoir"],
)
def test_weights_metrics_and_chains_are_the_same_bits_for_every_number_of_processes(
    buffer: Any,
) -> None:
    options = EVERYTHING | ({} if buffer is None else {"buffer": buffer})
    ((alone, metrics),) = run_ranks(1, learn(**options))
    assert not same_state(alone, state(learner(sampler(fresh()), ema=0.9)))
    for world_size in (2, 3) if buffer is None else (3,):
        results = run_ranks(world_size, learn(**options))
        assert same_state(results[0][0], alone)
        for tensors, theirs in results:
            assert theirs == metrics
            tensors = tensors | ({} if buffer is None else {"buffer": alone["buffer"]})
            assert same_state(tensors, alone)  # rank 0 alone has all of the buffer


def test_without_parts_the_weights_agree_to_rounding_and_between_the_ranks() -> None:
    ((alone, _),) = run_ranks(1, learn())
    results = run_ranks(4, learn())
    for name, value in alone.items():
        torch.testing.assert_close(results[0][0][name], value, rtol=1e-4, atol=1e-5)
    for tensors, _ in results[1:]:
        assert same_state(tensors, results[0][0])


def test_a_checkpoint_of_one_number_of_processes_is_resumed_by_another(tmp_path: Any) -> None:
    options = EVERYTHING | {"buffer": persistent("fifo")}
    ((whole, _),) = run_ranks(1, learn(iterations=4, **options))

    def cut(group: Group) -> None:
        made = options | {"buffer": options["buffer"]()}
        learning = learner(sampler(fresh()), group=group, **made)
        for _ in range(2):
            learning.step()
        learning.save(tmp_path / "cut.safetensors")

    def resume(group: Group) -> dict[str, Tensor]:
        made = options | {"buffer": options["buffer"]()}
        learning = learner(sampler(fresh()), group=group, **made)
        learning.load(tmp_path / "cut.safetensors")
        for _ in range(2):
            learning.step()
        return state(learning)

    assert run_ranks(3, cut) == [None] * 3
    for world_size in (1, 2):
        assert same_state(run_ranks(world_size, resume)[0], whole)


CHANGES: dict[str, Any] = {
    "the weights": lambda learning: next(learning.energy.parameters()).data.add_(1e-6),
    "the averages": lambda learning: next(learning.averaged.parameters()).data.add_(1e-6),
    "the optimiser": lambda learning: next(iter(learning.optimizer.state.values()))[
        "exp_avg_sq"
    ].mul_(1.001),
    "the count of persistent chains": lambda learning: setattr(learning.buffer._buffer, "added", 3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_rank_whose_state_differs_is_named_and_nothing_is_saved(
    what: str, tmp_path: Path
) -> None:
    def work(group: Group) -> None:
        learning = learner(sampler(fresh()), group=group, ema=0.9, buffer=persistent("fifo")())
        learning.step()
        if group.rank == 1:
            CHANGES[what](learning)
        learning.save(tmp_path / "cut.safetensors")

    for error in run_ranks(3, work):
        assert isinstance(error, distributed.DistributedError)
        assert f"cut.safetensors: the processes differ in {what}: " in str(error)
        assert str(error).endswith("on rank 1")
    assert list(tmp_path.iterdir()) == []
