"""Training runs: learn into a folder of checkpoints, records and samples; resume from it."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlangevin.distributed import DistributedError, Group
from fastlangevin.learn.atomic import save_text
from fastlangevin.learn.build import build_learner, choose_device, draw_samples, fingerprint
from fastlangevin.learn.checkpoint import (
    DamagedCheckpointError,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
)
from fastlangevin.learn.config import TrainConfig, save_config
from fastlangevin.learn.divergence import DivergedError, DivergenceGuard
from fastlangevin.learn.images import save_grid
from fastlangevin.learn.job import check_same_folder, check_same_work, is_own
from fastlangevin.learn.learner import ShortRunLearner
from fastlangevin.learn.log import RunLog
from fastlangevin.learn.model import describe, digest_of_start, start_in
from fastlangevin.learn.run_folder import (
    CONFIG,
    DIVERGED,
    REMEDY,
    check_folder,
    is_run,
    only_writer,
    remove_run,
    remove_run_leftovers,
)
from fastlangevin.learn.stop import StopRequest, stop_signal
from fastlangevin.names import keywords_checked
from fastlangevin.sampler import LangevinSampler

# The newest checkpoint, and the previous one in case the newest is damaged. Each holds the weights
# four times (with their average and Adam's two moments) and the buffer.
KEPT_CHECKPOINTS = 2

# Called after every iteration as report(iteration, record).
IterationReport = Callable[[int, Mapping[str, Any]], None]


@keywords_checked
def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: IterationReport | None = None,
    start: Callable[[ShortRunLearner], None] | None = None,
    stop: StopRequest | None = None,
    group: Group | None = None,
) -> Path:
    """Train with the settings of ``config`` in the folder ``out``; return the last checkpoint.

    The folder receives config.yaml, metrics.jsonl, series.jsonl, checkpoints/, samples/,
    samples.png and, if TensorBoard is installed, tensorboard/.

    Args:
        resume: Continue the run in ``out`` from its newest checkpoint. The result is identical to
            that of an uninterrupted run. If the newest checkpoint is damaged, the run warns,
            renames it to end in .damaged, and continues from the previous one.
        overwrite: Delete the run in ``out`` first.
        report: Called as ``report(iteration, record)`` after every iteration.
        start: Called with the learner before the first iteration.
        stop: Afterwards holds the signal that stopped the run. SIGINT, SIGTERM and SIGHUP save a
            checkpoint after the current iteration and end the run.
        group: The processes that share each batch. All of them call this function; see
            :func:`fastlangevin.distributed.join`. Rank 0 writes. A signal to any of them stops
            all. A run that the same job began before torchrun restarted it is continued.

    Before anything is written, raises FileExistsError if ``out`` holds a run and neither
    ``resume`` nor ``overwrite`` is given, or if another process is training in it; ValueError for
    settings that do not fit; and, with ``resume``, FileError naming the file of the run that
    cannot be read. Later, raises DivergedError, naming the last good checkpoint, and OSError if the
    disk is full; checkpoints that were already written are kept. Raises DistributedError if the
    processes of a group have different settings, code, data or folders, or if one of them fails.
    """
    out, group = Path(out), group or Group()
    check_same_work(group, config)
    with contextlib.ExitStack() as stack:

        def open_folder() -> bool:
            """Check and lock the folder; return whether to continue the run in it."""
            is_ours = is_run(out) and is_own(group, out)
            check_folder(config, out, resume or is_ours, overwrite and not is_ours)
            stack.enter_context(only_writer(out))
            return resume or is_ours

        resume = group.first(open_folder, f"run folder {out}")
        with group.working():
            learner = build_learner(
                config, group=group, start=_start_of(config, out) if resume else None
            )
            data = fingerprint(learner.data)
            of_start = digest_of_start(*describe(learner.sampler))
        group.compare({"the data": data, "the model that chains start from": of_start}, "start")
        _open_run(learner, config, out, resume, overwrite)
        if start is not None:
            with group.working():
                start(learner)
        return _train(learner, config, out, report, stop or StopRequest())


def _start_of(config: TrainConfig, out: Path) -> LangevinSampler | None:
    """Return the model that the chains of a run start from, as its newest checkpoint holds it."""
    for path in reversed(list_checkpoints(out)) if config.start is not None else ():
        with contextlib.suppress(DamagedCheckpointError):  # which is reported when it is resumed
            tensors, info = read_checkpoint(path)
            device = choose_device(config.device)
            return start_in(tensors, info, path, device) if "start" in info else None
    return None


def _open_run(
    learner: ShortRunLearner, config: TrainConfig, out: Path, resume: bool, overwrite: bool
) -> None:
    """Restore the learner from the run, or start a new one in the folder."""
    group = learner.group

    def prepare() -> int:
        remove_run_leftovers(out)
        if resume:
            (out / DIVERGED).unlink(missing_ok=True)
            resume_learner(learner, config, out)
        elif overwrite:
            remove_run(out)
        return learner.iteration

    iteration = group.first(prepare, f"run folder {out}")
    check_same_folder(group, out, "train")
    group.first(lambda: save_config(config, out / CONFIG), f"run folder {out}")
    if group.rank > 0 and iteration > 0:
        with group.working():
            learner.load(checkpoint_path(out, iteration))
    learner.check_replicas("start")


def _train(
    learner: ShortRunLearner,
    config: TrainConfig,
    out: Path,
    report: IterationReport | None,
    stop: StopRequest,
) -> Path:
    group = learner.group
    with group.working():
        log = RunLog(out, learner.iteration) if group.rank == 0 else None
    guard = DivergenceGuard(config.max_energy, config.max_saturation)
    try:
        with stop_signal(stop):
            learner.signal = max(group.share(stop.signal or 0, "start"))
            while learner.iteration < config.iterations and not _should_stop(learner, stop):
                iterate(learner, config, out, log, guard, report, stop)
            what = f"checkpoint of iteration {learner.iteration}"
            if not group.first(checkpoint_path(out, learner.iteration).exists, what):
                if not group.first(lambda: is_sound(learner, config), what):
                    raise DivergedError(f"energies run away after iteration {learner.iteration}")
                save_run(learner, config, out, log)
            return Path(group.first(lambda: finish(learner, config, out), what))
    except (DivergedError, FloatingPointError) as error:
        # The learner counts an iteration once its weights have changed.
        broken = learner.iteration + isinstance(error, FloatingPointError)
        if group.rank == 0:
            with contextlib.suppress(OSError):
                save_text(out / DIVERGED, f"diverged at iteration {broken}: {error}\n")
        advice = "" if list_checkpoints(out) else f"; {REMEDY}"
        raise DivergedError(f"{error}; {last_good(out)}{advice}") from error
    except DistributedError as error:
        raise DistributedError(f"{error}; {last_good(out)}") from error
    except OSError as error:
        raise OSError(f"{error}; {last_good(out)}, resume continues from there") from error
    finally:
        if log is not None:
            log.close()


def _should_stop(learner: ShortRunLearner, stop: StopRequest) -> bool:
    """Return whether a signal came; in a group, all processes stop after the same iteration."""
    if learner.group.world_size == 1:
        return stop.signal is not None
    stop.signal = learner.signal or stop.signal
    return learner.signal != 0


def iterate(
    learner: ShortRunLearner,
    config: TrainConfig,
    out: Path,
    log: RunLog | None,
    guard: DivergenceGuard,
    report: IterationReport | None,
    stop: StopRequest,
) -> None:
    """Run one iteration, check and log its figures, and write the samples and checkpoint due."""
    started, group = time.perf_counter(), learner.group
    sent, waited = group.bytes, group.seconds
    learner.lr, learner.data_noise = annealed(config, learner.iteration)
    number = learner.iteration + 1
    measured = number % config.log_every == 0 or number == config.iterations
    metrics = learner.step(measure=measured, signal=lambda: stop.signal or 0)
    guard.check(metrics)
    record = {**metrics._asdict(), "lr": learner.lr, "data_noise": learner.data_noise}
    record["seconds"] = time.perf_counter() - started
    if group.world_size > 1:
        record["communicated_bytes"] = group.bytes - sent
        record["communication_seconds"] = group.seconds - waited
    if log is not None:
        log.follow(number, metrics.gap, metrics.reach)
        if measured:
            log.record(record)

    def write_samples() -> None:
        if log is not None:
            log.grid(draw_samples(learner, config), number)

    if number % config.sample_every == 0:
        group.first(write_samples, f"samples of iteration {number}")
    what = f"checkpoint of iteration {number}"
    is_due = number % config.save_every == 0 and guard.calm
    if is_due and group.first(lambda: is_sound(learner, config), what):
        save_run(learner, config, out, log)
    if report is not None:
        report(number, record)


def finish(learner: ShortRunLearner, config: TrainConfig, out: Path) -> str:
    """Write the last grid of a run and return the path of its last checkpoint."""
    remove_old_checkpoints(out)  # an earlier process may have been killed before this
    save_grid(draw_samples(learner, config), out / "samples.png")
    return str(list_checkpoints(out)[-1])


def is_sound(learner: ShortRunLearner, config: TrainConfig) -> bool:
    """Return whether the current weights give finite chains with bounded energies.

    The guard checked the weights before their last update. A diverged run restarts from its last
    checkpoint, so a short chain checks the weights again before they are saved. Its mean energy
    may reach ten times the guard's bound: it is from another batch, and diverged weights exceed
    any bound by far.
    """
    chain = learner.sampler.diagnose(n=16, shape=learner.data.shape, seed=config.seed)
    # A comparison with NaN is false.
    bounded = chain.energy[-1].mean().abs() <= 10 * config.max_energy
    return bool(chain.x.isfinite().all() and bounded)


def last_good(out: Path) -> str:
    """Return a text about the checkpoint from which a run that has stopped can continue."""
    if checkpoints := list_checkpoints(out):
        return f"the last good checkpoint is {checkpoints[-1]}"
    return "no checkpoint was saved yet"


def annealed(config: TrainConfig, iteration: int) -> tuple[float, float]:
    """Return (lr, data_noise) at an iteration: constant, then linear to their final values."""
    start = config.anneal_start * config.iterations
    part = max(0.0, iteration - start) / max(1.0, config.iterations - start)
    return (
        config.lr + part * (config.lr_final - config.lr),
        config.data_noise + part * (config.data_noise_final - config.data_noise),
    )


def save_run(learner: ShortRunLearner, config: TrainConfig, out: Path, log: RunLog | None) -> None:
    """Flush the records, save a checkpoint, and delete all but the newest older ones."""
    what = f"checkpoint of iteration {learner.iteration}"

    def flush() -> None:
        if log is not None:
            log.sync()

    learner.group.first(flush, what)
    path = checkpoint_path(out, learner.iteration)
    learner.save(path, config=dataclasses.asdict(config), data=fingerprint(learner.data))
    learner.group.first(lambda: remove_old_checkpoints(out), what)


def remove_old_checkpoints(out: Path) -> None:
    for path in list_checkpoints(out)[:-KEPT_CHECKPOINTS]:
        path.unlink()


def resume_learner(learner: ShortRunLearner, config: TrainConfig, out: Path) -> None:
    """Restore a new learner from the newest intact checkpoint of a run, if the run has any.

    Newer checkpoints that are damaged are renamed, with a warning. Raises CheckpointError if all
    are damaged, and ValueError if the data differ from the run's or if the checkpoint is past
    the last iteration of ``config``.
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
            f"train: {reason}; it is now {aside.name}, and the run continues from {path}",
            stacklevel=7,
        )
