"""Small files that claim much, links, pipes and programs: little memory, soon, in the folder."""

import functools
import gzip
import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastlangevin.learn import html_report
from fastlangevin.learn.data import pictures
from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.errors import FileError
from tests.learn.hostile import (
    BOUND,
    KINDS,
    PIXELS,
    POSTSCRIPT,
    RNG,
    encoded,
    mask,
    no_waiting,  # noqa: F401  (used by every test)
    outcome,
    peak,
    write_parquet,
    write_picture,
    write_run,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes, /proc")

# Small files that claim much ----------------------------------------------------------------------


def npy_header(shape: str, descr: str = "'|u1'", length: int | None = None) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length or len(text)) + text


def png_claiming(width: int, height: int, kind: int = 6) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    row = zlib.compress(bytes(1 + 4 * width) * min(height, 60))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def aliases(leaf: str, form: str, levels: int = 9) -> bytes:
    """Nine levels, each nine times the one before."""
    lines = [f"a0: &a0 {leaf}"]
    for i in range(1, levels):
        lines.append(form.format(i=i, items=", ".join([f"*a{i - 1}"] * 9)))
    return "\n".join(lines).encode()


# What `claims` makes files of. Making them takes seconds, so not while tests are collected.
CLAIMING = {
    *("a.bmp", "a.gif", "a.npy", "a.npz", "a.png", "a.ppm", "mask.npy", "mask.png"),
    *("config.json", "config.toml", "config.yaml", "evaluate.json", "plan.yaml"),
    *("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"),
}


@functools.cache
def claims() -> list[tuple[str, bytes]]:
    return list(_claims())


def _claims() -> Iterator[tuple[str, bytes]]:
    """Names of files, and contents of at most 300 KB that stand for a gigabyte or more."""
    for shape in ("(1000000, 1000, 1000)", "(2**62, 4, 4)", "(-1, 8, 8)", "(4611686018427387905,)"):
        yield "a.npy", npy_header(shape.replace("2**62", str(2**62))) + bytes(64)
        yield "a.npz", zipped("x.npy", npy_header(shape.replace("2**62", str(2**62))) + bytes(64))
        yield "mask.npy", npy_header(shape.replace("2**62", str(2**62))) + bytes(64)
    yield "a.npy", npy_header("(1, 8, 8)", length=2**31)
    yield "a.npy", npy_header("(4,)", "'V4000000000'")
    yield "a.npy", npy_header("(" * 3000 + ")" * 3000)
    yield "a.npz", zipped("x.npy", npy_header("(70000, 32, 32)") + bytes(70000 * 1024))
    yield "a.npz", zipped("notes.txt", b"no arrays")
    yield "a.npz", zipped("x", npy_header("(1, 8, 8)") + bytes(64))
    zeros = gzip.compress(bytes(80_000_000), 9)
    for sizes in ((2**32 - 1,) * 3, (2**31, 28, 28), (100_000, 28, 28)):
        header = struct.pack(">4I", 0x803, *sizes)
        yield "train-images-idx3-ubyte", header + bytes(999)
        yield "train-images-idx3-ubyte.gz", gzip.compress(header) + zeros
    for width, height in ((30_000, 30_000), (13_000, 13_000), (9400, 9400), (4000, 4000)):
        for name in ("a.png", "mask.png"):
            yield name, png_claiming(width, height)
    yield "a.ppm", b"P6 20000 20000 255\n" + bytes(99)
    yield "a.bmp", encoded("BMP")[:18] + struct.pack("<ii", 12_000, 12_000) + encoded("BMP")[26:]
    yield "a.gif", b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + encoded("GIF")[10:]
    for name in ("config.yaml", "plan.yaml"):
        yield name, aliases("[x, x]", "a{i}: &a{i} [{items}]") + b"\nlr: *a8\n"
        yield name, aliases("[x, x]", "a{i}: &a{i} [{items}]") + b"\naxes: {steps: *a8}\n"
        yield name, aliases("{x: 1}", "a{i}: &a{i} {{<<: [{items}]}}")
        yield name, b"lr: &a [*a]\n"
        yield name, b"lr: 0x" + b"f" * 50_000
    yield "config.toml", b".".join([b"a"] * 30_000) + b" = 1\n"
    yield "config.json", b'{"lr": ' + b"[" * 60_000 + b"]" * 60_000 + b"}"
    yield "evaluate.json", b'{"a":' * 50_000


def test_every_kind_of_file_claims_something() -> None:
    assert {name for name, _ in claims()} == CLAIMING


@pytest.mark.parametrize("name", sorted(CLAIMING))
def test_small_files_take_little_memory(name: str, tmp_path: Path) -> None:
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    assert outcome(read, path) is None  # what the first call loads is loaded
    for content in (content for other, content in claims() if other == name):
        assert len(content) < 300_000
        path.write_bytes(content)
        assert peak(read, path) < BOUND, content[:60]


def test_sparse_files_take_little_memory(tmp_path: Path) -> None:
    """A terabyte of holes takes no room on the disk."""
    for name in ("a.png", "mask.png", "mask.npy", "config.yaml", "config.json", "evaluate.json"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / name
        KINDS[name][0](path)
        path.write_bytes(path.read_bytes()[:6])
        os.truncate(path, 2**40)
        assert peak(KINDS[name][1], path) < BOUND


def test_a_parquet_file_that_claims_too_much(tmp_path: Path) -> None:
    """One row 100,000 times, and 40 MB of zeros in a row, are a few KB."""
    path = tmp_path / "a.parquet"
    write_parquet(path)
    load_images(path, limit=1)
    for rows in ([{"bytes": None, "path": "a.png"}] * 100_000, [{"bytes": bytes(4 * 10**7)}]):
        write_parquet(path, *rows)
        assert peak(load_images, path) < BOUND


def test_few_images_are_read_of_a_packed_file(tmp_path: Path) -> None:
    """What follows the first two images is not unpacked: its damage is not met."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    images = RNG.integers(0, 256, (4000, 28, 28), dtype=np.uint8)
    packed = gzip.compress(struct.pack(">4I", 0x803, *images.shape) + images.tobytes(), 1)
    path.write_bytes(packed[: len(packed) // 2])
    np.testing.assert_array_equal(load_images(tmp_path, limit=2).pixels, images[:2, None])
    assert outcome(lambda path: load_images(path.parent), path) is not None


# Programs and places ------------------------------------------------------------------------------


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    mark = tmp_path / "mark"
    for program in ("gs", "gswin32c", "djpeg", "convert"):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once
    for kind in ("png", "jpeg", "tif", "webp"):
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / f"a.{kind}"
        path.write_bytes(POSTSCRIPT)
        assert outcome(lambda path: load_images(path.parent), path) is not None
        assert outcome(mask, path) is not None
    write_parquet(tmp_path / "a.parquet", {"bytes": POSTSCRIPT, "path": None})
    assert outcome(load_images, tmp_path / "a.parquet") is not None
    assert not mark.exists()


def test_a_parquet_row_names_pictures_in_its_own_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "set", tmp_path / "outside.png"
    folder.mkdir()
    write_picture(outside)
    write_picture(folder / "inside.png")
    (folder / "link.png").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    path = folder / "a.parquet"
    for inside in ("inside.png", str(folder / "inside.png"), "../set/inside.png"):
        write_parquet(path, {"bytes": None, "path": inside})
        np.testing.assert_array_equal(load_images(path).pixels[0, 0], PIXELS[0])
    for other in (
        str(outside), "../outside.png", "link.png", "pipe.png", "/dev/zero", "/etc/hostname",
        "a\0b", "x" * 5000, "a.parquet/x", ".",
    ):  # fmt: skip
        write_parquet(path, {"bytes": None, "path": other})
        with pytest.raises(FileError, match=f"^{folder}"):
            load_images(path, on_corrupt="skip")  # refused, not left out


def test_links_are_followed_in_the_folder_and_refused_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
    write_picture(folder / "ant" / "0.png")
    (folder / "ant" / "1.png").symlink_to("0.png")
    (folder / "cat").symlink_to("ant")
    (folder / "bee" / "deep").symlink_to("../ant", target_is_directory=True)
    data = load_images(folder)
    assert (len(data), data.labels.tolist()) == (6, [0, 0, 1, 1, 2, 2])
    whole = tmp_path / "alias"
    whole.symlink_to(folder)
    assert len(load_images(whole)) == 6
    (tmp_path / "other").mkdir()
    write_picture(tmp_path / "other" / "0.png")
    for target in (tmp_path / "other", tmp_path / "other" / "0.png", "/dev/zero", "nowhere", ".",
                   "..", tmp_path, "../set", "l.png"):  # fmt: skip
        link = folder / "bee" / "l.png"
        link.symlink_to(target)
        error = outcome(lambda path: load_images(folder), link)
        assert str(link) in str(error), target
        link.unlink()
    for name in ("a.parquet", "train-images-idx3-ubyte"):
        KINDS[name][0](tmp_path / "other" / name)
        (tmp_path / name).mkdir()
        link = tmp_path / name / name.replace("a.", "train.")
        link.symlink_to(tmp_path / "other" / name)
        assert outcome(lambda path: load_images(path.parent), link) is not None


def test_webs_of_links_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty folders, each linked twice from the one before, are a million paths."""
    monkeypatch.setattr(pictures, "_MOST_LINKED", 100)
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"{i}" / name).symlink_to(f"../{i + 1}")
    (tmp_path / "20").mkdir()
    with pytest.raises(FileError, match=r"is a link beyond the first 100 to folders"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "name", ["shown.png", "shown.txt", "evaluate.json", "metrics.jsonl", "samples.png",
             "diagnose.json", "samples/00000010.png"],
)  # fmt: skip
def test_a_report_shows_nothing_from_outside_its_folder(name: str, tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    (run / "samples").mkdir(parents=True)
    write_run(run / "evaluate.json")
    secret.write_text("secret")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(FileError, match=f"^{run / name} leads to {secret}, outside"):
        html_report.to_html(run)
