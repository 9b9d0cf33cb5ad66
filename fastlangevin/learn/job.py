"""The processes of a job: whether they do the same work, with the same code, in one folder."""

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastlangevin._version import __version__
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn.atomic import save_text
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.run_folder import JOB

# Seconds. Network file systems show new files late: NFS keeps a folder's entries for up to 60 s.
_SEEN_WITHIN = 60.0
_MAY_DIFFER = ("data", "device")  # settings that may differ between machines
_CODE = (".py", ".so", ".pyd")
VERSIONS = {"fastlangevin": __version__, "torch": torch.__version__}


def is_own(group: Group, out: Path) -> bool:
    """Return whether this job has begun the run in a folder, before the launcher restarted it."""
    job, start, *_ = [*_read_job(out).splitlines(), "", ""]
    # A second run that the same processes begin is another run.
    return job == group.job and start not in ("", group.start)


def check_same_work(group: Group, config: TrainConfig) -> None:
    """Raise DistributedError, naming what differs, unless all processes have equal settings."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _MAY_DIFFER}
    compare_with_code(group, settings)


def compare_with_code(group: Group, facts: Mapping[str, Any]) -> None:
    """Raise DistributedError unless all processes have equal facts, versions and code."""
    if group.world_size > 1:
        group.compare({**facts, **VERSIONS, "the code": _digest()}, "start")


def check_same_folder(group: Group, out: Path, command: str) -> None:
    """Write the folder's job file; raise DistributedError unless all processes see it."""
    if group.world_size == 1 and group.job is None:
        return

    def write() -> str:
        text = f"{group.job or ''}\n{group.start}\n{secrets.token_hex(8)}\n"
        save_text(out / JOB, text)
        return text

    text = group.first(write, f"run folder {out}")
    deadline = time.monotonic() + _SEEN_WITHIN
    with group.working():
        while not (visible := _read_job(out) == text) and time.monotonic() < deadline:
            time.sleep(0.1)
    shared = group.share(visible, f"run folder {out}")
    blind = [rank for rank, sees in enumerate(shared) if not sees]
    if blind:
        ranks = ", ".join(map(str, blind))
        raise DistributedError(
            f"{command}: {out} of rank 0 is not the folder that ranks {ranks} see under this name; "
            "all processes need one shared folder"
        )


def _read_job(out: Path) -> str:
    try:
        return (out / JOB).read_text("utf-8")
    except (OSError, ValueError):
        return ""


def _digest() -> str:
    """Return a digest of the package's code: Python files and compiled extensions."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in _CODE):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
