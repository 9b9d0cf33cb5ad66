"""The `fastlangevin` command."""

from fastlangevin.cli import learning, machine
from fastlangevin.cli.app import app

__all__ = ["app", "learning", "machine"]
