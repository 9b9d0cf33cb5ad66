"""Locks that are free again in a process forked while another thread held them."""

import os
import threading
import weakref
from collections.abc import Callable

_made: "weakref.WeakSet[threading.Lock | threading.RLock]" = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A ``threading.Lock``. What it guards must be usable, or rebuilt at the next use, in a child
    forked half way through: the thread that held the lock does not exist there."""
    lock = threading.Lock()
    _made.add(lock)
    return lock


def new_rlock() -> "threading.RLock":
    """A ``threading.RLock`` with the same promise as :func:`new_lock`."""
    lock = threading.RLock()
    _made.add(lock)
    return lock


def in_forked_child(call: Callable[[], None]) -> None:
    """Call ``call()`` in every process forked from this one, after the locks have been freed."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=call)


def _free_all() -> None:
    for lock in list(_made):
        lock._at_fork_reinit()  # type: ignore[union-attr]  # as the standard library does


in_forked_child(_free_all)
