"""Chains that start from n and a shape."""

import pytest
import torch

import fastlangevin as fl


def test_n_and_shape_start_chains_of_any_energy() -> None:
    sampler = fl.LangevinSampler(lambda x: x.square().flatten(1).sum(1), steps=3)
    want = sampler(fl.noise.initial((5, 3, 2, 2), seed=4), seed=4)
    assert torch.equal(sampler(n=5, shape=(3, 2, 2), seed=4), want)
    assert torch.equal(sampler(n=5, shape=torch.Size([3, 2, 2]), seed=4), want)
    assert torch.equal(sampler.trajectory(n=5, shape=[3, 2, 2], seed=4)[-1], want)
    assert torch.equal(sampler.diagnose(n=5, shape=(3, 2, 2), seed=4).x, want)
    assert torch.equal(sampler(n=2, shape=(3, 2, 2), seed=4, first_chain=3), want[3:])


def test_shape_replaces_the_energys_own() -> None:
    energy = fl.GaussianEnergy()
    energy.shape = (7,)
    sampler = fl.LangevinSampler(energy, steps=1)
    assert sampler(n=2, seed=0).shape == (2, 7)
    assert sampler(n=2, shape=(3,), seed=0).shape == (2, 3)
    assert sampler(n=0, shape=(3,), seed=0).shape == (0, 3)


def test_shape_of_a_state_of_several_tensors() -> None:
    def energy(x: dict[str, torch.Tensor]) -> torch.Tensor:
        return x["a"].square().sum(1) + x["b"].square().flatten(1).sum(1)

    sampler = fl.LangevinSampler(energy, steps=2)
    x = sampler(n=4, shape={"a": (3,), "b": (2, 2)}, seed=1)
    assert {name: part.shape for name, part in x.items()} == {"a": (4, 3), "b": (4, 2, 2)}
    flat = torch.cat([x["a"], x["b"].flatten(1)], 1)
    single = fl.LangevinSampler(lambda x: x.square().sum(1), steps=2)
    torch.testing.assert_close(flat, single(n=4, shape=(7,), seed=1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 2, "shape": "3,2"}, r"shape must be a sequence of integers, .* got '3,2'"),
        ({"n": 2, "shape": 3}, r"shape must be a sequence of integers, .* got 3"),
        ({"n": 2, "shape": (3, -1)}, r"shape\[1\] must be at least 1, got -1"),
        ({"n": 2, "shape": (3, 0.5)}, r"shape\[1\] must be an integer, got 0\.5"),
        ({"x0": torch.zeros(2, 3), "shape": (3,)}, "shape belongs to chains that n starts"),
        ({"shape": (3,)}, "give either x0 or n"),
        ({"n": 2}, r"n needs shape, one chain's, such as shape=\(3, 32, 32\)"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_refused(arguments: dict, match: str) -> None:
    sampler = fl.LangevinSampler(lambda x: x.square().sum(1), steps=2)
    with pytest.raises((TypeError, ValueError), match=match):
        sampler(**arguments)
