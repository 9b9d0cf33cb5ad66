"""Result files: the figures of a benchmark with the machine, the versions and the commit."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


class ResultFile:
    """The results of one benchmark as rows, below what they have in common.

    The file is written after every row, so that an interrupted run keeps its results. Without a
    path nothing is written.
    """

    def __init__(self, path: Path | None, benchmark: str, **common: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "benchmark": benchmark, **common, "machine": machine(), "results": [],
        }  # fmt: skip

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["results"]

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        self.content["machine"]["load_at_end"] = _load()
        if self.path is not None:
            write_json(self.path, self.content)


def parser_of(
    benchmark: str, *, device: str | None = "cpu", quick: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, ``--device`` with this default and ``--quick`` if wanted.

    ``quick`` is the help of ``--quick``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the result file"
    )
    if device is not None:
        parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments, and refuse a CUDA device that is not there."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def machine() -> dict[str, Any]:
    """Hardware, versions, commit, date and load, without which a figure has no meaning."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in _cpu_line("flags").split() if flag[:3] in ("avx", "amx")],
        "load": _load(),
        "gpu": gpu and gpu.name,
        "gpu_architecture": gpu and f"{gpu.major}.{gpu.minor}",
        "gpu_l2_bytes": gpu and gpu.L2_cache_size,
        "driver": gpu
        and _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        # The package's metadata leave out the build, as in 2.11.0+cu130.
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "torchebm", "fastlangevin")},
        # GIT_COMMIT is for copies of the tree without its history, or with an older one.
        "commit": os.environ.get("GIT_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content) + "\n")
    draft.replace(path)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_line(name: str) -> str:
    """The first value of that name in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints about this checkout or machine, or None if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
