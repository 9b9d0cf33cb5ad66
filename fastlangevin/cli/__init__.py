"""The `fastlangevin` command."""

from fastlangevin.cli import learning, machine, sweep
from fastlangevin.cli.app import app

__all__ = ["app", "learning", "machine", "sweep"]
