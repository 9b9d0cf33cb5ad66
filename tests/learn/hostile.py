"""Valid files of every kind that is read, what reads them, and how reading one that is not ends."""

import gzip
import io
import json
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fastlangevin.learn import html_report
from fastlangevin.learn.config import resolve, save_config
from fastlangevin.learn.data.load import load_images
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.sweep.plan import read_sweep
from fastlangevin.learn.tasks.measurements import make_operator

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
    html_report.to_html(path.parent)


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
    "config.yaml": (write_settings, lambda path: resolve(path)),
    "config.json": (write_settings, lambda path: resolve(path)),
    "config.toml": (write_settings, lambda path: resolve(path)),
    "plan.yaml": (write_sweep, lambda path: read_sweep(path)),
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
