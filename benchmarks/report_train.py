"""Tables and the plot of train_peers-cpu.json: training runs with their loop swapped."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import Row, about, number, pyplot, save_plot, table

LOOP, AGAIN = "original loop", "original loop again"
OURS, CONTROL = "fastlangevin", "half of the steps"
LEAST_P, MOST_RATIO = 0.01, 1.5  # within these bounds, runs count as the same
WINDOW = 10  # iterations in a point of the plot


def section(content: Row) -> str:
    """Three tables: final gaps, distances between the gaps' curves, and times."""
    rows = by_style(content)
    seeds, iterations = content["seeds"], content["iterations"]
    levels = table(
        ["gap, last third", LOOP, OURS, "p", "same?"],
        (
            [
                style,
                spread(variants[LOOP]["late_gap"]),
                spread(variants[OURS]["late_gap"]),
                f"{variants[OURS]['same_as_loop']['p']:.2g}",
                yes(variants[OURS]["same_as_loop"]["p"] >= LEAST_P),
            ]
            for style, variants in rows.items()
        ),
    )
    curves = table(
        ["distance to the original loop's curve", AGAIN, OURS, "same?", CONTROL, "same?"],
        (
            [
                style,
                number(variants[AGAIN]["distance"]),
                *apart(variants, OURS),
                *apart(variants, CONTROL),
            ]
            for style, variants in rows.items()
        ),
    )
    times = table(
        ["milliseconds", "sampling, " + LOOP, "sampling, ours", "iteration, " + LOOP,
         "iteration, ours"],
        ([style, *milliseconds(variants, "sampling"), *milliseconds(variants, "iteration")]
         for style, variants in rows.items()),
    )  # fmt: skip
    return "\n\n".join((
        about(content),
        "The gap is f(data) - f(samples) with f = -energy. The table has its mean over the last "
        f"third of {iterations} iterations and the standard deviation over {seeds} seeds. Two runs "
        f"count as the same if Student's test of equal means has p >= {LEAST_P} "
        f"({2 * seeds - 2} degrees of freedom).",
        levels,
        "The distance between whole curves is the root mean square over the iterations of the "
        "difference between runs from equal weights on equal batches, averaged over the seeds. "
        f"Curves count as the same if their distance is at most {MOST_RATIO} times that of the "
        "original loop run twice, with different noise. Our sampler at half of the steps shows "
        "that this criterion tells chains apart.",
        curves,
        f"Medians of an iteration's time (batch {content['batch']}, K = {content['steps']}, width "
        f"{content['width']}), and in parentheses the median ratio of iterations taken in turn.",
        times,
    ))  # fmt: skip


def by_style(content: Row) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for row in content["results"]:
        rows.setdefault(row["style"], {})[row["variant"]] = row
    return rows


def spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.4f} ± {deviation:.4f}"


def apart(variants: Row, variant: str) -> tuple[str, str]:
    ratio = variants[variant]["distance"] / variants[AGAIN]["distance"]
    return f"{number(variants[variant]['distance'])} ({ratio:.2f}x)", yes(ratio <= MOST_RATIO)


def yes(same: bool) -> str:
    return "yes" if same else "no"


def milliseconds(variants: Row, part: str) -> tuple[str, str]:
    loop, ours = (1e3 * variants[variant][part]["median"] for variant in (LOOP, OURS))
    return number(loop), f"{number(ours)} ({variants[OURS][f'{part}_speedup']['median']:.2f}x)"


def plot(content: Row, path: Path) -> None:
    """The gap over the iterations: means over the seeds, and the range of the seeds."""
    rows = by_style(content)
    figure, axes = pyplot().subplots(1, len(rows), figsize=(4 * len(rows), 2.8), squeeze=False)
    colors = {LOOP: "tab:gray", OURS: "tab:orange", CONTROL: "tab:blue"}
    for axis, (style, variants) in zip(axes[0], rows.items(), strict=True):
        for variant, color in colors.items():
            curves = [smooth(run) for run in variants[variant]["gap"]]
            iterations = [WINDOW * (k + 0.5) for k in range(len(curves[0]))]
            points = list(zip(*curves, strict=True))
            axis.plot(iterations, [sum(p) / len(p) for p in points], color=color, label=variant)
            axis.fill_between(
                iterations,
                [min(p) for p in points],
                [max(p) for p in points],
                color=color,
                alpha=0.2,
            )
        axis.set_title(style, fontsize=9)
        axis.set_xlabel("iteration")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0][0].set_ylabel("f(data) - f(samples)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    save_plot(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Means of WINDOW iterations each."""
    cuts = range(0, len(values) + 1, WINDOW)
    means = [sum(values[a:b]) / WINDOW for a, b in itertools.pairwise(cuts)]
    return means or [sum(values) / len(values)]
