"""Claims: which process of several works on what, in a folder that all of them see.

A claim is a file that its owner creates and touches while it works. A claim that has not been
touched for a while belongs to a process that was lost. To take it over, another process creates a
file with the next number: a process never removes or replaces a claim that it only believes to be
old. Only the creation must be atomic. It links a finished file to the name, which network file
systems support, or creates the file exclusively where there are no links.
"""

import contextlib
import os
import platform
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fastlangevin.learn.atomic import make_folder

EXPIRES = 300.0  # seconds without a touch after which a claim is lost
_TOUCHES = 10  # touches in this time


@contextlib.contextmanager
def claimed(path: Path, lost: Callable[[], None]) -> Iterator[bool]:
    """Try to claim ``path`` for the duration of the context, and yield whether that succeeded.

    lost: called, in another thread, if another process took over the claim, because this one had
        been stopped for longer than ``EXPIRES``. This process must then stop working on it.
    """
    make_folder(path.parent)
    owner = f"{platform.node()} {os.getpid()} {secrets.token_hex(8)}"
    own_claim = _take_claim(path, owner)
    if own_claim is None:
        yield False
        return
    done = threading.Event()
    keeper = threading.Thread(
        target=_keep_claim, args=(path, own_claim, owner, done, lost), daemon=True
    )
    keeper.start()
    try:
        yield True
    finally:
        done.set()
        keeper.join()
        with contextlib.suppress(OSError):  # a claim that cannot be removed expires
            if _is_owner(path, own_claim, owner):
                for claim in _claims(path):  # its own is the newest, and is removed last
                    claim.unlink(missing_ok=True)


def _claims(path: Path) -> list[Path]:
    """Return all claims of ``path``, oldest first."""
    ends = (p.name.removeprefix(f"{path.name}.") for p in path.parent.glob("*"))
    numbers = sorted(int(end) for end in ends if end.isdigit())
    return [path.with_name(f"{path.name}.{number}") for number in numbers]


def _take_claim(path: Path, owner: str) -> Path | None:
    """Create the next claim, unless the last one is in use; return its path."""
    last = next(reversed(_claims(path)), None)
    if last is not None and not _is_expired(last):
        return None
    number = 0 if last is None else int(last.suffix[1:]) + 1
    own_claim = path.with_name(f"{path.name}.{number}")
    if not _create(own_claim, owner):
        return None
    if last is not None and not _is_expired(last):  # another process was faster
        own_claim.unlink(missing_ok=True)
        return None
    return own_claim


def _create(path: Path, owner: str) -> bool:
    # The content must be complete when the name appears.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(owner, "utf-8")
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):  # or all work is done and the folder is gone
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(owner)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_expired(path: Path) -> bool:
    """Compare a claim's time with a new file's, because machines may have different clocks."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > EXPIRES
    except FileNotFoundError:  # it was given up, or all work is done and the folder is gone
        return False
    finally:
        probe.unlink(missing_ok=True)


def _keep_claim(
    path: Path, own_claim: Path, owner: str, done: threading.Event, lost: Callable[[], None]
) -> None:
    while not done.wait(EXPIRES / _TOUCHES):
        with contextlib.suppress(OSError):  # of a file system that fails for a while
            if not _is_owner(path, own_claim, owner):
                lost()
                return
            os.utime(own_claim)


def _is_owner(path: Path, own_claim: Path, owner: str) -> bool:
    try:
        return own_claim.read_bytes() == owner.encode() and _claims(path)[-1:] == [own_claim]
    except FileNotFoundError:
        return False
