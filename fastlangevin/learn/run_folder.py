"""A run's folder: what it may hold, and what may be done to it."""

import contextlib
import dataclasses
import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastlangevin.learn import atomic as files
from fastlangevin.learn.config import MARK, TrainConfig, resolve
from fastlangevin.learn.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
# What flock answers where another process has the lock; any other error is of the file system.
_LOCKED = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
_NUMBER = "[0-9]" * 8
WRITTEN = (
    f"checkpoints/{_NUMBER}.safetensors",
    f"checkpoints/{_NUMBER}.damaged",
    f"samples/{_NUMBER}.png",
    "metrics.jsonl",
    "series.jsonl",
    "samples.png",
    CONFIG,
)
# What a resumed run may change: how long it goes on, what it writes, and where things are. The
# data are compared by what is in them.
FREE_SETTINGS = (
    "data",
    "iterations",
    "device",
    "log_every",
    "sample_every",
    "save_every",
    "samples",
    "max_energy",
    "max_saturation",
)


def is_run(out: Path) -> bool:
    """Whether a folder is one that a run of ours wrote."""
    config = out / CONFIG
    if not config.is_file():
        return False
    with config.open("rb") as file:
        return file.read(len(MARK.encode())) == MARK.encode()


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that does not fit, before anything is loaded or written."""
    if resume and overwrite:
        raise ValueError("train: give resume or overwrite, not both")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"train: {out} is a file, not a folder for a run")
    if resume:
        if not is_run(out):
            raise FileNotFoundError(
                f"train: {out} holds no run to resume (it has no {CONFIG} of one)"
            )
        return check_resumed(config, out)
    in_the_way = [path for pattern in WRITTEN for path in sorted(out.glob(pattern))]
    if is_run(out) and not overwrite:
        raise FileExistsError(
            f"train: {out} already holds a run; resume it, overwrite it, or name another folder"
        )
    if in_the_way and not is_run(out):
        raise FileExistsError(
            f"train: {out} already holds {in_the_way[0].relative_to(out)}, which a run would "
            "replace, but is no whole run to overwrite; name another folder"
        )


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from training in it meanwhile.

    The lock is the folder's own and goes with the process, however that ends; on some network file
    systems it holds on one machine only. Where there are no locks the run goes on with a warning. A
    new folder that is still empty at the end is removed. FileExistsError if another process has
    the lock.
    """
    new = not out.exists()
    files.make_folder(out)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKED:
                raise FileExistsError(f"train: another process is training in {out}") from error
            warnings.warn(
                f"train: {out} cannot be locked ({error.strerror or error}); two processes must "
                "not train in this folder at the same time",
                stacklevel=4,
            )
        yield
    finally:
        os.close(folder)
        if new:
            with contextlib.suppress(OSError):  # it holds something
                out.rmdir()


def check_resumed(config: TrainConfig, out: Path) -> None:
    """ValueError if a run would not go on as it began; FileError if its settings are damaged."""
    try:
        saved = dataclasses.asdict(resolve(out / CONFIG))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{out / CONFIG}: {error}") from error
    asked = dataclasses.asdict(config)
    free: tuple[str, ...] = FREE_SETTINGS
    if (config.lr, config.data_noise) != (config.lr_final, config.data_noise_final):
        # The annealing is a function of the length.
        free = tuple(name for name in free if name != "iterations" or config.anneal_start == 1)
    different = [name for name in saved if name not in free and saved[name] != asked[name]]
    if different:
        changes = ", ".join(f"{name} ({saved[name]} to {asked[name]})" for name in different)
        hint = ", on whose value the annealing depends" if different == ["iterations"] else ""
        raise ValueError(f"train: {out} cannot be resumed with other settings: {changes}{hint}")


def remove_run(out: Path) -> None:
    """Delete what a run wrote, and nothing else. The config goes last: until then it is a run."""
    remove_leftovers(out)
    for pattern in ("tensorboard/events.out.tfevents.*", *WRITTEN):
        for path in out.glob(pattern) if is_run(out) else ():
            path.unlink()
    for name in ("checkpoints", "samples", "tensorboard"):
        with contextlib.suppress(OSError):  # not there, or with files of the user's in it
            (out / name).rmdir()


def remove_leftovers(out: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote into a run.

    The run's own files are written under its lock, so that any temporary file of them is left over.
    """
    for folder in (out, out / "checkpoints", out / "samples"):
        files.remove_leftovers(folder)
    for pattern in WRITTEN:
        place, _, name = pattern.rpartition("/")
        for path in (out / place).glob(f".{name}.*.tmp"):
            if re.search(r"\.\d+\.tmp$", path.name):
                path.unlink(missing_ok=True)
