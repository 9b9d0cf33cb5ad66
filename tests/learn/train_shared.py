"""Settings, cuts and comparisons that the tests of training runs share."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from fastlangevin.learn.checkpoint import read_checkpoint

# On top of a config of the paper's. Everything that has a state is on: average, buffer, flips,
# annealing.
SETTINGS = {
    "size": None,
    "channels": None,
    "width": 2,
    "steps": 2,
    "batch_size": 4,
    "iterations": 12,
    "save_every": 3,
    "log_every": 2,
    "sample_every": 5,
    "samples": 4,
    "lr": 1e-2,
    "ema": 0.9,
    "buffer_size": 8,
    "reinit": 0.3,
    "flip": True,
    "anneal_start": 0.5,
    "lr_final": 1e-3,
    "data_noise_final": 0.01,
    "device": "cpu",
}
FIND_SPEC = importlib.util.find_spec


class CutError(Exception):
    """What stops a run in these tests."""


def cut_at(*iterations: int) -> Any:
    def report(iteration: int, record: Any) -> None:
        if iteration in iterations:
            raise CutError

    return report


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_end(run: Path, whole: Path) -> None:
    """Final tensors bit for bit, every record once, the same files with the same grids."""
    (got, got_info), (want, want_info) = read_checkpoint(run), read_checkpoint(whole)
    assert got_info == want_info
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name
    assert records(run) == records(whole)
    assert (run / "series.jsonl").read_bytes() == (whole / "series.jsonl").read_bytes()
    grids = [path for path in snapshot(whole) if path.endswith(".png")]
    for name in ("config.yaml", *grids):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


OTHER = {
    "size": 16,
    "channels": 3,
    "limit": 5,
    "flip": False,
    "on_corrupt": "skip",
    "energy": "mine:Net",
    "width": 3,
    "activation": "relu",
    "leak": 0.1,
    "steps": 3,
    "step_size": 0.5,
    "noise_std": 0.5,
    "clamp": (-0.5, 0.5),
    "grad_clip": 1e-4,
    "noise_order": "before",
    "precision": "bf16",
    "backend": "reference",
    "start": "digits",
    "learn_precision": "bf16",
    "batch_size": 5,
    "parts": 2,
    "data_noise": 0.5,
    "lr": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "anneal_start": 0.1,
    "lr_final": 0.5,
    "data_noise_final": 0.5,
    "ema": None,
    "buffer_size": 0,
    "buffer_kind": "fifo",
    "reinit": 0.9,
    "seed": 5,
}
