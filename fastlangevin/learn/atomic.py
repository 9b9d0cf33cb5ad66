"""Files that are whole or absent, whenever the process is killed or the power fails."""

import contextlib
import errno
import glob
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

# .NAME.HOST.PID.tmp: the host too, as several may share the folder.
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d+)\.tmp")
# What file systems that cannot sync a folder, or do not let it be opened, answer.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes ``path``'s place in one move.

    The content reaches the disk before the move, and the move before the return. If the body
    raises (a full disk, say), the temporary file is removed and ``path`` is as it was. What
    processes that were killed left of the same file is removed first.
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


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete the temporary files, of ``name`` or of any file, of this host's dead processes."""
    pattern = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{pattern}.*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and found["host"] == _host() and not _is_running(int(found["pid"])):
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, so that a power cut does not take them away again."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Return when the content of a file, or a folder's list of names, is on the disk."""
    if not path.is_dir():
        with path.open("r+b") as file:  # Windows syncs no file that is open for reading only
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
    if os.name != "posix":  # os.kill would send Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True
