"""Batches of loaded images: their order, copies and threads."""

import warnings

import numpy as np
import pytest
import torch

from fastlangevin.learn.data import collect
from fastlangevin.learn.data.load import load_images
from tests.learn.data.shared import everything, noise, unit, write_png


# Batches
@pytest.fixture
def small(tmp_path):
    pixels = noise(5, 3, 4, 6)
    np.save(tmp_path / "a.npy", pixels)
    return load_images(tmp_path / "a.npy"), pixels


def test_batch_maps_every_level(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.save(tmp_path / "a.npy", levels)
    batch = everything(load_images(tmp_path / "a.npy"))
    assert torch.equal(batch, unit(levels))
    assert (batch.min(), batch.max()) == (-1, 1)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "float"])
def test_flip(tmp_path, layout):
    pixels = noise(5, 3, 5, 6)
    stored = {
        "NCHW": pixels,
        "NHWC": pixels.transpose(0, 2, 3, 1),
        "float": unit(pixels).numpy(),
    }[layout]
    np.save(tmp_path / "a.npy", stored)
    data = load_images(tmp_path / "a.npy")
    flip = torch.tensor([True, False, True, False])
    expected = unit(pixels[[4, 4, 0, 1]])
    expected[flip] = expected[flip].flip(-1)
    batch = data.batch([4, 4, 0, 1], flip=flip)
    assert torch.equal(batch, expected)
    assert batch.is_contiguous()
    # The stored images are as before.
    assert torch.equal(everything(data), unit(pixels))


def test_batch_is_a_copy(small):
    data, pixels = small
    data.batch([0]).zero_()
    assert torch.equal(data.batch([0]), unit(pixels[:1]))


def test_batch_of_none(small):
    data, _ = small
    nothing = torch.empty(0, dtype=torch.int64)
    batch = data.batch(nothing, flip=torch.empty(0, dtype=torch.bool))
    assert (batch.shape, batch.dtype) == ((0, 3, 4, 6), torch.float32)


@pytest.mark.parametrize(
    ("indices", "flip", "error", "message"),
    [
        ([0, 5], None, IndexError, r"0 \.\. 4, got 0 \.\. 5"),
        ([-1], None, IndexError, r"0 \.\. 4, got -1"),
        (torch.tensor([0.0]), None, TypeError, "integers, got float32"),
        (torch.tensor([True]), None, TypeError, "integers, got bool"),
        (torch.tensor([[0]]), None, ValueError, r"\[n\], got \[1, 1\]"),
        ([0, 1], torch.tensor([True]), ValueError, r"flip must have shape \[2\], got \[1\]"),
        ([0, 1], torch.tensor([1, 0]), TypeError, "flip must be bool, got int64"),
    ],
)
def test_batch_refuses(small, indices, flip, error, message):
    data, _ = small
    with pytest.raises(error, match=message):
        data.batch(indices, flip)


def test_threads_do_not_change_the_order(tmp_path, monkeypatch):
    sizes = [(40, 40), (200, 200), (64, 90)]
    for i in range(60):
        write_png(tmp_path / f"{i:02d}.png", noise(*sizes[i % 3], 3))
    runs = []
    for cores in (1, 8):
        monkeypatch.setattr(collect.os, "cpu_count", lambda cores=cores: cores)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runs.append(load_images(tmp_path, size=16).pixels)
    np.testing.assert_array_equal(runs[0], runs[1])
    single = load_images(tmp_path, size=16, limit=1).pixels
    np.testing.assert_array_equal(single[0], runs[0][0])
