"""Code shared by the tables and plots of all benchmarks."""

from pathlib import Path
from typing import Any

from fastlangevin.learn.sweep.write_sweep import markdown_table

table = markdown_table

Row = dict[str, Any]

MISSING = "not measured"
TITLES = {"cpu": "CPU", "cuda": "CUDA"}


def about(content: Row) -> str:
    """Describe the machine, the versions, the commit and the date of a result file."""
    machine = content["machine"]
    on_cpu = content["device"] == "cpu"
    parts = [f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else machine["gpu"]]
    for name in ("driver", "torch", "triton", "python"):
        if machine.get(name):
            parts.append(f"{name} {machine[name]}")
    if on_cpu and machine.get("cpu_capability"):
        parts.append(machine["cpu_capability"])
    commit = (machine["commit"] or "unknown")[:10]
    parts.append(f"commit {commit}{' (changed)' if machine['changed'] else ''}")
    parts.append(machine["date"][:10])
    if on_cpu and machine["load"] is not None:
        parts.append(f"load before the run {machine['load']:.1f}")
    threads = content.get("threads", 1)
    if threads > 1 or content["benchmark"] in ("migrate", "train_peers"):
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
    return f"**{TITLES[content['device']]}**: {', '.join(parts)}."


def fill(page: Path, name: str, tables: str) -> None:
    """Replace what a page has between the lines ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text("utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page}: expected one line {begin} and, below it, one line {end}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{tables}\n\n{end}{tail}", "utf-8")


def mebibytes(size: float) -> str:
    return number(size / 2**20)


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw identical files from identical results."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('report: --plots needs matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastlangevin"
    from matplotlib import pyplot as module

    return module


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure as SVG without a date, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
