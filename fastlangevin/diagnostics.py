"""Diagnostics: the measurements of every step of a call's chains, and their plot."""

import io
from typing import Any, NamedTuple

from torch import Tensor

from fastlangevin.reprs import short

_BAND = (0.05, 0.95)  # quantiles over chains
# Panels of a plot: the measurement and what its axis shows.
_PANELS = {
    "energy": "energy",
    "grad_norm": "|dE/dx|",
    "displacement": "|x after - x before|",
    "saturation": "elements at the clamp",
    "accepted": "accepted steps",
}


class Diagnostics(NamedTuple):
    """The last state, and measurements of every chain at every step as tensors [K, n]."""

    x: Any  #: [n, ...] the last state, in the form in which the sampler returns it
    energy: Tensor  #: at the state where the gradient was taken; NaN for a score network
    grad_norm: Tensor  #: |dE/dx|, the L2 norm over the chain's elements, before any clip
    displacement: Tensor  #: |x after the step - x before it|
    saturation: Tensor  #: fraction of elements at or beyond clamp, or (-1, 1) without one
    accepted: Tensor  #: 1 if the step was taken, 0 if metropolis rejected it

    def __repr__(self) -> str:
        measured = self._asdict()
        x = measured.pop("x")
        steps, chains = self.energy.shape
        text = f"Diagnostics(x={short(x)}, steps={steps}, chains={chains}"
        if chains:
            means = {name: values.double().mean(1) for name, values in measured.items()}
            figures = [f"{name} {m[0]:.4g} to {m[-1]:.4g}" for name, m in means.items()]
            text += f", mean at the first and the last step: {', '.join(figures)}"
        return f"{text})"

    def plot(self) -> Any:
        """Return a figure of all measurements by step: the median and the 5 to 95 % of chains.

        Notebooks show it if it is the last value of a cell, as they show the diagnostics
        themselves. ``figure.savefig(path)`` saves it. Energies that are all NaN, as those of score
        networks, and acceptance without ``metropolis`` are left out.

        Raises ImportError without matplotlib, and ValueError if there are no chains.
        """
        try:
            # pyplot is not used, because it would start or change the user's backend.
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'Diagnostics: a plot needs matplotlib: pip install "fastlangevin[plot]"'
            ) from error
        steps, chains = self.energy.shape
        if not chains:
            raise ValueError("Diagnostics: a plot needs chains, got 0")
        shown = {name: getattr(self, name).detach().double().cpu() for name in _PANELS}
        if shown["energy"].isnan().all():
            del shown["energy"]
        if shown["accepted"].mean() == 1:
            del shown["accepted"]
        figure = Figure(figsize=(3.2 * len(shown), 2.8), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (name, values) in zip(panels, shown.items(), strict=True):
            if name == "accepted":  # 0 or 1 for each chain
                axes.plot(range(1, steps + 1), values.mean(1))
            else:
                low, high = (values.nanquantile(q, 1) for q in _BAND)
                axes.fill_between(range(1, steps + 1), low, high, alpha=0.3, lw=0)
                axes.plot(range(1, steps + 1), values.nanquantile(0.5, 1))
            axes.set(title=_PANELS[name], xlabel="step")
        return figure

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows, beside the text."""
        try:
            figure = self.plot()
        except (ImportError, ValueError):
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()
