"""Write files atomically: complete or not at all, even if the process or the power fails."""

import contextlib
import errno
import glob
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# .NAME.HOST.PID.tmp, with the host because several hosts may share a folder.
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d+)\.tmp")
# Errors of file systems that cannot sync a folder or do not allow it to be opened.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success, move that file to ``path``.

    The content reaches the disk before the move, and the move before this function returns. If
    the body raises, for example because the disk is full, the temporary file is removed and
    ``path`` is unchanged. Temporary files that killed processes left for ``path`` are removed
    first.
    """
    make_folder(path.parent)
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def save_json(path: Path, value: Any, **options: Any) -> None:
    """Write a JSON file, as :func:`replacing` does; ``options`` are those of json.dumps."""
    save_text(path, json.dumps(value, **options) + "\n")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete temporary files that dead processes of this host left, for one file name or all."""
    pattern = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{pattern}.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not _is_running(int(match["pid"])):
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and sync them to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Return once the content of a file, or the list of names in a folder, is on the disk."""
    if not path.is_dir():
        with path.open("r+b") as file:  # Windows cannot sync a file that is open only for reading
            os.fsync(file.fileno())
    elif os.name == "posix":  # elsewhere a folder cannot be opened
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise


def _host() -> str:
    return platform.node().partition(".")[0]


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # on Windows, os.kill would send Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs as another user
    return True
