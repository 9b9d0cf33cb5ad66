"""reconstruct, interpolate, restore, transfer: against plain loops and answers known in advance."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.energies import GaussianEnergy
from fastlangevin.learn import (
    interpolate,
    load_images,
    reconstruct,
    resolve,
    restore,
    save_gif,
    transfer,
)
from fastlangevin.learn.build import load_held_out
from fastlangevin.learn.checkpoint import checkpoint_path, read_checkpoint, save_checkpoint
from fastlangevin.learn.images import to_grid
from fastlangevin.learn.tasks.guidance import StyleTerm
from fastlangevin.learn.tasks.measurements import (
    Blur,
    Downsample,
    Grey,
    Mask,
    adjoint,
    check_operator,
    identity,
    make_operator,
    norm,
    picture,
)
from fastlangevin.learn.tasks.transfer import guide
from tests.command import run_command

SHAPE = (3, 8, 8)
BOX = make_operator("mask", SHAPE)


def per_channel() -> Mask:
    known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    return Mask(known)


OPERATORS = {
    "identity": identity,
    "mask": BOX,
    "mask per channel": per_channel(),
    "downsample": Downsample(4),
    "blur": Blur(0.8),
    "blur wider than the image": Blur(5.0),
    "grey": Grey(),
}


@pytest.fixture(params=OPERATORS, ids=str)
def operator(request: pytest.FixtureRequest) -> Any:
    return OPERATORS[request.param]


def net(activation: str = "silu", channels: int = 3, **options: Any) -> fl.ConvEnergy:
    """A small random net whose gradients matter over a few steps."""
    torch.manual_seed(3)
    made = fl.ConvEnergy(channels, 8, 4, activation=activation, **options)
    with torch.no_grad():
        made.layers[-1].weight.mul_(20)
    return made


def images(n: int, channels: int = 3, seed: int = 11) -> Tensor:
    return 2 * fl.noise.uniform((n, channels, 8, 8), seed=seed, step=0) - 1


def start(n: int, seed: int, channels: int = 3) -> Tensor:
    return 2 * fl.noise.uniform((n, channels, 8, 8), seed=seed, step=0) - 1


def slope(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x)[0]


# operators ---------------------------------------------------------------------------------------


def dense(operator: Any) -> Tensor:
    """The matrix of an operator, column by column."""
    basis = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
    return operator(basis).flatten(1).T


def test_adjoint_is_the_transpose(operator: Any) -> None:
    x = images(2).double()
    y = operator(x)
    other = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    back = adjoint(operator, other, SHAPE)
    assert back.shape == x.shape
    there, here = (y * other).sum(), (x * back).sum()
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back.flatten(1), other.flatten(1) @ dense(operator))
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ dense(operator).T)  # it is linear


def test_norm_is_the_largest_singular_value(operator: Any) -> None:
    want = float(torch.linalg.svdvals(dense(operator))[0])
    assert norm(operator, SHAPE) == pytest.approx(want, rel=1e-2)
    assert norm(operator, SHAPE) <= want * (1 + 1e-5)


def test_what_operators_measure() -> None:
    x = images(2).double()
    want = x.clone()
    want[:, :, 2:6, 2:6] = 0
    assert torch.equal(BOX(x), want)
    half = make_operator("mask", SHAPE, mask="half")
    assert torch.equal(half(x)[:, :, :4], x[:, :, :4])
    assert float(half(x)[:, :, 4:].abs().max()) == 0
    blocks = x.view(2, 3, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(Downsample(4)(x), blocks)
    torch.testing.assert_close(Grey()(x)[:, 0], (x[:, 0] + x[:, 1] + x[:, 2]) / 3)

    blur = Blur(0.5)
    torch.testing.assert_close(blur(torch.full_like(x, 0.3)), torch.full_like(x, 0.3))
    impulse = torch.zeros((1, 1, 8, 8), dtype=torch.float64)
    impulse[0, 0, 4, 3] = 1
    spread = blur(impulse)[0, 0]
    at = torch.arange(8)
    squares = (at[:, None] - 4) ** 2 + (at - 3) ** 2
    near = ((at[:, None] - 4).abs() <= 2) & ((at - 3).abs() <= 2)
    want = torch.where(near, torch.exp(-squares / (2 * 0.5**2)), 0.0).double()
    torch.testing.assert_close(spread, want / want.sum(), rtol=1e-6, atol=1e-9)


def test_pictures_of_measurements() -> None:
    x = images(2)
    assert picture(BOX, BOX(x), SHAPE) is not None
    assert torch.equal(picture(BOX, BOX(x), SHAPE), BOX(x))
    y = Downsample(4)(x)
    enlarged = y.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(picture(Downsample(4), y, SHAPE), enlarged, rtol=1e-4, atol=1e-5)
    grey = Grey()(x)
    torch.testing.assert_close(picture(Grey(), grey, SHAPE), grey.expand(x.shape).contiguous())


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        (lambda x: x + 1, "must be linear"),
        (lambda x: x.square(), "must be linear"),
        (torch.tanh, "must be linear"),
        (lambda x: x.sum(), r"must map images \[2, 3, 8, 8\] to a floating tensor .*, got \[\]"),
        (lambda x: None, "got NoneType"),
        (lambda x: x.int(), r"got \[2, 3, 8, 8\] of torch.int32"),
        (lambda x: x.squeeze(0), r"must map images \[1, 3, 8, 8\] to .*, got \[3, 8, 8\] of"),
        (lambda x: 0 * x, "must not map every image to 0"),
        (lambda x: x.detach(), "does not depend on its images through autograd"),
        (lambda x: x + x.detach(), r"its gradient is another map's .*detached"),
        (Mask(torch.eye(5) > 0), r"images' shape \[8, 8\] or \[3, 8, 8\], got \[5, 5\]"),
        (Mask(torch.ones(2, 8, 8).triu() > 0), r"got \[2, 8, 8\]"),
        (Downsample(3), r"must divide the images' \[8, 8\], got 3"),
    ],
)
def test_operators_that_do_not_fit(operator: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_operator("restore", operator, SHAPE)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Mask(torch.ones(8, 8)), TypeError, "mask must be bool, got torch.float32"),
        (lambda: Mask(np.eye(8) > 0), TypeError, "mask must be a bool tensor, got ndarray"),
        (
            lambda: Mask(torch.ones(8) > 0),
            ValueError,
            r"must be \[H, W\] or \[C, H, W\], got \[8\]",
        ),
        (lambda: Mask(torch.ones(8, 8) > 0), ValueError, "hide some pixels"),
        (lambda: Mask(torch.ones(8, 8) < 0), ValueError, "leave some known"),
        (lambda: Downsample(1), ValueError, "factor must be at least 2, got 1"),
        (lambda: Downsample(2.5), TypeError, "factor must be an integer, got 2.5"),
        (lambda: Blur(0.0), ValueError, "sigma must be finite and > 0, got 0"),
        (lambda: Blur(1e9), ValueError, r"sigma must be at most 10000 pixels, got 1e\+09"),
        (lambda: Blur(math.nan), ValueError, "sigma must be finite and > 0, got nan"),
        (
            lambda: make_operator("smear", SHAPE),
            ValueError,
            "mask, downsample, blur, grey, got 'sm",
        ),
        (lambda: make_operator("grey", (1, 8, 8)), ValueError, "several channels, got 1"),
        (lambda: make_operator("downsample", SHAPE, factor=16), ValueError, "divide .*, got 16"),
        (lambda: make_operator("mask", SHAPE, mask="no.png"), FileNotFoundError, "got 'no.png'"),
    ],
)
def test_operators_that_cannot_be(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_masks_from_files(tmp_path: Path) -> None:
    known = np.random.default_rng(0).random((8, 8)) < 0.5
    np.save(tmp_path / "mask.npy", known)
    Image.fromarray(np.where(known, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("mask.npy", "mask.png"):
        made = make_operator("mask", SHAPE, mask=str(tmp_path / name))
        assert torch.equal(made(torch.ones(1, *SHAPE))[0, 1], torch.from_numpy(known).float())
    with pytest.raises(ValueError, match=r"bad.png cannot be read"):
        make_operator("mask", SHAPE, mask=str(tmp_path / "bad.png"))
    with pytest.raises(ValueError, match=r"got \[8, 8\]"):
        make_operator("mask", (3, 16, 16), mask=str(tmp_path / "mask.npy"))


def test_what_masks_mean_in_files_of_other_kinds(tmp_path: Path) -> None:
    known = np.random.default_rng(0).random((8, 8)) < 0.5
    blue = np.zeros((8, 8, 3), np.uint8)
    blue[..., 2] = known * 4  # a luma of 0.456
    Image.fromarray(blue).save(tmp_path / "blue.png")
    Image.fromarray(blue).quantize(2).save(tmp_path / "palette.png")
    Image.fromarray(known.astype(np.uint16) * 200).save(tmp_path / "wide.png")
    Image.fromarray(known).save(tmp_path / "bits.png")
    Image.fromarray(known.astype(np.float32) * 0.1).save(tmp_path / "float.tif")
    for path in tmp_path.iterdir():
        made = make_operator("mask", SHAPE, mask=str(path))
        assert torch.equal(made(torch.ones(1, *SHAPE))[0, 1], torch.from_numpy(known).float())


def test_masks_that_could_mean_either(tmp_path: Path) -> None:
    known = np.eye(8)
    layers = np.zeros((8, 8, 4), np.uint8)
    layers[..., 3] = 255 * known
    Image.fromarray(layers).save(tmp_path / "alpha.png")
    Image.fromarray(layers[..., 0]).save(tmp_path / "key.png", transparency=0)
    np.save(tmp_path / "nan.npy", np.where(known == 1, np.nan, 0))
    np.save(tmp_path / "words.npy", np.full((8, 8), "known"))
    (tmp_path / "empty.npy").touch()
    for name, match in (
        ("alpha.png", "cannot be read as a mask: it is transparent in places"),
        ("key.png", "cannot be read as a mask: it is transparent in places"),
        ("nan.npy", "must hold finite numbers to be a mask, got NaN or infinity"),
        ("words.npy", "must hold finite numbers to be a mask, got <U5"),
        ("empty.npy", "cannot be read as a .npy array: EOF"),
    ):
        with pytest.raises(ValueError, match=f"^{tmp_path / name} {match}"):
            make_operator("mask", SHAPE, mask=str(tmp_path / name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x.clamp(-10, 10),  # linear on images, and 10 times beyond
        lambda x: x + 1e-5 * x**3,
        lambda x: x + 1e-5,
        lambda x: x + 0.001 * x.abs(),  # homogeneous
        lambda x: (x * 1e4).round() / 1e4 + x - x.detach(),  # with the identity's gradient
        lambda x: x - x.mean(0),  # linear in the batch
        nn.BatchNorm2d(3).requires_grad_(False),
        lambda x: torch.nn.functional.max_pool2d(x, 2),
    ],
)
def test_what_is_almost_linear_is_not(operator: Any, dtype: torch.dtype) -> None:
    if isinstance(operator, nn.Module):
        operator = operator.to(dtype)
    with pytest.raises(ValueError, match="operator must be linear"):
        check_operator("restore", operator, (3, 16, 16), dtype=dtype)


@pytest.mark.parametrize(
    ("operator", "size"),
    [
        (Blur(10.0), 64),
        (lambda x: x.sum((1, 2, 3))[:, None], 1024),
        (lambda x: x.flatten(1).cumsum(1), 512),
        (lambda x: x.flatten(1) @ torch.ones(3 * 256 * 256, 2), 256),
        (lambda x: torch.view_as_real(torch.fft.fft2(x)), 128),
        (lambda x: x - Blur(0.3)(x), 64),  # what is left of a difference
        (lambda x: 1e-12 * x, 16),
        (lambda x: 1e12 * x, 16),
        (lambda x: x.half().sum((1, 2, 3))[:, None], 16),
        (lambda x: Blur(1.0)(x.bfloat16()), 16),
    ],
)
def test_what_is_linear_but_for_rounding(operator: Any, size: int) -> None:
    check_operator("restore", operator, (3, size, size))


def test_measurements_in_float64_are_of_images_in_float64() -> None:
    matrix = torch.randn(math.prod(SHAPE), 9, generator=torch.Generator().manual_seed(1)).double()
    sampler = fl.LangevinSampler(net().double(), steps=2)

    def operator(x: Tensor) -> Tensor:
        return x.flatten(1) @ matrix

    assert restore(sampler, operator(images(1).double()), operator).x.dtype == torch.float64
    want = float(torch.linalg.svdvals(matrix)[0])
    assert norm(operator, SHAPE, dtype=torch.float64) == pytest.approx(want, rel=1e-3)


def test_the_norm_of_nothing_is_0() -> None:
    assert norm(lambda x: 0 * x, SHAPE) == 0


def test_a_wide_blur_takes_no_memory_to_speak_of() -> None:
    """Wider than 30,000 pixels on every side: a padded square would take 14 GB a plane."""
    x = images(1)
    edges = x[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(-1)
    far = Blur(1e4)(x)
    torch.testing.assert_close(far, edges[:, :, None, None].expand_as(far), rtol=0, atol=1e-3)


# reconstruct -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"optimizer": "gd", "lr": 0.5}])
def test_reconstruct_finds_the_start_that_is_known(options: dict[str, Any]) -> None:
    """On |x|^2 / 2 v the chain is M(z) = c z, c = (1 - a / v)^K, with z in [-1, 1]."""
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=5, step_size=0.1, noise_std=0.3)
    c = 0.95**5
    y = images(3)
    fit = reconstruct(sampler, y, restarts=2, iterations=150, **options)
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
    fit = reconstruct(sampler, y, restarts=2, iterations=100, **options)
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
    restore(sampler, BOX(y), BOX)
    restore(sampler, BOX(y), BOX, method="clamped")
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
        assert restore(sampler, Downsample(2)(y), Downsample(2)).x.isfinite().all()


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


# interpolate -------------------------------------------------------------------------------------


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


# restore -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_posterior_chains_against_a_plain_loop(operator: Any, maximize: bool) -> None:
    """x <- x - a (dE/dx + 2 A^T (A x - y) / zeta^2) + b z, from p0."""
    energy, y = net(), operator(images(2))
    given = nn.Module()
    given.forward = lambda x: -energy(x)  # type: ignore[method-assign]
    given.shape = SHAPE  # type: ignore[assignment]
    sampler = fl.LangevinSampler(
        given if maximize else energy, steps=4, step_size=0.3, noise_std=0.05, maximize=maximize
    )
    zeta = 1.3
    restored = restore(sampler, y, operator, answers=2, zeta=zeta, seed=6)
    target, x = y.repeat_interleave(2, 0), start(4, 6)
    for k in range(4):
        pull = 2 / zeta**2 * adjoint(operator, operator(x) - target, SHAPE)
        noise = fl.noise.normal(x.shape, seed=6, step=k)
        x = x - 0.3 * (slope(energy, x) + pull) + 0.05 * noise
    torch.testing.assert_close(restored.x.flatten(0, 1), x, rtol=0, atol=2e-5)
    residual = (target - operator(x)).square().flatten(1).mean(1)
    torch.testing.assert_close(restored.residual.flatten(), residual, rtol=1e-4, atol=1e-5)
    alone = restore(sampler, y[:1], operator, answers=2, zeta=zeta, seed=6)
    torch.testing.assert_close(alone.x[0], restored.x[0], rtol=0, atol=1e-5)


def test_a_posterior_that_is_known() -> None:
    """For |x|^2 / 2 v, a mask and no noise: y (2/zeta^2) / (1/v + 2/zeta^2), and 0 where hidden."""
    sampler = fl.LangevinSampler(GaussianEnergy(2.0), steps=200, step_size=0.2, noise_std=0.0)
    y = BOX(images(2))
    restored = restore(sampler, y, BOX, zeta=2.0, answers=1)
    torch.testing.assert_close(restored.x[:, 0], y * 0.5 / (0.5 + 0.5), rtol=0, atol=1e-5)


def test_the_natural_zeta_takes_a_step_to_the_measurement(operator: Any) -> None:
    """With no energy to speak of, one step projects along the largest singular direction."""
    a = 0.7
    sampler = fl.LangevinSampler(GaussianEnergy(1e12), steps=1, step_size=a, noise_std=0.0)
    sampler.energy.shape = SHAPE  # type: ignore[attr-defined]
    y = operator(images(1))
    x = restore(sampler, y, operator, answers=1, seed=1).x[:, 0]
    largest = torch.linalg.svd(dense(operator))[2][0].float()
    first = start(1, 1)
    before = operator(first) - y
    direction = dense(operator).float() @ largest
    left = float(((operator(x) - y).flatten() * direction).sum())
    assert abs(left) <= 0.03 * abs(float((before.flatten() * direction).sum())) + 1e-5
    with pytest.raises(ValueError, match="zeta must be at least"):
        restore(sampler, y, operator, zeta=0.9 * norm(operator, SHAPE) * math.sqrt(a))


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
    fit = reconstruct(sampler, BOX(x), BOX, restarts=3, iterations=20, seed=2)
    restored = restore(sampler, BOX(x), BOX, method="latent", answers=3, iterations=20, seed=2)
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
        ({"method": "magic"}, ValueError, "posterior, clamped, latent, got 'magic'"),
        ({"method": "clamped", "operator": Grey()}, ValueError, "must be a Mask, got Grey"),
        ({"method": "clamped", "zeta": 1.0}, ValueError, 'zeta belongs to method "posterior"'),
        ({"iterations": 3}, TypeError, '"posterior" has no option iterations; it takes zeta'),
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
        ({"zeta": math.nan}, ValueError, "zeta must be finite and > 0, got nan"),
        ({"zeta": math.inf}, ValueError, "zeta must be finite"),
        ({"zeta": "wide"}, TypeError, "zeta must be a number, got 'wide'"),
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


# transfer ----------------------------------------------------------------------------------------


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


# held-out images, animations ---------------------------------------------------------------------


def test_held_out_images_are_those_past_the_limit() -> None:
    config = resolve(overrides={"data": "digits", "limit": 1500})
    held, every = load_held_out(config, (1, 8, 8)), load_images("digits")
    assert len(held) == 297
    assert torch.equal(held.batch([0, 296]), every.batch([1500, 1796]))
    assert held.labels is not None
    assert every.labels is not None
    assert held.labels.tolist() == every.labels[1500:].tolist()
    assert load_held_out(config, (3, 4, 4), "digits").shape == (3, 4, 4)


def test_held_out_images_of_a_test_split(tmp_path: Path) -> None:
    for split, grey in (("train", 10), ("test", 200)):
        (tmp_path / split).mkdir()
        Image.new("L", (8, 8), grey).save(tmp_path / split / "a.png")
    held = load_held_out(resolve(overrides={"data": str(tmp_path)}), (1, 8, 8))
    assert torch.equal(held.batch([0]), torch.full((1, 1, 8, 8), 200 / 127.5 - 1))


@pytest.mark.parametrize(
    ("limit", "match"),
    [(None, "trained on every image of digits: train with limit"), (1797, "holds out none")],
)
def test_nothing_held_out(limit: int | None, match: str) -> None:
    config = resolve(overrides={"data": "digits", "limit": limit})
    with pytest.raises(ValueError, match=match):
        load_held_out(config, (1, 8, 8))


def test_gif(tmp_path: Path) -> None:
    frames = images(6, 1).view(3, 2, 1, 8, 8)
    save_gif(frames, tmp_path / "a.gif", columns=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown, times = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            shown.append(np.asarray(gif.convert("RGB")))
            times.append(gif.info["duration"])
    assert times == [1000, 80, 1000]
    for frame, want in zip(shown, frames, strict=True):
        assert np.array_equal(frame, to_grid(want, columns=2))
    with pytest.raises(
        ValueError, match=r"frames must be \[F >= 1, n, C, H, W\], got \[2, 1, 8, 8"
    ):
        save_gif(frames[0], tmp_path / "b.gif")


# the commands ------------------------------------------------------------------------------------

TINY = {"width": 2, "steps": 2, "batch_size": 4, "iterations": 1, "samples": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has hardly begun, and holds out ten digits."""
    from fastlangevin.learn import train

    out = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=TINY | {"limit": 1787}), out)
    return out


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return run_command


def numbers(result: Any) -> dict[str, float]:
    """The number of each line that has one after its name."""
    assert result.exit_code == 0, result.output
    found = re.findall(r"^(\S.*?) +([+-]?\d+\.\d+)(?:   |$)", result.stdout, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_reconstruct_command(command: Any, run: Path) -> None:
    options = ("--n", 3, "--iterations", 4, "--samples", 5, "--restarts", 2, "--seed", 8)
    said = numbers(command("reconstruct", run, *options, "--out", "a.npz"))
    found = np.load("a.npz")
    held = load_images("digits").batch([1787, 1790, 1793])
    assert torch.equal(torch.from_numpy(found["images"]), held)
    error = ((found["images"] - found["x"]) ** 2).mean((1, 2, 3))
    assert found["error"] == pytest.approx(error, rel=1e-5)
    assert said["reconstruction"] == pytest.approx(error.mean(), abs=1e-5)
    drawn = fl.load(run)(n=5, seed=8)
    best = (held[:, None] - drawn).square().mean((2, 3, 4)).amin(1).mean()
    assert said["best of 5"] == pytest.approx(float(best), abs=1e-5)
    assert said["ratio"] == pytest.approx(float(error.mean() / best), abs=1e-3)

    assert command("reconstruct", run, *options, "--out", "a.png").exit_code == 0
    x = torch.from_numpy(found["x"])
    nearest = drawn[(held[:, None] - drawn).square().mean((2, 3, 4)).argmin(1)]
    want = to_grid(torch.cat([held, x, nearest]), 3)
    assert np.abs(np.asarray(Image.open("a.png")).astype(int) - want).max() <= 1


def test_interpolate_command(command: Any, run: Path) -> None:
    said = numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.npy"))
    x = torch.from_numpy(np.load("a.npy"))
    assert x.shape == (3, 2, 1, 8, 8)
    z = start(4, 0, channels=1)
    torch.testing.assert_close(x, interpolate(fl.load(run), z[::2], z[1::2], 3))
    assert said["ratio"] == pytest.approx(said["between"] / said["end points"], abs=2e-3)
    assert numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.png"))
    want = to_grid(x.transpose(0, 1).flatten(0, 1), 3)
    assert np.array_equal(np.asarray(Image.open("a.png")), want)
    assert numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.gif"))
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 4  # there and back


def test_a_model_whose_data_are_not_here(command: Any, run: Path) -> None:
    tensors, info = read_checkpoint(run)
    info = {name: value for name, value in info.items() if name not in ("format", "version")}

    def save(config: dict[str, Any], **others: Any) -> None:
        save_checkpoint("m.safetensors", tensors, info | {"config": config} | others)

    save(info["config"] | {"data": "not/here"})
    found = command("interpolate", "m.safetensors", "--n", 2, "--out", "i.npy")
    assert found.exit_code == 0, found.output
    assert found.stdout == "i.npy\n"
    assert "no classifier: load_images: 'not/here' is neither" in found.stderr
    assert np.load("i.npy").shape == (9, 2, 1, 8, 8)
    save(info["config"] | {"momentum": 0.9})
    for name in ("interpolate", "diagnose"):
        found = command(name, "m.safetensors")
        assert found.exit_code == 1
        assert "m.safetensors has settings that fastlangevin" in found.stderr
        assert "perhaps another version's: momentum" in found.stderr
    save(info["config"], iteration=None)
    found = command("diagnose", "m.safetensors")
    assert found.exit_code == 1
    assert "m.safetensors has a damaged header: no iteration in it" in found.stderr


def test_interpolate_command_between_images(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 2, "--frames", 3, "--iterations", 4, "--restarts", 2)
    result = command("interpolate", run, *options, "--seed", 8, "--out", "a.npy")
    said, x = numbers(result), torch.from_numpy(np.load("a.npy"))
    truth = load_images("digits").batch([0, 449, 898, 1347])
    fit = reconstruct(fl.load(run), truth, restarts=2, iterations=4, seed=8).best()
    assert said["their fit"] == pytest.approx(float(fit.error.mean()), abs=1e-5)
    assert "4 of digits, 1797 x 1x8x8" in result.stdout
    torch.testing.assert_close(x[0], fit.x[::2], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[2], fit.x[1::2], rtol=0, atol=1e-5)
    middle = interpolate(fl.load(run), fit.z[::2], fit.z[1::2], 3)[1]
    torch.testing.assert_close(x[1], middle, rtol=0, atol=1e-5)


def test_restore_command_takes_the_options_of_a_fit(command: Any, run: Path) -> None:
    fit: dict[str, Any] = {
        "restarts": 2,
        "iterations": 3,
        "optimizer": "gd",
        "lr": 0.3,
        "noise": "frozen",
        "grad_through": "straight",
        "checkpoint": 2,
    }
    options = [
        part for name, value in fit.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    common = ("--method", "latent", "--n", 2, "--answers", 2, "--seed", 3, "--out", "a.npz")
    assert command("restore", run, *common, *options).exit_code == 0
    y, x = (torch.from_numpy(np.load("a.npz")[name]) for name in ("y", "x"))
    box = make_operator("mask", (1, 8, 8))
    want = restore(fl.load(run), y, box, method="latent", answers=2, seed=3, **fit)
    torch.testing.assert_close(x, want.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["reconstruct", "interpolate", "restore", "transfer", "sample"])
def test_help_shows_shapes_and_what_is_done_by_default(command: Any, name: str) -> None:
    text = " ".join(command(name, "--help").stdout.split())
    shapes = {
        "interpolate": "[frames, n, C, H, W]",
        "restore": "[n, answers, C, H, W]",
        "transfer": "[n, C, H, W]",
        "sample": "[n, C, H, W]",
    }
    assert shapes.get(name, "") in text
    fits = name in ("reconstruct", "interpolate", "restore")
    assert ("best counts (default: 4; restore: 1)" in text) == fits


@pytest.mark.parametrize(
    "options",
    [
        ("--operator", "mask", "--mask", "half"),
        ("--operator", "mask", "--method", "clamped"),
        ("--operator", "mask", "--method", "latent", "--iterations", 2),
        ("--operator", "downsample", "--factor", 4),
        ("--operator", "blur", "--sigma", 0.6, "--zeta", 2),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_restore_command(command: Any, run: Path, options: tuple[Any, ...]) -> None:
    options = (*options, "--n", 2, "--answers", 3)
    said = numbers(command("restore", run, *options, "--out", "a.npz"))
    found = {name: torch.from_numpy(array) for name, array in np.load("a.npz").items()}
    assert found["x"].shape == (2, 3, 1, 8, 8)
    squares = (found["images"][:, None] - found["x"]).square().mean((2, 3, 4))
    assert said["answers"] == pytest.approx(float(squares.mean()), abs=1e-5)
    assert said["best"] == pytest.approx(float(squares.amin(1).mean()), abs=1e-5)
    result = command("restore", run, *options, "--out", "a.png")
    assert result.exit_code == 0, result.output
    with Image.open("a.png") as shown:
        assert shown.size == (5 * 34 + 2, 2 * 34 + 2)


def test_transfer_command(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 3, "--style", run.parent / "style.npy")
    np.save(run.parent / "style.npy", np.zeros((2, 8, 8), np.uint8))
    said = numbers(command("transfer", run, *options, "--content", 2, "--out", "a.npy"))
    x0 = load_images("digits").batch([0, 599, 1198])
    x = torch.from_numpy(np.load("a.npy"))
    assert said["change"] == pytest.approx(float((x - x0).square().mean()), abs=1e-5)
    result = command("transfer", run, *options, "--steps", 5, "--out", "a.gif")
    assert result.exit_code == 0, result.output
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 6
        assert np.array_equal(np.asarray(gif.convert("RGB")), to_grid(x0))
    assert command("transfer", run, *options, "--out", "a.png").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("a.png"))[:36], to_grid(x0, 3))


def test_transfer_command_warns_of_chains_that_left_the_images(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 3, "--style", "digits.npy", "--out", "a.npy")
    np.save("digits.npy", np.zeros((2, 8, 8), np.uint8))
    for weight in (1e-3, 1e4):
        result = command("transfer", run, *options, "--weight", weight)
        assert result.exit_code == 0, result.output
        reached = np.abs(np.load("a.npy")).max()
        warned = f"warning: chains ended at up to {reached:.3g}, but images lie in [-1, 1]"
        assert (warned in result.stderr.splitlines()) == (weight > 1) == (reached > 3)


def test_interpolate_command_of_two_frames_prints_the_file_alone(command: Any, run: Path) -> None:
    done = command("interpolate", run, "--n", 2, "--frames", 2, "--out", "a.npy")
    assert (done.exit_code, done.stdout) == (0, "a.npy\n"), done.output


def test_sample_command_draws_chains_as_a_gif(command: Any, run: Path) -> None:
    assert command("sample", run, "--n", 4, "--steps", 120, "--out", "a.gif").exit_code == 0
    with Image.open("a.gif") as gif:
        assert 2 < gif.n_frames <= 51
        first = np.asarray(gif.convert("RGB"))
    assert np.array_equal(first, to_grid(start(4, 0, channels=1)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("reconstruct", "--n", 11), "--n must be at most 10, the images of digits, those past"),
        (("reconstruct", "--out", "a.gif"), r"--out must end in .png or .npz, got a.gif"),
        (("reconstruct", "--checkpoint", "some", "--n", 1), "checkpoint"),
        (("interpolate", "--out", "a.npz"), "--out must end in .png, .gif or .npy, got a.npz"),
        (("restore", "--operator", "smear"), "operator must be one of mask, .*, got 'smear'"),
        (("restore", "--operator", "grey"), "several channels, got 1"),
        (
            ("restore", "--operator", "blur", "--factor", 2),
            "--factor belongs to another operator than blur",
        ),
        (("restore", "--operator", "blur", "--method", "clamped"), "must be a Mask, got Blur"),
        (("restore", "--iterations", 3), "--iterations belongs to --method latent"),
        (("restore", "--mask", "mask.npy"), r"must have the images' shape \[8, 8\]"),
        (
            ("restore", "--lr", 3, "--grad-through", "exact", "--method", "clamped"),
            "--grad-through, --lr belong to --method latent, got 'clamped'",
        ),
        (("restore", "--out", "folder.png"), "--out must be a file, got the folder folder.png"),
        (("interpolate", "--iterations", 3), "--iterations belongs to --images"),
        (
            ("interpolate", "--images", "digits", "--noise", "frozen"),
            "--noise belongs to random st",
        ),
        (("interpolate", "--images", "digits", "--n", 899), "at most 898, of 2 images each, .*899"),
        (("transfer", "--images", "digits", "--zeta", 1), "--zeta belongs to --content"),
        (
            ("transfer", "--images", "digits", "--content", 2, "--zeta", 0.01),
            "^error: transfer: zeta must be at least",
        ),
        (("transfer", "--images", "digits", "--weight", 2), "--weight belongs to --style"),
        (("transfer", "--images", "nowhere"), "'nowhere' is neither an existing path"),
        (("transfer", "--images", "digits", "--n", 2000), "at most 1797"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_commands_refuse(command: Any, run: Path, arguments: tuple[Any, ...], match: str) -> None:
    np.save("mask.npy", np.eye(5))
    Path("folder.png").mkdir()
    name, *options = arguments
    assert_refused(command(name, run, *options), match)


@pytest.mark.parametrize("name", ["reconstruct", "interpolate", "restore", "transfer"])
def test_runs_of_another_version(command: Any, run: Path, tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    tensors, info = read_checkpoint(other)
    save_checkpoint(
        checkpoint_path(other, 1), tensors, json.loads(json.dumps(info)) | {"version": 9}
    )
    options = ("--images", "digits") if name == "transfer" else ()
    assert_refused(command(name, other, *options), "of version 9; this fastlangevin reads")


def assert_refused(result: Any, match: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(match, line), line
