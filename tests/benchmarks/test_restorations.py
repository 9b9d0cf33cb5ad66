"""The table of restorations: its answers without a model, and that its rows are restore's own."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fastlangevin as fl
from benchmarks.restorations import (
    cell,
    errors,
    filled,
    main,
    model_moments,
    tables,
    without_model,
    won,
)
from fastlangevin.learn.tasks.measurements import Downsample, Grey, make_operator, measure
from fastlangevin.learn.tasks.restore import restore

BOX = make_operator("mask", (1, 8, 8))


def test_neighbour_fill_continues_a_slope_and_keeps_known_pixels() -> None:
    """A plane is harmonic: every pixel is the mean of its neighbours."""
    down, right = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = (0.1 * down - 0.05 * right)[None, None]
    box = make_operator("mask", (1, 8, 8))
    torch.testing.assert_close(filled(box(plane), box), plane, rtol=0, atol=1e-4)  # type: ignore[arg-type]


def test_answers_without_a_model() -> None:
    x = 2 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 1
    mean = x.mean(0)
    down = without_model("downsample", Downsample(2), Downsample(2)(x), mean)
    assert all(answer.shape == x.shape for answer in down.values())
    flat = without_model("downsample", Downsample(2), torch.full((1, 3, 4, 4), 0.3), mean)
    torch.testing.assert_close(flat["simple"], torch.full((1, 3, 8, 8), 0.3))
    grey = without_model("grey", Grey(), Grey()(x), mean)
    torch.testing.assert_close(Grey()(grey["simple"]), Grey()(x))
    torch.testing.assert_close(grey["measurement"], Grey()(x).expand_as(x))


@pytest.mark.parametrize("noise_std", [0.01, 0.0])
def test_errors_are_those_of_restore(noise_std: float) -> None:
    sampler = fl.load("digits", steps=3, noise_std=noise_std)
    x = fl.learn.load_images("digits").batch(range(1500, 1504))
    priors = {"moments": model_moments(sampler)}
    found = errors(sampler, x, "mask", 0.1, priors, ["posterior", "clamped"])
    y = measure(BOX, x, 0.1, seed=1)
    mine = restore(sampler, y, BOX, measurement_noise=0.1).mean.clamp(-1, 1)
    hidden = BOX(torch.ones_like(x)) == 0
    want = ((mine - x).square() * hidden).sum((1, 2, 3)) / 16
    torch.testing.assert_close(found["moments"], want, rtol=1e-4, atol=1e-5)
    assert {"measurement", "mean image", "posterior", "clamped"} < set(found)
    simple = min(float(found[name].mean()) for name in list(found)[:5])
    assert float(won(found).mean()) == pytest.approx(float(want.mean()) - simple, abs=1e-5)
    text = tables({("mask", 0.1): found})
    assert f"| **`restore`** (moments) | {cell(want)} |" in text


def test_the_command_writes_the_table_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(
        "above\n<!-- restorations digits -->\nold\n<!-- /restorations digits -->\nbelow\n", "utf-8"
    )
    arguments = ["digits", "--n", "3", "--docs", str(page), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["restorations", *arguments])
    main()
    text = page.read_text("utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert "| without noise | mask | downsample | blur |" in text  # digits have no colours
    assert "| with noise of 0.1 | mask | downsample | blur |" in capsys.readouterr().out
    rows = json.loads(file.read_text("utf-8"))["results"]
    assert len(rows) == 6
    assert all(len(e) == 3 for row in rows for e in row["errors"].values())
