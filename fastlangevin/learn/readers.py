"""Image sets that are encoded pictures: folders, parquet files and the hub's data sets."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlangevin.learn.arrays import require
from fastlangevin.learn.gather import Item

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IMAGE_COLUMNS = ("img", "image")
_BATCH_ROWS = 64


@dataclass(frozen=True)
class PictureSource:
    """Pictures still to be decoded."""

    name: str
    count: int
    items: Callable[[], Iterable[Item]]  # starts from the first picture at each call


def open_folder(folder: Path) -> PictureSource:
    """All pictures below a folder, sorted by path; first-level subfolders, if all have one, label.

    Raises ValueError when there is none.
    """
    parts = sorted(
        path.relative_to(folder).parts
        for path in folder.rglob("*")
        if path.suffix.lower() in _EXTENSIONS and path.is_file()
    )
    # macOS leaves "._name.png" files, which are no pictures.
    parts = [path for path in parts if not any(part.startswith(".") for part in path)]
    if not parts:
        raise ValueError(
            f"load_images: {folder} holds no images; looked for {' '.join(_EXTENSIONS)}, "
            "*.parquet and idx files"
        )
    labelled = all(len(path) > 1 for path in parts)
    classes = {name: label for label, name in enumerate(sorted({path[0] for path in parts}))}

    def items() -> Iterator[Item]:
        for path in parts:
            file = folder.joinpath(*path)
            yield Item(str(file), file, classes[path[0]] if labelled else None)

    return PictureSource(folder.name, len(parts), items)


def open_parquet(files: list[Path], name: str) -> PictureSource:
    """The rows of parquet files with a column `img` or `image` and perhaps an integer `label`.

    Raises ImportError without pyarrow, ValueError for a file without such a column.
    """
    parquet = require("pyarrow.parquet", "reading parquet files")
    count = 0
    columns: dict[Path, str] = {}
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                names, rows = file.schema_arrow.names, file.metadata.num_rows
        except ValueError as error:  # pyarrow's, which does not name the file
            raise ValueError(f"load_images: {path} is not a parquet file ({error})") from error
        columns[path] = _image_column(names, str(path))
        count += rows
    if count == 0:
        raise ValueError(f"load_images: {name} holds no images")

    def items() -> Iterator[Item]:
        for path in files:
            row = 0
            # Buffered and not read ahead: 0.5 GB instead of 1.5 GB for a row group of 1 GB.
            with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                wanted = [c for c in (columns[path], "label") if c in file.schema_arrow.names]
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    for record in batch.to_pylist():
                        yield _item(f"{path}, row {row}", record, columns[path])
                        row += 1

    return PictureSource(name, count, items)


def open_hub(name: str, split: str) -> PictureSource:
    """A split of a data set of the Hugging Face hub, through the package `datasets`."""
    datasets = require("datasets", f'the source "hub:{name}"')
    rows = datasets.load_dataset(name, split=split)
    column = _image_column(rows.column_names, f"hub:{name}")
    rows = rows.cast_column(column, datasets.Image(decode=False))
    if len(rows) == 0:
        raise ValueError(f"load_images: hub:{name} holds no images in its split {split!r}")

    def items() -> Iterator[Item]:
        for row, record in enumerate(rows):
            yield _item(f"hub:{name}, row {row}", record, column)

    return PictureSource(f"{name} {split}", len(rows), items)


def _image_column(names: list[str], where: str) -> str:
    for name in _IMAGE_COLUMNS:
        if name in names:
            return name
    raise ValueError(f"load_images: {where} must have a column img or image, got {names}")


def _item(name: str, record: dict[str, Any], column: str) -> Item:
    """A row as an item; its picture is bytes, or a struct of bytes or else a path."""
    picture, label = record[column], record.get("label")
    if isinstance(picture, dict):
        encoded, path = picture.get("bytes"), picture.get("path")
        picture = Path(path) if encoded is None and path else encoded
    # A row without a picture counts as corrupt: no bytes, which Pillow cannot identify.
    return Item(name, picture or b"", label if isinstance(label, int) else None)
