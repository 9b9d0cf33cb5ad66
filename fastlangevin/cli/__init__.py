"""The `fastlangevin` command."""

from fastlangevin.cli import evaluate, inverse, latent, learning, machine, measures, report, sweep
from fastlangevin.cli.app import app

__all__ = [
    "app", "evaluate", "inverse", "latent", "learning", "machine", "measures", "report", "sweep",
]  # fmt: skip
