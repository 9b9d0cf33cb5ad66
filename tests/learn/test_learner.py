"""Algorithm 1 against a plain torch loop, and the learner's promises."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner
from tests.learn.learner_shared import (
    SHAPE,
    B,
    Linear,
    Normed,
    Recorder,
    images,
    learner,
    net,
    same_state,
    sampler,
    state,
)


class Negative(nn.Module):
    """f = -E."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return -self.energy(x)


def tiny(**options: Any) -> ShortRunLearner:
    """A learner of :class:`Linear` on seven points."""
    chain = sampler(Linear(), steps=1, step_size=0.1)
    return learner(chain, torch.linspace(-1, 1, 28).view(7, 4), **options)


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def by_hand(energy: nn.Module, indices: list[Tensor], seed: int, steps: int) -> Iterator[dict]:
    """Algorithm 1 as a plain loop in torch, on the contract's noise."""
    adam = torch.optim.Adam(energy.parameters(), lr=1e-2, betas=(0.9, 0.999))
    for iteration, rows in enumerate(indices):
        data = images()[rows]
        data = data + 0.1 * fl.noise.normal(data.shape, seed=seed, step=iteration, stream=2)
        chain = fl.noise.fold_in(seed, iteration)
        x = 2 * fl.noise.uniform((B, *SHAPE), seed=chain, step=0, stream=1) - 1
        for k in range(steps):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
            x = x + (-1.0 * grad + 0.01 * fl.noise.normal(x.shape, seed=chain, step=k, stream=0))
        data_energy, sample_energy = energy(data).mean(), energy(x).mean()
        adam.zero_grad()
        (data_energy - sample_energy).backward()
        adam.step()
        outside = (x.abs() >= 1).double().mean().item()
        yield {"data": data_energy.item(), "samples": sample_energy.item(), "saturation": outside}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("iterations", [1, 4])
def test_weights_equal_those_of_a_plain_loop(iterations: int, maximize: bool) -> None:
    energy, data = net(), Recorder(images())
    # Bit for bit takes the loop's own order of operations: autograd's.
    options = {"maximize": maximize, "gradient": "autograd"}
    chain = sampler(Negative(energy) if maximize else energy, **options)
    plain = copy.deepcopy(energy)
    learning = learner(chain, data)
    metrics = [learning.step() for _ in range(iterations)]
    records = list(by_hand(plain, data.indices, seed=5, steps=3))
    assert equal(weights(energy), weights(plain))
    assert not equal(weights(energy), weights(net()))
    sign = -1 if maximize else 1
    for i, (got, want) in enumerate(zip(metrics, records, strict=True)):
        assert got.iteration == i + 1
        assert got.energy_data == sign * want["data"]
        assert got.energy_samples == sign * want["samples"]
        assert got.gap == pytest.approx(got.energy_data - got.energy_samples, abs=1e-6)
        assert got.saturation == pytest.approx(want["saturation"], abs=1e-6)


def test_ascending_f_learns_the_same_as_descending_its_negative() -> None:
    energies = net(), net()
    down = learner(sampler(energies[0], clamp=(-1, 1)), ema=0.9)
    up = learner(sampler(Negative(energies[1]), clamp=(-1, 1), maximize=True), ema=0.9)
    for _ in range(3):
        assert down.step().gap == -up.step().gap
    assert equal(weights(energies[0]), weights(energies[1]))
    assert equal(weights(down.model), weights(up.model))


def test_samples_are_held_constant() -> None:
    """For U = x^2 / 2 + <w, x>, d gap / d w = mean(data) - mean(samples), nothing more."""
    chain = sampler(Linear(), steps=2, step_size=0.1)
    learning = learner(chain, torch.zeros(5, 4), data_noise=0.0)
    x0 = 2 * fl.noise.uniform((B, 4), seed=fl.noise.fold_in(5, 0), step=0) - 1
    samples = chain(x0, seed=fl.noise.fold_in(5, 0))
    learning.step()
    first_moment = learning.tensors()["adam.exp_avg.weight"]
    torch.testing.assert_close(first_moment, 0.1 * -samples.mean(0))


def test_two_learners_agree_and_torchs_generator_is_not_asked() -> None:
    first, second = learner(ema=0.5), learner(ema=0.5)
    got = []
    for learning, seed in ((first, 0), (second, 1)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        got.append([learning.step() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), before)
    assert got[0] == got[1]
    assert same_state(state(first), state(second))
    other = learner(seed=6, ema=0.5)
    assert other.step() != got[0][0]


@pytest.mark.parametrize("buffered", [False, True])
def test_measuring_changes_no_number(buffered: bool) -> None:
    runs = []
    for measure in (False, True):
        buffer = fl.ReplayBuffer(8, SHAPE, seed=2) if buffered else None
        learning = learner(sampler(clamp=(-1, 1)), buffer=buffer)
        runs.append((learning, [learning.step(measure=measure) for _ in range(3)]))
    (plain, without), (measured, found) = runs
    assert same_state(state(plain), state(measured))
    assert [m._replace(grad_norm=None, displacement=None) for m in found] == without


def test_what_is_measured_is_what_the_sampler_diagnoses() -> None:
    learning = learner()
    twin = sampler(copy.deepcopy(learning.energy))
    seed = fl.noise.fold_in(5, 0)
    x0 = 2 * fl.noise.uniform((B, *SHAPE), seed=seed, step=0) - 1
    want, got = twin.diagnose(x0, seed=seed), learning.step(measure=True)
    assert got.grad_norm == want.grad_norm.mean().item()
    assert got.displacement == want.displacement.mean().item()
    assert got.saturation == pytest.approx(want.saturation[-1].mean().item(), abs=1e-6)
    unmeasured = learning.step()
    assert (unmeasured.grad_norm, unmeasured.displacement) == (None, None)


def test_saturation_counts_from_the_clamp_inwards() -> None:
    """With a clamp of +-0.25 on U(-1, 1) three quarters lie on it: N = 6 x 64, |z| <= 5."""
    chain = sampler(steps=1, step_size=0.0, noise_std=0.0, clamp=(-0.25, 0.25))
    found = learner(chain).step().saturation
    assert abs(found - 0.75) / math.sqrt(0.75 * 0.25 / (B * 64)) <= 5


def test_a_step_may_be_taken_at_any_iteration() -> None:
    """Batch and noise depend on the iteration, not on the steps taken so far."""
    data, late = Recorder(images()), Recorder(images())
    walked, jumped = learner(data=data), learner(data=late)
    for _ in range(3):
        walked.step()
    jumped.load_tensors(state(walked), 3)
    assert walked.step() == jumped.step()
    assert torch.equal(data.indices[3], late.indices[0])
    assert same_state(state(walked), state(jumped))
    assert not torch.equal(data.indices[3], data.indices[2])


@pytest.mark.parametrize("n", [1, 3, 64, 101])
def test_every_image_is_drawn_equally_often(n: int) -> None:
    """N = 10 x 2,000 draws of n images: each count is binomial(N, 1 / n), |z| <= 5."""
    data = Recorder(torch.zeros(n, 4))
    learning = learner(sampler(Linear(), steps=1), data, batch_size=2000)
    for _ in range(10):
        learning.step()
    draws = torch.cat(data.indices)
    counts, p = torch.bincount(draws, minlength=n).double(), 1 / n
    assert counts.shape == (n,)
    assert ((counts - 20_000 * p).abs() <= 5 * math.sqrt(20_000 * p * (1 - p))).all()
    assert data.flips == [None] * 10


def test_half_of_the_images_are_flipped_independently_of_which() -> None:
    """N = 10 x 2,000 coins, over all images and for each of 5: |z| <= 5."""
    data = Recorder(torch.zeros(5, 4))
    learning = learner(sampler(Linear(), steps=1), data, batch_size=2000, flip=True)
    for _ in range(10):
        learning.step()
    flips, rows = torch.cat([flip for flip in data.flips if flip is not None]), data.indices
    assert flips.dtype == torch.bool
    for coins in (flips, *(flips[torch.cat(rows) == i] for i in range(5))):
        assert abs(coins.double().sum().item() - len(coins) / 2) <= 5 * math.sqrt(len(coins)) / 2


def test_a_flip_mirrors_a_tensors_last_dimension() -> None:
    """One image: the batch mean is c mirrored + (1 - c) plain, c the fraction of flips."""
    image = images(1)

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.detach().clone())
            return (x * x.detach()).flatten(1).sum(1) + self.weight

    probe = Probe()
    learner(sampler(probe, steps=1), image, data_noise=0.0, flip=True, batch_size=40).step()
    rows = probe.seen[1]
    mirrored = (rows == image.flip(-1)).flatten(1).all(1)
    plain = (rows == image).flatten(1).all(1)
    assert bool((mirrored ^ plain).all())
    assert 0 < mirrored.sum() < 40  # both occur, but for 1 in 2^39


def test_data_noise_is_normal_of_the_stated_size() -> None:
    """U = w |x|^2 on zeros: the energy of the data is sigma^2 per element, N = 40,000, |z| <= 5."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x.square().flatten(1).mean(1)

    chain = sampler(Square(), steps=1)
    learning = learner(chain, torch.zeros(3, 40), batch_size=1000, data_noise=0.3, lr=0.0)
    assert abs(learning.step().energy_data / 0.09 - 1) <= 5 * math.sqrt(2 / 40_000)
    learning.data_noise = 0.6
    assert abs(learning.step().energy_data / 0.36 - 1) <= 5 * math.sqrt(2 / 40_000)
    learning.data_noise = 0.0
    assert learning.step().energy_data == 0.0


def test_a_tensor_and_a_data_set_of_the_same_images_are_the_same() -> None:
    first, second = learner(data=images()), learner(data=Recorder(images()))
    assert first.step() == second.step()
    assert same_state(state(first), state(second))


def test_the_callers_images_are_left_alone() -> None:
    data = images()
    before = data.clone()
    learner(data=data, flip=True).step()
    assert torch.equal(data, before)


def test_lr_may_be_set_between_steps() -> None:
    learning, twin = tiny(lr=1e-2), tiny(lr=1e-3)
    learning.lr = 1e-3
    assert learning.lr == 1e-3
    learning.step()
    twin.step()
    assert same_state(state(learning), state(twin))
    before = weights(learning.energy)
    learning.lr = 0.0
    learning.step()
    assert equal(weights(learning.energy), before)


def test_betas_are_passed_to_adam() -> None:
    """The first moment after one step is (1 - beta1) g, the second (1 - beta2) g^2."""
    learning = tiny(betas=(0.5, 0.75))
    learning.step()
    found = learning.tensors()
    gradient = found["adam.exp_avg.weight"] / 0.5
    torch.testing.assert_close(found["adam.exp_avg_sq.weight"], 0.25 * gradient.square())


def test_ema_is_the_average_of_the_weights() -> None:
    """After the first step the weights themselves; then average <- d average + (1 - d) weights."""
    learning, want = learner(ema=0.9), None
    for _ in range(5):
        learning.step()
        now = [value.double() for value in weights(learning.energy)]
        pairs = zip(want or now, now, strict=True)
        want = [0.9 * average + 0.1 * value for average, value in pairs]
        for got, average in zip(weights(learning.model), want, strict=True):
            torch.testing.assert_close(got.double(), average, rtol=1e-6, atol=1e-7)
    assert learning.model is not learning.energy
    assert not equal(weights(learning.model), weights(learning.energy))


def test_an_average_does_not_change_what_is_learned() -> None:
    plain, averaged = learner(), learner(ema=0.9)
    assert [plain.step() for _ in range(3)] == [averaged.step() for _ in range(3)]
    assert equal(weights(plain.energy), weights(averaged.energy))
    assert plain.model is plain.energy


def test_no_gradient_stays_behind() -> None:
    learning = learner()
    for parameter in learning.energy.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    twin = learner()
    twin.step()
    learning.step()
    assert same_state(state(learning), state(twin))
    assert all(parameter.grad is None for parameter in learning.energy.parameters())


def test_chains_leave_batchnorm_and_flags_alone() -> None:
    """In train mode an iteration moves the statistics twice: once by data, once by samples."""
    energy = Normed()
    plain, data = copy.deepcopy(energy), Recorder(images())
    chain = sampler(energy, steps=4)
    flags = [parameter.requires_grad for parameter in energy.parameters()]
    learner(chain, data, data_noise=0.0).step()

    seed = fl.noise.fold_in(5, 0)
    x0 = 2 * fl.noise.uniform((B, *SHAPE), seed=seed, step=0) - 1
    samples = sampler(plain, steps=4)(x0, seed=seed)
    plain(images()[data.indices[0]])
    plain(samples)
    statistics = {name: value for name, value in plain.named_buffers()}
    for name, value in energy.named_buffers():
        assert torch.equal(value, statistics[name]), name
    assert statistics["layers.1.num_batches_tracked"] == 2
    assert [parameter.requires_grad for parameter in energy.parameters()] == flags
    assert torch.equal(energy.layers[0].bias, plain.layers[0].bias)
    assert not torch.equal(energy.layers[0].weight, plain.layers[0].weight)
    assert energy.training
