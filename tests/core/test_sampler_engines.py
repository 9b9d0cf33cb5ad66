"""The choice of a gradient engine, what diagnose and explain say of it, and precision."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.kernels import extension
from fastlangevin.step import backend_status, choose_backend
from tests.core.sampler_shared import (
    OPTIONS,
    SHAPE,
    X0,
    K,
    N,
    double_well,
    everything,
    last,
    make_mlp,
    make_net,
    numbers,
    plain_chain,
    sampler,
)

needs_extension = pytest.mark.skipif(extension.library is None, reason="the extension is not built")


@pytest.mark.parametrize(("every", "kept"), [(1, 6), (2, 3), (3, 2), (5, 2), (6, 1), (100, 1)])
def test_trajectory_returns_every_nth_state_of_the_chain(
    net: nn.Module, x0: Tensor, every: int, kept: int
) -> None:
    z = numbers((K, *SHAPE), seed=1)
    states = [x0, *(step["x"] for step in plain_chain(net, x0, z))]
    got = sampler(net).trajectory(x0, noise=z, every=every)
    assert got.shape == (kept, *SHAPE)
    assert torch.equal(got[0], x0)
    assert torch.allclose(got, torch.stack(states[::every]), atol=1e-12)
    assert (K % every != 0) or torch.equal(got[-1], sampler(net)(x0, noise=z))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_diagnose_measures_each_step_of_the_chain(
    net: nn.Module, x0: Tensor, options: dict
) -> None:
    z = numbers((K, *SHAPE), seed=1)
    steps = list(plain_chain(net, x0, z, **options))
    states = torch.stack([x0, *(step["x"] for step in steps)])
    lo, hi = options.get("clamp", (-1.0, 1.0))
    want = fl.Diagnostics(
        x=states[-1],
        energy=torch.stack([step["energy"] for step in steps]),
        grad_norm=torch.stack([step["grad"].flatten(1).norm(dim=1) for step in steps]),
        displacement=(states[1:] - states[:-1]).flatten(2).norm(dim=2),
        saturation=((states[1:] <= lo) | (states[1:] >= hi)).double().flatten(2).mean(2),
        accepted=torch.ones(K, N, dtype=torch.float64),
    )
    got = sampler(net, **options).diagnose(x0, noise=z)
    for name, value in want._asdict().items():
        assert torch.allclose(getattr(got, name), value, atol=1e-12), name
    assert want.saturation.max() > 0


def test_diagnose_reports_where_a_chain_is_lost() -> None:
    run = sampler(lambda x: x.pow(6).sum(1), steps=12, step_size=1.0, noise_std=0)
    stats = run.diagnose(torch.tensor([[0.1], [3.0]]), seed=0)
    lost = ~torch.isfinite(stats.displacement)
    assert not lost[:, 0].any()
    assert 0 < int(lost[:, 1].int().argmax()) < 11
    with pytest.raises(FloatingPointError, match="1 of 2 chains"):
        run(torch.tensor([[0.1], [3.0]]), seed=0)


def test_explain_says_what_runs() -> None:
    run = sampler(fl.GaussianEnergy(), noise_order="last", maximize=True, precision="bf16")
    text = run.explain(torch.zeros(4, 3, 32, 32))
    serving = choose_backend("auto", torch.device("cpu"))
    words = [f"{K} steps", "after the clamp", "ascending", "bf16", f"{serving} on cpu"]
    for word in [*words, "[4, 3, 32, 32]"]:
        assert word in text
    for name, reason in backend_status(torch.device("cpu")).items():
        assert reason is None or f"{name}: {reason}" in text
    assert "descending" in sampler(fl.GaussianEnergy()).explain()


def test_auto_takes_the_fastest_score_and_says_why_not_another(net: nn.Module, x0: Tensor) -> None:
    run = sampler(net)
    text = run.explain(x0)
    assert "gradient   explicit: " in text
    assert "not fused: " in text
    assert "autograd" in sampler(net, gradient="autograd").explain(x0)
    text = sampler(everything()).explain(x0)
    assert "gradient   autograd: " in text
    assert "not fused, explicit: BatchNorm2d '1' is in train mode" in text
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 'precision="bf16" needs no autocast' in run.explain(x0)


@needs_extension
def test_auto_takes_the_native_kernels_for_a_stack_of_convolutions() -> None:
    assert "gradient   fused" in sampler(fl.ConvEnergy(size=8, width=1)).explain()
    x0 = numbers((5, 3, 8, 8), torch.float32)
    text = sampler(fl.ConvEnergy(size=8, width=4)).explain(x0)
    # 3x3 on 64 pixels, 3 to 4 channels; 4x4 on 16, 4 to 8: a multiply-add is two, both ways.
    assert f"work       {5 * 4 * (64 * 27 * 4 + 16 * 64 * 8) / 1e9:.3g} GFLOP a step" in text
    # Of the weights alone, each layer is packed for the pass forward and for the one back.
    weights = 4 * (3 * 4 * 9 + 4 * 8 * 16)
    copies = re.search(r"the engine holds about (.+) MiB, (.+) MiB of them copies", text)
    assert copies is not None
    held, packed = (2**20 * float(number) for number in copies.groups())
    assert held > packed >= weights


@needs_extension
@pytest.mark.parametrize("is_faster", [True, False])
def test_the_processor_decides_in_which_precision_a_half_network_is_fused(
    is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement could decide otherwise in a resumed run or on another rank."""
    monkeypatch.setattr(extension, "bfloat16_is_faster", lambda: is_faster)
    net, x0 = make_net(nn.SiLU(), torch.float32), numbers(SHAPE, torch.float32)
    run = sampler(net, precision="bf16")
    named = {p: sampler(net, precision=p, gradient="fused")(x0, seed=0) for p in ("bf16", "fp32")}
    assert not torch.equal(named["bf16"], named["fp32"])
    assert torch.equal(run(x0, seed=0), named["bf16" if is_faster else "fp32"])
    text = run.explain(x0)
    assert "gradient   fused: " in text
    assert ("precision bf16, computed in fp32; " in text) is not is_faster
    assert ("not fused in bf16: this processor" in text) is not is_faster


@needs_extension
@pytest.mark.parametrize(
    ("noise_order", "given"),
    [("after", False), ("after", True), ("before", False), ("last", True)],
)
def test_fused_steps_are_steps_along_the_gradient(noise_order: str, given: bool) -> None:
    net = make_net(nn.SiLU(), torch.float32)
    x0 = numbers(SHAPE, torch.float32)
    ends = []
    for gradient in ("autograd", "fused"):
        run = sampler(
            net, gradient=gradient, noise_order=noise_order, steps=4, clamp=(-0.9, 0.9),
            grad_clip=("chain_norm", 1.0), step_size=[0.1, 0.2, 0.3, 0.4], noise_std=0.1,
        )  # fmt: skip
        noise = numbers((4, *SHAPE), torch.float32) if given else None
        ends.append(run.diagnose(x0, seed=3, first_step=7, first_chain=2, noise=noise))
        end = run(x0, seed=3, first_step=7, first_chain=2, noise=noise)
        assert torch.equal(end, ends[-1].x)
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_explain_checks_its_states(net: nn.Module) -> None:
    with pytest.raises(TypeError, match="x0 must be a tensor, got ndarray"):
        sampler(net).explain(np.zeros(SHAPE))
    with pytest.raises(TypeError, match="x0 must be of floating dtype"):
        sampler(net).explain(torch.zeros(SHAPE, dtype=torch.int64))


def test_a_recording_is_kept_until_the_energy_changes(x0: Tensor) -> None:
    net = make_net(nn.Tanh())
    run, general = sampler(net), sampler(net, gradient="autograd")
    for change in (
        lambda: net[0].weight.data.mul_(-2.0),
        lambda: net.__setitem__(1, nn.SiLU()),
        lambda: setattr(net[0], "weight", nn.Parameter(net[0].weight.data.flip(0))),
        lambda: net[0].register_forward_hook(lambda module, inputs, out: 2 * out),
        lambda: net[0]._forward_hooks.clear(),
    ):
        before = run(x0, seed=0)
        change()
        after = run(x0, seed=0)
        assert torch.allclose(after, general(x0, seed=0), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(after, before, atol=1e-3)


def drawn(x: Tensor) -> Tensor:
    return (x * torch.rand_like(x)).flatten(1).sum(1)


def item(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1) * x.mean().item()


@pytest.mark.parametrize(
    ("gradient", "energy", "match"),
    [
        ("explicit", drawn, 'gradient "explicit" cannot run: rand_like draws random numbers'),
        ("explicit", item, 'gradient "explicit" cannot run: it reads values through item'),
        ("fused", double_well, 'gradient "fused" cannot run: the energy is a function'),
        ("fused", nn.Sequential(nn.Flatten(), nn.Linear(30, 1)), "it has no activation"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*in train mode Dropout:UserWarning")
def test_a_score_that_cannot_run_says_why(gradient: str, energy: Callable, match: str) -> None:
    run = sampler(energy, gradient=gradient)
    for call in (
        lambda: run(X0, seed=0),
        lambda: run.trajectory(X0, seed=0),
        lambda: run.diagnose(X0, seed=0),
        lambda: run.explain(X0),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_train_mode_is_warned_of_once(x0: Tensor) -> None:
    run = sampler(everything(), step_size=0.01)
    with pytest.warns(UserWarning, match=r"BatchNorm2d '1' makes every chain.*and 1 more") as seen:
        run(x0, seed=0)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x0, seed=0)
        sampler(everything().eval(), step_size=0.01)(x0, seed=0)


@pytest.mark.parametrize("gradient", ["autograd", "explicit"])
def test_an_overflow_of_fp16_is_reported(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clamp would turn the infinite gradient into a state like any other."""
    monkeypatch.setattr("fastlangevin.calls.check_precision", lambda *_: None)
    net, x0 = make_net(nn.ReLU(), torch.float32), numbers(SHAPE, torch.float32)
    run = sampler(net, precision="fp16", clamp=(-1.0, 1.0), gradient=gradient)
    assert run(x0, seed=0).isfinite().all()
    net[3].weight.data.mul_(1e7)
    with pytest.raises(FloatingPointError, match='with precision="fp16" at step 0 the gradient'):
        run(x0, seed=0)


def test_a_sampler_can_be_copied(net: nn.Module, x0: Tensor) -> None:
    run = sampler(net)
    want = run(x0, seed=0)
    for again in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert torch.equal(again(x0, seed=0), want)


NETS = {"conv": lambda: make_net(nn.Tanh(), torch.float32), "linear": make_mlp}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_fp32_is_strict_inside_autocast(make: Callable, differentiable: bool) -> None:
    """In the forward and in the gradient, which runs inside the caller's region as well."""
    net, x0, options = make(), numbers(SHAPE, torch.float32), {"differentiable": differentiable}
    want = sampler(net)(x0, seed=0, **options)
    assert torch.equal(sampler(net, precision="fp32")(x0, seed=0, **options), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampler(net, precision="fp32")(x0, seed=0, **options), want)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_precision_none_follows_the_callers_flags_and_autocast(
    make: Callable[[], nn.Module],
) -> None:
    net, x0, z = make(), numbers(SHAPE, torch.float32), numbers((K, *SHAPE), torch.float32, 1)
    outside = sampler(net)(x0, noise=z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sampler(net)(x0, noise=z)
        want = last(plain_chain(net, x0, z))
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, want, atol=1e-6)
    assert not torch.allclose(outside, want, atol=1e-6)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_bf16_rounds_the_network_and_not_the_state(make: Callable[[], nn.Module]) -> None:
    net, x0 = make(), numbers(SHAPE, torch.float32)
    exact = sampler(net.double())(x0.double(), seed=0)
    net.float()
    seen = []
    net[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    error = {}
    for precision in ("fp32", "bf16"):
        got = sampler(net, precision=precision)(x0, seed=0)
        assert got.dtype == torch.float32
        error[precision] = float((got - exact).abs().max())
    assert set(seen[:K]) == {torch.float32}
    assert set(seen[K:]) == {torch.bfloat16}
    assert error["fp32"] < 1e-5 < error["bf16"] < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_leaves_the_callers_autocast_as_it_was(precision: str) -> None:
    net, x0 = make_mlp(), numbers(SHAPE, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        sampler(net, precision=precision)(x0, seed=0)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
    sampler(net, precision=precision)(x0, seed=0)
    assert not torch.is_autocast_enabled("cpu")
