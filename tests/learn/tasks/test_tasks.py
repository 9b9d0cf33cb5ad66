"""reconstruct, interpolate, restore, transfer: against plain loops and answers known in advance."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.energies import GaussianEnergy
from fastlangevin.learn import (
    interpolate,
    reconstruct,
    restore,
    transfer,
)
from fastlangevin.learn.tasks.guidance import StyleTerm
from fastlangevin.learn.tasks.measurements import (
    Downsample,
    Grey,
    Mask,
    adjoint,
    norm,
)
from fastlangevin.learn.tasks.transfer import guide
from tests.learn.tasks.shared import BOX, SHAPE, dense, images, net, start


def slope(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x)[0]


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"optimizer": "gd", "lr": 0.5}])
def test_reconstruct_finds_the_start_that_is_known(options: dict[str, Any]) -> None:
    """On |x|^2 / 2 v the chain is M(z) = c z, c = (1 - a / v)^K, with z in [-1, 1]."""
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=2, step_size=0.1, noise_std=0.3)
    c = 0.95**2
    y = images(3)
    iterations = 100 if options["optimizer"] == "adam" else 12
    fit = reconstruct(sampler, y, restarts=2, iterations=iterations, **options)
    want = (y / c).clamp(-1, 1)[:, None].expand_as(fit.z)
    if options["optimizer"] == "gd":
        torch.testing.assert_close(fit.z, want, rtol=0, atol=2e-3)
    torch.testing.assert_close(fit.x, c * fit.z)
    torch.testing.assert_close(fit.error, (y[:, None] - fit.x).square().mean((2, 3, 4)))
    least = (y[:, None] - c * want).square().mean((2, 3, 4))  # what the bound of z leaves over
    torch.testing.assert_close(fit.error, least, rtol=0, atol=1e-4)


def test_reconstruct_with_frozen_noise_fits_that_noise() -> None:
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=5, step_size=0.1, noise_std=0.01)
    y = images(2) / 2
    options: dict[str, Any] = {"optimizer": "gd", "lr": 0.5, "noise": "frozen", "seed": 4}
    fit = reconstruct(sampler, y, restarts=2, iterations=15, **options)
    torch.testing.assert_close(fit.x, y[:, None].expand_as(fit.x), rtol=0, atol=2e-3)
    again = sampler(fit.z.flatten(0, 1), seed=4)  # the chain as anyone would run it
    torch.testing.assert_close(again, fit.x.flatten(0, 1), rtol=0, atol=1e-6)
    drift = fit.x - 0.95**5 * fit.z
    assert float(drift.abs().mean()) > 0.005


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_a_step_of_plain_gradient_descent(activation: str) -> None:
    """z <- clamp(z - lr dL/dz), L = |y - M(z)|^2, by a plain unrolled loop."""
    energy, y = net(activation), images(2)
    sampler = fl.LangevinSampler(energy, steps=3, step_size=0.5)
    z = start(2, seed=9).requires_grad_()
    x = z
    for _ in range(3):
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        x = x - 0.5 * grad
    (descent,) = torch.autograd.grad((y - x).square().sum(), z)
    if activation == "leaky_relu":  # d M / d z is the identity
        torch.testing.assert_close(descent, 2 * (x - y), rtol=1e-5, atol=1e-5)
    else:
        assert float((descent - 2 * (x - y)).abs().max()) > 1e-2
    want = (z - 0.02 * descent).clamp(-1, 1)

    options: dict[str, Any] = {
        "optimizer": "gd",
        "lr": 0.02,
        "restarts": 1,
        "iterations": 1,
        "seed": 9,
    }
    exact = reconstruct(sampler, y, **options)
    torch.testing.assert_close(exact.z[:, 0], want, rtol=1e-5, atol=1e-5)
    straight = reconstruct(sampler, y, grad_through="straight", **options)
    if activation == "leaky_relu":
        torch.testing.assert_close(straight.z, exact.z, rtol=0, atol=1e-6)
    else:
        assert float((straight.z - exact.z).abs().max()) > 1e-4


def test_reconstruct_keeps_the_best_and_says_so() -> None:
    sampler = fl.LangevinSampler(net(), steps=2)
    y, heard = images(3), []
    fit = reconstruct(
        sampler, y, restarts=3, iterations=6, lr=0.3, report=lambda i, e: heard.append((i, e))
    )
    assert [i for i, _ in heard] == list(range(7))
    assert all(later <= before for (_, before), (_, later) in itertools.pairwise(heard))
    best = fit.best()
    assert heard[-1][1] == pytest.approx(float(best.error.mean()))
    for i in range(3):
        r = int(fit.error[i].argmin())
        assert torch.equal(best.x[i], fit.x[i, r])
        assert torch.equal(best.z[i], fit.z[i, r])
        assert best.error[i] == fit.error[i].min()
    short = reconstruct(sampler, y[:1], restarts=3, iterations=6, lr=0.3)
    torch.testing.assert_close(short.z[0], fit.z[0], rtol=0, atol=1e-4)


def test_fits_leave_no_trace() -> None:
    energy = net()
    energy.layers[0].bias.requires_grad_(False)
    energy.layers[2].eval()
    flags = [p.requires_grad for p in energy.parameters()]
    modes = [m.training for m in energy.modules()]
    before = [p.detach().clone() for p in energy.parameters()]
    state = torch.get_rng_state()
    sampler, y = fl.LangevinSampler(energy, steps=2), images(1)
    reconstruct(sampler, y, iterations=2)
    restore(sampler, BOX(y), BOX, samples=8)
    for method in ("posterior", "clamped"):
        restore(sampler, BOX(y), BOX, method=method)
    transfer(sampler, y, style=y)
    with pytest.raises(ZeroDivisionError):
        reconstruct(sampler, y, report=lambda i, e: 1 / 0)
    assert [p.requires_grad for p in energy.parameters()] == flags
    assert [m.training for m in energy.modules()] == modes
    assert all(p.grad is None for p in energy.parameters())
    assert all(torch.equal(p, b) for p, b in zip(energy.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_have_gradients_where_the_caller_has_none(mode: Any) -> None:
    sampler, y = fl.LangevinSampler(net(), steps=2), images(1)
    options: dict[str, Any] = {"restarts": 1, "iterations": 3}
    want = reconstruct(sampler, y, **options)
    with mode():
        assert torch.equal(reconstruct(sampler, y, **options).z, want.z)
        assert restore(sampler, Downsample(2)(y), Downsample(2), samples=8).x.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"images": images(1) * 1.2}, ValueError, r"images must lie in \[-1, 1\], got -1\.1"),
        ({"images": images(1) * math.nan}, ValueError, "images must lie in .*, got nan"),
        ({"images": images(1, 1)}, ValueError, r"\[n >= 1, 3, 8, 8\], got \[1, 1, 8, 8\]"),
        ({"images": images(0)}, ValueError, r"got \[0, 3, 8, 8\]"),
        ({"images": images(1).int()}, TypeError, "images must be a floating tensor"),
        ({"images": images(1).numpy()}, TypeError, "images must be .*, got ndarray"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be one of adam, gd, got 'sgd'"),
        ({"noise": "on"}, ValueError, "noise must be one of off, frozen, got 'on'"),
        ({"grad_through": "st"}, ValueError, "grad_through must be one of exact, straight"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0, got 0"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_what_reconstruct_refuses(options: Any, error: type[Exception], match: str) -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(1)
        return x.square().sum((1, 2, 3))

    energy.shape = SHAPE  # type: ignore[attr-defined]
    sampler = fl.LangevinSampler(energy, steps=2)
    with pytest.raises(error, match=match):
        reconstruct(sampler, options.pop("images", images(1)), **options)
    assert not calls  # before any work


def test_interpolation_against_a_plain_loop() -> None:
    energy, z1, z2 = net(), start(2, 1), start(2, 2)
    sampler = fl.LangevinSampler(energy, steps=3, noise_std=0.1)
    found = interpolate(sampler, z1, z2, 5)
    for frame, t in zip(found, (0, 0.25, 0.5, 0.75, 1), strict=True):
        rho = math.cos(t * math.pi / 2)
        x = rho * z1 + math.sqrt(1 - rho**2) * z2
        for _ in range(3):
            x = x - slope(energy, x)
        torch.testing.assert_close(frame, x, rtol=0, atol=1e-5)


def test_frozen_noise_is_the_same_in_every_frame() -> None:
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=4, step_size=0.1, noise_std=0.2)
    z1, z2 = start(2, 1), start(2, 2)
    found = interpolate(sampler, z1, z2, 3, noise="frozen", seed=5)
    quiet = interpolate(sampler, z1, z2, 3)
    noise = found - quiet
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=0, atol=1e-6)
    assert float(noise.std()) > 0.1
    assert torch.equal(found[0], sampler(z1, seed=5))
    assert torch.equal(found[-1], sampler(z2, seed=5))


def test_what_interpolate_refuses() -> None:
    sampler = fl.LangevinSampler(net(), steps=1)
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        interpolate(sampler, start(1, 0), start(1, 1), 1)
    with pytest.raises(ValueError, match=r"z2 must have z1's shape \[1, 3, 8, 8\], got \[2,"):
        interpolate(sampler, start(1, 0), start(2, 1))
    with pytest.raises(TypeError, match=r"interpolate: z2 must be a floating tensor .*, got ndarr"):
        interpolate(sampler, start(1, 0), start(1, 1).numpy())  # type: ignore[arg-type]


def test_posterior_chains_against_a_plain_loop(operator: Any) -> None:
    """x <- x - a (dE/dx + 2 A^T (A x - y) / zeta^2) + b z, from p0."""
    maximize = isinstance(operator, Mask | Grey)
    energy, y = net(), operator(images(2))
    given = nn.Module()
    given.forward = lambda x: -energy(x)  # type: ignore[method-assign]
    given.shape = SHAPE  # type: ignore[assignment]
    sampler = fl.LangevinSampler(
        given if maximize else energy, steps=4, step_size=0.3, noise_std=0.05, maximize=maximize
    )
    zeta = 1.3
    options: dict[str, Any] = {"method": "posterior", "answers": 2, "zeta": zeta, "seed": 6}
    restored = restore(sampler, y, operator, **options)
    target, x = y.repeat_interleave(2, 0), start(4, 6)
    for k in range(4):
        pull = 2 / zeta**2 * adjoint(operator, operator(x) - target, SHAPE)
        noise = fl.noise.normal(x.shape, seed=6, step=k)
        x = x - 0.3 * (slope(energy, x) + pull) + 0.05 * noise
    torch.testing.assert_close(restored.x.flatten(0, 1), x, rtol=0, atol=2e-5)
    residual = (target - operator(x)).square().flatten(1).mean(1)
    torch.testing.assert_close(restored.residual.flatten(), residual, rtol=1e-4, atol=1e-5)
    alone = restore(sampler, y[:1], operator, **options)
    torch.testing.assert_close(alone.x[0], restored.x[0], rtol=0, atol=1e-5)


def test_a_posterior_that_is_known() -> None:
    """For |x|^2 / 2 v, a mask and no noise: y (2/zeta^2) / (1/v + 2/zeta^2), and 0 where hidden."""
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=200, step_size=0.2, noise_std=0.0)
    y = BOX(images(2))
    restored = restore(sampler, y, BOX, method="posterior", zeta=2.0, answers=1)
    torch.testing.assert_close(restored.x[:, 0], y * 0.5 / (0.5 + 0.5), rtol=0, atol=1e-5)


def test_the_natural_zeta_takes_a_step_to_the_measurement(operator: Any) -> None:
    """With no energy to speak of, one step projects along the largest singular direction."""
    a = 0.7
    sampler = fl.LangevinSampler(GaussianEnergy(1e12), steps=1, step_size=a, noise_std=0.0)
    sampler.energy.shape = SHAPE  # type: ignore[attr-defined]
    y = operator(images(1))
    x = restore(sampler, y, operator, method="posterior", answers=1, seed=1).x[:, 0]
    largest = torch.linalg.svd(dense(operator))[2][0].float()
    first = start(1, 1)
    before = operator(first) - y
    direction = dense(operator).float() @ largest
    left = float(((operator(x) - y).flatten() * direction).sum())
    assert abs(left) <= 0.03 * abs(float((before.flatten() * direction).sum())) + 1e-5
    short = 0.9 * norm(operator, SHAPE) * math.sqrt(a)
    with pytest.raises(ValueError, match="zeta must be at least"):
        restore(sampler, y, operator, method="posterior", zeta=short)


@pytest.mark.parametrize("order", ["after", "before", "last"])
def test_clamped_chains_against_a_plain_loop(order: str) -> None:
    """The known pixels are set back before every gradient."""
    energy, y = net(), BOX(images(2))
    sampler = fl.LangevinSampler(
        energy, steps=4, step_size=0.5, noise_std=0.1, noise_order=order, clamp=(-1, 1)
    )
    known = BOX(torch.ones(1, *SHAPE)) == 1
    x = start(4, 6)
    target = y.repeat_interleave(2, 0)
    for k in range(4):
        noise = 0.1 * fl.noise.normal(x.shape, seed=6, step=k)
        if order == "before":
            x = (x + noise).clamp(-1, 1)
        x = torch.where(known, target, x)
        move = -0.5 * slope(energy, x)
        if order == "after":
            move = move + noise
        x = (x + move).clamp(-1, 1)
        if order == "last":
            x = x + noise
    x = torch.where(known, target, x)
    restored = restore(sampler, y, BOX, method="clamped", answers=2, seed=6)
    torch.testing.assert_close(restored.x.flatten(0, 1), x, rtol=0, atol=1e-5)
    assert float(restored.residual.max()) == 0
    assert float((restored.x[:, 0] - restored.x[:, 1]).abs().max()) > 0.1  # several answers


def test_latent_answers_are_fits_with_the_known_pixels_filled_in() -> None:
    sampler, x = fl.LangevinSampler(net(), steps=2), images(2)
    fit = reconstruct(sampler, BOX(x), BOX, restarts=3, iterations=12, seed=2)
    restored = restore(sampler, BOX(x), BOX, method="latent", answers=3, iterations=12, seed=2)
    known = (BOX(torch.ones(1, *SHAPE)) == 1)[:, None]
    assert torch.equal(restored.x, torch.where(known, x[:, None], fit.x))
    first = reconstruct(sampler, BOX(x), BOX, restarts=3, iterations=1, seed=2)
    assert float(fit.error.mean()) < 0.5 * float(first.error.mean())
    options: dict[str, Any] = {"optimizer": "gd", "lr": 0.02, "grad_through": "straight", "seed": 2}
    best = restore(
        sampler, BOX(x), BOX, method="latent", answers=3, restarts=2, iterations=5, **options
    )
    fit = reconstruct(sampler, BOX(x), BOX, restarts=6, iterations=5, **options)
    for i, k in itertools.product(range(2), range(3)):
        r = 2 * k + int(fit.error[i, 2 * k : 2 * k + 2].argmin())
        assert torch.equal(best.x[i, k], torch.where(known[0, 0], x[i], fit.x[i, r]))
    y = Downsample(2)(x) * 1.5  # measurements may leave [-1, 1]
    small = restore(sampler, y, Downsample(2), method="latent", answers=1, iterations=2)
    assert small.x.shape == (2, 1, *SHAPE)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"y": images(1)[:, :, :4]}, ValueError, r": y must have shape .* got \[1, 3, 4, 8\]"),
        ({"y": images(1) / 0}, ValueError, ": y must be finite"),
        ({"operator": Mask(torch.eye(5) > 0)}, ValueError, r"got \[5, 5\]"),
        ({"operator": torch.tanh}, ValueError, "must be linear"),
        ({"method": "magic"}, ValueError, "moments, posterior, clamped, latent, got 'magic'"),
        ({"method": "clamped", "operator": Grey()}, ValueError, "must be a Mask, got Grey"),
        ({"method": "clamped", "zeta": 1.0}, ValueError, 'zeta belongs to method "posterior"'),
        (
            {"iterations": 3},
            TypeError,
            '"moments" has no option iterations; it takes measurement_n',
        ),
        ({"method": "posterior", "lr": 1}, TypeError, "no option lr; it takes zeta"),
        ({"zeta": 1.0}, ValueError, "zeta belongs to method \"posterior\", got method='moments'"),
        ({"method": "latent", "samples": 9}, ValueError, 'samples belongs to method "moments"'),
        (
            {"method": "clamped", "measurement_noise": 0.1},
            ValueError,
            "measurement_noise belongs to method \"moments\", got method='clamped'",
        ),
        ({"samples": 1}, ValueError, "restore: samples must be at least 2, got 1"),
        ({"samples": 2.5}, TypeError, "restore: samples must be"),
        ({"measurement_noise": -0.1}, ValueError, "measurement_noise must be finite and >= 0"),
        ({"measurement_noise": "loud"}, TypeError, "measurement_noise must be a number"),
        ({"method": "clamped", "lr": 1}, TypeError, '"clamped" has no option lr; it takes none'),
        (
            {"method": "latent", "rate": 1},
            TypeError,
            '"latent" has no option rate; it takes restarts, iterations, optimizer, lr, noise, ',
        ),
        ({"method": "latent", "restarts": 0}, ValueError, "restore: restarts must be at least 1"),
        ({"method": "latent", "lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"method": "latent", "report": 3}, TypeError, "report must be a function or None, got 3"),
        ({"answers": 0}, ValueError, "answers must be at least 1, got 0"),
        (
            {"method": "posterior", "zeta": math.nan},
            ValueError,
            "zeta must be finite and > 0, got nan",
        ),
        ({"method": "posterior", "zeta": math.inf}, ValueError, "zeta must be finite"),
        ({"method": "posterior", "zeta": "wide"}, TypeError, "zeta must be a number, got 'wide'"),
    ],
)
def test_what_restore_refuses(
    options: Any, error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = fl.LangevinSampler(net(), steps=1)
    monkeypatch.setattr(sampler.energy, "forward", lambda x: pytest.fail("work before checks"))
    y, operator = options.pop("y", images(1)), options.pop("operator", BOX)
    with pytest.raises(error, match=match):
        restore(sampler, y, operator, **options)


def test_transfer_is_the_chain_from_the_images() -> None:
    sampler, x0 = fl.LangevinSampler(net(), steps=3), images(2)
    assert torch.equal(transfer(sampler, x0, seed=3), sampler(x0, seed=3))
    content = Downsample(4)
    held = transfer(sampler, x0, content=content, zeta=1.0, seed=3)
    x, energy = x0, sampler.energy
    for k in range(3):
        pull = 2 * adjoint(content, content(x) - content(x0), SHAPE)
        x = x - slope(energy, x) - pull + 0.01 * fl.noise.normal(x.shape, seed=3, step=k)
    torch.testing.assert_close(held, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("statistics", ["gram", "mean-std"])
def test_style_term_against_features_by_hand(statistics: str) -> None:
    energy = net("leaky_relu").double()
    x, style = images(2).double(), images(3, seed=5).double()

    def summaries(x: Tensor) -> list[Tensor]:
        first = energy.layers[0](x)
        second = energy.layers[2](torch.nn.functional.leaky_relu(first, 0.2))
        found = []
        for features in (first, second):
            if statistics == "gram":
                pixels = features.shape[2] * features.shape[3]
                found.append(torch.einsum("nchw,ndhw->ncd", features, features) / pixels)
            else:
                mean = features.mean((2, 3))
                std = ((features - mean[..., None, None]) ** 2).mean((2, 3)).sqrt()
                found.append(torch.cat([mean, std], 1))
        return found

    want = torch.zeros(2, dtype=torch.float64)
    for ours, theirs in zip(summaries(x), summaries(style), strict=True):
        target = theirs.mean(0)
        size = ours.square().flatten(1).sum(1) + target.square().sum()
        want += 0.7 * (ours - target).square().flatten(1).sum(1) / size
    term = StyleTerm(energy, style, 0.7, statistics)
    torch.testing.assert_close(term(x), want, rtol=1e-6, atol=1e-9)
    same = StyleTerm(energy, style[:1], 0.7, statistics)
    assert float(same(style[:1])) < 1e-12


@pytest.mark.parametrize("maximize", [False, True])
def test_style_guides_chains_towards_its_statistics(maximize: bool) -> None:
    energy, x0, style = net(), images(4), images(1, seed=5) / 4
    sampler = fl.LangevinSampler(energy, steps=20, step_size=0.05, maximize=maximize, noise_std=0.0)
    term = StyleTerm(energy, style, 1.0, "gram")
    free = transfer(sampler, x0)
    guided = transfer(sampler, x0, style=style, weight=20.0)
    assert float(term(guided).mean()) < 0.5 * float(term(free).mean())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"images": images(1) + 1}, ValueError, r"images must lie in \[-1, 1\]"),
        ({"style": images(1) + 1}, ValueError, r"style must lie in \[-1, 1\]"),
        ({"style": images(1, 1)}, ValueError, r"style must have .*, got \[1, 1, 8, 8\]"),
        ({"style": images(1).numpy()}, TypeError, "style must be a floating tensor .*, got ndarr"),
        ({"style": images(1), "weight": 0.0}, ValueError, "weight must be finite and > 0"),
        ({"style": images(1), "statistics": "max"}, ValueError, "gram, mean-std, got 'max'"),
        ({"content": torch.tanh}, ValueError, "^transfer: content must be linear"),
        ({"content": "grey"}, TypeError, "^transfer: content must be a function, got 'grey'"),
        ({"zeta": 0.1}, ValueError, "^transfer: zeta must be at least"),
    ],
)
def test_what_transfer_refuses(options: Any, error: type[Exception], match: str) -> None:
    sampler = fl.LangevinSampler(net(), steps=1)
    with pytest.raises(error, match=match):
        transfer(sampler, options.pop("images", images(1)), **options)


def test_style_needs_layers() -> None:
    for energy, match in (
        (GaussianEnergy(), "nn.Sequential called layers, .* got GaussianEnergy"),
        (lambda x: x.square().sum((1, 2, 3)), "an nn.Module, got function"),
    ):
        with pytest.raises(TypeError, match=match):
            guide(fl.LangevinSampler(energy, steps=1), images(1), style=images(1))
