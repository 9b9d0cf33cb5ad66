"""Diagnostics: the measurements of every step of a call's chains, and their plot."""

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.optional import require
from fastlangevin.reprs import short

_BAND = (0.05, 0.95)  # quantiles over chains
_SPAN = 1e3  # a ratio of values above which their axis is logarithmic
# Panels of a plot: the measurement and what its axis shows.
_PANELS = {
    "energy": "energy",
    "grad_norm": "|dE/dx|",
    "displacement": "|x after - x before|",
    "saturation": "elements at the bounds",
    "accepted": "accepted steps",
}


class Diagnostics(NamedTuple):
    """The last state, and measurements of every chain at every step as tensors [K, n]."""

    x: Any  #: [n, ...] the last state, in the form in which the sampler returns it
    energy: Tensor  #: at the state where the gradient was taken; NaN for a score network
    grad_norm: Tensor  #: |dE/dx|, the L2 norm over the chain's elements, before any clip
    displacement: Tensor  #: |x after the step - x before it|
    #: fraction of elements at or beyond clamp, or (-1, 1) without one; NaN if x is not finite
    saturation: Tensor
    accepted: Tensor  #: 1 if the step was taken, 0 if metropolis rejected it

    def __repr__(self) -> str:
        measured = self._measured()
        steps, chains = self.energy.shape
        text = f"Diagnostics(x={short(self.x)}, steps={steps}, chains={chains}"
        if chains:
            means = {name: values.mean(1) for name, values in measured.items()}
            figures = [f"{name} {m[0]:.4g} to {m[-1]:.4g}" for name, m in means.items()]
            text += f", mean at the first and the last step: {', '.join(figures)}"
            if failure := self._failure():
                text += f"; {failure[1]}"
        return f"{text})"

    def _measured(self) -> dict[str, Tensor]:
        """Return what was measured, by name, in float64 on the CPU.

        The acceptance is left out if no step was rejected, as without ``metropolis``.
        """
        measured = {name: getattr(self, name).detach().double().cpu() for name in _PANELS}
        if bool((measured["accepted"] == 1).all()):
            del measured["accepted"]
        return measured

    def _failure(self) -> tuple[int, str] | None:
        """Return the first step, from 1, at which a chain was not finite, and a line about it.

        Energies that are all NaN are not counted, because a score network has no energy.
        """
        measured = self._measured()
        names = ["grad_norm", "displacement"]
        if not measured["energy"].isnan().all():
            names.append("energy")
        wrong = ~torch.stack([measured[name].isfinite() for name in names]).all(0)
        steps = wrong.any(1).nonzero()
        if not len(steps):
            return None
        first, chains = int(steps[0]), wrong.shape[1]
        of_first, of_all = int(wrong[first].sum()), int(wrong.any(0).sum())
        text = f"first not finite: step {first + 1}, {of_first} of {chains} chains"
        return first + 1, text + (f", {of_all} by the end" if of_all > of_first else "")

    def plot(self) -> Any:
        """Return a figure of all measurements by step: the median and the 5 to 95 % of chains.

        A notebook shows it, or the diagnostics themselves, as the last value of a cell.
        ``figure.savefig(path)`` saves it. Energies that are all NaN, as for score networks, and the
        acceptance of chains that rejected no step are left out. The axis of values that span many
        orders of magnitude is logarithmic. A dotted line marks the first step at which a chain was
        not finite.

        Raises ImportError without matplotlib, and ValueError if there are no chains.
        """
        # pyplot is not used, because it would start or change the user's backend.
        matplotlib_figure = require("matplotlib.figure", "plot", "Diagnostics: a plot")
        steps, chains = self.energy.shape
        if not chains:
            raise ValueError("Diagnostics: a plot needs chains, got 0")
        shown = self._measured()
        if shown["energy"].isnan().all():
            del shown["energy"]
        figure = matplotlib_figure.Figure(figsize=(3.2 * len(shown), 2.8), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        failure = self._failure()
        for axes, (name, values) in zip(panels, shown.items(), strict=True):
            if name == "accepted":  # 0 or 1 for each chain
                axes.plot(range(1, steps + 1), values.mean(1))
            else:
                values = values.masked_fill(values.isinf(), torch.nan)
                low, middle, high = (values.nanquantile(q, 1) for q in (_BAND[0], 0.5, _BAND[1]))
                axes.fill_between(range(1, steps + 1), low, high, alpha=0.3, lw=0)
                alone = int(middle.isfinite().sum()) == 1  # a line needs two points
                axes.plot(range(1, steps + 1), middle, marker="o" if alone else None)
                if name != "saturation":
                    _scale(axes, middle)
            if failure:
                axes.axvline(failure[0], color="tab:red", ls=":")
            axes.set(title=_PANELS[name], xlabel="step")
        if failure:
            figure.suptitle(failure[1], color="tab:red")
        return figure

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows together with the text."""
        try:
            figure = self.plot()
        except (ImportError, ValueError):
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def _scale(axes: Any, values: Tensor) -> None:
    """Make the axis of values [K] logarithmic if they span many orders of magnitude."""
    values = values[values.isfinite()]
    if not len(values):
        return
    # A quantile, because a value that only crosses zero says nothing about the scale.
    small = float(values.abs().quantile(0.25, interpolation="lower"))
    if values.abs().max() > _SPAN * small > 0:
        if values.min() > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=small)
