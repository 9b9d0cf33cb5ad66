"""Tensors, arrays, and torch's datasets and loaders as the data of a learner."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import fastlangevin as fl
from fastlangevin.learn import Metrics, ShortRunLearner
from tests.learn.learner_shared import Linear

IMAGES = 2 * fl.noise.uniform((11, 1, 4), seed=9, step=0) - 1
LABELS = torch.arange(11)


class Jittered(Dataset[Tensor]):
    """A dataset whose transform draws from torch's generator."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        return IMAGES[index] + 0.1 * torch.rand(()) * torch.randn(1, 4)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(IMAGES)


def learner(data: Any, **options: Any) -> ShortRunLearner:
    sampler = fl.LangevinSampler(Linear(), steps=2, step_size=0.1)
    settings = {"batch_size": 6, "lr": 0.1, "flip": True, "seed": 3}
    return ShortRunLearner(sampler, data, **settings | options)


def learn(data: Any, iterations: int = 3, **options: Any) -> tuple[list[Metrics], Tensor]:
    learning = learner(data, **options)
    metrics = [learning.step() for _ in range(iterations)]
    return metrics, learning.energy.weight.detach().clone()


KINDS = {
    "array": lambda: IMAGES.numpy(),
    "array of float64": lambda: IMAGES.numpy().astype(np.float64),
    "reversed array": lambda: np.flip(IMAGES.numpy()[::-1].copy(), 0),
    "images and labels": lambda: TensorDataset(IMAGES, LABELS),
    "images alone": lambda: TensorDataset(IMAGES),
    "subset": lambda: Subset(TensorDataset(torch.cat([-IMAGES, IMAGES])), list(range(11, 22))),
    "list of tensors": lambda: list(IMAGES),
    "list of pairs": lambda: [(image.numpy(), 3) for image in IMAGES],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_learns_what_a_tensor_does(kind: str) -> None:
    expected, weights = learn(IMAGES)
    metrics, same = learn(KINDS[kind]())
    assert metrics == expected
    assert torch.equal(weights, same)


def test_only_the_dataset_of_a_loader_is_used_and_that_is_said() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2, shuffle=True, num_workers=3)
    with pytest.warns(
        UserWarning, match="only the dataset of the .* is used.*own batch_size"
    ) as warned:
        learning = learner(loader)
    assert warned[0].filename == __file__
    assert learning.step() == learn(IMAGES, 1)[0][0]


def test_random_transforms_are_functions_of_seed_and_iteration_and_leave_torch_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    expected, weights = learn(Jittered())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    metrics, same = learn(Jittered())
    assert metrics == expected
    assert torch.equal(weights, same)
    data = learner(Jittered()).data
    first = data.batch(torch.tensor([4, 4, 4]), None, 1, 0)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(data.batch(torch.tensor([4, 4]), None, 1, 1), first[1:])
    assert not torch.equal(data.batch(torch.tensor([4]), None, 2, 0), first[:1])


def test_a_resumed_run_sees_the_same_transformed_images() -> None:
    expected = learn(Jittered(), 4)[0][-1]
    learning = learner(Jittered())
    for _ in range(3):
        learning.step()
    resumed = learner(Jittered())
    resumed.load_tensors(learning.tensors(), 3)
    assert resumed.step() == expected


class Growing(Dataset[Tensor]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(1, 4 if index == 0 else 3)


def pairs(first: Any) -> list[tuple[Any, int]]:
    return [(first, 0)] * 4


SAMPLED = DataLoader(TensorDataset(IMAGES), sampler=WeightedRandomSampler([1.0] * 11, 11))
COLLATED = DataLoader(TensorDataset(IMAGES), collate_fn=lambda items: items)
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (Stream(), TypeError, "an IterableDataset has neither"),
    (SAMPLED, ValueError, "has a sampler of its own"),
    (COLLATED, ValueError, "has a collate_fn of its own"),
    (np.zeros((3, 1, 4), np.uint8), TypeError, "data must be of floating dtype, got uint8"),
    (np.full((3, 1, 4), np.nan), ValueError, "data must be finite"),
    (pairs(torch.zeros(1, 4, dtype=torch.uint8)), TypeError, r"item 0 gives torch\.uint8"),
    (pairs("picture.png"), TypeError, "item 0 gives str"),
    ([{"image": IMAGES[0]}], TypeError, "item 0 gives dict"),
    ([], ValueError, "data is empty"),
    (iter(IMAGES), TypeError, "data must be a tensor or array .*, got tuple_iterator"),
    ("digits", TypeError, "data must be a tensor or array .*, got str"),
]


@pytest.mark.parametrize(("data", "kind", "match"), REFUSED)
def test_what_is_refused(data: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=f"ShortRunLearner: .*{match}"):
        learner(data)


def test_the_stream_of_a_loader_is_refused_too() -> None:
    with (
        pytest.warns(UserWarning, match="only the dataset"),
        pytest.raises(TypeError, match="IterableDataset"),
    ):
        learner(DataLoader(Stream()))


def test_an_image_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 4\] of the first, item [1-8] has \[1, 3\]"):
        learn(Growing())
