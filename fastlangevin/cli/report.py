import contextlib
import tempfile
from pathlib import Path
from typing import Any

from fastlangevin.cli.diagnose import diagnose
from fastlangevin.cli.evaluate import evaluate
from fastlangevin.cli.interpolate import interpolate
from fastlangevin.cli.options import Chains, Device, Flag, Run
from fastlangevin.cli.outputs import (
    EXPECTED,
    Result,
    announce_replacing,
    choose_out,
    error_line,
    note,
)
from fastlangevin.cli.reconstruct import reconstruct
from fastlangevin.cli.restore import restore

# A sixteenth of the default number of evaluations, which takes seconds for a packaged model.
_SHORT: dict[str, Any] = {"n": 8, "fit": {"restarts": 1, "iterations": 100}}


def report(
    run: Run, /, *, out: Path | None = None, compute: Flag = False, overwrite: Flag = False,
    device: Device = "auto",
) -> Result:  # fmt: skip
    """Write one HTML page: samples, curves, results, diagnosis and settings.

    The page needs no other file and no network. Each picture in RUN is shown with the text file of
    the same name. --compute runs reconstruct, interpolate, restore, evaluate and diagnose, which
    takes minutes, and reports which of them failed and why. The page of a model without a run has
    no curves. Its samples, interpolations and short fits of reconstructions are always computed.

    Args:
        out: The page (default: report.html in RUN, which is replaced; for a model without a run,
            report.html in the working directory, or report-2.html, ... if that exists).
        compute: First compute the results that RUN lacks or has only for other weights.
        overwrite: Replace the page if it exists.
    """
    from fastlangevin.learn.build import choose_device
    from fastlangevin.learn.html_report import write_report
    from fastlangevin.learn.images import save_grid
    from fastlangevin.learn.model import load
    from fastlangevin.learn.run_folder import is_run

    inside = out is None and is_run(run)
    path = run / "report.html" if inside else choose_out(out, "report.html", overwrite)
    results = None
    with contextlib.ExitStack() as stack:
        if not is_run(run):
            results = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sampler = load(run, device=choose_device(device))
            save_grid(sampler(n=64, seed=0), results / "samples.png")
        if results or compute:
            _compute(run, results or run, device, compute)
        announce_replacing(path)
        write_report(run, path, results)
    return Result(files=[path])


def _compute(run: Path, folder: Path, device: str, everything: bool) -> None:
    from fastlangevin.learn.atomic import save_text
    from fastlangevin.learn.html_report import ITERATION, age, find_weights

    weights = find_weights(run)
    commands: dict[str, Any] = {"reconstructed.png": reconstruct, "interpolated.png": interpolate}
    if everything:
        commands |= {"restored.png": restore, "evaluate.json": evaluate, "diagnose.json": diagnose}
    for name, command in commands.items():
        path = folder / name
        if path.exists() and not age(path, weights):
            continue
        options: dict[str, Any] = {"device": device}
        if path.suffix == ".png":
            options = {"chains": Chains(**options, overwrite=True)}
        elif command is evaluate:
            options["overwrite"] = True
        if command is reconstruct and not everything:
            options |= _SHORT
        note(f"computing {name}")
        try:
            result = command(run, out=folder if name == "diagnose.json" else path, **options)
        except EXPECTED as error:  # the page is written without this result
            error_line(error)
            continue
        if path.suffix == ".png":
            text = f"{ITERATION}{weights.iteration}\n{result.text}\n"
            save_text(path.with_suffix(".txt"), text)
