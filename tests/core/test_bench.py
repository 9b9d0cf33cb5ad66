"""The short measurement: what it runs, counts and says."""

import math

import pytest
import torch
from torch import nn

import fastlangevin as fl
from fastlangevin import bench
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import extension
from fastlangevin.roofline import cost
from tests.command import run_command


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_cost_counts_products_both_ways_and_no_head() -> None:
    graph = recognise(fl.ConvEnergy(size=8, width=4), images())
    assert not isinstance(graph, str)
    found = cost(graph)
    assert found.flops == 4 * (64 * 4 * 27 + 16 * 8 * 4 * 16)
    assert found.activations == 64 * 4 + 16 * 8


def test_the_plain_loop_descends_the_energy() -> None:
    energy = fl.GaussianEnergy(2.0)
    x = images()
    assert torch.allclose(bench.plain_loop(energy, x, 3, 0.1, 0.0), x * 0.95**3)


def test_every_score_has_a_row_or_a_reason() -> None:
    rows = bench.bench(fl.ConvEnergy(size=8, width=2), images(), (None, "bf16"), seconds=0.0)
    names = {(row.name, row.precision) for row in rows}
    assert names == {(bench.NAIVE, None)} | {
        (name, precision)
        for name in ("autograd", "explicit", "fused")
        for precision in (None, "bf16")
    }
    served = [row for row in rows if row.why_not is None]
    assert rows[0].speedup == 1.0
    for row in served:
        assert row.seconds > 0
        assert math.isclose(row.speedup, rows[0].seconds / row.seconds)  # of a single round
    if extension.library is not None:
        assert len(served) == len(rows)


def test_scores_that_do_not_serve_say_why() -> None:
    rows = bench.bench(lambda x: x.square().flatten(1).sum(1), images(), seconds=0.0)
    reasons = {row.name: row.why_not for row in rows}
    assert reasons[bench.NAIVE] is None
    assert reasons["autograd"] is None
    assert reasons["explicit"] is None
    assert "not an nn.Module" in str(reasons["fused"])
    assert "no: the energy is a function" in bench.to_text(rows)


def make_energy() -> nn.Module:
    return fl.ConvEnergy(size=8, width=2)


not_an_energy = dict


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"{__name__}:make_energy"], "plain loop"),
        (["digits"], "plain loop"),
        ([f"{__name__}:make_energy", "--shape", "1,8,8"], "x must have shape"),
        ([f"{__name__}:make_energy", "--shape", "8;8"], "--shape must be positive integers"),
        ([f"{__name__}:nothing"], "has no attribute 'nothing'"),
        (
            [f"{__name__}:not_an_energy"],
            "or a function that returns one, got dict",
        ),
        (["torch.nn:Identity"], "give --shape"),
        (["nowhere:energy"], "no module 'nowhere' in the working directory"),
        (["none"], "give a config (anatomy-nonconvergent"),
    ],
)
def test_the_command(arguments: list[str], expected: str) -> None:
    given = ["bench", *arguments, "--seconds", "0", "--batch", "2", "--steps", "1"]
    result = run_command(*given)
    output = " ".join(result.output.split())
    assert expected in output
    assert (result.exit_code == 0) == (expected == "plain loop"), output
