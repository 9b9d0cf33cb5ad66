"""The processes of a training job: whether they do the same work in one folder."""

import dataclasses
import hashlib
import os
import platform
import secrets
import time
from pathlib import Path

import torch

from fastlangevin._version import __version__
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn.atomic import replacing
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.run_folder import JOB

_SEEN_WITHIN = 10.0  # seconds; network file systems show new files late
_OWN = ("data", "device")  # settings that may differ between machines


def job_id() -> str | None:
    """Return a text that is the same after torchrun has restarted its processes, if it started us.

    It is the job's id for torchrun or, if the user gave none, torchrun's own process.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    launcher = os.getppid()
    return f"{platform.node()} {launcher} {_started(launcher)}"


def _started(process: int) -> str:
    """Return when a process started, in ticks, since containers use process numbers again."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text("utf-8")
    except OSError:  # not Linux
        return ""
    return stat.rpartition(")")[2].split()[19]


def is_own(out: Path) -> bool:
    """Return whether this job, before a restart, has started the run in a folder."""
    try:
        return job_id() in (out / JOB).read_text("utf-8").splitlines()[:1]
    except OSError:
        return False


def check_same_work(group: Group, config: TrainConfig) -> None:
    """Raise DistributedError, naming what differs, unless all processes have equal settings."""
    facts = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OWN}
    if group.world_size > 1:
        facts |= {"fastlangevin": __version__, "torch": torch.__version__, "the code": _digest()}
    group.compare(facts, "start")


def check_same_folder(group: Group, out: Path) -> None:
    """Write the folder's job file; raise DistributedError unless all processes see it."""
    if group.world_size == 1 and job_id() is None:
        return

    def write() -> str:
        text = f"{job_id() or ''}\n{secrets.token_hex(8)}\n"
        with replacing(out / JOB) as temporary:
            temporary.write_text(text, "utf-8")
        return text

    text = group.first(write, f"run folder {out}")
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (seen := _reads(out / JOB, text)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(group.share(seen, f"run folder {out}")) if not sees]
    if blind:
        ranks = ", ".join(map(str, blind))
        raise DistributedError(
            f"train: {out} of rank 0 is not the folder that ranks {ranks} see under this name; "
            "all processes need one shared folder"
        )


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text("utf-8") == text
    except OSError:
        return False


def _digest() -> str:
    """Return a digest of the package's Python files."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
