"""The `fastlangevin` command."""

from fastlangevin.cli import learning, machine, measures, tasks
from fastlangevin.cli.app import app

__all__ = ["app", "learning", "machine", "measures", "tasks"]
