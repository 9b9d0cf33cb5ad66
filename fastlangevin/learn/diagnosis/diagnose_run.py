"""Diagnose a run or one of its checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

from fastlangevin.learn.build import choose_device
from fastlangevin.learn.checkpoint import find_checkpoint, read_checkpoint, run_folder
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.diagnosis.diagnose import Diagnosis, diagnose, noisy_batch
from fastlangevin.learn.diagnosis.write_diagnosis import save, to_text
from fastlangevin.learn.log import read_records, read_series
from fastlangevin.learn.model import load
from fastlangevin.learn.train import annealed
from fastlangevin.progress import Report, silent


class RunDiagnosis(NamedTuple):
    """A diagnosis, with facts about what was diagnosed."""

    diagnosis: Diagnosis
    title: str
    facts: dict[str, Any]  # JSON-ready
    folder: Path | None  # of the run; None for a model without a run

    def text(self) -> str:
        """Return all figures as text, each with its reference value."""
        return to_text(self.diagnosis)

    def save(self, folder: Path) -> list[Path]:
        """Write the files of the diagnosis, and return their paths."""
        return save(self.diagnosis, folder, self.title, **self.facts)


def diagnose_run(
    run: str | Path,
    config: TrainConfig,
    train: ImageData,
    *,
    n: int = 256,
    seed: int = 1,
    device: str = "auto",
    averaged: bool = False,
    long: int = 10,
    starts: int = 16,
    lags: int = 15,
    report: Report = silent,
) -> RunDiagnosis:
    """Diagnose a checkpoint and, if it belongs to a run, the log up to its iteration.

    The arguments are those of the command ``diagnose`` and of :func:`diagnose`. The n images have
    the noise that the run added to them.
    """
    checkpoint = find_checkpoint(run)
    iteration, folder = read_checkpoint(checkpoint)[1]["iteration"], run_folder(checkpoint)
    sampler = load(checkpoint, device=choose_device(device), averaged=averaged)
    _, data_noise = annealed(config, iteration - 1)
    images = noisy_batch(train, n, data_noise, seed, choose_device(device))
    logs = ([], []) if folder is None else (read_records(folder), read_series(folder))
    # If the run continued after this checkpoint, later records are about other weights.
    until = [[line for line in log if line["iteration"] <= iteration] for log in logs]
    diagnosis = diagnose(
        sampler, images, *until, seed=seed, long=long, starts=starts, lags=lags, report=report
    )
    facts = {"iteration": iteration, "averaged": averaged, "seed": seed}
    return RunDiagnosis(diagnosis, f"{checkpoint.stem}, {n} chains", facts, folder)
