from fastlangevin._version import __version__
from fastlangevin.cli.outputs import Result


def version() -> Result:
    """Print the version."""
    return Result(__version__)
