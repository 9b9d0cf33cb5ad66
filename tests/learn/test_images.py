"""Grids of samples, pixel by pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastlangevin.learn import image_grid, save_grid
from fastlangevin.learn.images import to_grid

W = 255  # the border


def test_a_small_grid_is_exact() -> None:
    """Three grey 2 x 2 images in two columns, one pixel each: levels round((x + 1) 127.5)."""
    images = torch.tensor([[-1.0, 1.0, 0.0, -0.5], [2.0, -3.0, 0.5, 0.25], [1.0, -1.0, -1.0, 1.0]])
    want = [
        [W, W, W, W, W, W, W, W, W, W],
        [W, W, W, W, W, W, W, W, W, W],
        [W, W, 0, 255, W, W, 255, 0, W, W],
        [W, W, 128, 64, W, W, 191, 159, W, W],
        [W, W, W, W, W, W, W, W, W, W],
        [W, W, W, W, W, W, W, W, W, W],
        [W, W, 255, 0, W, W, W, W, W, W],
        [W, W, 0, 255, W, W, W, W, W, W],
        [W, W, W, W, W, W, W, W, W, W],
        [W, W, W, W, W, W, W, W, W, W],
    ]
    grid = to_grid(images.view(3, 1, 2, 2), columns=2, tile=1)
    assert grid.dtype == np.uint8
    assert np.array_equal(grid, np.repeat(np.array(want)[..., None], 3, axis=2))


def test_colours_keep_their_places() -> None:
    images = torch.full((1, 3, 2, 3), -1.0)
    images[0, 0, 0, 0] = images[0, 1, 0, 1] = images[0, 2, 1, 2] = 1.0
    inside = to_grid(images, tile=1)[2:-2, 2:-2]
    want = np.zeros((2, 3, 3), np.uint8)
    want[0, 0, 0] = want[0, 1, 1] = want[1, 2, 2] = 255
    assert np.array_equal(inside, want)


def test_small_images_are_enlarged_by_repeating_pixels() -> None:
    """8 x 8 at the default tile of 32: every pixel becomes a square of 4 x 4."""
    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    inside = to_grid(images)[2:-2, 2:-2]
    assert inside.shape == (32, 32, 3)
    assert np.array_equal(inside, np.kron(to_grid(images, tile=1)[2:-2, 2:-2], np.ones((4, 4, 1))))


@pytest.mark.parametrize(
    ("n", "size", "columns", "height", "width"),
    [
        (64, 32, None, 8 * 34 + 2, 8 * 34 + 2),
        (5, 8, None, 2 * 34 + 2, 3 * 34 + 2),
        (5, 64, 5, 66 + 2, 5 * 66 + 2),
        (1, 20, None, 24, 24),
        (4, 3, 1, 4 * 32 + 2, 34),
    ],
)
def test_size_of_a_grid(n: int, size: int, columns: int | None, height: int, width: int) -> None:
    assert to_grid(torch.zeros(n, 1, size, size), columns).shape == (height, width, 3)


def test_a_saved_grid_is_a_png_of_the_same_pixels(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(images, tmp_path / "new" / "grid.png", columns=2, tile=14)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), to_grid(images, columns=2, tile=14))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_images_are_read_and_not_changed() -> None:
    images = torch.full((2, 1, 4, 4), 3.0, requires_grad=True)
    to_grid(images)
    assert torch.equal(images, torch.full((2, 1, 4, 4), 3.0))


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 8, 8), (0, 1, 8, 8), (4, 4, 8, 8)], ids=str)
def test_tensors_that_are_no_images_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images must be \[n, 1 or 3, H, W\], got \[") as caught:
        save_grid(torch.zeros(shape), tmp_path / "grid.png")
    assert str(list(shape)) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "columns", "error", "match"),
    [
        (np.zeros((2, 1, 8, 8)), None, TypeError, "images must be a tensor, got ndarray"),
        (torch.zeros(2, 1, 8, 8), 0, ValueError, "columns must be at least 1, got 0"),
        (torch.zeros(2, 1, 8, 8), 1.5, TypeError, "columns must be an integer, got 1.5"),
    ],
)
def test_wrong_grid_settings_are_refused(
    images: Any, columns: Any, error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"to_grid: {match}"):
        save_grid(images, tmp_path / "grid.png", columns)
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_a_grid_of_samples() -> None:
    images = torch.rand(5, 3, 4, 4)
    picture = image_grid(images, columns=3)
    assert (picture._repr_png_() or b"").startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(picture), to_grid(images, columns=3))


def test_the_states_of_a_trajectory_are_rows() -> None:
    states = torch.rand(2, 3, 1, 4, 4)
    rows = to_grid(torch.cat([states[0], states[1]]), columns=3)
    assert np.array_equal(np.asarray(image_grid(states)), rows)


def test_a_grid_of_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be \[n, 1 or 3, H, W\], got \[0, 1, 4, 4\]"):
        image_grid(torch.zeros(2, 0, 1, 4, 4))
    with pytest.raises(TypeError, match="images must be a tensor, got list"):
        image_grid([1])  # type: ignore[arg-type]
