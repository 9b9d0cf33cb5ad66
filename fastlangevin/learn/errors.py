"""The one error that unreadable files end in."""

from __future__ import annotations


class FileError(ValueError):
    """A file that cannot be read as what it should be; the message begins with its path."""
