"""Coarse to fine: a sampler whose chains start from enlarged samples of another."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import fastlangevin as fl
from fastlangevin.coarse import enlarged


def sampler(size: int, start: fl.LangevinSampler | None = None, **settings: object) -> object:
    torch.manual_seed(size)
    energy = fl.ConvEnergy(3, size, width=4)
    return fl.LangevinSampler(energy, steps=3, step_size=2.0, start=start, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def coarse() -> fl.LangevinSampler:
    return sampler(8)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def fine(coarse: fl.LangevinSampler) -> fl.LangevinSampler:
    return sampler(32, sampler(16, coarse))  # type: ignore[arg-type,return-value]


def test_chains_start_from_enlarged_samples_of_the_start(fine: fl.LangevinSampler) -> None:
    assert fine.start is not None
    starts = fine.starts(5, seed=7)
    small = fine.start(n=5, seed=fl.noise.fold_in(7, 2**42)).clamp(-1, 1)
    assert torch.equal(starts, enlarged(small, (3, 32, 32)))
    assert torch.equal(fine(n=5, seed=7), fine(starts, seed=7))
    plain = fl.LangevinSampler(fine.energy, steps=3, step_size=2.0)
    assert not torch.equal(fine(n=5, seed=7), plain(n=5, seed=7))
    assert torch.equal(fine(starts, seed=7), plain(starts, seed=7))


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 24, 12), (3, 8, 8)])
def test_enlarged_images_are_the_small_ones_if_reduced_again(shape: tuple[int, int, int]) -> None:
    """And equal pixels stay as they are."""
    small = fl.noise.uniform((4, 3, 8, 8), seed=0, step=0) - 0.5
    small = torch.nn.functional.avg_pool2d(small, 3, 1, 1, count_include_pad=False)

    def error(large: Tensor) -> float:
        reduced = interpolate(large, size=(8, 8), mode="bicubic", antialias=True)
        return float((reduced - small).norm() / small.norm())

    large = enlarged(small, shape)
    assert large.shape == (4, *shape)
    once = interpolate(small, size=shape[1:], mode="bicubic")
    assert error(large) <= 0.1 * error(once) + 1e-6
    torch.testing.assert_close(enlarged(small.half(), shape).float(), large, atol=2e-3, rtol=0)
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(enlarged(flat, shape), torch.full((1, *shape), 0.3))


def test_enlarged_starts_stay_within_the_bounds_of_images(coarse: fl.LangevinSampler) -> None:
    wild = fl.LangevinSampler(coarse.energy, steps=1, step_size=0.0, noise_std=3.0)
    assert sampler(16, wild).starts(4, seed=0).abs().max() == 1  # type: ignore[attr-defined]


def test_a_chain_does_not_depend_on_the_chains_beside_it(fine: fl.LangevinSampler) -> None:
    whole = fine(n=6, seed=3)
    for first, n in ((0, 1), (1, 3), (4, 2)):
        assert torch.equal(fine(n=n, seed=3, first_chain=first), whole[first : first + n])
    assert len(fine(n=0, seed=3)) == 0


def test_every_way_to_run_chains_has_the_same_starts(fine: fl.LangevinSampler) -> None:
    x = fine(n=2, seed=1)
    assert torch.equal(fine.diagnose(n=2, seed=1).x, x)
    states = fine.trajectory(n=2, seed=1)
    assert torch.equal(states[-1], x)
    assert torch.equal(states[0], fine.starts(2, seed=1))
    again = fl.LangevinSampler(fine.energy, **fine.settings())
    assert torch.equal(again(n=2, seed=1), x)


def test_starts_without_a_start_are_uniform_noise(coarse: fl.LangevinSampler) -> None:
    expected = fl.noise.initial((4, 3, 8, 8), seed=2, first_chain=5)
    assert torch.equal(coarse.starts(4, seed=2, first_chain=5), expected)


def quadratic(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def test_an_energy_without_a_shape_gets_it_from_the_call(coarse: fl.LangevinSampler) -> None:
    free = fl.LangevinSampler(quadratic, steps=1, start=coarse)
    assert free(n=2, shape=(3, 12, 20), seed=0).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match=r"start's images \[3, 8, 8\] must have the channels"):
        free(n=2, shape=(1, 16, 16), seed=0)
    with pytest.raises(ValueError, match=r"a start needs images \[C, H, W\]"):
        free(n=2, shape=(100,), seed=0)


@pytest.mark.parametrize(
    ("size", "start", "message"),
    [
        (16, "cifar10", "start must be a LangevinSampler or None, got 'cifar10'"),
        (8, 16, r"start's images \[3, 16, 16\] must have .* and at most its size"),
        (8, fl.LangevinSampler(abs), "start must have an energy with the attribute shape"),
        (16, {"step_size": torch.ones(3)}, "start must have one step_size for all chains"),
    ],
)
def test_a_start_that_does_not_fit_is_named(size: int, start: object, message: str) -> None:
    if isinstance(start, int):
        start = sampler(start)
    if isinstance(start, dict):
        start = fl.LangevinSampler(fl.ConvEnergy(3, 8, width=4), **start)
    with pytest.raises((TypeError, ValueError), match=message):
        sampler(size, start)  # type: ignore[arg-type]
