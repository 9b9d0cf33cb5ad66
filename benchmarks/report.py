"""Make Markdown tables and plots from result files.

    python -m benchmarks.report RESULT.json... [--short] [--readme README.md] [--plots docs/]

prints every table, or with ``--short`` those of contiguous fp32 states only. ``--readme`` writes
the short tables between the lines ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` of a file.
``--plots`` draws BENCHMARK-DEVICE.svg (needs matplotlib). A figure that is in no file reads
"not measured".
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import (
    report_chain,
    report_memory,
    report_migrate,
    report_networks,
    report_train,
)
from benchmarks.tables import MISSING, TITLES, Row, about, fill, number, pyplot, save_plot, table

BASELINES = {
    "cpu": ("eager", "eager in place", "torch.compile"),
    "cuda": ("eager", "eager in place", "torch.compile", "torchebm"),
}
OURS = {"cpu": ("reference", "native"), "cuda": ("reference", "native", "triton")}
FAST = {"cpu": ("native",), "cuda": ("native", "triton")}
RATIOS = "eager in place", "torch.compile"
_BENCHMARKS = {
    "chain": "A step of a chain, network and all",
    "networks": "A step of a chain on other networks",
    "chain_memory": "Gradients through a chain",
    "step": "The update alone",
    "migrate": "Loops and their presets",
    "train_peers": "Training runs with their loop swapped",
}
_OTHERS = {
    "chain": report_chain,
    "chain_memory": report_memory,
    "migrate": report_migrate,
    "networks": report_networks,
    "train_peers": report_train,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--short", action="store_true", help="print contiguous fp32 states only")
    parser.add_argument(
        "--readme", type=Path, help="write the short tables between a file's markers"
    )
    parser.add_argument("--plots", type=Path, help="folder to write the plots to")
    options = parser.parse_args(arguments)
    files = [json.loads(path.read_text()) for path in options.results]
    print(report(files, options.short))
    if options.readme:
        fill(options.readme, "benchmarks", report(files, short=True))
    if options.plots:
        for content in files:
            if content["benchmark"] in ("migrate", "networks"):
                continue  # they have tables only
            draw = plot if content["benchmark"] == "step" else _OTHERS[content["benchmark"]].plot
            draw(content, options.plots / f"{content['benchmark']}-{content['device']}.svg")


def report(files: Sequence[Row], short: bool = False) -> str:
    """A section per file, and a line for each device that has not been measured."""
    sections = []
    for benchmark, title in _BENCHMARKS.items():
        contents = [content for content in files if content["benchmark"] == benchmark]
        if not contents:
            continue
        sections.append(f"### {title}")
        for device in TITLES:
            of_device = [content for content in contents if content["device"] == device]
            for content in of_device:
                if benchmark == "step":
                    sections.append(section(content, short))
                else:
                    sections.append(_OTHERS[benchmark].section(content))
            if not of_device:
                sections.append(f"**{TITLES[device]}**: {MISSING}.")
    return "\n\n".join(sections)


def section(content: Row, short: bool) -> str:
    """Two tables: everyone's times, and ours relative to the limit and the baselines."""
    device = content["device"]
    cases = group(content["results"], short)
    names = ("copy", *BASELINES[device], *OURS[device])
    times = table(
        ["case", *names],
        (
            [label(key), *(microseconds(rows.get(name)) for name in names)]
            for key, rows in cases.items()
        ),
    )
    limits = table(
        [
            "case",
            "backend",
            "GB/s",
            "of copy",
            "ns / element",
            *(f"over {name}" for name in RATIOS),
        ],
        (
            [label(key), name, *relative(rows.get(name))]
            for key, rows in cases.items()
            for name in FAST[device]
        ),
    )
    return "\n\n".join((
        about(content),
        "Microseconds per step, with the distance between the quartiles in percent of the median. "
        "`copy` moves as many bytes as the step must: it must read x and g and write x.",
        times,
        "The step's bytes per second, and how many times faster it is than what it replaces "
        "(medians of ratios taken round by round).",
        limits,
    ))  # fmt: skip


def group(results: Iterable[Row], short: bool) -> dict[tuple, dict[str, Row]]:
    """Rows by case and variant, in the file's order."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in results:
        if short and (row["dtype"], row["layout"]) != ("fp32", "contiguous"):
            continue
        key = tuple(row[name] for name in ("size", "dtype", "layout", "noise_std", "threads"))
        cases.setdefault(key, {})[row["variant"]] = row
    return cases


def label(key: tuple) -> str:
    size, dtype, layout, noise_std, threads = key
    words = [size, dtype, *([layout] if layout != "contiguous" else [])]
    words.append("with noise" if noise_std else "b = 0")
    if threads:
        words.append(f"{threads} thread{'s' * (threads > 1)}")
    return ", ".join(words)


def microseconds(row: Row | None) -> str:
    if row is None or "error" in row:
        return MISSING if row is None else "failed"
    time = row["seconds"]
    spread = 100 * (time["q3"] - time["q1"]) / time["median"]
    return f"{number(time['median'] * 1e6)} ({spread:.0f} %)"


def relative(row: Row | None) -> list[str]:
    """Bandwidth, its share of the copy's, time per element, and ratios to the baselines."""
    if row is None or "error" in row:
        return [MISSING if row is None else "failed"] * (3 + len(RATIOS))
    over = row["speedup_over"]
    return [
        number(row["gb_per_s"]),
        f"{row['percent_of_copy']:.0f} %",
        f"{row['ns_per_element']:.3f}",
        *(f"{number(over[name]['median'])}x" if name in over else MISSING for name in RATIOS),
    ]


def plot(content: Row, path: Path) -> None:
    """Time per element of every variant and of the copy, by size, for contiguous fp32 states."""
    cases = group(content["results"], short=True)
    most_threads = max((key[4] or 0 for key in cases), default=0)
    cases = {key: rows for key, rows in cases.items() if key[3] and (key[4] or 0) == most_threads}
    figure, axes = pyplot().subplots(
        1, max(1, len(cases)), figsize=(4 * max(1, len(cases)), 2.8), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    names = BASELINES[content["device"]] + OURS[content["device"]]
    for axis, (key, rows) in zip(axes[0], cases.items(), strict=False):
        for height, name in enumerate(names):
            row = rows.get(name, {"error": MISSING})
            if "error" in row:
                axis.text(0.02, height, MISSING, transform=axis.get_yaxis_transform(), va="center")
                continue
            color = "tab:orange" if name in FAST[content["device"]] else "tab:gray"
            axis.plot(row["ns_per_element"], height, "o", color=color)
        axis.axvline(rows["copy"]["ns_per_element"], color="black", linestyle=":", label="copy")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.set_xlabel("ns per element")
        axis.set_title(label(key), fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    save_plot(figure, path)


if __name__ == "__main__":
    main()
