"""Runs that are killed or lose power between any two moves of a file; what is left goes on."""

import ast
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlangevin.learn import TrainConfig, atomic, resolve, train
from fastlangevin.learn.checkpoint import list_checkpoints, read_checkpoint
from fastlangevin.learn.log import read_records, read_series
from fastlangevin.learn.run_folder import is_run

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGE = Path(atomic.__file__).parents[1]
SETTINGS = {
    "size": None,
    "channels": None,
    "width": 1,
    "steps": 1,
    "batch_size": 2,
    "iterations": 3,
    "save_every": 1,
    "log_every": 1,
    "sample_every": 3,
    "samples": 1,
    "buffer_size": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    return resolve("paper-cifar10", overrides=SETTINGS | {"data": str(path)})


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same_end(run: Path, whole: Path) -> None:
    """The same files; the same weights and records bit for bit."""
    assert names(run) == names(whole)
    for path in [*list_checkpoints(whole), whole / "series.jsonl", whole / "config.yaml"]:
        assert (run / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name
    records = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(each)]
        for each in (run, whole)
    ]
    assert records[0] == records[1]


def assert_consistent(run: Path) -> None:
    """Checkpoints are whole, and every iteration up to the newest has its records."""
    checkpoints = list_checkpoints(run)
    for path in checkpoints:
        assert read_checkpoint(path)[1]["iteration"] == int(path.stem)
    if checkpoints:
        past = list(range(1, int(checkpoints[-1].stem) + 1))
        for read in (read_records, read_series):
            assert [record["iteration"] for record in read(run)][: len(past)] == past


class DeadError(BaseException):
    """The process is no more; no handler of ordinary errors sees it."""


class Disk:
    """Stands between a run and the disk: dies at the n-th move, and knows what is durable.

    A dead process moves nothing more, so that cleaning up fails too. ``cut_power`` takes back what
    a disk may lose then: writes to a file since its last sync, and changes of names in a folder
    since the folder's.
    """

    MOVES = ("replace", "fsync", "unlink", "mkdir")

    def __init__(self, patch: pytest.MonkeyPatch, run: Path, dies_at: int) -> None:
        self.dies_at, self.count = dies_at, 0
        found = [path.stat() for path in run.rglob("*") if path.is_file()]
        self.synced = {each.st_ino: each.st_size for each in found}  # sizes by inode
        self.undo: dict[Path, list[Callable[[], object]]] = {}  # by folder
        for name in self.MOVES:
            patch.setattr(os, name, self._move(name, getattr(os, name)))

    def _move(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def move(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count >= self.dies_at:
                raise DeadError
            if name in ("replace", "unlink"):
                self._note_changed(Path(arguments[-1]))
            result = real(*arguments, **options)
            if name == "fsync":
                self._note_synced(*arguments)
            return result

        return move

    def _note_changed(self, path: Path) -> None:
        before = path.read_bytes() if path.exists() else None

        def undo() -> None:
            path.unlink(missing_ok=True) if before is None else path.write_bytes(before)

        self.undo.setdefault(path.parent, []).append(undo)

    def _note_synced(self, handle: int) -> None:
        found = os.fstat(handle)
        self.synced[found.st_ino] = found.st_size
        for folder in list(self.undo):
            if folder.exists() and folder.stat().st_ino == found.st_ino:
                del self.undo[folder]

    def cut_power(self, run: Path) -> None:
        for path in run.rglob("*"):
            if path.is_file():
                os.truncate(path, self.synced.get(path.stat().st_ino, 0))
        for changes in self.undo.values():
            for undo in reversed(changes):
                undo()


def die_at(
    move: int, config: TrainConfig, out: Path, *, power_cut: bool, resume: bool = False
) -> bool:
    """Train until the process dies; False if it came to its end first."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, out, dies_at=move)
        try:
            train(config, out, resume=resume)
        except DeadError:
            died = True
        else:
            died = False
    if died and power_cut:
        disk.cut_power(out)
    return died


# Every move is tried with a power cut, which leaves less than a kill.
@pytest.mark.parametrize(
    ("resumed", "power_cut", "stride"),
    [
        (False, True, 11),
        (True, True, 13),
        pytest.param(False, False, 7, marks=pytest.mark.slow),
        pytest.param(False, True, 1, marks=pytest.mark.slow),
        pytest.param(True, True, 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_whenever_it_dies(
    resumed: bool, power_cut: bool, stride: int, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    """At one of ``stride`` moves: what is left is consistent, and a run goes on from it to the
    same end.
    """

    def cut(iteration: int, record: Any) -> None:
        if iteration == 2:  # its record is taken out again, as its checkpoint is lost
            list_checkpoints(tmp_path / "cut")[-1].unlink()
            raise DeadError

    if resumed:
        with pytest.raises(DeadError):
            train(config, tmp_path / "cut", report=cut)
    for move in range(1, 1000, stride):
        out = tmp_path / str(move)
        if resumed:
            shutil.copytree(tmp_path / "cut", out)
        died = die_at(move, config, out, power_cut=power_cut, resume=resumed)
        assert_consistent(out)
        train(config, out, resume=is_run(out))
        assert_same_end(out, whole)
        if not died:
            break
    assert move > 20


# Leftovers ---------------------------------------------------------------------------------------


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **CAPTURED)
    return int(done.stdout)


CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
FOREIGN = [".config.yaml.tmp", ".config.yaml.old.tmp", "config.yaml.1.tmp", ".tmpAbCdEf", ".x.tmp"]


def test_a_file_takes_away_what_dead_processes_left_of_it(tmp_path: Path) -> None:
    """Of this host, as another's processes are not seen; and of no other file."""
    host, dead = atomic._host(), dead_process()
    ours = tmp_path / f".a b[1].txt.{host}.{dead}.tmp"
    others = [
        f".a b[1].txt.{host}.{os.getppid()}.tmp",  # is running
        f".a b[1].txt.another-host.{dead}.tmp",
        f".b.txt.{host}.{dead}.tmp",
        *FOREIGN,
    ]
    for name in (ours.name, *others):
        (tmp_path / name).write_text("half")
    with atomic.replacing(tmp_path / "a b[1].txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == {"a b[1].txt", *others}
    assert (tmp_path / "a b[1].txt").read_text() == "whole"


def test_a_run_takes_away_what_killed_processes_left_in_its_folder(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    """Of its own files whoever left it, as it has the lock; of others (reports) the dead's."""
    out, host, dead = tmp_path / "run", atomic._host(), dead_process()
    leftovers = [
        ".config.yaml.4.tmp",  # as earlier versions named them
        f".config.yaml.{host}.{os.getpid()}.tmp",
        ".metrics.jsonl.another-host.77.tmp",
        ".samples.png.77.tmp",
        f".report.html.{host}.{dead}.tmp",
        f"checkpoints/.00000002.safetensors.{host}.{dead}.tmp",
        f"samples/.00000003.png.{host}.{dead}.tmp",
    ]
    theirs = [f".report.html.another-host.{dead}.tmp", "checkpoints/.tmpAbCdEf", *FOREIGN]
    for resume in (False, True):
        for name in (*leftovers, *theirs):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("half")
        train(config, out, resume=resume)
        assert names(out) == names(whole) | set(theirs)


# One way to write --------------------------------------------------------------------------------

WRITERS = {"write_text", "write_bytes", "savefig", "savez", "save", "to_csv", "tofile", "dump"}
# These write by the helper.
NOT_FILES = {
    "learner.save", "report.save", "evaluation.evaluate.save", "result.save", "chains.save",
    "diagnosed.save", "evaluated.save", "save",
}  # fmt: skip


def writes(tree: ast.AST, inside: bool = False) -> Iterator[tuple[int, str]]:
    """Calls that write to a path, and are not in the block of a `replacing`."""
    if isinstance(tree, ast.With):
        inside |= any("replacing(" in ast.unparse(item) for item in tree.items)
    if isinstance(tree, ast.Call) and not inside:
        name = getattr(tree.func, "attr", getattr(tree.func, "id", ""))
        mode = {getattr(argument, "value", None) for argument in tree.args}
        if name in WRITERS or (name == "open" and mode & {"w", "wb", "a"}):
            called = ast.unparse(tree.func)
            if called not in NOT_FILES:
                yield tree.lineno, called
    for child in ast.iter_child_nodes(tree):
        yield from writes(child, inside)


def test_every_file_of_the_package_is_written_by_the_one_helper() -> None:
    """But for the log, whose lines are appended, claims, which a new file makes, and what is handed
    a helper's temporary path."""
    found = {
        (path.relative_to(PACKAGE).as_posix(), called)
        for path in PACKAGE.rglob("*.py")
        if re.search(rf"\b({'|'.join(WRITERS)}|open)\(", path.read_text("utf-8"))
        for _, called in writes(ast.parse(path.read_text("utf-8")))
    }
    assert found == {
        ("learn/log.py", "path.open"),
        ("learn/checkpoint.py", "path.open"),
        ("learn/sweep/claims.py", "temporary.write_text"),
        ("diagnostics.py", "figure.savefig"),  # into memory, for a notebook
    }


# File systems that cannot do everything ----------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced elsewhere")
def test_a_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems say EINVAL; a file that cannot be synced is one."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folders = True
    with atomic.replacing(tmp_path / "new" / "a") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "new" / "a").read_text() == "whole"
    folders = False
    with (
        pytest.raises(OSError, match="Invalid argument"),
        atomic.replacing(tmp_path / "new" / "a") as temporary,
    ):
        temporary.write_text("other")
    assert (tmp_path / "new" / "a").read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="fcntl is of POSIX")
@pytest.mark.parametrize("name", ["ENOLCK", "EIO"])
def test_a_run_goes_on_where_its_folder_cannot_be_locked(
    name: str, config: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning, whatever the file system answers."""
    number = getattr(errno, name)

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="cannot be locked") as caught:
        train(config, out)
    assert [str(each.message) for each in caught] == [
        f"train: {out} cannot be locked ({os.strerror(number)}); two processes must not train in "
        "this folder at the same time"
    ]
    assert caught[0].filename == __file__
    assert_same_end(out, whole)


@pytest.mark.skipif(os.name != "posix", reason="fcntl is of POSIX")
@pytest.mark.parametrize("name", ["EAGAIN", "EACCES"])
def test_a_lock_that_another_process_has_is_still_refused(
    name: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(getattr(errno, name), "")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FileExistsError, match="another process is training in"):
        train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
