"""fl.testing.compare: finds equal chains equal, other ones other, and leaves all as it was."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K, SHAPE = 3, 4, (1, 8, 8)


@pytest.fixture
def energy() -> nn.Module:
    torch.manual_seed(0)
    net = fl.ConvEnergy(1, 8, 4)
    for p in net.parameters():
        p.data *= 2  # gradients of the noise's size
    return net


@pytest.fixture
def x0() -> Tensor:
    return torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loop(
    energy: Callable[..., Tensor],
    x0: Tensor,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
    sign: float = -1.0,
    std: float = 0.01,
    steps: int = K,
) -> Tensor:
    x = x0.clone().requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(energy(x).sum(), [x])
        x.data += sign * g + std * draw(x)
    return x.detach()


def sampler(energy: Callable[..., Tensor], **settings: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(
        energy, **{"steps": K, "step_size": 1.0, "noise_std": 0.01} | settings
    )


compare = functools.partial(fl.testing.compare, rounds=1)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_equal_loops_are_found_equal(
    energy: nn.Module, x0: Tensor, dtype: torch.dtype | None
) -> None:
    report = compare(functools.partial(loop, energy), sampler(energy), x0, dtype=dtype)
    assert report.same
    assert report.dtype == (dtype or torch.float32)
    assert (report.draws, report.gradients, report.steps) == (K, K, K)
    assert len(report.differences) == K + 1
    assert report.differences[0] == 0
    assert max(report.differences) < (1e-4 if dtype is None else 1e-12)
    assert report.notes == ()
    assert min(report.seconds) > 0
    assert report.peak_bytes[0] > x0.numel() * 4
    for part in ("the same chain", "start 0.0e+00", "step 1", "time", "memory", "x as fast"):
        assert part in str(report)


DRAWS = {
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "randn, unpacked": lambda x: torch.randn(*x.shape, dtype=x.dtype),
    "normal, keywords": lambda x: torch.normal(mean=0.0, std=1.0, size=x.shape),
    "normal, tensors": lambda x: torch.normal(torch.zeros_like(x), 1.0),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "normal_, shifted": lambda x: (torch.empty_like(x).normal_(3.0, std=2.0) - 3) / 2,
    "init": lambda x: nn.init.normal_(torch.empty_like(x)),
    "distributions": lambda x: torch.distributions.Normal(torch.zeros_like(x), 1.0).sample(),
    "beside others": lambda x: 0 * torch.randn(5)[0] + torch.randn_like(x) + 0 * torch.rand(1),
}  # fmt: skip


def test_every_way_to_draw_a_normal(energy: nn.Module, x0: Tensor) -> None:
    """Each at a step of its own, which the report names if it is not seen."""

    def original(x: Tensor) -> Tensor:
        ways = iter(DRAWS.values())
        return loop(energy, x, draw=lambda x: next(ways)(x), steps=len(DRAWS))

    report = compare(original, sampler(energy, steps=len(DRAWS)), x0)
    assert report.same, report
    assert report.draws == len(DRAWS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"maximize": True}, "of the loop is -1 gradient +0.01 noise[0], of the sampler +1 grad"),
        ({"step_size": 1.01}, "of the sampler -1.01 gradient"),
        ({"noise_std": 0.0101}, "of the sampler -1 gradient +0.0101 noise[0]"),
        ({"noise_order": "before"}, "noise_order"),
        ({"clamp": (-0.5, 0.5)}, "clipped or clamped"),
    ],
)
def test_another_chain_is_found_at_its_first_step(
    energy: nn.Module, x0: Tensor, settings: dict[str, Any], says: str
) -> None:
    report = compare(functools.partial(loop, energy), sampler(energy, **settings), x0)
    assert not report.same
    assert says in report.verdict, report
    beyond = [d > t for d, t in zip(report.differences, report.tolerances, strict=True)]
    assert beyond.index(True) == (0 if "noise_order" in settings else 1)


def test_a_schedule_that_parts_later(energy: nn.Module, x0: Tensor) -> None:
    stds = [0.01, 0.01, 0.02, 0.01]
    report = compare(functools.partial(loop, energy), sampler(energy, noise_std=stds), x0)
    assert not report.same
    assert "after step 3" in report.verdict
    assert "step 3 of the loop is -1 gradient +0.01 noise[2], of the sampler" in report.verdict


def quadratic(x: Tensor, curve: float) -> Tensor:
    return 0.5 * curve * x.square().flatten(1).sum(1)


def schedule(energy: Callable[..., Tensor], x: Tensor, stds: list[float], a: float) -> Tensor:
    for std in stds:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(x).sum(), x)
        x = x - a * g + std * torch.randn_like(x)
    return x.detach()


LONG = 12
# Long chains against loops that are slightly others: (curve, loop's noise, a, sampler's settings).
OTHERS = {
    "no noise at the last step": (1.0, [0.005] * (LONG - 1) + [0.0], 0.1, {"noise_std": 0.005}),
    "noise of half the steps": (1.0, [0.001] * 6 + [0.0] * 6, 0.1, {"noise_std": 0.001}),
    "no noise where chains run away": (-1.0, [0.0] * LONG, 0.1, {"noise_std": 0.002}),
    "the wrong sign of a small step": (0.03, [0.0] * LONG, -1e-4, {"noise_std": 0.0}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_long_chain_that_is_slightly_another(x0: Tensor, case: str) -> None:
    curve, stds, a, settings = OTHERS[case]
    energy = functools.partial(quadratic, curve=curve)
    ours = sampler(energy, steps=LONG, step_size=abs(a), **settings)
    report = compare(lambda x: schedule(energy, x, stds, a), ours, x0)
    assert not report.same, report
    right = [settings["noise_std"]] * LONG
    report = compare(lambda x: schedule(energy, x, right, abs(a)), ours, x0)
    assert report.same, report


@pytest.mark.parametrize("step_size", [1.0, 30.0])
def test_a_right_chain_in_which_rounding_grows(step_size: float, x0: Tensor) -> None:
    """With kinks and steps of 30 the runs part altogether; step by step they are the same."""
    torch.manual_seed(0)
    energy = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(256, 1),
    )  # fmt: skip
    for p in energy.parameters():
        p.data *= 3
    original = functools.partial(schedule, energy, stds=[0.01] * 14, a=step_size)
    report = compare(original, sampler(energy, steps=14, step_size=step_size), x0)
    assert report.same, report
    if step_size > 1:
        assert report.apart[-1] > 0.1
    stds = [0.01] * 7 + [0.011] + [0.01] * 6
    ours = sampler(energy, steps=14, step_size=step_size, noise_std=stds)
    report = compare(original, ours, x0)
    assert not report.same
    assert "step 8 of the loop" in report.verdict


def test_only_ends_are_held_to_what_rounding_makes_of_them(x0: Tensor) -> None:
    """A loop whose gradient is written by hand has no states to be read but its last."""

    def original(x: Tensor, last: float = 0.005) -> Tensor:
        for k in range(LONG):
            x = x - 0.1 * x + (0.005 if k < LONG - 1 else last) * torch.randn_like(x)
        return x

    ours = sampler(
        functools.partial(quadratic, curve=1.0), steps=LONG, step_size=0.1, noise_std=0.005
    )
    report = compare(original, ours, x0)
    assert report.same
    assert "only the ends were compared" in report.notes
    assert not compare(functools.partial(original, last=0.0), ours, x0).same


def test_what_a_function_does_after_its_chain_counts(energy: nn.Module, x0: Tensor) -> None:
    run = sampler(energy)

    def function(x: Tensor, noise: Tensor | None) -> Tensor:
        return run(x, noise=noise) / 2

    assert compare(lambda x: loop(energy, x) / 2, function, x0, steps=K).same
    assert not compare(functools.partial(loop, energy), function, x0, steps=K).same


@pytest.mark.filterwarnings("ignore:LangevinSampler. in train mode")
@pytest.mark.parametrize("in_eval", [True, False])
def test_train_mode_is_said_first(x0: Tensor, in_eval: bool) -> None:
    """The loop of JEM's sample_q sets eval mode itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))

    def original(x: Tensor) -> Tensor:
        net.train(not in_eval)
        return loop(net, x)

    report = compare(original, sampler(net), x0)
    text = "in train mode BatchNorm2d '1' makes every chain depend on the others"
    assert report.same != in_eval
    assert (report.verdict if in_eval else report.notes[0]).startswith(text)
    assert "energy.eval()" in str(report)


def test_noise_drawn_for_all_steps_at_once(energy: nn.Module, x0: Tensor) -> None:
    def original(x: Tensor) -> Tensor:
        z = iter(0.5 * torch.randn(K, *x.shape))
        return loop(energy, x, draw=lambda _: next(z), std=0.02)

    report = compare(original, sampler(energy), x0)
    assert report.same, report
    assert report.draws == K


def test_noise_that_is_not_seen_is_said_first(energy: nn.Module, x0: Tensor) -> None:
    original = functools.partial(loop, energy, draw=lambda x: torch.randn(x.numel()).view_as(x))
    report = compare(original, sampler(energy), x0)
    assert not report.same
    assert report.verdict.startswith("no draws of x0's shape were seen")


@pytest.mark.parametrize("steps", [K - 1, K + 1])
def test_another_number_of_steps(energy: nn.Module, x0: Tensor, steps: int) -> None:
    report = compare(functools.partial(loop, energy, steps=steps), sampler(energy), x0)
    assert not report.same
    assert report.draws == steps
    assert f"drew normals of x0's shape {steps} times" in str(report) or "were not replaced" in str(
        report
    )
    assert f"the loop took {steps} gradients by autograd in {K} steps" in report.notes


def test_draws_before_the_loop_are_its_own(energy: nn.Module, x0: Tensor) -> None:
    """A tensor made with randn, then filled anew at every step; the loop's backward; a tuple."""

    def original(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape)
        x.requires_grad_()
        for _ in range(K):
            noise.normal_(0, 0.005)
            x.data.add_(noise)
            energy(x).sum().backward()
            x.data.add_(x.grad.clamp_(-0.01, 0.01), alpha=-10)
            x.grad.zero_()
            x.data.clamp_(0, 1)
        return torch.zeros(3), x

    sample = fl.presets.igebm(energy, sample_step=K)
    report = compare(original, lambda x, noise: sample(x, noise=noise), x0, steps=K)
    assert report.same, report
    assert report.draws == K + 1
    assert report.gradients == K
    assert len(report.differences) == K + 1
    assert "were not replaced" in str(report)
    assert all(p.grad is not None for p in energy.parameters())  # its own doing: not told of


def test_a_loop_without_noise(energy: nn.Module, x0: Tensor) -> None:
    descend = functools.partial(loop, energy, draw=torch.zeros_like)
    report = compare(descend, sampler(energy, noise_std=0.0), x0)
    assert report.same
    assert report.draws == 0


def test_labels_go_to_the_sampler(x0: Tensor) -> None:
    def well(x: Tensor, y: Tensor) -> Tensor:
        return (y.view(-1, 1, 1, 1) * x.square()).flatten(1).sum(1)

    y = torch.tensor([0.1, 0.2, 0.3])
    original = functools.partial(loop, lambda x: well(x, y))
    assert compare(original, sampler(well), x0, y=y).same
    assert not compare(original, sampler(well), x0, y=y + 0.1).same


def test_a_loop_with_an_inner_loop(energy: nn.Module, x0: Tensor) -> None:
    """More gradients than steps: the k-th are not the same step's, and the ends tell."""

    def original(x: Tensor, scale: float = 1.0) -> Tensor:
        for _ in range(K):
            x.requires_grad_()
            torch.autograd.grad(energy(x + 1).sum(), [x])
            x = loop(energy, x.detach(), steps=1) * scale
        return x

    report = compare(original, sampler(energy), x0)
    assert report.same
    assert len(report.differences) == 1
    assert "only the ends" in str(report)
    assert not compare(functools.partial(original, scale=0.99), sampler(energy), x0).same


def test_a_loop_that_changes_its_x0_in_place(energy: nn.Module, x0: Tensor) -> None:
    def original(x: Tensor) -> None:
        x.copy_(loop(energy, x))

    assert compare(original, sampler(energy), x0).same


def test_chains_that_are_not_finite_are_not_equal(x0: Tensor) -> None:
    def lost(x: Tensor) -> Tensor:
        return loop(lambda x: x.square().flatten(1).sum(1), x) + torch.nan

    assert not compare(lost, sampler(lambda x: x.square().flatten(1).sum(1)), x0).same


def test_compare_changes_nothing_outside(energy: nn.Module, x0: Tensor) -> None:
    """Also by a loop that thaws, leaves train mode, fills .grads and draws."""
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 1))
    net[2].weight.requires_grad_(False)
    net[2].bias.grad = torch.ones(1)
    net.eval()
    parameters = [(p, p.data_ptr(), p.clone(), p.requires_grad, p.grad) for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    start, rng = x0.clone(), torch.get_rng_state()

    def original(x: Tensor) -> Tensor:
        out = loop(net, x)
        for p in net.parameters():
            p.requires_grad_()
        net.train()
        net(torch.randn(9, 1, 8, 8, dtype=x.dtype)).sum().backward()
        return out

    report = compare(original, sampler(net), x0, dtype=torch.float64)
    assert report.differences[-1] < 1e-12
    for p, place, value, requires_grad, grad in parameters:
        assert (p.data_ptr(), p.requires_grad, p.dtype) == (place, requires_grad, torch.float32)
        assert torch.equal(p, value)
        assert p.grad is grad
    assert torch.equal(net[2].bias.grad, torch.ones(1))
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    assert not any(m.training for m in net.modules())
    assert torch.equal(x0, start)
    assert not x0.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert report.gradients == K


def test_a_preset_of_several_chains(x0: Tensor) -> None:
    """improved_cd is a chain of K - 1 steps, one of 1, and a differentiable one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return (self.scale * x.sin()).flatten(1).sum(1)

    net = Net()

    def original(x: Tensor) -> Tensor:
        for _ in range(K):
            x = (x + 0.001 * torch.randn_like(x)).detach().requires_grad_()
            (g,) = torch.autograd.grad(net(x).sum(), x)
            x = (x - 0.1 * g).detach().clamp(0, 1)
        return x

    flags = SimpleNamespace(step_lr=0.1, anneal=False, dataset="mnist")
    gen_image = fl.presets.improved_cd()
    report = compare(
        original,
        lambda x, noise: gen_image(None, flags, net, x, K, noise=noise),
        x0,
        steps=K,
        energy=net,
        dtype=torch.float64,
    )
    assert report.same, report
    assert len(report.differences) == K + 1
    assert max(report.differences) < 1e-12


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "x0 must be", {"x0": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "steps must be the sampler's 4, got 5", {"steps": 5}),
        (TypeError, "give steps", {"sampler": lambda x, noise: x}),
        (TypeError, "must be callable", {"sampler": 3}),
        (
            ValueError,
            "energy=",
            {"sampler": lambda x, noise: x, "steps": 2, "dtype": torch.float64},
        ),
        (ValueError, r"must return states of shape \[3, 1, 8, 8\]", {"original": lambda x: 1}),
        (ValueError, "rounds", {"rounds": 0}),
    ],
)
def test_compare_names_wrong_input(
    energy: nn.Module, x0: Tensor, error: type, match: str, options: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"original": functools.partial(loop, energy), "x0": x0}
    given = given | {"sampler": sampler(energy)} | options
    with pytest.raises(error, match=match):
        fl.testing.compare(**given)


class PowerIteration(nn.Module):
    """Spectral norm as many write it: its vector moves at every forward, in eval mode too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(64, 8), how
        self.head = nn.Linear(8, 1)
        self.register_buffer("u", nn.functional.normalize(torch.ones(8), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        with torch.no_grad():
            v = nn.functional.normalize(w.t() @ self.u, dim=0)
            u = nn.functional.normalize(w @ v, dim=0)
            if self.how == "data":
                self.u.data = u
            elif self.how == "in place":
                self.u.copy_(u)
            else:
                self.u = u
        w = w / (u @ w @ v)
        return self.head(torch.tanh(5 * nn.functional.linear(x.flatten(1), w)))


@pytest.mark.parametrize(
    ("how", "std"), [("in place", 0.01), ("data", 0.01), ("assigned", 0.01), ("in place", 0.02)]
)
def test_buffers_that_move_in_eval_mode(x0: Tensor, how: str, std: float) -> None:
    """Both runs begin with the same, every step with the loop's, and they are put back."""
    torch.manual_seed(0)
    energy = PowerIteration(how).eval()
    buffer, before = energy.u, energy.u.clone()
    ours = sampler(energy, gradient="autograd")
    report = compare(functools.partial(loop, energy, std=std), ours, x0)
    assert report.same == (std == 0.01), report.verdict
    assert energy.u is buffer
    assert torch.equal(energy.u, before)
    if not report.same:
        assert "+0.02 noise[0]" in report.verdict
