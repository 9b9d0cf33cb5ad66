"""Torch's default dtype and default device change nothing: the same bits as with none set."""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from benchmarks.theory_laws import Grid
from fastlangevin.learn import ShortRunLearner
from fastlangevin.learn.build import build_energy
from fastlangevin.learn.config import resolve
from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.diagnosis.correlations import correlations, temperature_of
from fastlangevin.learn.diagnosis.diagnose import reach
from fastlangevin.learn.evaluation import metrics
from fastlangevin.learn.tasks.measurements import Blur, make_operator

# A wide dtype shows in the dtypes of results, a narrow one in their bits. "meta" stands for a
# device that no call is about; torch's functions are intercepted only where a device is set.
DEFAULTS: list[tuple[torch.dtype, str | None]] = [(torch.float64, None), (torch.float16, "meta")]
GRADIENTS = ("autograd", "explicit", "fused")
SHAPE = (1, 8, 8)
N, K = 3, 4


def random(*shape: int) -> Tensor:
    return 2 * fl.noise.uniform(shape, seed=1, step=0) - 1


@functools.cache
def digits() -> Any:
    return load_images("digits", limit=8)


def weights() -> torch.nn.Module:
    config = resolve("digits", overrides={"width": 4, "device": "cpu"})
    return build_energy(config, digits())


@functools.cache
def energy() -> torch.nn.Module:
    return weights()


IMAGES = random(16, *SHAPE)
X0 = random(N, *SHAPE)
PER_CHAIN = torch.linspace(0.01, 0.1, N)


def assert_same(name: str, got: Any, want: Any) -> None:
    """Equal in kind, dtype, device and every bit; NaN is equal to NaN."""
    assert type(got) is type(want), name
    if isinstance(want, Tensor):
        assert (got.dtype, got.device) == (want.dtype, want.device), name
        ours, theirs = (value.detach().nan_to_num(7.0) for value in (got, want))
        assert torch.equal(ours, theirs), name
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), name
        for key, value in want.items():
            assert_same(f"{name}, {key}", got[key], value)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), name
        for ours, theirs in zip(got, want, strict=True):
            assert_same(name, ours, theirs)
    else:
        assert got == want, name


def sampler(gradient: str, **settings: Any) -> fl.LangevinSampler:
    """One that remembers nothing, of an energy that was made before."""
    return fl.LangevinSampler(copy.deepcopy(energy()), K, 0.1, 0.02, gradient=gradient, **settings)


def differentiate(gradient: str, checkpoint: str | int) -> list[Tensor]:
    s, x0 = sampler(gradient), X0.clone().requires_grad_()
    x = s(x0, seed=0, differentiable=True, checkpoint=checkpoint)
    wanted = [x0, *(p for p in s.energy.parameters() if p.ndim > 1)]
    return [x, *torch.autograd.grad(x.square().sum(), wanted)]


CALLS: dict[str, Callable[[str], Any]] = {
    "call": lambda s: sampler(s)(X0, seed=0),
    "from the prior": lambda s: sampler(s)(n=N, seed=0),
    "without a seed": lambda s: (torch.manual_seed(0), sampler(s)(X0))[1],
    "bf16": lambda s: sampler(s, precision="bf16")(X0, seed=0),
    "reference": lambda s: sampler(s, backend="reference")(X0, seed=0),
    "noise before": lambda s: sampler(s, noise_order="before", clamp=(-1, 1))(X0, seed=0),
    "norm clip": lambda s: sampler(s, grad_clip=("chain_norm", 0.1))(X0, seed=0),
    "metropolis": lambda s: sampler(s, metropolis=True, clamp=(-1, 1))(X0, seed=0),
    "trajectory": lambda s: sampler(s).trajectory(X0, seed=0, every=2),
    "diagnose": lambda s: tuple(sampler(s).diagnose(X0, seed=0)),
    "explain": lambda s: sampler(s).explain(X0),
    "unrolled": lambda s: differentiate(s, "none"),
    "checkpointed": lambda s: differentiate(s, 2),
}


def buffer(kind: str, dtype: torch.dtype) -> list[Any]:
    made = fl.ReplayBuffer(8, SHAPE, seed=0, kind=kind, dtype=dtype)
    slots, x = made.draw(N, 0)
    made.put(slots, x)
    return [*made.draw(N, 1), made.state_dict()]


def learn() -> list[Any]:
    """Two iterations, and what is saved after them and loaded again."""
    buffer = fl.ReplayBuffer(8, SHAPE, seed=0)
    learner = ShortRunLearner(
        sampler("auto"), IMAGES, batch_size=4, data_noise=0.1, flip=True, ema=0.9, buffer=buffer
    )
    measured = [learner.step(), learner.step(measure=True)]
    # Adam's count of steps follows torch's default dtype; it is read as a number alone.
    kept = {k: v.float() if ".step." in k else v for k, v in learner.tensors().items()}
    kept = {name: value.clone() for name, value in kept.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        learner.save(path)
        learner.load(path)
        loaded = fl.load(path)
    return [*measured, kept, learner.step(), loaded(X0, seed=0), loaded.energy.state_dict()]


def from_a_file() -> list[Any]:
    loaded = fl.load("digits")
    return [loaded.energy.state_dict(), loaded(n=2, seed=0)]


def annealed() -> Tensor:
    plan = fl.anneal.levels([1.0, 0.1], steps_each=2, step_lr=1e-3)
    made = fl.LangevinSampler.from_score(
        lambda x, sigma: -x * sigma, plan.steps, step_size=plan.step_size, noise_std=plan.noise_std
    )
    return made(X0, seed=0, step_kwargs={"sigma": plan.sigma})


def preset_chains() -> list[Any]:
    f = copy.deepcopy(energy())
    return [
        fl.presets.short_run(f, SHAPE, m=N)(K=K, seed=0),
        fl.presets.ula(f, steps=K, step_size=[0.1] * K, temperature=0.1)(X0, seed=0),
        fl.presets.torchebm(f, step_size=0.1).sample(x=X0, n_steps=K, seed=0),
    ]


def loop(x: Tensor, z: Tensor) -> Tensor:
    for noise in z:
        y = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy()(y).sum(), y)
        x = x - 0.1 * grad + 0.02 * noise
    return x


STEP = {"seed": 0, "step": 3, "noise_std": PER_CHAIN, "step_size": 0.1}
# In this order: the steps' own tensors, and what the rest of the package makes.
TASKS: dict[str, Callable[[], Any]] = {
    "normal": lambda: fl.noise.normal((3, 5), seed=1, step=2),
    "normal float64": lambda: fl.noise.normal((3, 5), seed=1, step=2, dtype=torch.float64),
    "uniform": lambda: fl.noise.uniform((3, 5), seed=1, step=2),
    "initial": lambda: fl.noise.initial((3, 5), seed=1),
    "words": lambda: fl.noise.words((3, 5), seed=1, step=2, stream=0),
    "step": lambda: fl.langevin_step_(X0.clone(), X0, **STEP),
    "step, odd strides": lambda: fl.langevin_step_(
        torch.as_strided(X0.clone(), (2, 3), (2, 3)), None, seed=0, step=0, step_size=0.0,
        noise_std=0.1,
    ),
    "reference": lambda: fl.langevin_step_(X0.clone(), X0, backend="reference", **STEP),
    "index": lambda: buffer("index", torch.float32),
    "fifo": lambda: buffer("fifo", torch.uint8),
    "reservoir": lambda: buffer("reservoir", torch.float32),
    "load": from_a_file,
    "weights": lambda: weights().state_dict(),
    "anneal": annealed,
    "float64": lambda: sampler("auto")(X0.double(), seed=0),
    "no x0": lambda: sampler("auto").explain(),
    "parts": lambda: fl.LangevinSampler(lambda p: p["a"].square().sum(1), K)(
        {"a": X0.flatten(1)}, seed=0
    ),
    "gaussian": lambda: fl.LangevinSampler(fl.energies.GaussianEnergy(2.0), K)(X0, seed=0),
    "presets": preset_chains,
    "reach": lambda: reach(sampler("auto"), IMAGES),
    "temperature": lambda: temperature_of(sampler("auto")),
    "correlations": lambda: correlations(*IMAGES[:, 0, :2].transpose(0, 1).flatten(1).tolist()),
    "grid": lambda: [Grid(-1, 1, 16).points, Grid(-1, 1, 16, atoms=True).volumes],
    "nearest": lambda: metrics.nearest(IMAGES.flatten(1), [X0.flatten(1)]),
    "operators": lambda: [
        make_operator("mask", SHAPE)(IMAGES), make_operator("downsample", SHAPE)(IMAGES),
        Blur(1.0)(IMAGES),
    ],
    "batches": lambda: digits().batch([1, 3]),
    "learn": learn,
}  # fmt: skip


JOBS = {
    f"{score}: {n}": functools.partial(f, score) for score in GRADIENTS for n, f in CALLS.items()
}
JOBS |= TASKS


@functools.cache
def unset(name: str) -> Any:
    """A job's results with neither default set."""
    return JOBS[name]()


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS, ids=str)
def test_defaults_change_nothing(dtype: torch.dtype, device: str | None) -> None:
    # float64 shows with any engine, so that one is enough; the other default runs them all.
    jobs = {n: run for n, run in JOBS.items() if device or not n.startswith(("autograd", "fused"))}
    wanted = {name: unset(name) for name in jobs}
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        results = {name: run() for name, run in jobs.items()}
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for name, want in wanted.items():
        assert_same(name, results[name], want)


def test_a_device_context_is_a_default_device() -> None:
    want = unset("fused: call")
    with torch.device("meta"):
        got = JOBS["fused: call"]()
    assert_same("call", got, want)
