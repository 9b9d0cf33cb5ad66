"""Write the results of a sweep as JSON, tables and a plot: means over seeds and standard errors."""

import importlib.util
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlangevin._version import __version__
from fastlangevin.kernels.devices import device_name
from fastlangevin.learn.atomic import replacing, save_json, save_text
from fastlangevin.learn.build import choose_device, load_data
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.evaluation.classifier import QualityCheck
from fastlangevin.learn.evaluation.feature_check import FeatureCheck
from fastlangevin.learn.reading import as_json
from fastlangevin.learn.sweep import run
from fastlangevin.learn.sweep.plan import VERSION, Settings, Sweep, describe

Result = Mapping[str, Any]


def write_report(plan: Sweep, results: Sequence[Result], out: Path) -> list[Path]:
    """Write sweep.json, sweep.md and, if matplotlib is installed, sweep.svg; return their paths."""
    content = summarise(plan, results)
    written = [out / "sweep.json", out / "sweep.md"]
    save_json(written[0], content, indent=1)
    save_text(written[1], to_markdown(content))
    if importlib.util.find_spec("matplotlib") is not None:
        plot(content, out / "sweep.svg")
        written.append(out / "sweep.svg")
    return written


def outcome(result: Result) -> str:
    """Return the result of a run in a few words."""
    if result["diverged"]:
        return f"diverged at iteration {result['diverged']['iteration']}"
    sure = "" if result["sure"] is None else f"sure of {result['sure']:.0%}, "
    of_features = result["feature_frechet"]
    features = "" if of_features is None else f", of features {of_features:.4g}"
    return f"{sure}Frechet distance {result['frechet']:.3g}{features}"


def summarise(plan: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    """Return the plan, the machine, reference values, and each point with its runs, JSON-ready.

    The measures of a point are {"mean", "error", "n"} over its n runs that did not diverge. The
    error is the standard error, the standard deviation / sqrt(n), and None for n = 1.
    """
    samples = run.sample_count(plan.features)
    points = []
    for settings in plan.points():
        runs = [result for result in results if result["settings"] == as_json(settings)]
        finished = [result for result in runs if result["diverged"] is None]
        measures = {name: _mean([result[name] for result in finished]) for name in run.MEASURES}
        points.append({"settings": settings, "measures": measures, "runs": runs})
    content = {
        "format": "fastlangevin sweep",
        "version": VERSION,
        "machine": _machine(plan.centre.device),
        "samples": samples,
        "plan": plan.plan(),
        "lines": {name: plan.lines(name) for name in plan.axes},
        "marks": marks_of(plan.centre, samples, plan.features),
        "points": points,
    }
    return dict(as_json(content))


def marks_of(centre: TrainConfig, samples: int, features: str | None = None) -> dict[str, Any]:
    """Return the reference values for a number of samples of the centre's data, JSON-ready."""
    data = load_data(centre)
    marks = {name: mark._asdict() for name, mark in QualityCheck(data).marks(samples).items()}
    if features is not None:
        check = FeatureCheck(data, features, choose_device(centre.device))
        for name, quality in check.marks(samples).items():
            marks[name] |= quality._asdict()
    return marks


def to_markdown(content: Mapping[str, Any]) -> str:
    """Return the tables: one per axis with a column per value, or for a grid a row per point."""
    axes, seeds = content["plan"]["axes"], content["plan"]["seeds"]
    centre = content["plan"]["centre"]
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items() if value)
    parts = [
        f"{centre['data']}, {centre['iterations']} iterations, {seeds} seeds; mean and standard "
        f"error over the seeds. {content['samples']} samples a run. Machine: {machine}.",
        f"Centre: {describe({name: centre[name] for name in axes})}.{_together_text(content)}",
        "; ".join(
            f"{name}: sure {_text(mark['sure'])}, Frechet distance {_text(mark['frechet'])} "
            f"({mark['images']} against {mark['reference']}){_features_text(mark)}"
            for name, mark in content["marks"].items()
        )
        + ".",
    ]
    measures = _measures(content)
    titles = [*measures.values(), "diverged"]
    if content["plan"]["grid"]:
        rows = [
            [*(str(point["settings"][name]) for name in axes), *_cells(point, measures)]
            for point in content["points"]
        ]
        parts.append(markdown_table([*axes, *titles], rows))
    else:
        for name, lines in content["lines"].items():
            points = _points_on(content, lines[0])
            columns = [titles, *(_cells(point, measures) for point in points)]
            header = [name, *(str(value) for value in axes[name])]
            parts.append(markdown_table(header, zip(*columns, strict=True)))
    diverged = [
        f"- {describe(point['settings'])}, seed {result['seed']}: iteration "
        f"{result['diverged']['iteration']}: {result['diverged']['reason']}"
        for point in content["points"]
        for result in point["runs"]
        if result["diverged"]
    ]
    if diverged:
        parts.append("Diverged:\n\n" + "\n".join(diverged))
    return "\n\n".join(parts) + "\n"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Plot every measure against every axis, as SVG: means over seeds, with standard errors.

    Dotted lines show real images, at the counts of the samples.
    """
    import matplotlib

    # Equal results give equal files. Text is stored as text, a tenth of the size of outlines.
    with matplotlib.rc_context({"svg.hashsalt": "fastlangevin", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        axes = content["plan"]["axes"]
        # If every run diverged, one row of plots shows only tick labels that say so.
        measured = [
            name
            for name in _measures(content)
            if any(point["measures"][name] is not None for point in content["points"])
        ] or ["frechet"]
        figure = Figure(figsize=(3.2 * len(axes), 1.9 * len(measured)), layout="constrained")
        grid = figure.subplots(len(measured), len(axes), squeeze=False, sharey="row")
        for column, (axis, values) in enumerate(axes.items()):
            for row, measure in enumerate(measured):
                subplot = grid[row][column]
                _plot_measure(subplot, content, axis, measure)
                labels = [str(value) + _diverged_label(content, axis, value) for value in values]
                subplot.set_xticks(range(len(values)), labels, fontsize="small")
                subplot.set_xlim(-0.3, len(values) - 0.7)
                subplot.grid(alpha=0.3)
                if row == len(measured) - 1:
                    subplot.set_xlabel(axis)
                if column == 0:
                    subplot.set_ylabel(run.MEASURES[measure], fontsize="small")
            if content["plan"]["grid"]:
                grid[0][column].legend(fontsize="xx-small")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _plot_measure(subplot: Any, content: Mapping[str, Any], axis: str, measure: str) -> None:
    """Draw a measure along the lines of an axis, and its value for real images."""
    for line in content["lines"][axis]:
        measures = [point["measures"][measure] for point in _points_on(content, line)]
        points = [(i, stats) for i, stats in enumerate(measures) if stats is not None]
        subplot.errorbar(
            [i for i, _ in points], [stats["mean"] for _, stats in points],
            yerr=[stats["error"] or 0.0 for _, stats in points], marker="o", markersize=4,
            capsize=3, label=describe({k: v for k, v in line[0].items() if k != axis}),
        )  # fmt: skip
    mark = content["marks"]["real images"].get(measure)
    if mark is not None:
        subplot.axhline(mark, color="black", linestyle=":", linewidth=1)


def _points_on(content: Mapping[str, Any], line: Sequence[Settings]) -> Iterator[Mapping[str, Any]]:
    for settings in line:
        yield next(point for point in content["points"] if point["settings"] == settings)


def _together_text(content: Mapping[str, Any]) -> str:
    plan = content["plan"]
    together = plan.get("together", {})  # missing in older files
    return "".join(
        f" {name} changes with {axis}: "
        + ", ".join(f"{v} at {at}" for v, at in zip(values, plan["axes"][axis], strict=True))
        + "."
        for axis, fields in together.items()
        for name, values in fields.items()
    )


def _measures(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the measures that a sweep makes, by name."""
    features = content["plan"].get("features")
    left_out = run.OF_FEATURES if features is None else {}
    return {name: title for name, title in run.MEASURES.items() if name not in left_out}


def _features_text(mark: Mapping[str, Any]) -> str:
    distance = mark.get("feature_frechet")
    return "" if distance is None else f", of features {distance:.4g}"


def _cells(point: Mapping[str, Any], measures: Iterable[str]) -> list[str]:
    cells = []
    for statistic in (point["measures"][name] for name in measures):
        cells.append("-" if statistic is None else _text(statistic["mean"]))
        if statistic is not None and statistic["error"] is not None:
            cells[-1] += f" ± {statistic['error']:.1g}"
    return [*cells, f"{_count_diverged(point)} of {len(point['runs'])}"]


def _count_diverged(point: Mapping[str, Any]) -> int:
    return sum(result["diverged"] is not None for result in point["runs"])


def _diverged_label(content: Mapping[str, Any], axis: str, value: Any) -> str:
    """Return a tick label's line about diverged runs, which are not in the means."""
    count = sum(
        _count_diverged(point)
        for line in content["lines"][axis]
        for point in _points_on(content, line)
        if point["settings"][axis] == value
    )
    return f"\n{count} diverged" if count else ""


def _mean(values: Sequence[float | None]) -> dict[str, float | None] | None:
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    error = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else None
    return {"mean": statistics.fmean(finite), "error": error, "n": len(finite)}


def _machine(device: str) -> dict[str, Any]:
    """Describe this machine, on which times depend."""
    return {
        "device": device_name(choose_device(device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastlangevin": __version__,
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
