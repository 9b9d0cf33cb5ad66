"""The folder of a run: what a run writes there, and whether a run may start or resume there."""

import contextlib
import dataclasses
import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import fastlangevin.learn.atomic as _atomic
from fastlangevin.learn.config import TrainConfig, is_of_run, resolve
from fastlangevin.learn.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
# Names the job that writes a folder, and its start, if torchrun or several processes do.
JOB = ".job"
# Errors of flock if another process holds the lock. Any other error is one of the file system.
_LOCKED = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
DIVERGED = "diverged.txt"  # says at which iteration a run has diverged, and how
REMEDY = "the usual remedy is a tenth of lr, and docs/divergence.md has others"
_NUMBER = "[0-9]" * 8
WRITTEN = (
    f"checkpoints/{_NUMBER}.safetensors",
    f"checkpoints/{_NUMBER}.damaged",
    f"samples/{_NUMBER}.png",
    "metrics.jsonl",
    "series.jsonl",
    "samples.png",
    DIVERGED,
    CONFIG,
)
# Settings that a resumed run may change: its length, what it writes, and where things are. The path
# of the data may change, because the content of the data is compared.
FREE_SETTINGS = ("data", "iterations", "device", "log_every", "sample_every", "save_every",
                 "samples", "max_energy", "max_saturation")  # fmt: skip


class FolderInUseError(FileExistsError):
    """Another process is training in the folder."""


def has_plan(op: str, out: Path, plan: str, what: str) -> bool:
    """Return whether a folder holds the file ``plan``, which describes the other files.

    Raises FileExistsError if the folder is a file, or holds other files without a plan.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{op}: {out} is a file, not a folder for {what}")
    # Another process may be writing its plan, to a hidden temporary file, and then other files.
    # The plan is looked for after they have been listed, so it is there if they belong to it.
    names = sorted(p.name for p in out.glob("*") if not p.name.startswith("."))
    found = (out / plan).exists()
    if names and not found:
        raise FileExistsError(f"{op}: {out} holds {names[0]} but no {plan}; name another folder")
    return found


def is_run(out: Path) -> bool:
    """Return whether a folder was written by a training run."""
    return is_of_run(out / CONFIG)


def divergence(out: Path) -> str | None:
    """Return how a run has diverged, as in "diverged at iteration 7: ...", or None."""
    if not is_run(out) or not (out / DIVERGED).is_file():
        return None
    with (out / DIVERGED).open("rb") as file:
        return file.read(1000).decode("utf-8", errors="replace").strip()


def free_folder(folder: Path) -> Path:
    """Return ``folder``, or the first of folder-2, folder-3, ... that does not exist yet."""
    others = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10**6))
    return folder if not folder.exists() else next(path for path in others if not path.exists())


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Raise an error if ``out`` cannot be used, before anything is loaded or written."""
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
            f"train: {out} already holds a run; resume it (--resume), overwrite it (--overwrite), "
            "or name another folder"
        )
    if in_the_way and not is_run(out):
        raise FileExistsError(
            f"train: {out} already holds {in_the_way[0].relative_to(out)}, which a run would "
            "replace, but it is not a complete run that could be overwritten; name another folder"
        )


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Create the folder and lock it, so that no other process trains in it.

    The lock is on the folder itself and ends with the process, however it ends. On some network
    file systems it is effective only within one machine. If the folder cannot be locked, the run
    continues with a warning. A new folder that is still empty at the end is removed. Raises
    FileExistsError if another process holds the lock.
    """
    new = not out.exists()
    _atomic.make_folder(out)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKED:
                raise FolderInUseError(f"train: another process is training in {out}") from error
            warnings.warn(
                f"train: {out} cannot be locked ({error.strerror or error}); two processes must "
                "not train in this folder at the same time",
                stacklevel=8,
            )
        yield
    finally:
        os.close(folder)
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def check_resumed(config: TrainConfig, out: Path) -> None:
    """Raise ValueError if ``config`` changes the run in ``out``, FileError if that is damaged."""
    try:
        saved = dataclasses.asdict(resolve(out / CONFIG))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{out / CONFIG}: {error}") from error
    asked = dataclasses.asdict(config)
    free: tuple[str, ...] = FREE_SETTINGS
    if (config.lr, config.data_noise) != (config.lr_final, config.data_noise_final):
        # Annealing depends on the number of iterations.
        free = tuple(name for name in free if name != "iterations" or config.anneal_start == 1)
    different = [name for name in saved if name not in free and saved[name] != asked[name]]
    if different:
        changes = ", ".join(f"{name} ({saved[name]} to {asked[name]})" for name in different)
        hint = "; the annealing depends on it" if different == ["iterations"] else ""
        raise ValueError(f"train: {out} cannot be resumed with other settings: {changes}{hint}")


def remove_run(out: Path) -> None:
    """Delete the files of a run and nothing else. config.yaml is last: it marks the run."""
    remove_run_leftovers(out)
    for pattern in (JOB, "tensorboard/events.out.tfevents.*", *WRITTEN):
        for path in out.glob(pattern) if is_run(out) else ():
            path.unlink()
    for name in ("checkpoints", "samples", "tensorboard"):
        with contextlib.suppress(OSError):  # it does not exist, or holds files of the user
            (out / name).rmdir()


def remove_run_leftovers(out: Path) -> None:
    """Delete temporary files that killed processes left in the folder of a run.

    A run holds the lock while it writes, so every temporary file of a run's files is a leftover.
    """
    for folder in (out, out / "checkpoints", out / "samples"):
        _atomic.remove_leftovers(folder)
    for pattern in WRITTEN:
        subfolder, _, name = pattern.rpartition("/")
        for path in (out / subfolder).glob(f".{name}.*.tmp"):
            if re.search(r"\.\d+\.tmp$", path.name):
                path.unlink(missing_ok=True)
