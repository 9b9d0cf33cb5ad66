"""Algorithm 1 against a plain torch loop, and the learner's promises."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner
from fastlangevin.learn.checkpoint import CheckpointError

B = 6
SHAPE = (1, 8, 8)


class Recorder:
    """A data set that remembers what it was asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.shape = images, tuple(images.shape[1:])
        self.indices: list[Tensor] = []
        self.flips: list[Tensor | None] = []

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        self.indices.append(indices)
        self.flips.append(flip)
        return self.images[indices]


class Linear(nn.Module):
    """U(x) = |x|^2 / 2 + <w, x>: the cheapest energy that learns."""

    def __init__(self, elements: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, x: Tensor) -> Tensor:
        return (x.square() / 2 + x * self.weight).flatten(1).sum(1)


class Negative(nn.Module):
    """f = -E."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return -self.energy(x)


class Normed(nn.Module):
    """An energy with BatchNorm, a frozen parameter and an output [n, 1, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 6)
        )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def images(n: int = 11) -> Tensor:
    return 2 * fl.noise.uniform((n, *SHAPE), seed=9, step=0) - 1


def net(**options: Any) -> fl.ConvEnergy:
    torch.manual_seed(1)
    return fl.ConvEnergy(1, 8, 4, **options)


def sampler(energy: nn.Module | None = None, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy or net(), **{"steps": 3} | options)


def learner(
    chain: fl.LangevinSampler | None = None, data: Any = None, **options: Any
) -> ShortRunLearner:
    defaults = {"batch_size": B, "lr": 1e-2, "data_noise": 0.1, "seed": 5}
    data = images() if data is None else data
    return ShortRunLearner(chain or sampler(), data, **defaults | options)


def tiny(**options: Any) -> ShortRunLearner:
    """A learner of :class:`Linear` on seven points."""
    chain = sampler(Linear(), steps=1, step_size=0.1)
    return learner(chain, torch.linspace(-1, 1, 28).view(7, 4), **options)


def weights(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def state(learning: ShortRunLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learning.tensors().items()}


def same_state(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(v, those[k]) for k, v in these.items())


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


# The algorithm -----------------------------------------------------------------------------------


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


# Functions of (seed, iteration) ------------------------------------------------------------------


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


# Data --------------------------------------------------------------------------------------------


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


# Weights -----------------------------------------------------------------------------------------


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


def test_betas_are_adams() -> None:
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


# Persistent chains -------------------------------------------------------------------------------


def test_chains_are_continued_and_written_back_to_their_slots() -> None:
    buffer = fl.ReplayBuffer(16, SHAPE, seed=2, reinit=0.3)
    learning = learner(buffer=buffer)
    for iteration in range(3):
        before = buffer.states.clone()
        slots, x0 = buffer.draw(B, iteration)
        want = learning.sampler(x0, seed=fl.noise.fold_in(5, iteration))
        learning.step()
        others = [slot for slot in range(16) if slot not in slots.tolist()]
        assert torch.equal(buffer.states[slots], want)
        assert torch.equal(buffer.states[others], before[others])


# State -------------------------------------------------------------------------------------------


def complete(energy: nn.Module | None = None) -> ShortRunLearner:
    buffer = fl.ReplayBuffer(8, SHAPE, seed=2, reinit=0.3)
    return learner(sampler(energy), ema=0.9, flip=True, buffer=buffer)


@pytest.mark.parametrize("iteration", [0, 1, 3])
@pytest.mark.parametrize("make", [net, Normed])
def test_tensors_and_the_iteration_are_the_whole_state(make: Any, iteration: int) -> None:
    learning = complete(make())
    for _ in range(iteration):
        learning.step()
    other = complete(make())
    other.step()
    other.load_tensors(state(learning), iteration)
    assert other.iteration == iteration
    assert same_state(state(other), state(learning))
    fresh = complete(make())
    fresh.load_tensors(state(learning), iteration)
    for _ in range(2):
        assert learning.step() == fresh.step()
    assert same_state(state(learning), state(fresh))


def test_loaded_tensors_are_copied() -> None:
    learning, other = complete(), complete()
    learning.step()
    held = learning.tensors()
    other.load_tensors(held, 1)
    before = state(learning)
    other.step()
    assert same_state(state(learning), before)


def test_an_energy_with_a_parameter_that_is_not_used_resumes() -> None:
    class Spare(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(2))

    learning, other = (learner(sampler(Spare(), steps=1), torch.zeros(3, 4)) for _ in range(2))
    learning.step()
    other.load_tensors(state(learning), 1)
    assert learning.step() == other.step()
    assert same_state(state(learning), state(other))


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("model.layers.0.weight", r"ConvEnergy\.layers\.0\.weight needs .* the file has nothing"),
        ("ema.layers.0.weight", r"ConvEnergy\.layers\.0\.weight needs .* the file has nothing"),
        ("ema_updates", "the checkpoint has no ema_updates"),
        ("buffer", "the checkpoint has no buffer"),
        ("adam.step.layers.0.bias", r"the checkpoint has no adam\.step\.layers\.0\.bias"),
    ],
)
def test_a_tensor_that_is_missing_is_named(lost: str, match: str) -> None:
    learning = complete()
    learning.step()
    held = state(learning)
    del held[lost]
    with pytest.raises(CheckpointError, match=match):
        complete().load_tensors(held, 1)


@pytest.mark.parametrize("capacity", [1, 6, 12])
def test_a_buffer_of_another_capacity(capacity: int) -> None:
    learning = complete()
    learning.step()
    held = state(learning) | {"buffer": torch.zeros(capacity, *SHAPE)}
    with pytest.raises(CheckpointError, match="buffer"):
        complete().load_tensors(held, 1)


# Errors ------------------------------------------------------------------------------------------


class Overflow(Linear):
    """Infinite where x passes 100, NaN where the weights are told so."""

    nan = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.where(x.amax(1) > 100, math.inf, 0.0) + self.nan


FAULTS = ["infinite on the data", "NaN everywhere", "chains run away"]


def faulty(fault: str, **options: Any) -> tuple[ShortRunLearner, dict[str, Tensor]]:
    """A learner whose second step goes wrong, and its state before that."""
    energy, data = Overflow(), torch.linspace(-1, 1, 28).view(7, 4)
    learning = learner(sampler(energy, steps=30), data, ema=0.9, **options)
    learning.step()
    before = state(learning)
    if fault == "infinite on the data":
        data.fill_(1000.0)
    elif fault == "NaN everywhere":
        energy.nan = math.nan
    else:
        learning.sampler.step_size = 1e6
    return learning, before


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_energies_that_are_not_finite_change_no_weight(fault: str, measure: bool) -> None:
    learning, before = faulty(fault)
    with pytest.raises(FloatingPointError, match="not finite"):
        learning.step(measure=measure)
    assert learning.iteration == 1
    assert same_state(state(learning), before)
    assert all(parameter.grad is None for parameter in learning.energy.parameters())


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_energies_that_are_not_finite_change_no_kept_chain(fault: str, measure: bool) -> None:
    """Else the step could not be taken again, with a smaller lr say, as if nothing had been."""
    learning, before = faulty(fault, buffer=fl.ReplayBuffer(8, (4,), seed=2))
    with pytest.raises(FloatingPointError, match="not finite"):
        learning.step(measure=measure)
    assert torch.equal(state(learning)["buffer"], before["buffer"])


ERRORS = [
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": -2}, ValueError, "batch_size must be at least 1, got -2"),
    ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
    ({"lr": -1e-4}, ValueError, "Invalid learning rate: -0.0001"),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"data_noise": -0.1}, ValueError, "data_noise must be >= 0, got -0.1"),
    ({"data_noise": math.nan}, ValueError, "data_noise must be >= 0, got nan"),
    ({"ema": 0.0}, ValueError, r"ema must be in \(0, 1\) or None, got 0.0"),
    ({"ema": 1}, ValueError, r"ema must be in \(0, 1\) or None, got 1"),
    ({"ema": math.nan}, ValueError, r"ema must be in \(0, 1\) or None, got nan"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\)"),
    ({"data": torch.zeros(0, *SHAPE)}, ValueError, "data is empty"),
    ({"data": Recorder(torch.zeros(0, *SHAPE))}, ValueError, "data is empty"),
    ({"data": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, TypeError, "data must be of floating"),
    (
        {"chain": fl.LangevinSampler(lambda x: x.flatten(1).sum(1))},
        TypeError,
        "sampler.energy must be an nn.Module, got function",
    ),
    (
        {"chain": fl.LangevinSampler(fl.GaussianEnergy())},
        ValueError,
        "sampler.energy has no parameter that requires grad",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "error", "match"), ERRORS, ids=[f"{next(iter(e[0]))}-{e[2]}" for e in ERRORS]
)
def test_wrong_arguments(wrong: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        learner(**wrong)


def test_images_that_do_not_fit_the_energy() -> None:
    match = r"data must have the energy's shape \[1, 8, 8\], got \[3, 8, 8\]"
    with pytest.raises(ValueError, match=match):
        learner(data=torch.zeros(3, 3, 8, 8))


@pytest.mark.parametrize("data", [np.zeros((3, 1, 8, 8)), [torch.zeros(1, 8, 8)]], ids=type)
def test_data_of_another_kind(data: Any) -> None:
    with pytest.raises(TypeError, match=r"data must be a tensor \[N, ...\], what load_images"):
        learner(data=data)


def test_data_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="data must be finite"):
        learner(data=torch.full((3, *SHAPE), math.nan))


def test_save_and_load(tmp_path: Path) -> None:
    """With step sizes per step, which are a tensor, an energy of one's own, and some words."""
    sizes = torch.rand(3, 1)

    def made() -> ShortRunLearner:
        chain = fl.LangevinSampler(Normed(), steps=3, step_size=sizes)
        return ShortRunLearner(chain, images(), batch_size=B, ema=0.9)

    learning, other = made(), made()
    learning.step()
    learning.save(tmp_path / "a.safetensors", note="mine")
    assert other.load(tmp_path / "a.safetensors")["note"] == "mine"
    assert other.step() == learning.step()
    assert same_state(state(other), state(learning))
    loaded = fl.load(tmp_path / "a.safetensors", energy=Normed())
    assert torch.equal(loaded.step_size, sizes)
    with pytest.raises(CheckpointError, match="trained on a custom energy: pass it as energy="):
        fl.load(tmp_path / "a.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 serves where CUDA is")
def test_a_precision_that_does_not_serve_here(tmp_path: Path) -> None:
    """A run from a GPU is sampled from on a CPU: with a warning, or as the user says."""
    path = tmp_path / "a.safetensors"
    learner(sampler(precision="fp16")).save(path)
    with pytest.warns(UserWarning, match='"fp16" needs a CUDA device.*; using None instead'):
        assert fl.load(path)(n=2, seed=0).isfinite().all()
    assert fl.load(path, precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match='precision "fp16" needs a CUDA device'):
        fl.load(path, precision="fp16")


def test_dropout_is_a_function_of_seed_and_iteration() -> None:
    results = []
    for number in range(2):
        torch.manual_seed(number)
        energy = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 1))
        nn.init.constant_(energy[2].weight, 0.1)
        nn.init.zeros_(energy[2].bias)
        before = torch.get_rng_state()
        chain = fl.LangevinSampler(energy, steps=2)
        results.append(ShortRunLearner(chain, torch.ones(5, 1, 8, 8), data_noise=0.0).step())
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert results[0].energy_data != pytest.approx(6.4, rel=1e-4)  # what it is without dropout


def test_a_batch_larger_than_the_buffer() -> None:
    learning = learner(buffer=fl.ReplayBuffer(B - 1, SHAPE, seed=0))
    with pytest.raises(ValueError, match=rf"n must be in 1\.\.capacity={B - 1}, got {B}"):
        learning.step()
