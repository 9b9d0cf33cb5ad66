"""The plot of a result file of benchmarks.chain_memory.

python -m benchmarks.chain_plot chain-cpu.json --plots docs/

draws chain-cpu.svg: peak memory and time against K for each schedule (needs matplotlib).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain_plot")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--plots", type=Path, required=True, help="folder for plots")
    options = parser.parse_args(arguments)
    content = json.loads(options.result.read_text())
    options.plots.mkdir(parents=True, exist_ok=True)
    path = options.plots / f"chain-{content['device']}.svg"
    plot(content["results"], path)
    print(f"wrote {path}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('chain_plot needs matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("svg")
    # The same file from the same results.
    matplotlib.rcParams["svg.hashsalt"] = "fastlangevin"
    from matplotlib import pyplot

    timed = [row for row in rows if "seconds" in row]
    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for name in dict.fromkeys(row["variant"] for row in timed):
        chosen = [row for row in timed if row["variant"] == name]
        steps = [row["steps"] for row in chosen]
        style = "--" if name in ("plain loop", "torch checkpoint") else "-"
        memory.plot(steps, [row["peak_bytes"] / 2**20 for row in chosen], style + "o", label=name)
        seconds.plot(steps, [row["seconds"]["median"] for row in chosen], style + "o", label=name)
    for axis, label in ((memory, "peak MiB"), (seconds, "seconds, both passes")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("K")
        axis.set_ylabel(label)
    memory.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
