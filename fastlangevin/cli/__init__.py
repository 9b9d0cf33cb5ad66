"""The `fastlangevin` command."""

from fastlangevin.cli.app import main

__all__ = ["main"]
