"""The `fastlangevin` command."""

from fastlangevin.cli import evaluate, learning, machine, measures, report, sweep, tasks
from fastlangevin.cli.app import app

__all__ = ["app", "evaluate", "learning", "machine", "measures", "report", "sweep", "tasks"]
