"""A training run: a folder that fills with checkpoints, records and samples, and can be resumed."""

import contextlib
import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlangevin import noise as _noise
from fastlangevin.learn.build import (
    build_learner,
    choose_device,
    draw_samples,
    fingerprint,
)
from fastlangevin.learn.checkpoint import (
    DamagedCheckpointError,
    checkpoint_path,
    list_checkpoints,
)
from fastlangevin.learn.config import TrainConfig, save_config
from fastlangevin.learn.guard import DivergedError, DivergenceGuard
from fastlangevin.learn.images import save_grid
from fastlangevin.learn.learner import ShortRunLearner
from fastlangevin.learn.log import RunLog
from fastlangevin.learn.run_folder import (
    CONFIG,
    check_folder,
    only_writer,
    remove_leftovers,
    remove_run,
)

# The newest, and the one before it to fall back to: each has the weights four times (their average
# and Adam's two moments) and the buffer.
KEPT_CHECKPOINTS = 2

Report = Callable[[int, Mapping[str, Any]], None]


class StopRequest:
    """The signal that asks a run to end after its current iteration; None: it goes on."""

    def __init__(self) -> None:
        self.signal: int | None = None


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    stop: StopRequest | None = None,
) -> Path:
    """Learn by algorithm 1 as ``config`` says, in the folder ``out``; returns the last checkpoint.

    The folder gets config.yaml, metrics.jsonl, series.jsonl, checkpoints/, samples/, samples.png
    and, where TensorBoard is installed, tensorboard/. With ``resume`` the run in it goes on from
    its newest checkpoint and ends with the numbers of a run that was never cut. If that checkpoint
    is damaged, the run warns, renames it to end in .damaged and goes on from the one before it.
    ``report(iteration, record)`` is called after every iteration. SIGINT, SIGTERM and SIGHUP end
    the run after the current iteration, with a checkpoint; ``stop`` tells afterwards which one did.

    Raises, before anything is written, FileExistsError if ``out`` holds a run and neither
    ``resume`` nor ``overwrite`` is given or if another process is training in it, and ValueError
    for settings that do not fit; with ``resume``, FileError naming the file of the run that cannot
    be read. Later DivergedError, naming the last good checkpoint, and OSError
    when the disk is full: the checkpoints written before stay.
    """
    out = Path(out)
    check_folder(config, out, resume, overwrite)
    with only_writer(out):
        return _train(config, out, resume, overwrite, report, stop or StopRequest())


def _train(
    config: TrainConfig,
    out: Path,
    resume: bool,
    overwrite: bool,
    report: Report | None,
    stop: StopRequest,
) -> Path:
    learner = build_learner(config)
    remove_leftovers(out)
    if resume:
        resume_learner(learner, config, out)
    elif overwrite:
        remove_run(out)
    save_config(config, out / CONFIG)
    log = RunLog(out, learner.iteration)
    guard = DivergenceGuard(config.max_energy, config.max_saturation)
    try:
        with stop_signal(stop):
            while learner.iteration < config.iterations and stop.signal is None:
                iterate(learner, config, out, log, guard, report)
            if not checkpoint_path(out, learner.iteration).exists():
                if not is_sound(learner, config):
                    raise DivergedError(f"energies run away after iteration {learner.iteration}")
                save_run(learner, config, out, log)
            remove_old_checkpoints(out)  # a process may have been killed before it did
            save_grid(draw_samples(learner, config), out / "samples.png")
    except (DivergedError, FloatingPointError) as error:
        raise DivergedError(f"{error}; {last_good(out)}") from error
    except OSError as error:
        raise OSError(f"{error}; {last_good(out)}, resume goes on from there") from error
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
    log.follow(due, metrics.gap, metrics.reach)
    if measured:
        log.record(record)
    if due % config.sample_every == 0:
        log.grid(draw_samples(learner, config), due)
    if due % config.save_every == 0 and guard.calm and is_sound(learner, config):
        save_run(learner, config, out, log)
    if report is not None:
        report(due, record)


def is_sound(learner: ShortRunLearner, config: TrainConfig) -> bool:
    """Whether the weights, just changed, still give finite chains of bounded energy.

    The guard has seen what they were before the change. A checkpoint is what a lost run goes back
    to, so it is worth a small chain. Its mean energy has ten times the guard's room: it is another
    batch, and weights that are lost pass any bound by far.
    """
    x0 = _noise.initial((16, *learner.data.shape), seed=config.seed)
    chain = learner.sampler.diagnose(x0.to(choose_device(config.device)), seed=config.seed)
    # A comparison with NaN is false.
    return bool(
        chain.x.isfinite().all() and chain.energy[-1].mean().abs() <= 10 * config.max_energy
    )


def last_good(out: Path) -> str:
    """Which checkpoint a run that has stopped can go back to, in words."""
    found = list_checkpoints(out)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was saved yet"


def annealed(config: TrainConfig, iteration: int) -> tuple[float, float]:
    """(lr, data_noise) of an iteration: constant, then linear to their final values."""
    start = config.anneal_start * config.iterations
    part = max(0.0, iteration - start) / max(1.0, config.iterations - start)
    return (
        config.lr + part * (config.lr_final - config.lr),
        config.data_noise + part * (config.data_noise_final - config.data_noise),
    )


def save_run(learner: ShortRunLearner, config: TrainConfig, out: Path, log: RunLog) -> Path:
    """Save a checkpoint, after the records of its past; of the older ones the newest is kept."""
    log.sync()
    path = checkpoint_path(out, learner.iteration)
    learner.save(path, config=dataclasses.asdict(config), data=fingerprint(learner.data))
    remove_old_checkpoints(out)
    return path


def remove_old_checkpoints(out: Path) -> None:
    for path in list_checkpoints(out)[:-KEPT_CHECKPOINTS]:
        path.unlink()


def resume_learner(learner: ShortRunLearner, config: TrainConfig, out: Path) -> None:
    """Put a fresh learner where the run's newest whole checkpoint, if it has any, left off.

    Damaged ones that are newer are renamed, with a warning. Raises CheckpointError if none is
    whole, and ValueError if the data are others than the run's, or it is past its last iteration.
    """
    damaged: dict[Path, DamagedCheckpointError] = {}
    for path in reversed(list_checkpoints(out)):
        try:
            saved = learner.load(path)
            break
        except DamagedCheckpointError as error:
            damaged[path] = error
    else:
        if damaged:
            newest = next(iter(damaged.values()))
            raise DamagedCheckpointError(
                f"{newest}; no older checkpoint is whole, start the run again with overwrite"
            ) from newest
        return
    if saved.get("data") != fingerprint(learner.data):
        raise ValueError(f"train: {out} was trained on other data than {config.data} holds now")
    if learner.iteration > config.iterations:
        raise ValueError(
            f"train: {out} is at iteration {learner.iteration} already, "
            f"iterations must be at least that, got {config.iterations}"
        )
    for newer, reason in damaged.items():
        aside = newer.with_suffix(".damaged")
        newer.replace(aside)
        warnings.warn(
            f"train: {reason}; it is now {aside.name}, and the run goes on from {path}",
            stacklevel=4,
        )


@contextlib.contextmanager
def stop_signal(stop: StopRequest) -> Iterator[None]:
    """Note the first SIGINT, SIGTERM or SIGHUP in ``stop``; a second one acts as it always does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Windows has no SIGHUP.
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {number: signal.getsignal(number) for number in numbers if number is not None}
    # A shell has them ignored for what it runs in the background, nohup has SIGHUP; that stays.
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}

    def request(number: int, _frame: object) -> None:
        stop.signal = number
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, request)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
