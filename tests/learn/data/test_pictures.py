"""Images from picture files: folders, sizes, modes and damaged files."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.errors import FileError
from tests.learn.data.shared import RNG, everything, noise, unit, write_png


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


# Folders
@pytest.mark.parametrize("in_file", [False, True])
def test_folder_of_classes(tmp_path, request, in_file):
    if in_file:
        request.getfixturevalue("spill")
    # Sorted by class, then by path; written in another order.
    names = ["ant/1.png", "ant/deep/0.PNG", "bee/0.png", "cat/0.png"]
    pictures = {name: noise(5, 6, 3) for name in names}
    for name in reversed(names):
        write_png(tmp_path / name, pictures[name])
    write_png(tmp_path / "cat/._0.png", noise(5, 6, 3))
    (tmp_path / "notes.txt").touch()
    data = load_images(str(tmp_path))
    assert data.shape == (3, 5, 6)
    expected = np.stack([pictures[name].transpose(2, 0, 1) for name in names])
    assert torch.equal(everything(data), unit(expected))
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert isinstance(data.pixels, np.memmap) == in_file
    limited = load_images(tmp_path, limit=3)
    assert torch.equal(everything(limited), unit(expected[:3]))
    assert limited.labels.tolist() == [0, 0, 1]

    write_png(tmp_path / "stray.png", noise(5, 6, 3))
    assert load_images(tmp_path).labels is None


def test_folder_of_splits(tmp_path):
    pictures = {split: noise(1, 4, 4) for split in ("train", "test")}
    for split, picture in pictures.items():
        write_png(tmp_path / "set" / split / "a" / "0.png", picture[0])
    for split, picture in pictures.items():
        data = load_images(tmp_path / "set", split=split)
        assert torch.equal(everything(data), unit(picture[None]))
        assert data.labels.tolist() == [0]
    # With a class beside them, train and test are classes too.
    write_png(tmp_path / "set" / "bus" / "0.png", pictures["train"][0])
    assert load_images(tmp_path / "set").labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="has no splits, got split='test'"):
        load_images(tmp_path / "set", split="test")


def test_colour_wins_in_a_mixed_folder(tmp_path):
    grey, colour = noise(5, 6), noise(5, 6, 3)
    write_png(tmp_path / "0.png", grey)
    assert load_images(tmp_path).shape == (1, 5, 6)
    write_png(tmp_path / "1.png", colour)
    expected = np.stack([grey[None].repeat(3, axis=0), colour.transpose(2, 0, 1)])
    assert torch.equal(everything(load_images(tmp_path)), unit(expected))
    # The colour picture is decoded ahead of need, but is not one of the images used.
    assert load_images(tmp_path, limit=1).shape == (1, 5, 6)

    luma = np.asarray(Image.fromarray(colour).convert("L"))
    as_grey = load_images(tmp_path, channels=1)
    assert torch.equal(everything(as_grey), unit(np.stack([grey, luma])[:, None]))


def test_transparency_becomes_white(tmp_path):
    rgba = np.dstack([noise(5, 6, 3), np.full((5, 6), 255, "u1")])
    rgba[1, 2] = 10, 20, 30, 0
    rgba[3, 3] = 0, 100, 200, 51
    expected = rgba[..., :3].copy()
    expected[1, 2] = 255
    expected[3, 3] = 204, 224, 244  # 0.2 colour + 0.8 white
    write_png(tmp_path / "pictures" / "0.png", rgba)
    np.save(tmp_path / "a.npy", rgba[None])
    for source in ("pictures", "a.npy"):
        data = load_images(tmp_path / source)
        assert torch.equal(everything(data), unit(expected.transpose(2, 0, 1)[None]))


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path):
    high = noise(4, 5)
    write_png(tmp_path / "0.png", high.astype(np.uint16) * 256 + noise(4, 5))
    assert torch.equal(everything(load_images(tmp_path)), unit(high[None, None]))


def test_exif_orientation_is_applied(tmp_path):
    pixels, exif = noise(4, 6), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    expected = np.rot90(pixels, k=-1)
    assert torch.equal(everything(load_images(tmp_path)), unit(expected[None, None]))


# Size
@pytest.mark.parametrize("kind", ["folder", "npy", "float npy"])
@pytest.mark.parametrize(("height", "width"), [(32, 51), (51, 32), (32, 32)])
def test_crop_keeps_the_centre(tmp_path, kind, height, width):
    """Without a change of scale no pixel may change."""
    pixels = noise(3, height, width)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = unit(pixels[:, None, top : top + 32, left : left + 32])
    if kind == "folder":
        for i, picture in enumerate(pixels):
            write_png(tmp_path / f"{i}.png", picture)
        data = load_images(tmp_path, size=32)
    else:
        stored = pixels if kind == "npy" else unit(pixels).numpy()
        np.save(tmp_path / "a.npy", stored)
        data = load_images(tmp_path / "a.npy", size=32)
    assert torch.equal(everything(data), expected)


@pytest.mark.parametrize("kind", ["folder", "npy", "float npy"])
def test_resize_of_a_ramp(tmp_path, kind):
    """Shrunk 4x, pixel i is the mean of 4 columns of the crop, but at the cut-off border."""
    ramp = np.broadcast_to(2 * np.arange(96, dtype=np.uint8), (1, 64, 96))
    if kind == "folder":
        write_png(tmp_path / "0.png", ramp[0])
        data = load_images(tmp_path, size=16)
    else:
        stored = ramp if kind == "npy" else ramp.astype(np.float32) / 255
        np.save(tmp_path / "a.npy", stored)
        data = load_images(tmp_path / "a.npy", size=16)
    assert data.shape == (1, 16, 16)
    levels = (everything(data)[0, 0].double() + 1) * 127.5
    expected = 2 * (16 + 4 * torch.arange(16, dtype=torch.float64) + 1.5)
    tolerance = 1e-4 if kind == "float npy" else 0.5
    assert (levels - expected)[:, 2:-2].abs().max() <= tolerance + 1e-4


def test_resize_is_antialiased(tmp_path):
    """One-pixel stripes shrink to their mean; sampling without a filter would keep 0 or 255."""
    stripes = np.zeros((1, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    np.save(tmp_path / "a.npy", stripes)
    levels = (everything(load_images(tmp_path / "a.npy", size=16)) + 1) * 127.5
    assert (levels - 127.5)[..., 2:-2].abs().max() <= 1


def test_float_overshoot_is_clipped(tmp_path):
    pixels = np.where(RNG.random((4, 3, 16, 16)) < 0.5, np.float32(-1), np.float32(1))
    np.save(tmp_path / "a.npy", pixels)
    batch = everything(load_images(tmp_path / "a.npy", size=24))
    assert batch.shape == (4, 3, 24, 24)
    assert (batch.min(), batch.max()) == (-1, 1)


def test_channels_of_arrays(tmp_path):
    grey, colour = noise(2, 5, 6), noise(2, 5, 6, 3)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "float.npy", colour.astype(np.float32) / 255)
    tripled = everything(load_images(tmp_path / "grey.npy", channels=3))
    assert torch.equal(tripled, unit(grey[:, None].repeat(3, axis=1)))
    luma = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in colour])
    as_grey = everything(load_images(tmp_path / "colour.npy", channels=1))
    assert torch.equal(as_grey, unit(luma[:, None]))
    as_float = everything(load_images(tmp_path / "float.npy", channels=1))
    assert (as_float - as_grey).abs().max() <= 1.01 / 255  # the integer luma is rounded


def test_mixed_sizes(tmp_path):
    write_png(tmp_path / "0.png", noise(8, 9))
    write_png(tmp_path / "1.png", noise(8, 10))
    with pytest.raises(ValueError, match=r"8x9 in .*0\.png and 8x10 in .*1\.png; pass size="):
        load_images(tmp_path)
    assert load_images(tmp_path, size=8).shape == (1, 8, 8)


# Corrupt and missing
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:20], id="header only"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"<html>not found</html>", id="other"),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_corrupt_pictures(tmp_path, kind, damage):
    good = [noise(32, 32, 3) for _ in range(40)]
    for i, pixels in enumerate(good):
        write_png(tmp_path / f"{i:02d}.png", pixels)
    (tmp_path / "05.x.jpg").write_bytes(damage(encoded(noise(32, 32, 3), kind)))
    (tmp_path / "31.x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r'05\.x\.jpg cannot be decoded \(.*on_corrupt="skip"'):
        load_images(tmp_path)
    with pytest.warns(UserWarning, match=r"skipped 2 corrupt .*05\.x\.jpg") as caught:
        data = load_images(tmp_path, on_corrupt="skip")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(everything(data), unit(np.stack(good).transpose(0, 3, 1, 2)))
    # The limit counts what is kept, and what lies behind it is no concern.
    with pytest.warns(UserWarning, match="skipped 1 corrupt"):
        limited = load_images(tmp_path, on_corrupt="skip", limit=20)
    assert torch.equal(everything(limited), everything(data)[:20])
    assert len(load_images(tmp_path, limit=5)) == 5


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; looked for .*\.png"):
        load_images(tmp_path)
    (tmp_path / "0.png").touch()
    with pytest.raises(ValueError, match="none of 1 images could be decoded"):
        load_images(tmp_path, on_corrupt="skip")


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"'digts'.*digits, fashion-mnist, mnist5k"
    ) as error:
        load_images("digts")
    assert str(tmp_path / "digts") in str(error.value)
    (tmp_path / "a.zip").touch()
    with pytest.raises(
        ValueError, match=r"must be \.npy, \.npz, \.parquet or a picture .*, got a\.zip"
    ):
        load_images("a.zip")
    # A name stands before a path, a path object is a path.
    write_png(tmp_path / "digits" / "0.png", noise(4, 5))
    assert load_images(Path("digits")).shape == (1, 4, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"channels": 2},
        {"limit": 0},
        {"on_corrupt": "ignore"},
        {"split": "test"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        load_images("digits", **arguments)


# Parquet files and the hub
def parquet_file(path, records, column="img", **columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    struct_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = {column: pyarrow.array(records, type=struct_type), **columns}
    parquet.write_table(pyarrow.table(table), path, row_group_size=2)


def test_parquet_folder(tmp_path):
    pictures = noise(5, 6, 7, 3)
    records = [{"bytes": encoded(picture), "path": None} for picture in pictures]
    parquet_file(tmp_path / "train-0.parquet", records[:3], label=[4, 0, 2])
    parquet_file(tmp_path / "train-1.parquet", records[3:4], label=[1])
    parquet_file(tmp_path / "test-0.parquet", records[4:], column="image")
    data, test = load_images(tmp_path), load_images(tmp_path, split="test")
    assert torch.equal(everything(data), unit(pictures[:4].transpose(0, 3, 1, 2)))
    assert data.labels.tolist() == [4, 0, 2, 1]
    assert torch.equal(everything(test), unit(pictures[4:].transpose(0, 3, 1, 2)))
    assert test.labels is None
    one = load_images(tmp_path / "train-1.parquet")
    assert torch.equal(everything(one), everything(data)[3:])
    with pytest.raises(FileNotFoundError, match=r"starts with 'val', it holds test-0\.parquet"):
        load_images(tmp_path, split="val")


def test_parquet_rows_that_fail(tmp_path):
    picture = noise(6, 7)
    records = [
        {"bytes": encoded(picture), "path": None},
        {"bytes": encoded(picture)[:50], "path": "a.png"},
        {"bytes": None, "path": None},
    ]
    path = tmp_path / "a.parquet"
    parquet_file(path, records, label=[1, 2, 3])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 "):
        load_images(path)
    with pytest.warns(UserWarning, match="skipped 2 corrupt"):
        data = load_images(path, on_corrupt="skip")
    assert torch.equal(everything(data), unit(picture[None, None]))
    assert data.labels.tolist() == [1]

    parquet_file(path, records, column="picture")
    with pytest.raises(ValueError, match=r"img or image, got \['picture'\]"):
        load_images(path)
    parquet_file(path, [])
    with pytest.raises(ValueError, match="holds no images"):
        load_images(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as a parquet file"):
        load_images(path)


def test_hub(monkeypatch, tmp_path):
    pictures = noise(3, 4, 5)
    write_png(tmp_path / "2.png", pictures[2])
    rows = [
        {"image": {"bytes": encoded(pictures[0]), "path": None}, "label": 2},
        {"image": {"bytes": encoded(pictures[1]), "path": "not read"}, "label": 0},
        {"image": {"bytes": None, "path": str(tmp_path / "2.png")}, "label": 1},
    ]

    class Rows(list):
        column_names = ("image", "label")

        def cast_column(self, column, feature):
            assert (column, feature) == ("image", ("Image", False))
            return self

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Rows(rows)

    fake = SimpleNamespace(
        load_dataset=load_dataset,
        Image=lambda decode: ("Image", decode),
        config=SimpleNamespace(HF_DATASETS_CACHE=tmp_path),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = load_images("hub:owner/name", split="validation")
    assert asked == [("owner/name", "validation")]
    assert torch.equal(everything(data), unit(pictures[:, None]))
    assert data.labels.tolist() == [2, 0, 1]
    # A path of the data set's own making may name any file here.
    fake.config = SimpleNamespace(HF_DATASETS_CACHE=tmp_path / "cache", HF_HUB_CACHE=None)
    with pytest.raises(FileError, match=r"^hub:owner/name, row 2 has a picture at .* is outside"):
        load_images("hub:owner/name")


@pytest.mark.slow
def test_cifar10():
    root = os.environ.get("FASTLANGEVIN_DATA")
    if root is None or not (Path(root) / "cifar10").is_dir():
        pytest.skip("FASTLANGEVIN_DATA names no folder that holds cifar10/")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = Path(root) / "cifar10"
    data = load_images(folder, split="test")
    assert (len(data), data.shape) == (10_000, (3, 32, 32))
    assert np.bincount(data.labels).tolist() == [1000] * 10
    (path,) = folder.glob("test-*.parquet")
    row = parquet.read_table(path).slice(1234, 1).to_pylist()[0]
    pixels = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))).transpose(2, 0, 1)
    assert torch.equal(data.batch([1234]), unit(pixels[None]))
    assert data.labels[1234] == row["label"]
