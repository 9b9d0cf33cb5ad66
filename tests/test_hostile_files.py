"""Files damaged or made to harm: one error that names them, soon and in little memory."""

import gzip
import io
import json
import os
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastlangevin.energies import ConvEnergy
from fastlangevin.learn import features, reading, report
from fastlangevin.learn.checkpoint import save_checkpoint
from fastlangevin.learn.config import resolve, save_config
from fastlangevin.learn.data import load_images
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.operators import make_operator
from fastlangevin.learn.sweep import read_sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes, /proc")

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (4, 8, 8), dtype=np.uint8)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
BOUND = 64 * 2**20


class Hung(BaseException):
    """No Exception, so that no reader takes it for a damaged file."""


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A reader that waits, for a pipe say, fails its test instead of stopping them all."""

    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Valid files of every kind, and what reads them ---------------------------------------------------


def encoded(kind: str, pixels: np.ndarray = PIXELS[0]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def write_array(path: Path) -> None:
    np.save(path, PIXELS)


def write_archive(path: Path) -> None:
    np.savez_compressed(path, x=PIXELS, y=np.arange(4))


def write_idx(path: Path) -> None:
    content = struct.pack(">4I", 0x803, *PIXELS.shape) + PIXELS.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_parquet(path: Path, *rows: dict[str, Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    found = list(rows) or [{"bytes": encoded("PNG", each), "path": None} for each in PIXELS]
    columns = {"img": pyarrow.array(found, type=kind), "label": pyarrow.array([1] * len(found))}
    parquet.write_table(pyarrow.table(columns), path)


def write_picture(path: Path) -> None:
    path.write_bytes(encoded({".tif": "TIFF"}.get(path.suffix, path.suffix[1:].upper())))


def write_settings(path: Path) -> None:
    settings = {"steps": 5, "clamp": [-1.0, 1.0], "data": "digits", "lr": 1e-3}
    if path.suffix == ".toml":
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    else:
        path.write_text(json.dumps(settings) if path.suffix == ".json" else yaml.dump(settings))


def write_sweep(path: Path) -> None:
    path.write_text(yaml.dump({"data": "digits", "axes": {"steps": [1, 2]}, "seeds": 2}))


EVALUATION = {
    "format": "fastlangevin evaluation", "version": 1, "iteration": 20, "levels": 256,
    "features": "pixels", "dimension": 64, "reference_images": 9, "reference": "train",
    "reference_rank": 8, "k": 3, "neighbours": 5, "training_images": 9, "inception": False,
    "figures": {"samples": {"frechet_distance": 1.5}},
}  # fmt: skip


def write_run(path: Path) -> None:
    """Into the folder of ``path``, all that a report reads."""
    save_config(resolve("digits"), path.parent / "config.yaml")
    records = [{"iteration": i, "gap": 0.5 * i, "lr": 0.1} for i in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path.parent / "metrics.jsonl").write_text(lines)
    (path.parent / "evaluate.json").write_text(json.dumps(EVALUATION))
    write_picture(path.parent / "shown.png")
    (path.parent / "shown.txt").write_text("ratio 0.1\n")


def mask(path: Path) -> None:
    make_operator("mask", (1, 8, 8), mask=str(path))


def page(path: Path) -> None:
    report.to_html(path.parent)


# Name of a file -> what writes it and what reads it.
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "a.npy": (write_array, load_images),
    "a.npz": (write_archive, load_images),
    "train-images-idx3-ubyte": (write_idx, lambda path: load_images(path.parent)),
    "train-images-idx3-ubyte.gz": (write_idx, lambda path: load_images(path.parent, limit=2)),
    "a.parquet": (write_parquet, load_images),
    "train.parquet": (write_parquet, lambda path: load_images(path.parent)),
    **{
        f"a.{kind}": (write_picture, lambda path: load_images(path.parent))
        for kind in ("png", "jpeg", "gif", "bmp", "ppm", "tif", "webp")
    },
    "mask.png": (lambda path: path.write_bytes(encoded("PNG", PIXELS[0] // 99)), mask),
    "mask.npy": (lambda path: np.save(path, PIXELS[0] > 99), mask),
    "config.yaml": (write_settings, lambda path: resolve(file=path)),
    "config.json": (write_settings, lambda path: resolve(file=path)),
    "config.toml": (write_settings, lambda path: resolve(file=path)),
    "plan.yaml": (write_sweep, lambda path: read_sweep(file=path)),
    "evaluate.json": (write_run, page),
    "metrics.jsonl": (write_run, page),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def outcome(read: Callable[[Path], Any], path: Path) -> FileError | None:
    """What reading ended in; the test fails unless it is a short FileError that names the file."""
    found = None
    try:
        read(path)
    except FileError as error:
        found = error
    if found is not None:
        # Its folder where that is what is read and nothing is left in it.
        assert str(found).startswith(str(path.parent))
        assert path.name in str(found) or "no images" in str(found)
        assert len(str(found)) < 1500 + len(str(path))
    return found


def peak(read: Callable[[Path], Any], path: Path) -> int:
    """Bytes by which the process grew at most meanwhile."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    before = status("VmRSS")
    assert outcome(read, path) is not None, path
    return status("VmHWM") - before


@every_kind
def test_valid_files_are_read(name: str, tmp_path: Path) -> None:
    """Without this the other tests would show nothing."""
    write, read = KINDS[name]
    write(tmp_path / name)
    assert outcome(read, tmp_path / name) is None


# Damage -------------------------------------------------------------------------------------------


@every_kind
def test_damaged_files_end_in_one_error(name: str, tmp_path: Path) -> None:
    """Cut, with other bytes, of another kind; what can still be read may be."""
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    size = len(whole)
    cuts = [whole[:n] for n in {0, 1, 7, size // 3, size // 2, size - 9, size - 1}]
    places = {*range(0, min(size, 32), 3), *range(size // 20, size, max(1, size // 12))}
    flips = [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in places]
    others = [POSTSCRIPT, b"\xff\xfe" * 50, b"\x00" * 300, b"[" * 60_000, b"a: " * 9000, b"\n" * 9]
    others += [encoded("PNG"), b"PK\x03\x04" + bytes(99), b"PAR1" + bytes(40) + b"PAR1"]
    found = []
    for content in [*cuts, *flips, *others]:
        path.write_bytes(content)
        found.append(outcome(read, path))
    if name != "metrics.jsonl":  # of which whole lines count
        assert any(found[: len(cuts)])
        assert found[len(cuts + flips)] is not None, "PostScript"


@every_kind
def test_what_is_no_regular_file_is_refused(name: str, tmp_path: Path) -> None:
    """Neither waited for nor read: a folder, a pipe, a device, a file that the kernel denies."""
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    for place in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to(path),
        lambda: path.mkdir(),
    ):
        path.unlink()
        place()
        assert outcome(read, path) is not None


@every_kind
@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_named(name: str, tmp_path: Path) -> None:
    write, read = KINDS[name]
    write(tmp_path / name)
    (tmp_path / name).chmod(0)
    assert outcome(read, tmp_path / name) is not None


# Values of a wrong type ---------------------------------------------------------------------------

LARGE = 10**400
WRONG = (None, [], {}, "x", -1, 1e308, float("nan"), [[1]], LARGE)


def mutations(value: Any, wrong: tuple[Any, ...] = WRONG) -> Iterator[Any]:
    """A JSON value with every part replaced, once by each wrong one, and once left out."""
    yield from wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts if isinstance(value, dict | list) else ():
        for other in mutations(part) if isinstance(part, dict | list) else wrong:
            changed = value.copy()
            changed[key] = other
            yield changed
        changed = value.copy()
        del changed[key]
        yield changed


def test_settings_of_a_wrong_type_name_their_file(tmp_path: Path) -> None:
    path, count = tmp_path / "config.json", 0
    for name, value in json.loads(json.dumps(vars(resolve("digits")))).items():
        for changed in mutations({name: value}, wrong=(None, [], {}, "x", LARGE)):
            path.write_text(json.dumps(changed))
            count += outcome(lambda path: resolve(file=path), path) is not None
    assert count > 100


def test_sweeps_of_wrong_types_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = {"axes": {"steps": [1, 2]}, "seeds": 2, "grid": True, "preset": "digits", "width": 4}
    found = []
    for changed in mutations(plan):
        path.write_text(json.dumps(changed))
        found.append(outcome(lambda path: read_sweep(file=path), path))
    assert sum(error is not None for error in found) > len(found) / 2
    plan["axes"] = {name: list(range(1, 200)) for name in ("steps", "width", "samples", "limit")}
    path.write_text(json.dumps(plan))
    assert "at most 10000 runs" in str(outcome(lambda path: read_sweep(file=path), path))


@pytest.mark.parametrize("name", ["evaluate.json", "metrics.jsonl"])
def test_results_of_wrong_types_name_their_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_run(path)
    value = EVALUATION if name == "evaluate.json" else {"iteration": 5, "gap": 0.1, "lr": 0.2}
    before = path.read_text() if name == "metrics.jsonl" else ""
    for changed in mutations(value):
        path.write_text(before + json.dumps(changed) + "\n")
        outcome(page, path)
    path.write_text(before + '{"iteration": 5, "gap": ' + "[" * 90_000 + "\n")
    assert outcome(page, path) is not None


def test_headers_of_models_of_wrong_types_name_their_file(tmp_path: Path) -> None:
    """Those that commands and reports read: the run's settings, the sampler's, the energy's."""
    from fastlangevin.cli.app import run_config

    path, energy = tmp_path / "m.safetensors", ConvEnergy(1, 8, 1)
    tensors = {f"model.{name}": value for name, value in energy.state_dict().items()}
    info = {
        "config": {"steps": 5, "clamp": [-1, 1], "data": "digits"},
        "energy": energy.settings(),
        "sampler": {"steps": 5, "step_size": 0.1},
        "iteration": 3,
    }
    for changed in mutations(info):
        if not isinstance(changed, dict) or "version" in changed:
            continue
        save_checkpoint(path, tensors, changed)
        outcome(report.to_html, path)
        if changed.get("config") is not None and isinstance(changed.get("iteration"), int):
            outcome(run_config, path)


# Small files that claim much ----------------------------------------------------------------------


def npy_header(shape: str, descr: str = "'|u1'", length: int | None = None) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length or len(text)) + text


def png_claiming(width: int, height: int, kind: int = 6) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    row = zlib.compress(bytes(1 + 4 * width) * min(height, 600))
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


def claims() -> Iterator[tuple[str, bytes]]:
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
    for sizes in ((2**32 - 1,) * 3, (2**31, 28, 28), (100_000, 28, 28)):
        header = struct.pack(">4I", 0x803, *sizes)
        yield "train-images-idx3-ubyte", header + bytes(999)
        yield "train-images-idx3-ubyte.gz", gzip.compress(header + bytes(80_000_000), 9)
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


CLAIMS = list(claims())


@pytest.mark.parametrize("name", sorted({name for name, _ in CLAIMS}))
def test_small_files_take_little_memory(name: str, tmp_path: Path) -> None:
    write, read = KINDS[name]
    path = tmp_path / name
    write(path)
    assert outcome(read, path) is None  # what the first call loads is loaded
    for content in (content for other, content in CLAIMS if other == name):
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
    images = RNG.integers(0, 256, (20_000, 28, 28), dtype=np.uint8)
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


def test_webs_of_links_end(tmp_path: Path) -> None:
    """Twenty folders, each linked twice from the one before, are a million paths."""
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"{i}" / name).symlink_to(f"../{i + 1}")
    (tmp_path / "20").mkdir()
    with pytest.raises(FileError, match=r"is a link beyond the first 1000 to folders"):
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
        report.to_html(run)


def test_weights_of_features_that_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(features, "_weights", lambda *_: path)
    np.save(tmp_path / "a.npy", PIXELS)
    data = load_images(tmp_path / "a.npy")
    torch.save({"_fc.weight": torch.zeros(3)}, path)
    whole = path.read_bytes()
    for content in (whole, whole[:300], b"", b"[1", POSTSCRIPT):
        path.write_bytes(content)
        read = lambda _: features.make_features("efficientnet-lite0", data)  # noqa: E731
        assert outcome(read, path) is not None


# What errors show ---------------------------------------------------------------------------------


def test_values_in_errors_are_short() -> None:
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    own: list[Any] = []
    own.append(own)
    many = {str(i): [i] * 50 for i in range(10_000)}
    for value in (nested, own, many, "x" * 10**6, LARGE, 10**9000, b"y" * 10**6, {1: {2: {3: {}}}}):
        assert len(reading.brief(value)) < 250
    for value in (None, 5, -0.1, "text", [1, 2], {"lo": -1.0, "hi": 1.0}, (1, "a")):
        assert reading.brief(value) == repr(value)
