"""Table of migrate-DEVICE.json: loops of published codebases and the presets that replace them."""

from benchmarks.tables import Row, about, mebibytes, number, table


def section(content: Row) -> str:
    """A table of times, memory and the largest differences, by codebase."""
    return "\n\n".join((
        about(content),
        f"One call takes K = {content['steps']} steps on `ConvEnergy(3, {content['size']}, "
        f"width={content['width']})` with batch {content['batch']}. Times are medians in "
        "milliseconds; `speed` is the median of ratios taken round by round. MiB are the most that "
        "a call's tensors take at a time. The last columns are the largest difference between loop "
        "and preset in any state, with equal noise.",
        table(
            ["preset", "loop ms", "preset ms", "speed", "loop MiB", "preset MiB", "in float64",
             "in float32"],
            (line(row) for row in content["results"]),
        ),
    ))  # fmt: skip


def line(row: Row) -> list[str]:
    return [
        f"`{row['name']}`",
        *(number(1e3 * seconds) for seconds in row["seconds"]),
        f"{row['speedup']:.2f}x",
        *map(mebibytes, row["peak_bytes"]),
        *(f"{row[f'difference_{dtype}']:.0e}" for dtype in ("float64", "float32")),
    ]
