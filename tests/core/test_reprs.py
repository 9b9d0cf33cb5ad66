"""Reprs fit on a line or two, whatever the size of what they stand for."""

import numpy as np
import pytest
import torch

import fastlangevin as fl
from fastlangevin.learn.tasks.reconstruct import Fit
from fastlangevin.learn.tasks.restore import Restored
from fastlangevin.reprs import short

X = torch.zeros(2, 1, 8, 8)


def test_a_sampler_shows_its_energy_and_what_is_not_a_default() -> None:
    energy = fl.ConvEnergy(channels=1, size=8, width=2)
    assert repr(fl.LangevinSampler(energy)) == (
        "LangevinSampler(ConvEnergy, steps=100, step_size=1.0, noise_std=0.01)"
    )
    sampler = fl.LangevinSampler(
        energy, steps=5, step_size=torch.ones(5, 2), noise_std=[0.5, 0.4, 0.3, 0.2, 0.1],
        clamp=(-1, 1), precision="bf16",
    )  # fmt: skip
    assert repr(sampler) == (
        "LangevinSampler(ConvEnergy, steps=5, step_size=<tensor [5, 2], float32>, "
        "noise_std=<5 values, 0.5 to 0.1>, clamp=(-1.0, 1.0), precision='bf16')"
    )


def test_a_sampler_shows_the_name_of_a_function() -> None:
    def well(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1)

    assert repr(fl.LangevinSampler(well, steps=3)).startswith("LangevinSampler(well, steps=3, ")


def test_diagnostics_show_the_means_of_the_first_and_the_last_step() -> None:
    sampler = fl.LangevinSampler(lambda x: x.square().sum(1), step_size=0.25, noise_std=0, steps=3)
    assert repr(sampler.diagnose(torch.ones(4, 2), seed=0)) == (
        "Diagnostics(x=<tensor [4, 2], float32>, steps=3, chains=4, mean at the first and the last "
        "step: energy 2 to 0.125, grad_norm 2.828 to 0.7071, displacement 0.7071 to 0.1768, "
        "saturation 0 to 0)"
    )
    assert "chains=0" in repr(sampler.diagnose(torch.ones(0, 2), seed=0))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (
            Fit(X, X, torch.zeros(2, 1)),
            "Fit(x=<tensor [2, 1, 8, 8], float32>, z=<tensor [2, 1, 8, 8], float32>, "
            "error=<tensor [2, 1], float32>)",
        ),
        (
            Restored(X[:, None], torch.zeros(2, 1), X),
            "Restored(x=<tensor [2, 1, 1, 8, 8], float32>, residual=<tensor [2, 1], float32>, "
            "mean=<tensor [2, 1, 8, 8], float32>)",
        ),
        (
            fl.learn.ImageData(np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, np.int64), "a", 1, 0),
            "ImageData(pixels=<array [3, 1, 8, 8], uint8>, labels=<array [3], int64>, name='a', "
            "divisor=1, offset=0)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_results_show_shapes(value: object, want: str) -> None:
    assert repr(value) == want


def test_a_learner_shows_how_far_it_is() -> None:
    sampler = fl.LangevinSampler(fl.ConvEnergy(channels=1, size=8, width=2), steps=1)
    learner = fl.learn.ShortRunLearner(sampler, X, batch_size=2)
    learner.step()
    assert repr(learner) == (
        "ShortRunLearner(LangevinSampler(ConvEnergy, steps=1, step_size=1.0, noise_std=0.01), "
        "iteration=1, data=<2 images [1, 8, 8]>, batch_size=2)"
    )


def test_short_lists_are_shown_as_they_are() -> None:
    assert short([1, 2, 3, 4]) == "[1, 2, 3, 4]"
    assert short(None) == "None"
