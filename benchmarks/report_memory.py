"""Tables and the plot of chain_memory-DEVICE.json: gradients through chains."""

from pathlib import Path

from benchmarks.tables import MISSING, Row, about, mebibytes, number, pyplot, save_plot, table

BASELINES = ("plain loop", "torch checkpoint")


def section(content: Row) -> str:
    """A table of peak memory and seconds of both passes, by schedule and K."""
    rows = {(row["variant"], row["steps"]): row for row in content["results"]}
    names = list(dict.fromkeys(name for name, _ in rows))
    lengths = sorted({steps for _, steps in rows})
    return "\n\n".join((
        about(content),
        "Peak MiB of tensors in a forward and backward pass, and its seconds, for the paper's net "
        f"with SiLU at width {content['width']}, batch {content['batch']}.",
        table(
            ["`checkpoint=`", *(f"K = {steps}" for steps in lengths)],
            ([name, *(cell(rows.get((name, steps))) for steps in lengths)] for name in names),
        ),
    ))  # fmt: skip


def cell(row: Row | None) -> str:
    if row is None:
        return MISSING
    peak = mebibytes(row["peak_bytes"])
    if "seconds" not in row:
        return peak
    differs = f", differs by {row['deviation']:.0e}" if row.get("differs") else ""
    return f"{peak} ({number(row['seconds']['median'])} s{differs})"


def plot(content: Row, path: Path) -> None:
    """Peak memory and time against K for each schedule."""
    timed = [row for row in content["results"] if "seconds" in row]
    figure, (memory, seconds) = pyplot().subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for name in dict.fromkeys(row["variant"] for row in timed):
        chosen = [row for row in timed if row["variant"] == name]
        steps = [row["steps"] for row in chosen]
        style = "--o" if name in BASELINES else "-o"
        memory.plot(steps, [row["peak_bytes"] / 2**20 for row in chosen], style, label=name)
        seconds.plot(steps, [row["seconds"]["median"] for row in chosen], style, label=name)
    for axis, label in ((memory, "peak MiB"), (seconds, "seconds, both passes")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("K")
        axis.set_ylabel(label)
    memory.legend(fontsize=8)
    figure.tight_layout()
    save_plot(figure, path)
