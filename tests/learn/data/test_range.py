"""The learner warns of images that are not in [-1, 1]."""

import warnings

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn import load_images
from tests.learn.learner_shared import images, learner


def warnings_of(data: object) -> list[str]:
    """What two steps on the data warn of."""
    chain = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), steps=1)
    learning = learner(chain, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learning.step()
        learning.step()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


UNIT = (images() + 1) / 2


@pytest.mark.parametrize(
    "data",
    [UNIT, 255 * UNIT, (UNIT - 0.13) / 0.31, [(image, 0) for image in UNIT]],
    ids=["unit", "bytes", "standardised", "dataset"],
)
def test_images_that_are_out_of_range_are_named_once(data: object) -> None:
    (text,) = warnings_of(data)
    assert "ShortRunLearner: data must be in [-1, 1]" in text
    assert "first batch's values are from" in text
    assert ("2 * images - 1" in text) == (not isinstance(data, Tensor) or data is UNIT)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
def test_images_in_range_and_their_noise_are_silent(noise: float) -> None:
    black_and_white = images().sign()
    assert warnings_of(black_and_white + noise * torch.randn_like(black_and_white)) == []


def test_loaded_images_are_silent_even_if_all_are_bright() -> None:
    loaded = load_images("digits")
    loaded.pixels[:] = 255
    assert warnings_of(loaded) == []


def test_points_of_a_plane_are_silent() -> None:
    plane = torch.linspace(0, 5, 28).view(14, 2)
    energy = torch.nn.Sequential(torch.nn.Linear(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = learner(fl.LangevinSampler(energy, steps=1), plane).step()
    assert metrics.iteration == 1
