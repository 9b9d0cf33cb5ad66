"""FileError: the error raised for files that cannot be read."""


class FileError(ValueError):
    """A file cannot be read in the format expected of it. The message begins with its path."""
