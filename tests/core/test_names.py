"""Mistyped names: what the error says, and that a keyword meant for the sampler never vanishes."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.names import check_name, did_you_mean, keywords_checked, nearest
from fastlangevin.presets.common import Summed

X0 = torch.zeros(2, 3)


def quadratic(x: Tensor) -> Tensor:
    return x.square().sum(1)


def swallows(x: Tensor, **kwargs: Any) -> Tensor:
    return quadratic(x)


def scaled(x: Tensor, sede: float = 1.0) -> Tensor:
    return sede * quadratic(x)


class Scaled(nn.Module):
    def forward(self, x: Tensor, sede: float = 1.0) -> Tensor:
        return scaled(x, sede)


class PassesOn(nn.Module):
    """A wrapper that passes on all keywords."""

    def __init__(self, inner: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x, **kwargs)


def closed_over(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, **kwargs: inner(x, **kwargs)


def sampler(energy: Callable[..., Tensor]) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, steps=2, step_size=0.1, noise_std=0.0, gradient="autograd")


@pytest.mark.parametrize(
    "energy", [swallows, PassesOn(quadratic), closed_over(swallows), quadratic]
)
@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sede", "seed"),
        ("Seed", "seed"),
        ("N", "n"),
        ("frist_chain", "first_chain"),
        ("first-step", "first_step"),
        ("diferentiable", "differentiable"),
        ("gradsteps", "grad_steps"),
        ("evry", "every"),
        ("stepsize", "step_size"),
    ],
)
def test_a_keyword_near_to_a_calls_own_is_an_error(
    energy: Callable[..., Tensor], method: str, name: str, meant: str
) -> None:
    with pytest.raises(TypeError, match=rf"is called {name}; did you mean {meant}\?"):
        getattr(sampler(energy), method)(X0, **{name: 1})


@pytest.mark.parametrize("energy", [swallows, quadratic])
def test_a_setting_in_a_call_is_an_error(energy: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"give it to LangevinSampler\(energy, steps=\.\.\.\)"):
        sampler(energy)(X0, steps=5)


def test_a_near_keyword_is_an_error_also_if_it_changes_from_step_to_step() -> None:
    with pytest.raises(TypeError, match=r"did you mean seed\?"):
        sampler(swallows)(X0, step_kwargs={"sede": [1, 2]})


@pytest.mark.parametrize(
    "energy",
    [
        scaled,
        Scaled(),
        PassesOn(Scaled()),
        PassesOn(scaled),
        Summed(scaled),
        Summed(PassesOn(Scaled())),
        closed_over(Scaled()),
        functools.partial(PassesOn(Scaled())),
        PassesOn(Scaled()).forward,
        torch.jit.script(Scaled()),
    ],
)
def test_an_energys_own_keyword_is_passed_on_whatever_it_resembles(
    energy: Callable[..., Tensor],
) -> None:
    x0 = torch.ones(2, 3)
    still, moved = (sampler(energy)(x0, sede=sede) for sede in (0.0, 1.0))
    assert torch.equal(still, x0)
    torch.testing.assert_close(moved, x0 * 0.8**2)


def test_a_keyword_unlike_any_other_reaches_an_energy_that_accepts_all() -> None:
    received = {}

    def energy(x: Tensor, **kwargs: Any) -> Tensor:
        received.update(kwargs)
        return quadratic(x)

    sampler(energy)(X0, y=1, labels=2, context=3, t=4, noise_level=5)
    assert received == {"y": 1, "labels": 2, "context": 3, "t": 4, "noise_level": 5}


def test_a_mistyped_keyword_of_the_energy_is_named() -> None:
    def energy(x: Tensor, label: Tensor | None = None) -> Tensor:
        return quadratic(x)

    with pytest.raises(TypeError, match=r"is called lable; did you mean label\?"):
        sampler(energy)(X0, lable=1)


E_ = fl.ConvEnergy(channels=1, size=8, width=2)
IMAGES = torch.zeros(1, 1, 8, 8)
MISTYPED: dict[str, tuple[Callable[[], Any], str]] = {
    "setting": (lambda: fl.LangevinSampler(E_, stepsize=1), "step_size"),
    "setting of a score": (lambda: fl.LangevinSampler.from_score(E_, nois_std=1), "noise_std"),
    "noise order": (lambda: fl.LangevinSampler(E_, noise_order="befor"), "before"),
    "backend": (lambda: fl.LangevinSampler(E_, backend="nativ"), "native"),
    "gradient": (lambda: fl.LangevinSampler(E_, gradient="autogard"), "autograd"),
    "precision": (lambda: fl.LangevinSampler(E_, precision="BF16"), "bf16"),
    "clip": (lambda: fl.LangevinSampler(E_, grad_clip=("chain_nrom", 1.0)), "chain_norm"),
    "energy": (lambda: fl.ConvEnergy(chanels=1), "channels"),
    "activation": (lambda: fl.ConvEnergy(activation="leakyrelu"), "leaky_relu"),
    "buffer": (lambda: fl.ReplayBuffer(4, (1,), seed=0, kind="resevoir"), "reservoir"),
    "checkpoint": (
        lambda: fl.LangevinSampler(E_, steps=1)(IMAGES, differentiable=True, checkpoint="stp"),
        "step",
    ),
    "grad_through": (
        lambda: fl.LangevinSampler(E_, steps=1)(IMAGES, differentiable=True, grad_through="exct"),
        "exact",
    ),
    "step": (
        lambda: fl.langevin_step_(X0, X0, stepsize=1, noise_std=0, seed=0, step=0),  # type: ignore
        "step_size",
    ),
    "name of the package": (lambda: fl.LangevinSamplr, "LangevinSampler"),  # type: ignore
    "name of learning": (lambda: fl.learn.load_image, "load_images"),  # type: ignore
    "name of a preset's": (lambda: fl.presets.short_runs, "short_run"),  # type: ignore
    "preset": (lambda: fl.presets.igebm(E_, samplestep=2), "sample_step"),
    "call of a preset": (lambda: fl.presets.igebm(E_)(IMAGES, sede=1), "seed"),
    "class of a preset": (lambda: fl.presets.ebmkit(stepsize=1), "step_size"),
    "model": (lambda: fl.load("digts"), "digits"),
    "change of a model": (lambda: fl.load("digits", step=5), "steps"),
    "data": (lambda: fl.learn.load_images("digit"), "digits"),
    "option of data": (lambda: fl.learn.load_images("digits", limt=3), "limit"),
    "on_corrupt": (lambda: fl.learn.load_images("digits", on_corrupt="skp"), "skip"),
    "config": (lambda: fl.learn.resolve("digit"), "digits"),
    "training setting": (lambda: fl.learn.resolve(overrides={"stps": 5}), "steps"),
    "reconstruct": (lambda: fl.learn.reconstruct(E_, IMAGES, optimiser="gd"), "optimizer"),
    "restore": (lambda: fl.learn.restore(E_, IMAGES, abs, methd="latent"), "method"),
    "transfer": (lambda: fl.learn.transfer(E_, IMAGES, styl=IMAGES), "style"),
    "interpolate": (lambda: fl.learn.interpolate(E_, IMAGES, IMAGES, nosie="off"), "noise"),
    "learner": (lambda: fl.learn.ShortRunLearner(E_, IMAGES, batchsize=1), "batch_size"),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_the_nearest_name_is_suggested(case: str) -> None:
    call, meant = MISTYPED[case]
    with pytest.raises(
        (AttributeError, TypeError, ValueError, OSError), match=rf"; did you mean {meant}\?$"
    ):
        call()


def test_nothing_is_suggested_for_a_name_that_resembles_none() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of a, bc, got 'xyz'$"):
        check_name("kind", "xyz", ("a", "bc"))
    with pytest.raises(ValueError, match=r"got \['a'\]$"):
        check_name("kind", ["a"], ("a", "bc"))
    with pytest.raises(TypeError, match=r"^f: no argument is called xyz; the arguments are a, b$"):
        keywords_checked(f)(1, xyz=2)


def f(a: int, *, b: int = 0) -> int:
    return a + b


def test_checked_functions_keep_their_signature_and_result() -> None:
    checked = keywords_checked(f)
    assert (checked.__name__, checked(1, b=2), checked(a=1)) == ("f", 3, 1)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        checked()  # type: ignore[call-arg]


def test_case_and_hyphens_make_no_difference() -> None:
    assert nearest("STEP-SIZE", ("step_size", "steps")) == "step_size"
    assert did_you_mean("steps", ("steps",)) == ""
    assert did_you_mean("s" * 10**6, ("steps",)) == ""


def test_names_are_checked_without_torch() -> None:
    code = "import sys, fastlangevin.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
