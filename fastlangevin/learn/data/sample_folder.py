"""The format of a folder of samples: samples.json, and .npy files named by their first chain."""

from pathlib import Path

import numpy as np

from fastlangevin.learn.data.arrays import ArraySource, as_nchw, map_npy
from fastlangevin.learn.data.collect import RowWriter
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import check_inside, read_json

SAMPLES = "samples.json"
FORMAT, VERSION = "fastlangevin samples", 1
_MOST_FILES = 10**6


def shard_paths(folder: Path, n: int, per_file: int) -> list[Path]:
    """Return the paths of the files of n samples."""
    return [folder / f"{first:08d}.npy" for first in range(0, n, per_file)]


def read_shards(folder: Path, limit: int | None = None) -> ArraySource:
    """Read the samples of a folder, which must be complete, or the first ``limit`` of them.

    More than 256 MiB are copied to a temporary file. Raises FileError, naming a file, if one is
    missing or does not hold its samples.
    """
    file = folder / SAMPLES
    plan = read_json(file)
    valid = isinstance(plan, dict) and (plan.get("format"), plan.get("version")) == (
        FORMAT,
        VERSION,
    )
    n, per_file = (plan.get("n"), plan.get("per_file")) if valid else (None, None)
    if type(n) is not int or type(per_file) is not int or not 0 < n <= _MOST_FILES * per_file:
        raise FileError(f"{file} does not describe samples of this version of fastlangevin")
    paths = shard_paths(folder, n, per_file)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise FileError(
            f"{missing[0]} is missing, as are {len(missing)} of {len(paths)} files in all; the "
            "command that made the others continues with them"
        )
    count = n if limit is None else min(n, limit)
    writer: RowWriter | None = None
    for path in paths[: -(-count // per_file)]:
        check_inside(path, folder)
        rows = as_nchw(map_npy(path), str(path))
        expected = min(per_file, n - int(path.stem))
        if len(rows) != expected or (writer is not None and rows.shape[1:] != writer.shape):
            raise FileError(f"{path} must hold {expected} samples, got shape {list(rows.shape)}")
        writer = writer or RowWriter(count, rows.shape[1:], np.float32)
        for row in rows[: count - int(path.stem)]:
            writer.append(row)
    assert writer is not None
    return ArraySource(folder.name, writer.finish(), None)
