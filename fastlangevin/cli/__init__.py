"""The `fastlangevin` command."""

from fastlangevin.cli import learning, machine, tasks
from fastlangevin.cli.app import app

__all__ = ["app", "learning", "machine", "tasks"]
