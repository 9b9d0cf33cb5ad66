"""Run a sweep: each run once, resumed if it was interrupted, shared by any number of processes."""

import contextlib
import dataclasses
import functools
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.learn.atomic import save_json, save_text
from fastlangevin.learn.build import DATA_OPTIONS, build_learner, choose_device, load_data
from fastlangevin.learn.checkpoint import list_checkpoints
from fastlangevin.learn.config import TrainConfig, of_its_version, read_settings
from fastlangevin.learn.divergence import DivergedError
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.evaluation.classifier import QualityCheck
from fastlangevin.learn.evaluation.feature_check import FeatureCheck
from fastlangevin.learn.log import read_records
from fastlangevin.learn.model import load
from fastlangevin.learn.reading import brief, read_bytes, read_json
from fastlangevin.learn.run_folder import FolderInUseError, has_plan, is_run
from fastlangevin.learn.seeds import SWEEP
from fastlangevin.learn.stop import StopRequest, stop_signal
from fastlangevin.learn.sweep.claims import claimed
from fastlangevin.learn.sweep.plan import VERSION, Run, Sweep, describe
from fastlangevin.learn.train import train
from fastlangevin.progress import Report, silent

PLAN, RESULT, CLAIMS = "sweep.yaml", "result.json", ".claims"
_POLL = 2.0  # seconds between checks of what other processes have done
MARK = "# The plan of a fastlangevin sweep.\n"
SAMPLES = 1024
FEATURE_SAMPLES = 2048  # more, because features have more dimensions than coarse pixels
# The measures of a run, in the order of tables and plots. Only a sweep with features has those of
# features.
OF_FEATURES = {
    "feature_frechet": "Frechet distance of features",
    "feature_kernel": "kernel distance of features",
    "feature_recall": "recall of features",
}
MEASURES = {
    "sure": "fraction of sure samples",
    "frechet": "Frechet distance of pixels",
    **OF_FEATURES,
    "gap": "energy gap, data - samples",
    "gap_rms": "its root mean square",
    "grad_norm": "gradient magnitude",
    "seconds": "seconds an iteration",
}

RunReport = Callable[[Run, Mapping[str, Any]], None]
# Measures the samples of a run with this config.
Judge = Callable[[TrainConfig, Tensor], dict[str, float | None]]


def run_sweep(
    plan: Sweep,
    out: str | Path,
    *,
    device: str | None = None,
    report: RunReport | None = None,
    stop: StopRequest | None = None,
    progress: Report = silent,
) -> list[dict[str, Any]] | None:
    """Make the runs of a sweep, in folders under ``out``, and return all results.

    Any number of processes may call this function for one folder, also on several machines and at
    different times. Each takes the next run that no other works on. If a process is lost, another
    one takes over its run some minutes later and resumes it from its checkpoint. All of them
    return when every run has a result. ``report(run, result)`` is called for each of them, and
    ``progress(run, done, total)`` after every iteration of a run of this process.

    Returns None if a signal ended the sweep, which ``stop`` then holds. When called again, it keeps
    finished runs and resumes an interrupted one. A run that diverges has a result, with the
    iteration and the reason.

    Before anything is written, raises ValueError for a run with invalid settings or a damaged
    result, and FileExistsError for a folder that holds another sweep or anything else.
    """
    out = Path(out)
    runs = plan.runs()
    if device is not None:
        runs = [
            dataclasses.replace(run, config=dataclasses.replace(run.config, device=device))
            for run in runs
        ]
    _check_folder(plan, out)
    for run in runs:
        _read_result(out / run.name)  # raises an error for a damaged result before any work
    judge = _check_runs(runs, plan.features)
    count = sample_count(plan.features)
    stop = stop or StopRequest()
    if not (out / PLAN).exists():
        save_text(out / PLAN, MARK + yaml.safe_dump(plan.plan(), sort_keys=False))
    results: dict[str, dict[str, Any]] = {}
    while len(results) < len(runs):
        before = len(results)
        for run in runs:
            if run.name in results:
                continue
            result = _read_result(out / run.name) or _claim_and_make(
                run, out, count, judge, stop, progress
            )
            if stop.signal is not None:
                return None
            if result is not None:
                results[run.name] = result
                if report is not None:
                    report(run, result)
        # Without a new result, others work on all runs that are left.
        if len(results) == before and not _wait_for_others(stop):
            return None
    with contextlib.suppress(OSError):  # another process has just removed it
        (out / CLAIMS).rmdir()
    return [results[run.name] for run in runs]


def _wait_for_others(stop: StopRequest) -> bool:
    """Wait a little for other processes; return False if a signal came."""
    with stop_signal(stop):
        deadline = time.monotonic() + _POLL
        while stop.signal is None and time.monotonic() < deadline:
            time.sleep(0.05)
    return stop.signal is None


def _claim_and_make(
    run: Run, out: Path, count: int, judge: Judge, stop: StopRequest, progress: Report
) -> dict[str, Any] | None:
    """Make a run, unless another process works on it or a signal ends it: then return None."""
    own_stop, lost = StopRequest(), threading.Event()

    def leave() -> None:
        if own_stop.signal is None:  # a signal of the user stays
            lost.set()
            own_stop.signal = signal.SIGTERM

    with claimed(out / CLAIMS / run.name, leave) as free:
        if not free:
            return None
        result = _read_result(out / run.name)  # another process may just have finished it
        try:
            result = result or _make_run(run, out / run.name, count, judge, own_stop, progress)
        except FolderInUseError:  # by a process whose claim has expired, but which still holds it
            return None
    if not lost.is_set():
        stop.signal = own_stop.signal  # also one that came when the run was complete
    return result


def _check_folder(plan: Sweep, out: Path) -> None:
    if not has_plan("sweep", out, PLAN, "a sweep"):
        return
    if not read_bytes(out / PLAN).startswith(MARK.encode()):
        raise FileExistsError(
            f"sweep: {out / PLAN} does not belong to a sweep; name another folder"
        )
    saved, asked = read_settings(out / PLAN), plan.plan()
    if saved.get("version") != VERSION:
        raise FileError(
            f"{out / PLAN} is a sweep of version {brief(saved.get('version'))}; "
            f"this fastlangevin reads version {VERSION}"
        )
    if not isinstance(saved.get("centre"), dict):
        raise FileError(f"{out / PLAN} is damaged, it has no centre; name another folder")
    axes = saved.get("axes")
    if "learn_precision" not in saved["centre"] and "precision" in (axes or {}):
        raise FileExistsError(
            f"sweep: {out} holds a sweep over precision from before train learned in bfloat16, "
            "which would now be another run; name another folder"
        )
    saved.setdefault("together", {})  # sweeps from before it was a setting
    saved, asked = ({**of_its_version(p.pop("centre")), **p} for p in (saved, asked))
    for name in asked:
        if name != "device" and saved.get(name) != asked[name]:
            raise FileExistsError(
                f"sweep: {out} holds another sweep: {name} is {brief(saved.get(name))} there, "
                f"{asked[name]} here; name another folder"
            )


def sample_count(features: str | None) -> int:
    """Return how many samples of each run are measured."""
    return SAMPLES if features is None else FEATURE_SAMPLES


def _check_runs(runs: Sequence[Run], features: str | None) -> Judge:
    """Build the learner of every point once; return a function that judges a run's samples."""
    data_of = functools.cache(load_data)
    quality_of = functools.cache(lambda source: QualityCheck(data_of(source)))

    @functools.cache
    def feature_check_of(source: TrainConfig) -> FeatureCheck | None:
        if features is None:
            return None
        return FeatureCheck(data_of(source), features, choose_device(source.device))

    def source(config: TrainConfig) -> TrainConfig:
        """Return a config that differs from the first run's only in its data."""
        changes = {name: getattr(config, name) for name in ("data", *DATA_OPTIONS)}
        return dataclasses.replace(runs[0].config, **changes)

    for run in runs:
        if run.config.seed != runs[0].config.seed:
            continue
        try:
            build_learner(run.config, data_of(source(run.config)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sweep: at {describe(run.settings)}: {error}") from error
        feature_check_of(source(run.config))  # raises an error for unknown features

    def judge(config: TrainConfig, images: Tensor) -> dict[str, float | None]:
        check = feature_check_of(source(config))
        of_features = {} if check is None else check(images)._asdict()
        return quality_of(source(config))(images)._asdict() | of_features

    return judge


def _make_run(
    run: Run, folder: Path, count: int, judge: Judge, stop: StopRequest, progress: Report
) -> dict[str, Any] | None:
    """Train or resume a run, measure its samples and save the result; None if a signal ended it."""
    config = run.config
    checkpoints = list_checkpoints(folder)
    done = int(checkpoints[-1].stem) if checkpoints else 0

    def follow(iteration: int, _record: Mapping[str, Any]) -> None:
        nonlocal done
        done = iteration
        progress(run.name, done, config.iterations)

    diverged = None
    try:
        last = train(config, folder, resume=is_run(folder), report=follow, stop=stop)
        if int(last.stem) < config.iterations:
            return None
    except DivergedError as error:
        # Its cause says the same without the names of files.
        reason = str(error.__cause__ or error)
        diverged = {"iteration": min(done + 1, config.iterations), "reason": reason}
    measures: dict[str, float | None] = dict.fromkeys(MEASURES)
    records = read_records(folder)
    if records:
        measures["seconds"] = statistics.median(record["seconds"] for record in records)
    if diverged is None:
        images = _draw_samples(config, folder, count)
        if bool(images.isfinite().all()):
            measures |= judge(config, images)
            measures |= _settled_measures(records)
        else:
            diverged = {"iteration": config.iterations, "reason": "samples are not finite"}
    result = {"settings": run.settings, "seed": config.seed, "diverged": diverged, **measures}
    save_json(folder / RESULT, result)
    return _read_result(folder)


def _draw_samples(config: TrainConfig, folder: Path, count: int) -> Tensor:
    """Run new chains from p0 through the trained model, a batch at a time."""
    sampler = load(folder, device=choose_device(config.device))
    seed, size = _noise.fold_in(config.seed, SWEEP), config.batch_size
    batches = [
        sampler(n=min(size, count - first), seed=seed, first_chain=first).cpu()
        for first in range(0, count, size)
    ]
    return torch.cat(batches)


def _settled_measures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return measures over the last quarter of a run's records, the most settled part."""
    late = records[-max(1, len(records) // 4) :]
    gaps = [record["gap"] for record in late]
    return {
        "gap": statistics.fmean(gaps),
        "gap_rms": statistics.fmean(gap**2 for gap in gaps) ** 0.5,
        "grad_norm": statistics.fmean(record["grad_norm"] for record in late),
    }


def _read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None; FileError if it is damaged."""
    path = folder / RESULT
    if not os.path.lexists(path):
        return None
    try:
        result = read_json(path)
        valid = _is_result(result)
    except FileError:
        valid = False
    if not valid:
        raise FileError(
            f"{path} is damaged or from another version; remove it, and the same command measures "
            "the run again from its checkpoint"
        )
    return dict.fromkeys(OF_FEATURES) | result


def _is_result(result: Any) -> bool:
    """Return whether a value has all entries that tables and plots read."""
    if not isinstance(result, dict) or not {"settings", "seed", "diverged"} <= result.keys():
        return False
    numbers = [result.get(name, None if name in OF_FEATURES else "missing") for name in MEASURES]
    end = result["diverged"]
    return all(value is None or isinstance(value, int | float) for value in numbers) and (
        end is None or (isinstance(end, dict) and {"iteration", "reason"} <= end.keys())
    )
