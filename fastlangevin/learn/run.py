"""A training run: a folder that fills with checkpoints, records and samples, and can be resumed."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlangevin import noise as _noise
from fastlangevin.energies import ConvEnergy
from fastlangevin.learn.build import (
    build_learner,
    choose_device,
    draw_samples,
    sampler_settings,
)
from fastlangevin.learn.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from fastlangevin.learn.config import TrainConfig, read_settings, resolve, save_config
from fastlangevin.learn.guard import DivergedError, DivergenceGuard
from fastlangevin.learn.images import save_grid
from fastlangevin.learn.learner import ShortRunLearner
from fastlangevin.learn.log import RunLog

CONFIG = "config.yaml"
KEPT_CHECKPOINTS = 2
_NUMBER = "[0-9]" * 8
WRITTEN = (
    f"checkpoints/{_NUMBER}.safetensors",
    f"samples/{_NUMBER}.png",
    "metrics.jsonl",
    "samples.png",
    CONFIG,
)
# What a resumed run may change: how long it goes on, what it writes, and where.
FREE_SETTINGS = (
    "iterations",
    "device",
    "log_every",
    "sample_every",
    "save_every",
    "samples",
    "max_energy",
    "max_saturation",
)

Report = Callable[[int, Mapping[str, Any]], None]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Path:
    """Learn by algorithm 1 as ``config`` says, in the folder ``out``; returns the last checkpoint.

    The folder gets config.yaml, metrics.jsonl, checkpoints/, samples/, samples.png and, where
    TensorBoard is installed, tensorboard/. With ``resume`` the run in it goes on from its newest
    checkpoint and ends with the numbers of a run that was never cut. ``report(iteration, record)``
    is called after every iteration. SIGINT and SIGTERM end the run after the current iteration,
    with a checkpoint.

    Raises, before anything is written, FileExistsError if ``out`` holds a run and neither
    ``resume`` nor ``overwrite`` is given, and ValueError for settings that do not fit. Later
    DivergedError, naming the last good checkpoint, and OSError when the disk is full: the
    checkpoints written before stay.
    """
    out = Path(out)
    check_folder(config, out, resume, overwrite)
    learner = build_learner(config)
    if resume:
        remove_leftovers(out)
        resume_learner(learner, out)
    elif overwrite:
        remove_run(out)
    save_config(config, out / CONFIG)
    log = RunLog(out, learner.iteration)
    guard = DivergenceGuard(config.max_energy, config.max_saturation)
    try:
        with stop_signal() as stop:
            while learner.iteration < config.iterations and not stop.is_set():
                iterate(learner, config, out, log, guard, report)
        if not checkpoint_path(out, learner.iteration).exists():
            if not is_sound(learner, config):
                raise DivergedError(f"energies run away after iteration {learner.iteration}")
            save_run(learner, config, out)
        save_grid(draw_samples(learner, config), out / "samples.png")
    except (DivergedError, FloatingPointError) as error:
        good = list_checkpoints(out)
        where = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved yet"
        raise DivergedError(f"{error}; {where}") from error
    finally:
        log.close()
    return list_checkpoints(out)[-1]


def iterate(
    learner: ShortRunLearner,
    config: TrainConfig,
    out: Path,
    log: RunLog,
    guard: DivergenceGuard,
    report: Report | None,
) -> None:
    """One iteration, and what is due after it: record, grid, checkpoint."""
    started = time.perf_counter()
    learner.lr, learner.data_noise = annealed(config, learner.iteration)
    due = learner.iteration + 1
    measured = due % config.log_every == 0 or due == config.iterations
    metrics = learner.step(measure=measured)
    guard.check(metrics)
    record = {
        **metrics._asdict(),
        "lr": learner.lr,
        "data_noise": learner.data_noise,
        "seconds": time.perf_counter() - started,
    }
    if measured:
        log.record(record)
    if due % config.sample_every == 0:
        log.grid(draw_samples(learner, config), due)
    if due % config.save_every == 0 and guard.calm and is_sound(learner, config):
        save_run(learner, config, out)
    if report is not None:
        report(due, record)


def is_sound(learner: ShortRunLearner, config: TrainConfig) -> bool:
    """Whether the weights, just changed, still give finite chains of bounded energy.

    The guard has seen what they were before the change. A checkpoint is what a lost run goes back
    to, so it is worth a small chain. Its mean energy has ten times the guard's room: it is another
    batch, and weights that are lost pass any bound by far.
    """
    x0 = 2 * _noise.uniform((16, *learner.data.shape), seed=config.seed, step=0) - 1
    chain = learner.sampler.diagnose(x0.to(choose_device(config.device)), seed=config.seed)
    # A comparison with NaN is false.
    return bool(
        chain.x.isfinite().all() and chain.energy[-1].mean().abs() <= 10 * config.max_energy
    )


def annealed(config: TrainConfig, iteration: int) -> tuple[float, float]:
    """(lr, data_noise) of an iteration: constant, then linear to their final values."""
    start = config.anneal_start * config.iterations
    part = max(0.0, iteration - start) / max(1.0, config.iterations - start)
    return (
        config.lr + part * (config.lr_final - config.lr),
        config.data_noise + part * (config.data_noise_final - config.data_noise),
    )


def save_run(learner: ShortRunLearner, config: TrainConfig, out: Path) -> Path:
    """Save a checkpoint; of the older ones the newest is kept."""
    path = checkpoint_path(out, learner.iteration)
    info = {
        "iteration": learner.iteration,
        "energy": learner.energy.settings() if isinstance(learner.energy, ConvEnergy) else None,
        "sampler": sampler_settings(config),
        "config": dataclasses.asdict(config),
    }
    save_checkpoint(path, learner.tensors(), info)
    for old in list_checkpoints(out)[:-KEPT_CHECKPOINTS]:
        old.unlink()
    return path


def resume_learner(learner: ShortRunLearner, out: Path) -> None:
    """Put a fresh learner where the run's newest checkpoint, if it has one, left off."""
    for path in list_checkpoints(out)[-1:]:
        tensors, info = read_checkpoint(path)
        learner.load_tensors(tensors, info["iteration"])


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that does not fit, before anything is loaded or written."""
    if resume and overwrite:
        raise ValueError("train: give resume or overwrite, not both")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"train: {out} is a file, not a folder for a run")
    if resume and not (out / CONFIG).exists():
        raise FileNotFoundError(f"train: {out} holds no run to resume (it has no {CONFIG})")
    if not resume and not overwrite and ((out / CONFIG).exists() or list_checkpoints(out)):
        raise FileExistsError(
            f"train: {out} already holds a run; resume it, overwrite it, or name another folder"
        )
    if resume:
        saved = dataclasses.asdict(resolve(overrides=read_settings(out / CONFIG)))
        asked = dataclasses.asdict(config)
        different = [k for k in saved if k not in FREE_SETTINGS and saved[k] != asked[k]]
        if different:
            changes = ", ".join(f"{k} ({saved[k]} to {asked[k]})" for k in different)
            raise ValueError(f"train: {out} cannot be resumed with other settings: {changes}")


def remove_run(out: Path) -> None:
    """Delete what a run wrote, and nothing else. The config goes last: until then it is a run."""
    remove_leftovers(out)
    for pattern in ("tensorboard/events.out.tfevents.*", *WRITTEN):
        for path in out.glob(pattern):
            path.unlink()
    for name in ("checkpoints", "samples", "tensorboard"):
        with contextlib.suppress(OSError):  # not there, or with files of the user's in it
            (out / name).rmdir()


def remove_leftovers(out: Path) -> None:
    """Delete the unfinished files of a process that was killed while it wrote them."""
    for pattern in WRITTEN:
        folder, _, name = pattern.rpartition("/")
        for path in (out / folder).glob(f".{name}.*.tmp"):
            path.unlink()


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it always does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, request)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
