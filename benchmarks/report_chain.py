"""Tables and the plot of chain-DEVICE.json: a step of a chain, including the network."""

from pathlib import Path

from benchmarks.tables import MISSING, Row, about, mebibytes, number, pyplot, save_plot, table

PAPER = "paper's loop"
OURS = ("autograd", "explicit", "fused")


def section(content: Row) -> str:
    """Two tables: times relative to the paper's loop, and memory."""
    cases: dict[tuple[int, int, int], Row] = {}
    for row in content["results"]:
        cases.setdefault((row["width"], row["batch"], row["size"]), {})[row["variant"]] = row
    names = list(dict.fromkeys(row["variant"] for row in content["results"]))
    header = ["a step", *(f"width {w}, batch {n}" for w, n, _ in cases)]
    times, memory = [], []
    for name in names:
        rows = [variants.get(name) for variants in cases.values()]
        times.append([label(name), *map(speed, rows)])
        memory.append([label(name), *map(peak, rows)])
    precision = "fp16" if content["device"] == "cuda" else "fp32"
    rates = [best(variants, precision) for variants in cases.values()]
    return "\n\n".join((
        about(content),
        "Milliseconds per step of a chain on the paper's networks for 3x32x32 images, and how many "
        "times faster this is than the paper's five-line loop in the same run (medians of ratios "
        "taken round by round).",
        table(header, [*times, [f"share of the matrix rate, best {precision}", *rates]]),
        "Memory: the most that one step holds at a time, without the energy's weights, by "
        "counting allocations. Packed copies of weights are included.",
        table(header, memory),
    ))  # fmt: skip


def label(name: str) -> str:
    engine, _, rest = name.partition(" ")
    return f'`gradient="{engine}"`, {rest}' if engine in OURS else name


def speed(row: Row | None) -> str:
    if row is None or "error" in row:
        return MISSING if row is None else "no"
    differs = f", differs by {row['deviation']:.0e}" if row.get("differs") else ""
    return f"{number(1e3 * row['seconds']['median'])} ({row['speedup']['median']:.2f}x{differs})"


def peak(row: Row | None) -> str:
    if row is None or "error" in row:
        return MISSING if row is None else "no"
    return f"{mebibytes(row['peak_bytes'])} MiB"


def best(variants: Row, precision: str) -> str:
    rows = [row for name, row in variants.items() if name.endswith(precision)]
    rates = [row["percent_of_matrix_rate"] for row in rows if "error" not in row]
    return f"{max(rates):.0f} %" if rates else MISSING


def plot(content: Row, path: Path) -> None:
    """Speed relative to the paper's loop, by network."""
    rows = [row for row in content["results"] if "error" not in row]
    cases = list(dict.fromkeys((row["width"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != PAPER))
    figure, axis = pyplot().subplots(figsize=(2.2 * max(2, len(cases)), 3.2))
    thickness = 0.8 / max(1, len(names))
    colors = dict(zip(names, pyplot().get_cmap("tab10").colors, strict=False))
    for i, name in enumerate(names):
        by_case = {(r["width"], r["batch"]): r for r in rows if r["variant"] == name}
        heights = [by_case[c]["speedup"]["median"] if c in by_case else 0.0 for c in cases]
        positions = [k + (i - (len(names) - 1) / 2) * thickness for k in range(len(cases))]
        axis.bar(positions, heights, thickness, label=name, color=colors.get(name))
    axis.axhline(1.0, color="black", linestyle=":")
    axis.set_xticks(range(len(cases)), [f"width {w}\nbatch {n}" for w, n in cases])
    axis.set_ylabel("times the paper's loop")
    axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    save_plot(figure, path)
