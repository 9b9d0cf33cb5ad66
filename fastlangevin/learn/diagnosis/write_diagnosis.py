"""Write a diagnosis as text, JSON and a picture."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlangevin.learn.atomic import replacing, save_json
from fastlangevin.learn.diagnosis.correlations import FEWEST, Correlations
from fastlangevin.learn.diagnosis.diagnose import Diagnosis
from fastlangevin.learn.diagnosis.residuals import Residual

FORMAT = "fastlangevin diagnosis"


def to_text(diagnosis: Diagnosis) -> str:
    """Return all figures as text, each with its reference value."""
    reach, long_run, mixing = diagnosis.reach, diagnosis.long_run, diagnosis.mixing
    parts = [
        "Learning",
        _correlations("every iteration: d and |x_K - x_0|", diagnosis.every),
        _correlations("logged iterations: d and r", diagnosis.measured),
        "\nMoments: |E_data h - E_samples h|, chance alone leaves residual / floor about 1",
        _table(diagnosis.layers, diagnosis.top),
        "\nThe estimating equation, by parameter: |E_data dE/dw - E_samples dE/dw|",
        _table(diagnosis.parameters, None),
        "\nReach",
        f"  |x_K - x_0| {reach.moved:.3g} of {reach.data:.3g} to the data; path {reach.path:.3g}, "
        f"gradient steps {reach.drift:.3g} in all, noise alone {reach.noise:.3g}",
        f"\nLong run: {long_run.verdict}",
        "  step        energy    saturation    |grad|",
    ]
    rows = zip(
        long_run.steps, long_run.energy, long_run.saturation, long_run.grad_norm, strict=True
    )
    parts += [f"  {k:<8} {e:>9.3f} {s:>12.1%} {g:>10.3f}" for k, e, s, g in rows]
    parts += [
        f"  data     {long_run.data_energy:>9.3f} {long_run.data_saturation:>12.1%}   "
        f"(energy +- {long_run.data_std:.3f}; the chains' moved {long_run.shift:+.2f} of these)",
        "\nMixing: shares of the variance of x_K",
        f"  start z {mixing.start:.1%}, noise u {mixing.noise:.1%}, both {mixing.both:.1%}",
    ]
    return "\n".join(parts)


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis, JSON-ready: fields by name, with null for numbers that are not finite."""
    return {"format": FORMAT, "version": 1, **_json_value(diagnosis)}


def save(diagnosis: Diagnosis, folder: Path, title: str = "", **facts: Any) -> list[Path]:
    """Write diagnose.json and, if matplotlib is installed, diagnose.png; return their paths.

    The JSON also holds ``facts`` about what was diagnosed.
    """
    paths = [folder / "diagnose.json"]
    save_json(paths[0], to_json(diagnosis) | facts, indent=1, allow_nan=False)
    if importlib.util.find_spec("matplotlib") is not None:
        paths.append(folder / "diagnose.png")
        _plot(diagnosis, paths[1], title)
    return paths


def _correlations(what: str, series: Correlations | None) -> str:
    if series is None:
        return f"  {what}: no log, or fewer than {FEWEST} values in it, nothing to correlate"
    swings = series.oscillation
    shown = " ".join(f"{value:+.2f}" for value in swings.d)
    verdict = f"{swings.verdict} oscillation"
    if swings.verdict is None:
        apart = f"values are {series.spacing} iterations apart"
        verdict = f"no verdict on oscillation, {'too few values' if series.spacing == 1 else apart}"
    return (
        f"  {what}, the last {series.values}\n"
        f"    d {series.d_mean:+.4g} +- {series.d_std:.4g}, below 0 (expansion) in "
        f"{series.expansion:.0%}; its correlation with the next change of the other "
        f"{series.response:+.2f}\n"
        f"    autocorrelation of d at lags 1-5, of the last {swings.values} less their parabola: "
        f"{shown} (chance: within {swings.bound:.2f}): {verdict}"
    )


def _table(rows: Sequence[Residual], top: Residual | None) -> str:
    width = max([len(row.name) for row in rows] + [5])
    lines = [f"  {'':<{width}} elements  residual     floor  residual / floor  relative"]
    for row in rows:
        relative = row.residual / row.scale if row.scale else 0.0
        mark = "  <- h of the top layer" if row == top else ""
        lines.append(
            f"  {row.name:<{width}} {row.elements:>8} {row.residual:>9.3g} {row.floor:>9.3g} "
            f"{row.excess:>17.2f} {relative:>9.3f}{mark}"
        )
    return "\n".join(lines)


def _json_value(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _json_value(field) for name, field in value._asdict().items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(diagnosis: Diagnosis, path: Path, title: str) -> None:
    # pyplot is not used, because it would start or change the user's backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (of_d, cross), (layers, long) = figure.subplots(2, 2)
    figure.suptitle(title)
    series = diagnosis.every or diagnosis.measured
    if series is not None:
        what = "|x_K - x_0|" if diagnosis.every else "r"
        lags = [series.spacing * lag for lag in range(len(series.d))]
        of_d.plot(lags[1:], series.d[1:], ".-", label="d")
        of_d.plot(lags[1:], series.r[1:], ".--", label=what)
        of_d.axhspan(-series.bound, series.bound, color="0.9", zorder=0)
        of_d.legend(fontsize="small")
        lags = [-lag for lag in lags[:0:-1]] + lags
        cross.plot(lags, series.cross, ".-")
        cross.set(title=f"d with {what} a lag later")
    of_d.set(title="autocorrelations", xlabel="lag in iterations")
    cross.set(xlabel="lag in iterations")
    for axes in (of_d, cross):
        axes.axhline(0, color="0.6", lw=0.8)
    places = range(len(diagnosis.layers))
    layers.bar(places, [row.residual for row in diagnosis.layers], label="residual")
    layers.plot(places, [row.floor for row in diagnosis.layers], "k_", ms=14, label="chance")
    layers.set_xticks(list(places), [row.name for row in diagnosis.layers], rotation=45, ha="right")
    layers.set(title="|E_data h - E_samples h| by layer", yscale="log")
    layers.legend(fontsize="small")
    run = diagnosis.long_run
    long.plot(run.steps, run.energy, ".-", label="chains")
    low, high = run.data_energy - run.data_std, run.data_energy + run.data_std
    long.axhspan(low, high, color="0.85", label="data, +- 1 sd")
    long.set(title=f"long run: {run.verdict}", xlabel="step", ylabel="energy")
    long.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
