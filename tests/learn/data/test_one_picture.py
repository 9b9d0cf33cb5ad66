"""One picture as a source of images, in Python and in commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastlangevin.learn import load_images
from tests.command import run_command


def picture(path: Path, mode: str = "RGB") -> np.ndarray:
    pixels = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path)
    return np.asarray(image)


@pytest.mark.parametrize("name", ["one.png", "ONE.PNG", "one.bmp"])
def test_one_picture_is_a_set_of_one(name: str, tmp_path: Path) -> None:
    pixels = picture(tmp_path / name)
    data = load_images(tmp_path / name)
    assert (len(data), data.labels) == (1, None)
    assert data.name == f"{name}, 1 x 3x12x8"
    assert np.array_equal(data.pixels[0], pixels.transpose(2, 0, 1))


def test_one_picture_is_cropped_resized_and_made_grey(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    assert load_images(str(tmp_path / "one.png"), size=4, channels=1).pixels.shape == (1, 1, 4, 4)
    assert len(load_images(tmp_path / "one.png", limit=3)) == 1


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png.*it is none of BMP, GIF"):
        load_images(tmp_path / "text.png")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must be \.npy, .* or a picture \(\.bmp .*\), got .*txt"):
        load_images(tmp_path / "text.txt")
    picture(tmp_path / "one.png")
    with pytest.raises(ValueError, match="has no splits, got split='test'"):
        load_images(tmp_path / "one.png", split="test")


FIT = ("--restarts", 1, "--iterations", 1)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (("reconstruct", "--samples", 1, *FIT, "--out", "x.npz"), (1, 1, 8, 8)),
        (("restore", "--answers", 2, "--out", "x.npz"), (1, 2, 1, 8, 8)),
        (("transfer", "--out", "x.npy"), (1, 1, 8, 8)),
    ],
    ids=lambda value: str(value[0]),
)
def test_commands_take_one_picture(
    arguments: tuple[Any, ...], shape: tuple[int, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "one.png")
    name, *options = arguments
    done = run_command(name, "digits", "--steps", 1, "--images", "one.png", *options)
    assert done.exit_code == 0, done.output
    found = np.load(options[-1])
    assert (found if options[-1].endswith(".npy") else found["x"]).shape == shape


def test_a_pair_needs_two_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "one.png")
    done = run_command("interpolate", "digits", "--images", "one.png", *FIT)
    assert done.exit_code == 1
    assert done.stderr.endswith("\nerror: images must be 2 or more, got 1: one.png, 1 x 1x8x8\n")
