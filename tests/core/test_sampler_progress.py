"""Callbacks and progress bars of long chains."""

import pytest
import torch
from torch import Tensor

import fastlangevin as fl

CONV = fl.ConvEnergy(channels=1, size=8, width=4)
X0 = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)


def well(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    ("gradient", "every", "steps"),
    [
        ("auto", 1, 5),
        ("autograd", 2, 5),
        ("auto", 2, 5),
        ("auto", 5, 5),
        ("auto", 9, 5),
        ("auto", 10, 701),
    ],
)
def test_a_callback_sees_the_states_of_the_trajectory(
    progress: bool, gradient: str, every: int, steps: int
) -> None:
    sampler = fl.LangevinSampler(CONV, steps=steps, gradient=gradient)
    seen: dict[int, Tensor] = {}
    x = sampler(
        X0, seed=1, callback=lambda step, x: seen.update({step: x.clone()}), callback_every=every,
        progress=progress,
    )  # fmt: skip
    assert list(seen) == sorted({*range(every, steps + 1, every), steps})
    assert torch.equal(x, sampler(X0, seed=1))
    assert torch.equal(x, seen[steps])
    states = sampler.trajectory(X0, seed=1)
    assert all(torch.equal(state, states[step]) for step, state in seen.items())


def test_a_callback_receives_the_state_in_the_energys_form() -> None:
    sampler = fl.LangevinSampler(lambda x: x["a"].square().sum(1) + x["b"].square(), steps=2)
    seen = []
    x0 = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    x = sampler(x0, seed=0, callback=lambda step, x: seen.append({k: x[k].clone() for k in x}))
    assert len(seen) == 2
    assert all(torch.equal(x[name], seen[-1][name]) for name in x0)


def test_a_callback_can_stop_a_chain_and_the_next_call_is_whole() -> None:
    sampler = fl.LangevinSampler(CONV, steps=4)
    want = sampler(X0, seed=1)

    def stop(step: int, x: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(X0, seed=1, callback=stop)
    assert torch.equal(sampler(X0, seed=1), want)


def test_the_bar_is_on_standard_error_of_a_terminal_only(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = fl.LangevinSampler(well, steps=6)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    quiet = sampler(X0, seed=1, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal
    assert torch.equal(sampler(X0, seed=1, progress=True), quiet)
    out, err = capsys.readouterr()
    assert (out, "6/6" in err) == ("", True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"callback": 5}, "callback must be a function of"),
        ({"callback": print, "callback_every": 0}, "callback_every must be at least 1, got 0"),
        ({"progress": True, "differentiable": True}, "not supported with differentiable=True"),
        ({"callback": print, "differentiable": True}, "not supported with differentiable=True"),
    ],
    ids=str,
)
def test_what_a_callback_cannot_do_is_refused(options: dict, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        fl.LangevinSampler(well, steps=2)(X0.clone().requires_grad_(), **options)


def test_other_methods_refuse_a_callback() -> None:
    with pytest.raises(TypeError, match="callback is an option of a call to the sampler"):
        fl.LangevinSampler(well, steps=2).trajectory(X0, callback=print)


def test_no_chains_have_no_steps_to_call_back_from() -> None:
    seen = []
    fl.LangevinSampler(well, steps=2)(X0[:0], callback=lambda step, x: seen.append(step))
    assert seen == []
