from pathlib import Path
from typing import Annotated, Any

from fastlangevin.cli.options import Flag, Timeout, more, settings_options
from fastlangevin.cli.outputs import Result, note, table
from fastlangevin.cli.progress_bar import progress, start_line


def train(
    *, out: Path | None = None, config: str | None = None, resume: Flag = False,
    overwrite: Flag = False, timeout: Timeout = 600.0,
    settings: "Annotated[settings_options(), more('Settings')]" = None,  # type: ignore[valid-type]
) -> Result:  # fmt: skip
    """Learn an energy from images by short-run MCMC, into a folder.

    Options change settings of the config. All settings of the run are saved as OUT/config.yaml.
    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop the run, with exit status 130, 143 or 129.
    Several processes that torchrun has started share every batch.

    Args:
        out: Folder of the run (default: runs/CONFIG, or runs/CONFIG-2, ... if that exists).
        config: Settings to start from: a config in the package (see configs), or a YAML, TOML or
            JSON file (default: digits).
        resume: Continue the run in OUT.
        overwrite: Delete the run in OUT first.
    """
    from fastlangevin.distributed import join
    from fastlangevin.learn import run_folder
    from fastlangevin.learn.config import resolve
    from fastlangevin.learn.stop import StopRequest
    from fastlangevin.learn.train import train as learn

    stop = StopRequest()
    if resume:
        if out is None:
            raise ValueError("--resume needs --out, the folder of the run")
        if config is not None:
            raise ValueError("--resume uses the settings of the run: do not give --config")
        if run_folder.is_run(out):
            config = str(out / run_folder.CONFIG)
    resolved = resolve(config, settings)
    with join(resolved.device, timeout) as group:
        if out is None and (group.world_size > 1 or group.job is not None):
            raise ValueError("several processes need --out, the folder of the run")
        folder = out or run_folder.free_folder(Path("runs") / Path(config or "digits").stem)
        with progress(shown=group.rank == 0, pause=0.0) as show:

            def start(learner: Any) -> None:
                if group.rank == 0:
                    work = _describe(resolved, learner)
                    start_line(work, learner.sampler, resolved.batch_size, folder)

            def report(iteration: int, record: Any) -> None:
                norm = record["grad_norm"]
                state = f"gap {record['gap']:+.3f}"
                state += "" if norm is None else f"  |grad| {norm:.3f}"
                show("iteration", iteration, resolved.iterations, state)

            last = learn(
                resolved, folder, resume=resume, overwrite=overwrite, report=report, start=start,
                stop=stop, group=group,
            )  # fmt: skip
    text = table(
        ("checkpoint", str(last)), ("samples", str(folder / "samples.png")),
        ("settings", str(folder / run_folder.CONFIG)),
    )  # fmt: skip
    stopped = stop.signal is not None and int(last.stem) < resolved.iterations
    status = 128 + stop.signal if stop.signal is not None and stopped else 0
    if group.rank > 0:
        return Result(status=status)
    if stopped:
        note(f"stopped at {int(last.stem)} of {resolved.iterations}; continue with --resume")
    return Result(text, status=status)


def _describe(config: Any, learner: Any) -> str:
    """Return what a run does: data, length, custom energy and precision of learning."""
    data = getattr(learner.data, "name", config.data)
    total = config.iterations
    iterations = "1 iteration" if total == 1 else f"{total} iterations"
    energy = "" if config.energy is None else f" on energy {config.energy}"
    precision = "" if learner.precision is None else f", learned in {learner.precision}"
    return f"{data}; {iterations} of {config.batch_size} chains{energy}{precision}"
