"""Tables of networks-DEVICE.json: a step of a chain on energies in the manner of public code."""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.tables import Row, about, mebibytes, number, table

LOOP = "plain loop"


def section(content: Row) -> str:
    """A table and a summary for each precision and number of threads."""
    sections = [
        about(content),
        "Milliseconds per step of the five-line loop and of the sampler; `speed` is the median of "
        "ratios taken round by round. The errors are those of the gradient against float64, "
        "relative to its norm.",
    ]
    settings: dict[tuple[str, int], list[Row]] = {}
    for row in content["results"]:
        settings.setdefault((row["precision"], row["threads"]), []).append(row)
    for (precision, threads), rows in settings.items():
        sections += [f"{precision}{_conditions(content, precision, threads)}:", *tables(rows)]
    return "\n\n".join(sections)


def tables(rows: Sequence[Row]) -> list[str]:
    """A table of the rows of one precision and number of threads, and a summary by gradient."""
    loops = {row["energy"]: row for row in rows if row["gradient"] == LOOP}
    ours = [row for row in rows if row["gradient"] != LOOP]
    ours += [row for row in loops.values() if "error" in row]
    gradients = dict.fromkeys(row["gradient"] for row in rows if row["gradient"] != LOOP)
    with_memory = any("peak_bytes" in row for row in rows)
    header = [
        "energy", "loop ms", "ours ms", "speed", "engine", "our error", "loop's error",
        *(["loop MiB", "our MiB"] if with_memory else []), "why not a faster engine",
    ]  # fmt: skip
    body = [line(loops[row["energy"]], row, len(gradients) > 1, with_memory) for row in ours]
    return [table(header, body), *(summary(loops, ours, name) for name in gradients)]


def _conditions(content: Row, precision: str, threads: int) -> str:
    autocast = ", the loop under autocast" if precision in ("bf16", "fp16") else ""
    if content["device"] == "cuda":
        return autocast
    with_bf16 = f", {bf16_of(content)}" if precision == "bf16" else ""
    return f"{autocast}{with_bf16}, {threads} thread{'s' * (threads > 1)}"


def bf16_of(content: Row) -> str:
    """The instructions that the processor has for products in bf16."""
    flags = content["machine"]["cpu_flags"]
    instructions = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return f"with {' and '.join(instructions)}" if instructions else "without bf16 instructions"


def line(loop: Row, row: Row, with_gradient: bool, with_memory: bool) -> list[str]:
    name = f"{row['energy']}, `{row['gradient']}`" if with_gradient else row["energy"]
    if "error" in row:
        cells = [name, milliseconds(loop), "cannot run", *[""] * (6 if with_memory else 4)]
        return [*cells, row["error"]]
    return [
        name,
        milliseconds(loop),
        milliseconds(row),
        f"{row['speedup']['median']:.2f}x",
        row["engine"],
        f"{row['gradient_error']:.0e}",
        f"{loop['gradient_error']:.0e}",
        *([peak(loop), peak(row)] if with_memory else []),
        "; ".join(
            [f"{engine}: {reason}" for engine, reason in row["why_not"].items()]
            + ([f"CUDA graph: {row['cuda_graph']}"] if "cuda_graph" in row else [])
        ),
    ]


def milliseconds(row: Row) -> str:
    return number(1e3 * row["seconds"]["median"]) if "seconds" in row else ""


def peak(row: Row) -> str:
    return mebibytes(row["peak_bytes"]) if "peak_bytes" in row else ""


def summary_of(loop: Row, row: Row) -> str:
    """One line about a row, printed as soon as it is measured."""
    return "  ".join(line(loop, row, True, "peak_bytes" in row))


def summary(loops: Mapping[str, Row], rows: Sequence[Row], gradient: str) -> str:
    """How many energies a faster engine than autograd ran, and the ratios of times and errors."""
    rows = [row for row in rows if row["gradient"] == gradient]
    done = [row for row in rows if "speedup" in row]
    if not done:
        return f'`gradient="{gradient}"`: no energy can run.'
    speeds = {row["energy"]: row["speedup"]["median"] for row in done}
    slowest = min(speeds, key=lambda name: speeds[name])
    worst = max(row["gradient_error"] / loops[row["energy"]]["gradient_error"] for row in done)
    return (
        f'`gradient="{gradient}"`: an engine other than autograd runs '
        f"{sum(row['engine'] != 'autograd' for row in done)} of {len(rows)} energies, and "
        f"{len(rows) - len(done)} cannot run. The median speed is "
        f"{statistics.median(speeds.values()):.2f}x, the least {speeds[slowest]:.2f}x ({slowest}); "
        f"{sum(speed < 1 for speed in speeds.values())} are below 1x. The largest error is "
        f"{worst:.1f} times the loop's."
    )
