"""The records of a run: metrics.jsonl, series.jsonl and, if it is installed, TensorBoard's."""

import importlib.util
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastlangevin.learn.atomic import save_text, sync
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.images import save_grid, to_grid
from fastlangevin.learn.reading import check_file

_ALWAYS_MEASURED = ("gap", "reach")  # the others may be null


class RunLog:
    """Writes the records and sample grids of a run to its folder.

    metrics.jsonl receives one record per logged iteration. series.jsonl receives a short line for
    every iteration, which shows oscillations between consecutive iterations. When a run is resumed,
    records after ``iteration`` are removed, because the weights that they describe were lost.
    """

    def __init__(self, run: Path, iteration: int) -> None:
        self.run = run
        self._file = _reopen(run / "metrics.jsonl", iteration)
        self._series = _reopen(run / "series.jsonl", iteration)
        self._board = _summary_writer(run / "tensorboard", iteration)

    def record(self, values: dict[str, Any]) -> None:
        """Append one record and flush it to the file."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "iteration" and value is not None:
                    self._board.add_scalar(name, value, values["iteration"])

    def follow(self, iteration: int, gap: float, reach: float) -> None:
        """Append the line of an iteration to the series."""
        # Nine digits represent a float32 exactly.
        line = {"iteration": iteration, "gap": float(f"{gap:.9g}"), "reach": float(f"{reach:.9g}")}
        self._series.write(json.dumps(line) + "\n")
        self._series.flush()

    def grid(self, images: Tensor, iteration: int) -> Path:
        """Write samples/ITERATION.png and return its path."""
        path = self.run / "samples" / f"{iteration:08d}.png"
        save_grid(images, path)
        if self._board is not None:
            picture = torch.from_numpy(to_grid(images))
            self._board.add_image("samples", picture, iteration, dataformats="HWC")
        return path

    def sync(self) -> None:
        """Return once all records are on the disk, as they must be before a later checkpoint."""
        for file in (self._file, self._series):
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()
            for path in (self.run / "tensorboard").glob("events.out.tfevents.*"):
                sync(path)

    def close(self) -> None:
        self._file.close()
        self._series.close()
        if self._board is not None:
            self._board.close()


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; FileError for JSON that is not a record."""
    return [record for _, record in _records(run / "metrics.jsonl")]


def read_series(run: Path) -> list[dict[str, Any]]:
    """Return iteration, gap and reach of every iteration; errors are as for `read_records`."""
    return [record for _, record in _records(run / "series.jsonl")]


def _reopen(path: Path, iteration: int) -> TextIO:
    """Remove the records after ``iteration`` from a file and open it to append more."""
    lines = [line for line, record in _records(path) if record["iteration"] <= iteration]
    save_text(path, "".join(lines))
    return path.open("a", encoding="utf-8")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, record) of every complete record.

    A killed process may truncate the last line, and a power failure may blank several.
    """
    if not path.exists():
        return
    check_file(path)
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        except RecursionError as error:
            raise FileError(f"{path}, line {number}: JSON nested too deeply") from error
        if line.endswith("\n"):
            _check_record(record, f"{path}, line {number}")
            yield line, record


def _check_record(record: Any, where: str) -> None:
    """Raise FileError unless a record has an iteration and numbers, by names of any version."""
    if not isinstance(record, dict):
        raise FileError(f"{where}: expected a record, got {reprlib.repr(record)}")
    iteration = record.get("iteration")
    if type(iteration) is not int or iteration < 0:
        raise FileError(
            f"{where}: iteration must be an integer >= 0, got {reprlib.repr(iteration)}"
        )
    for name, value in record.items():
        if type(value) not in (int, float) and (value is not None or name in _ALWAYS_MEASURED):
            raise FileError(f"{where}: {name} must be a number, got {reprlib.repr(value)}")


def _summary_writer(folder: Path, iteration: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=iteration + 1)
