"""Locks that a forked process gets unlocked, even if another thread held them at the fork."""

import os
import threading
import weakref
from collections.abc import Callable

_made: "weakref.WeakSet[threading.Lock | threading.RLock]" = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A ``threading.Lock`` that is unlocked in a forked child.

    The thread that held the lock does not exist in the child. What the lock guards must therefore
    be usable, or be rebuilt at the next use, in a state that this thread left half-finished.
    """
    lock = threading.Lock()
    _made.add(lock)
    return lock


def new_rlock() -> "threading.RLock":
    """A ``threading.RLock``; see :func:`new_lock`."""
    lock = threading.RLock()
    _made.add(lock)
    return lock


def in_forked_child(call: Callable[[], None]) -> None:
    """Arranges that ``call()`` runs in every forked child, after the locks have been released."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=call)


def _free_all() -> None:
    for lock in list(_made):
        lock._at_fork_reinit()  # type: ignore[union-attr]  # the standard library does the same


in_forked_child(_free_all)
