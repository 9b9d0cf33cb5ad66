import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fastlangevin.cli.options import Count, more, settings_options
from fastlangevin.cli.outputs import Result, check_folder, note
from fastlangevin.cli.progress_bar import progress

_LISTS = more("Settings: one value each, or several to sweep over, such as 5,10,25")


def sweep(
    *, out: Path = Path("runs/sweep"), config: str | None = None, seeds: Count | None = None,
    grid: Annotated[bool | None, Parameter(negative="--axes")] = None, features: str | None = None,
    lists: "Annotated[settings_options(True), _LISTS]" = None,  # type: ignore[valid-type]
) -> Result:  # fmt: skip
    """Train over lists of settings and seeds; write tables and a plot of the results.

    An example is `sweep --steps 5,10,25,50 --width 8,16 --iterations 500 --seeds 3`. Every run has
    a folder in OUT, as with `train`. If a sweep is stopped, the same command continues it. Several
    processes, also on several machines, share the runs if they have the same OUT.

    Args:
        out: Folder of the sweep.
        config: Settings to start from: a config in the package (see configs), or a YAML, TOML or
            JSON file, which may also hold axes (lists by setting), together (settings that change
            with an axis), seeds, grid and features (default: digits).
        seeds: Number of runs of each point, 1 or more, with consecutive seeds (default: 3).
        grid: Run all combinations of the lists, or sweep one axis at a time (default: --axes).
        features: Compare samples with the data also by these features, as evaluate does.
    """
    from fastlangevin.distributed import own_device
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.stop import StopRequest
    from fastlangevin.learn.sweep.plan import describe, parse_values, read_sweep
    from fastlangevin.learn.sweep.run import Run, run_sweep
    from fastlangevin.learn.sweep.write_sweep import outcome, write_report

    check_folder(out)
    stop = StopRequest()
    values = {name: parse_values(name, text) for name, text in (lists or {}).items()}
    plan = read_sweep(config, values, seeds, grid, features)
    total, count = len(plan.runs()), 0

    def report(run: Run, result: Mapping[str, Any]) -> None:
        nonlocal count
        count += 1
        point = f"{describe(run.settings)}, seed {run.config.seed}"
        note(f"{count}/{total}  {point}  {outcome(result)}")

    device = own_device(plan.centre.device)
    note(f"{total} runs on {plan.centre.data}, {choose_device(device)}, to {out}")
    with progress() as show:
        results = run_sweep(
            plan, out, device=device, report=report, stop=stop,
            progress=lambda _, done, of: show("iteration", done, of, f"of run {count + 1}/{total}"),
        )  # fmt: skip
    files = [] if results is None else write_report(plan, results, out)
    if files and out / "sweep.svg" not in files:
        note('no plot: it needs matplotlib, pip install "fastlangevin[plot]"')
    if results is None:
        note("stopped; the same command continues the sweep")
        return Result(files=files, status=128 + (stop.signal or signal.SIGINT))
    return Result(files=files)
