"""The plot of a chain's diagnostics."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

import fastlangevin as fl

SHOWN = ["energy", "|dE/dx|", "|x after - x before|", "elements at the bounds"]


def diagnostics(chains: int = 5, **settings: Any) -> fl.Diagnostics:
    sampler = fl.LangevinSampler(fl.GaussianEnergy(), steps=4, step_size=0.1, **settings)
    return sampler.diagnose(torch.linspace(-2, 2, 3 * chains).view(chains, 3), seed=0)


def titles(stats: fl.Diagnostics) -> list[str]:
    pytest.importorskip("matplotlib")
    return [axes.get_title() for axes in stats.plot().axes]


def test_each_measurement_is_shown_by_step_with_its_median() -> None:
    pytest.importorskip("matplotlib")
    stats = diagnostics()
    figure = stats.plot()
    assert [axes.get_title() for axes in figure.axes] == SHOWN
    for axes, values in zip(figure.axes, stats[1:], strict=False):
        (line,) = axes.lines
        assert np.array_equal(line.get_xdata(), [1, 2, 3, 4])
        assert np.allclose(line.get_ydata(), values.median(1).values)


def test_what_says_nothing_is_left_out() -> None:
    assert titles(diagnostics(metropolis=True, noise_std=2.0)) == [*SHOWN, "accepted steps"]
    score = fl.LangevinSampler.from_score(lambda x: -x, steps=2, step_size=0.1)
    assert titles(score.diagnose(torch.ones(2, 3), seed=0)) == SHOWN[1:]


def diverging() -> fl.Diagnostics:
    sampler = fl.LangevinSampler(lambda x: x.pow(6).sum(1), steps=12, step_size=1.0, noise_std=0)
    return sampler.diagnose(torch.tensor([[0.1], [3.0], [2.0]]), seed=0)


def test_the_first_step_that_is_not_finite_is_named_and_marked() -> None:
    stats = diverging()
    lost = ~(stats.displacement.isfinite() & stats.grad_norm.isfinite())
    first = int(lost.any(1).int().argmax()) + 1
    line = f"first not finite: step {first}, {int(lost[first - 1].sum())} of 3 chains"
    assert line in repr(stats)
    assert "2 by the end" in repr(stats) or int(lost[first - 1].sum()) == 2
    assert "not finite" not in repr(diagnostics())
    pytest.importorskip("matplotlib")
    figure = stats.plot()
    assert line in figure.get_suptitle()
    for axes in figure.axes:
        assert list(axes.lines[-1].get_xdata()) == [first, first]
    assert diagnostics().plot().get_suptitle() == ""


def test_score_networks_have_no_energy_that_could_fail() -> None:
    score = fl.LangevinSampler.from_score(lambda x: -x, steps=2, step_size=0.1)
    assert "not finite" not in repr(score.diagnose(torch.ones(2, 3), seed=0))


def test_the_saturation_of_a_state_that_is_not_finite_is_unknown() -> None:
    stats = diverging()
    assert bool(stats.saturation[-1, 1:].isnan().all())
    assert not bool(stats.saturation[:, 0].isnan().any())


def test_an_axis_is_logarithmic_if_its_values_span_many_orders() -> None:
    pytest.importorskip("matplotlib")
    assert {axes.get_yscale() for axes in diagnostics().plot().axes} == {"linear"}
    growing = torch.logspace(0, 12, 4, dtype=torch.float64)[:, None].expand(4, 5)
    stats = diagnostics()._replace(energy=-growing, grad_norm=growing)
    assert [axes.get_yscale() for axes in stats.plot().axes[:3]] == ["symlog", "log", "linear"]


def test_a_notebook_shows_the_plot_as_a_picture() -> None:
    """Also that of chains that are not finite."""
    pytest.importorskip("matplotlib")
    stats = diagnostics()
    energy = stats.energy.clone()
    energy[2:] = torch.nan
    energy[1, 0] = torch.inf
    assert (stats._replace(energy=energy)._repr_png_() or b"").startswith(b"\x89PNG")
    assert diagnostics(chains=0)._repr_png_() is None
    with pytest.raises(ValueError, match="a plot needs chains, got 0"):
        diagnostics(chains=0).plot()


def test_without_matplotlib_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastlangevin\[plot\]"'):
        diagnostics().plot()
    assert diagnostics()._repr_png_() is None
