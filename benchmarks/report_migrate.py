"""Table of migrate-DEVICE.json: loops of published codebases beside their presets."""

from benchmarks.tables import Row, about, number, table


def section(content: Row) -> str:
    """Times, memory and the largest differences of every codebase."""
    return "\n\n".join((
        about(content).removesuffix(".") + f", {content['threads']} thread.",
        f"Milliseconds of a call of K = {content['steps']} steps on `ConvEnergy(3, "
        f"{content['size']}, width={content['width']})`, batch {content['batch']}, medians (ratio: "
        "median of the rounds'); MiB of tensors at most at a time; the largest difference between "
        "loop and preset in any state, with equal noise, in float64 and in float32.",
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
        *(number(size / 2**20) for size in row["peak_bytes"]),
        *(f"{row[f'difference_{dtype}']:.0e}" for dtype in ("float64", "float32")),
    ]
