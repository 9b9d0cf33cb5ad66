"""Tables and the plot of train_peers-cpu.json: training runs with their loop swapped."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import Row, about, number, pyplot, table

LOOP, AGAIN = "original loop", "original loop again"
OURS, CONTROL = "fastlangevin", "half of the steps"
LEAST_P, MOST_RATIO = 0.01, 1.5  # what passes for the same
WINDOW = 10  # iterations in a point of the plot


def section(content: Row) -> str:
    """Gaps side by side, and times."""
    rows = by_style(content)
    seeds, iterations = content["seeds"], content["iterations"]
    levels = table(
        ["gap, last third", LOOP, OURS, "p", "same?"],
        (
            [
                style,
                spread(found[LOOP]["late_gap"]),
                spread(found[OURS]["late_gap"]),
                f"{found[OURS]['same_as_loop']['p']:.2g}",
                yes(found[OURS]["same_as_loop"]["p"] >= LEAST_P),
            ]
            for style, found in rows.items()
        ),
    )
    curves = table(
        ["distance to the original loop's curve", AGAIN, OURS, "same?", CONTROL, "same?"],
        (
            [style, number(found[AGAIN]["distance"]), *apart(found, OURS), *apart(found, CONTROL)]
            for style, found in rows.items()
        ),
    )
    times = table(
        ["milliseconds", "sampling, " + LOOP, "sampling, ours", "iteration, " + LOOP,
         "iteration, ours"],
        ([style, *milliseconds(found, "sampling"), *milliseconds(found, "iteration")]
         for style, found in rows.items()),
    )  # fmt: skip
    return "\n\n".join((
        f"{about(content)[:-1]}, {content['threads']} thread{'s' * (content['threads'] > 1)}.",
        "The gap is f(data) - f(samples), f = -energy. Its mean over the last third of "
        f"{iterations} iterations, with the standard deviation over {seeds} seeds; the same, if "
        f"Student's test of equal means has p >= {LEAST_P} ({2 * seeds - 2} degrees of freedom).",
        levels,
        "How far the whole curves lie apart: the root mean square over the iterations of the "
        "difference between runs from equal weights on equal batches, mean over the seeds. The "
        f"same, if that is at most {MOST_RATIO} times what it is for the original loop run twice, "
        "with other noise. Our sampler at half of the steps shows that this tells chains apart.",
        curves,
        f"Medians of an iteration's time (batch {content['batch']}, K = {content['steps']}, width "
        f"{content['width']}), and how many times faster: the median of ratios of iterations taken "
        "in turn.",
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


def apart(found: Row, variant: str) -> tuple[str, str]:
    ratio = found[variant]["distance"] / found[AGAIN]["distance"]
    return f"{number(found[variant]['distance'])} ({ratio:.2f}x)", yes(ratio <= MOST_RATIO)


def yes(same: bool) -> str:
    return "yes" if same else "no"


def milliseconds(found: Row, part: str) -> tuple[str, str]:
    loop, ours = (1e3 * found[variant][part]["median"] for variant in (LOOP, OURS))
    return number(loop), f"{number(ours)} ({found[OURS][f'{part}_speedup']['median']:.2f}x)"


def plot(content: Row, path: Path) -> None:
    """The gap over the iterations: means over the seeds, and from the least to the greatest."""
    rows = by_style(content)
    figure, axes = pyplot().subplots(1, len(rows), figsize=(4 * len(rows), 2.8), squeeze=False)
    colors = {LOOP: "tab:gray", OURS: "tab:orange", CONTROL: "tab:blue"}
    for axis, (style, found) in zip(axes[0], rows.items(), strict=True):
        for variant, color in colors.items():
            curves = [smooth(run) for run in found[variant]["gap"]]
            at = [WINDOW * (k + 0.5) for k in range(len(curves[0]))]
            points = list(zip(*curves, strict=True))
            axis.plot(at, [sum(p) / len(p) for p in points], color=color, label=variant)
            axis.fill_between(
                at, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.2
            )
        axis.set_title(style, fontsize=9)
        axis.set_xlabel("iteration")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0][0].set_ylabel("f(data) - f(samples)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Means of WINDOW iterations each."""
    cuts = range(0, len(values) + 1, WINDOW)
    found = [sum(values[a:b]) / WINDOW for a, b in itertools.pairwise(cuts)]
    return found or [sum(values) / len(values)]
