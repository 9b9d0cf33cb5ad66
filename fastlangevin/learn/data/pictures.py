"""Image sets that are encoded pictures: folders, parquet files and the hub's data sets."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlangevin.learn.data.arrays import require
from fastlangevin.learn.data.collect import Item
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.reading import brief, check_expansion, check_file, check_inside, reading

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IMAGE_COLUMNS = ("img", "image")
_BATCH_ROWS = 64
_MOST_LINKED = 1000  # folders entered through links; links among a few could make any number
_CACHES = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "HF_HUB_CACHE")


@dataclass(frozen=True)
class PictureSource:
    """Pictures still to be decoded."""

    name: str
    count: int
    items: Callable[[], Iterable[Item]]  # starts from the first picture at each call


def open_folder(folder: Path) -> PictureSource:
    """All pictures below a folder, sorted by path; first-level subfolders, if all have one, label.

    Links are followed within the folder. Raises FileError for a link that leaves it, leads nowhere
    or into a circle, and when there is no picture.
    """
    with reading(folder, "a folder of images"):
        parts = sorted(path.relative_to(folder).parts for path in _pictures(folder))
    if not parts:
        raise FileError(
            f"{folder} holds no images; looked for {' '.join(_EXTENSIONS)}, *.parquet and idx files"
        )
    labelled = all(len(path) > 1 for path in parts)
    classes = {name: label for label, name in enumerate(sorted({path[0] for path in parts}))}

    def items() -> Iterator[Item]:
        for path in parts:
            file = folder.joinpath(*path)
            yield Item(str(file), file, classes[path[0]] if labelled else None)

    return PictureSource(folder.name, len(parts), items)


def _pictures(folder: Path) -> Iterator[Path]:
    """The files below a folder with a picture's extension, links followed; no hidden ones."""
    pending: list[tuple[Path, tuple[Path, ...]]] = [(folder, (Path(os.path.realpath(folder)),))]
    linked = 0
    while pending:
        here, above = pending.pop()
        for entry in os.scandir(here):
            path, real = Path(entry.path), above[-1] / entry.name
            if entry.name.startswith("."):  # macOS leaves "._name.png" files
                continue
            if entry.is_symlink():
                check_inside(path, folder)
                real = Path(os.path.realpath(path))
            if entry.is_dir():
                linked += entry.is_symlink()
                if real in above:
                    raise FileError(f"{path} leads to {real}, a folder that it lies in")
                if linked > _MOST_LINKED:
                    raise FileError(f"{path} is a link beyond the first {_MOST_LINKED} to folders")
                pending.append((path, (*above, real)))
            elif path.suffix.lower() in _EXTENSIONS:
                check_file(path)
                yield path


def open_parquet(files: list[Path], name: str) -> PictureSource:
    """The rows of parquet files with a column `img` or `image` and perhaps an integer `label`.

    A row that holds a path instead of a picture is read relative to its file's folder, and only
    within that.

    Raises ImportError without pyarrow, FileError for a file without such a column.
    """
    parquet = require("pyarrow.parquet", "reading parquet files")
    count = 0
    columns: dict[Path, str] = {}
    for path in files:
        check_file(path)
        with reading(path, "a parquet file"), parquet.ParquetFile(path) as file:
            columns[path] = _image_column(file.schema_arrow.names, str(path))
            _check_sizes(file.metadata, columns[path], path.stat().st_size)
            count += file.metadata.num_rows
    if count <= 0:
        raise FileError(f"{files[0]}: {name} holds no images")

    def items() -> Iterator[Item]:
        for path in files:
            row = 0
            # Buffered and not read ahead: 0.5 GB instead of 1.5 GB for a row group of 1 GB.
            with (
                reading(path, "a parquet file"),
                parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file,
            ):
                wanted = [c for c in (columns[path], "label") if c in file.schema_arrow.names]
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    for record in batch.to_pylist():
                        yield _item(f"{path}, row {row}", record, columns[path], [path.parent])
                        row += 1

    return PictureSource(name, count, items)


def open_hub(name: str, split: str) -> PictureSource:
    """A split of a data set of the Hugging Face hub, through the package `datasets`."""
    datasets = require("datasets", f'the source "hub:{name}"')
    rows = datasets.load_dataset(name, split=split)
    column = _image_column(rows.column_names, f"hub:{name}")
    rows = rows.cast_column(column, datasets.Image(decode=False))
    if len(rows) == 0:
        raise FileError(f"hub:{name} holds no images in its split {split!r}")
    # Where the package keeps what it has loaded.
    kept = [Path(path) for c in _CACHES if (path := getattr(datasets.config, c, None))]

    def items() -> Iterator[Item]:
        for row, record in enumerate(rows):
            yield _item(f"hub:{name}, row {row}", record, column, kept)

    return PictureSource(f"{name} {split}", len(rows), items)


def _image_column(names: list[str], where: str) -> str:
    for name in _IMAGE_COLUMNS:
        if name in names:
            return name
    raise FileError(f"{where} must have a column img or image, got {brief(names)}")


def _check_sizes(metadata: Any, column: str, stored: int) -> None:
    """ValueError for a parquet file whose rows or pages claim to be more than it can hold."""
    if metadata.num_rows > stored:  # a picture has more than one byte
        raise ValueError(f"{stored} bytes claim to hold {metadata.num_rows} pictures")
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for part in (group.column(j) for j in range(group.num_columns)):
            if part.path_in_schema.split(".")[0] in (column, "label"):
                packed = min(part.total_compressed_size, stored)
                check_expansion(part.total_uncompressed_size, packed)


def _item(name: str, record: dict[str, Any], column: str, folders: list[Path]) -> Item:
    """A row as an item; its picture is bytes, or a struct of bytes or else a path.

    The path is relative to the first of the folders. A FileError, as the item's content, unless it
    lies in one of them.
    """
    picture, label = record[column], record.get("label")
    if isinstance(picture, dict):
        encoded, path = picture.get("bytes"), picture.get("path")
        picture = _within(name, path, folders) if encoded is None and path else encoded
    if not isinstance(label, int) or not -(2**63) <= label < 2**63:
        label = None
    # A row without a picture counts as corrupt: no bytes, which Pillow cannot identify.
    return Item(name, picture or b"", label)


def _within(name: str, path: Any, folders: list[Path]) -> Path | FileError:
    with contextlib.suppress(OSError, TypeError, ValueError):  # what can be no path
        found = Path(*folders[:1], path)
        real = Path(os.path.realpath(found))
        if any(real.is_relative_to(os.path.realpath(folder)) for folder in folders):
            return found
    where = " or ".join(map(str, folders)) or "any folder of the data set"
    return FileError(f"{name} has a picture at {brief(path)}, which is outside {where}")
