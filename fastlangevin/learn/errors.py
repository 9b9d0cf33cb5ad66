"""The error of files that cannot be read."""


class FileError(ValueError):
    """A file that cannot be read as what it should be; the message begins with its path."""
