"""A sweep's results as a file, a table and a plot: means over seeds, with standard errors."""

import importlib.util
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlangevin._version import __version__
from fastlangevin.learn.atomic import replacing
from fastlangevin.learn.build import choose_device, load_data
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.evaluation.quality import QualityCheck
from fastlangevin.learn.sweep import run as sweep_runs
from fastlangevin.learn.sweep.plan import VERSION, Settings, Sweep, describe
from fastlangevin.learn.sweep.run import MEASURES

Result = Mapping[str, Any]


def write_report(plan: Sweep, results: Sequence[Result], out: Path) -> list[Path]:
    """Write OUT/sweep.json and sweep.md, and sweep.svg where matplotlib is installed.

    ``results`` are those of all of the plan's runs, as :func:`run_sweep` returns them.
    """
    content = summarise(plan, results)
    texts = {"sweep.json": json.dumps(content, indent=1) + "\n", "sweep.md": to_markdown(content)}
    for name, text in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text, "utf-8")
    written = [out / name for name in texts]
    if importlib.util.find_spec("matplotlib") is not None:
        plot(content, out / "sweep.svg")
        written.append(out / "sweep.svg")
    return written


def summarise(plan: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    """JSON-ready: the plan, the machine, the marks of the data, and each point with its runs.

    A point's measures are {"mean", "error", "n"}: over its n runs that did not diverge, error the
    standard error (the standard deviation over sqrt(n)), None for n = 1.
    """
    points = []
    for settings in plan.points():
        runs = [result for result in results if result["settings"] == _json(settings)]
        held = [run for run in runs if run["diverged"] is None]
        measures = {name: _mean([run[name] for run in held]) for name in MEASURES}
        points.append({"settings": settings, "measures": measures, "runs": runs})
    content = {
        "format": "fastlangevin sweep",
        "version": VERSION,
        "machine": _machine(plan.centre.device),
        "samples": sweep_runs.SAMPLES,
        "plan": plan.plan(),
        "lines": {name: plan.lines(name) for name in plan.axes},
        "marks": marks_of(plan.centre, sweep_runs.SAMPLES),
        "points": points,
    }
    return dict(_json(content))


def marks_of(centre: TrainConfig, samples: int) -> dict[str, Any]:
    """The marks of so many samples of the centre's data, JSON-ready."""
    marks = QualityCheck(load_data(centre)).marks(samples)
    return {name: mark._asdict() for name, mark in marks.items()}


def to_markdown(content: Mapping[str, Any]) -> str:
    """The tables: of each axis, values across and measures down; of a grid, a point a line."""
    axes, seeds = content["plan"]["axes"], content["plan"]["seeds"]
    centre = content["plan"]["centre"]
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items() if value)
    parts = [
        f"{centre['data']}, {centre['iterations']} iterations, {seeds} seeds; mean and standard "
        f"error over the seeds. {content['samples']} samples a run. Machine: {machine}.",
        "Centre: " + describe({name: centre[name] for name in axes}) + ".",
        "; ".join(
            f"{name}: sure {_text(mark['sure'])}, Frechet distance {_text(mark['frechet'])} "
            f"({mark['images']} against {mark['reference']})"
            for name, mark in content["marks"].items()
        )
        + ".",
    ]
    if content["plan"]["grid"]:
        rows = [
            [*(str(point["settings"][name]) for name in axes), *_cells(point).values()]
            for point in content["points"]
        ]
        parts.append(table([*axes, *_titles()], rows))
    else:
        for name, lines in content["lines"].items():
            cells = [list(_cells(point).values()) for point in _along(content, lines[0])]
            header = [name, *(str(value) for value in axes[name])]
            rows = [
                [title, *row]
                for title, row in zip(_titles(), zip(*cells, strict=True), strict=True)
            ]
            parts.append(table(header, rows))
    lost = [
        f"- {describe(point['settings'])}, seed {run['seed']}: iteration "
        f"{run['diverged']['iteration']}: {run['diverged']['reason']}"
        for point in content["points"]
        for run in point["runs"]
        if run["diverged"]
    ]
    if lost:
        parts.append("Diverged:\n\n" + "\n".join(lost))
    return "\n\n".join(parts) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Every measure against every axis, as SVG: the mean over seeds, its standard error as bar.

    The dotted lines are real images, at the samples' counts.
    """
    import matplotlib

    # The same file from the same results; letters as text, a tenth of the size of their outlines.
    with matplotlib.rc_context({"svg.hashsalt": "fastlangevin", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        axes = content["plan"]["axes"]
        # Where every run diverged there is nothing but the ticks that say so.
        measured = [name for name in MEASURES if _is_measured(content, name)] or ["frechet"]
        figure = Figure(figsize=(3.2 * len(axes), 1.9 * len(measured)), layout="constrained")
        grid = figure.subplots(len(measured), len(axes), squeeze=False, sharey="row")
        for column, (axis, values) in enumerate(axes.items()):
            for row, measure in enumerate(measured):
                place = grid[row][column]
                for line in content["lines"][axis]:
                    found = [point["measures"][measure] for point in _along(content, line)]
                    held = [(i, one) for i, one in enumerate(found) if one is not None]
                    place.errorbar(
                        [i for i, _ in held],
                        [one["mean"] for _, one in held],
                        yerr=[one["error"] or 0.0 for _, one in held],
                        marker="o",
                        markersize=4,
                        capsize=3,
                        label=describe({k: v for k, v in line[0].items() if k != axis}),
                    )
                mark = content["marks"]["real images"].get(measure)
                if mark is not None:
                    place.axhline(mark, color="black", linestyle=":", linewidth=1)
                labels = [str(value) + _lost_at(content, axis, value) for value in values]
                place.set_xticks(range(len(values)), labels, fontsize="small")
                place.set_xlim(-0.3, len(values) - 0.7)
                place.grid(alpha=0.3)
                if row == len(measured) - 1:
                    place.set_xlabel(axis)
                if column == 0:
                    place.set_ylabel(MEASURES[measure], fontsize="small")
            if content["plan"]["grid"]:
                grid[0][column].legend(fontsize="xx-small")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _along(content: Mapping[str, Any], line: Sequence[Settings]) -> Iterator[Mapping[str, Any]]:
    for settings in line:
        yield next(point for point in content["points"] if point["settings"] == settings)


def _titles() -> list[str]:
    return [*MEASURES.values(), "diverged"]


def _cells(point: Mapping[str, Any]) -> dict[str, str]:
    cells = {}
    for name, found in point["measures"].items():
        cells[name] = "-" if found is None else _text(found["mean"])
        if found is not None and found["error"] is not None:
            cells[name] += f" ± {found['error']:.1g}"
    return cells | {"diverged": f"{_lost(point)} of {len(point['runs'])}"}


def _lost(point: Mapping[str, Any]) -> int:
    return sum(run["diverged"] is not None for run in point["runs"])


def _lost_at(content: Mapping[str, Any], axis: str, value: Any) -> str:
    """What a tick of the axis says of runs that are not in the means."""
    lost = sum(
        _lost(point)
        for line in content["lines"][axis]
        for point in _along(content, line)
        if point["settings"][axis] == value
    )
    return f"\n{lost} diverged" if lost else ""


def _is_measured(content: Mapping[str, Any], measure: str) -> bool:
    return any(point["measures"][measure] is not None for point in content["points"])


def _mean(values: Sequence[float | None]) -> dict[str, float | None] | None:
    held = [value for value in values if value is not None]
    if not held:
        return None
    error = statistics.stdev(held) / math.sqrt(len(held)) if len(held) > 1 else None
    return {"mean": statistics.fmean(held), "error": error, "n": len(held)}


def _machine(device: str) -> dict[str, Any]:
    """What made the times, as far as the last process knows."""
    where = choose_device(device)
    return {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastlangevin": __version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _json(value: Any) -> Any:
    """As it is read back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))
