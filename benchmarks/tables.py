"""What the tables and plots of all benchmarks share."""

from typing import Any

from fastlangevin.learn.sweep.report import table as table

Row = dict[str, Any]

MISSING = "not measured"
TITLES = {"cpu": "CPU", "cuda": "CUDA"}


def about(content: Row) -> str:
    """What was measured, on what, when."""
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
    return f"**{TITLES[content['device']]}**: {', '.join(parts)}."


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def pyplot() -> Any:
    """matplotlib's, set to draw the same file from the same results."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('report: --plots needs matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastlangevin"
    from matplotlib import pyplot as found

    return found
