"""The operators of restore: adjoints, norms, masks from files, and what is not linear."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import (
    restore,
)
from fastlangevin.learn.tasks.measurements import (
    Blur,
    Downsample,
    Grey,
    Mask,
    adjoint,
    check_operator,
    make_operator,
    norm,
    picture,
)
from tests.learn.tasks.shared import BOX, SHAPE, dense, images, net


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
        ("alpha.png", "cannot be read as a mask: it has transparent pixels"),
        ("key.png", "cannot be read as a mask: it has transparent pixels"),
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
