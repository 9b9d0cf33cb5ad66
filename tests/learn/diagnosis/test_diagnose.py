"""Diagnoses: moments, chains, and the command."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import load_images, resolve, train
from fastlangevin.learn.checkpoint import read_checkpoint, save_checkpoint
from fastlangevin.learn.diagnosis import write_diagnosis
from fastlangevin.learn.diagnosis.diagnose import diagnose, long_run, mixing, noisy_batch, reach
from fastlangevin.learn.diagnosis.residuals import layer_residuals, parameter_residuals, top_layer
from fastlangevin.learn.diagnosis.write_diagnosis import to_json, to_text
from tests.command import run_command
from tests.learn.diagnosis.shared import normal


@pytest.fixture
def net() -> fl.ConvEnergy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fl.ConvEnergy(1, 8, 4, activation="silu")


def test_a_shift_is_a_layers_residual() -> None:
    """Through a linear layer a shift s of the input moves the mean by W s, exactly."""
    layer = nn.Linear(5, 3)
    energy = nn.Sequential(layer, nn.Linear(3, 1, bias=False))
    x, shift = normal(40, 5), torch.tensor([1.0, 0, -2, 0, 0.5])
    first, second = layer_residuals(energy, x, x + shift)
    moved = layer.weight.detach() @ shift
    assert first.residual == pytest.approx(float(moved.norm()), rel=1e-5)
    assert second.residual == pytest.approx(float((energy[1].weight.detach() @ moved).norm()), 1e-5)
    assert (first.name, first.elements, second.elements) == ("0", 3, 1)
    assert all(row.residual == 0 for row in layer_residuals(energy, x, x.clone()))


def test_the_floor_is_that_of_split_halves() -> None:
    """Of all 12,870 halvings of 16 points: half the mean squared difference, at full counts."""
    energy, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), normal(16, 2, seed=5)
    (row, _) = layer_residuals(energy, x, x)
    h = energy[0](x).detach().double()
    halves = torch.zeros(12870, 16).double()
    for i, half in enumerate(itertools.combinations(range(16), 8)):
        halves[i, list(half)] = 1
    difference = (halves - (1 - halves)) @ h / 8
    # A half has 8, twice the variance of the mean of 16.
    want = difference.square().sum(1).mean() / 2
    assert row.floor**2 == pytest.approx(float(want), rel=1e-5)


def test_chance_alone_gives_an_excess_of_one(net: fl.ConvEnergy) -> None:
    """16 pairs of unequal sets of one law: mean squares of residual / floor are 1 within 5 z."""
    squares: dict[str, list[float]] = {}
    for i in range(16):
        x, y = normal(48, 1, 8, 8, seed=10 + i).split([32, 16])
        for row in (*layer_residuals(net, x, y), *parameter_residuals(net, x, y)):
            squares.setdefault(row.name, []).append(row.excess**2)
    for name in ("layers.0", "layers.1", "layers.3", "layers.2.weight", "layers.4.weight"):
        found = torch.tensor(squares[name])
        assert abs(float(found.mean()) - 1) <= 5 * float(found.std()) / math.sqrt(16), name


def test_the_top_layers_moments_are_the_last_weights_gradient(net: fl.ConvEnergy) -> None:
    """E = <w, h> + c: the two tables have the row in common, and the constant has no residual."""
    x, y = normal(32, 1, 8, 8), normal(32, 1, 8, 8, seed=1) + 1
    layers = layer_residuals(net, x, y)
    top = top_layer(layers, net)
    assert top is not None
    assert top.name == "layers.3"
    rows = {row.name: row for row in parameter_residuals(net, x, y)}
    assert rows["layers.4.weight"].residual == pytest.approx(top.residual, rel=1e-4)
    assert rows["layers.4.bias"].residual < 1e-6
    assert top.excess > 2


def test_parameter_residuals_by_autograd(net: fl.ConvEnergy) -> None:
    x, y = normal(32, 1, 8, 8), 0.5 * normal(24, 1, 8, 8, seed=1)
    rows = {row.name: row for row in parameter_residuals(net, x, y, groups=4)}
    for name, parameter in net.named_parameters():
        means, floor = [], 0.0
        for part, size in ((x, 8), (y, 6)):
            grads = torch.stack(
                [torch.autograd.grad(net(p).mean(), parameter)[0] for p in part.split(size)]
            ).flatten(1)
            means.append(grads.mean(0))
            floor += float(grads.var(0).sum()) / 4
        assert rows[name].residual == pytest.approx(float((means[0] - means[1]).norm()), abs=1e-6)
        assert rows[name].floor == pytest.approx(math.sqrt(floor), rel=1e-3, abs=1e-6)
        assert rows[name].scale == pytest.approx(float(means[0].norm() + means[1].norm()), rel=1e-4)


def test_moments_leave_no_trace() -> None:
    """Of batch norm in train mode, dropout's generator, gradients, flags or hooks."""
    energy = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    energy[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in energy.state_dict().items()}
    state = torch.get_rng_state()
    x = normal(32, 4)
    rows = [row.name for row in parameter_residuals(energy, x, x)]
    layer_residuals(energy, x, x)
    assert rows == ["0.weight", "0.bias", "2.weight"]
    assert all(torch.equal(value, before[name]) for name, value in energy.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [p.requires_grad for p in energy.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in energy.parameters())
    assert not any(module._forward_hooks for module in energy.modules())


@pytest.mark.parametrize(
    ("data", "samples", "message"),
    [
        (normal(15, 1, 8, 8), normal(32, 1, 8, 8), "data must hold 16 or more .* got 15"),
        (normal(32, 1, 8, 8), normal(2, 1, 8, 8), "samples must hold 16 or more .* got 2"),
        (normal(32, 1, 8, 8), normal(32, 1, 4, 4), r"shape \[n, 1, 8, 8\], got \[32, 1, 4, 4\]"),
        (normal(32, 1, 8, 8), normal(32, 1, 8, 8) / 0, "samples must be finite"),
    ],
)
def test_no_moments(net: fl.ConvEnergy, data: Tensor, samples: Tensor, message: str) -> None:
    for residuals in (layer_residuals, parameter_residuals):
        with pytest.raises(ValueError, match=message):
            residuals(net, data, samples)


def test_reach_in_closed_form() -> None:
    """Without noise x_k = c^k x_0: everything is a multiple of |x_0|."""
    c, steps = 0.9, 7
    sampler = fl.LangevinSampler(fl.GaussianEnergy(), steps, step_size=1 - c, noise_std=0.0)
    data = normal(500, 30)
    found = reach(sampler, data, seed=3)
    x0 = 2 * fl.noise.uniform(data.shape, seed=3, step=0) - 1
    want = (1 - c**steps) * float(x0.norm(dim=1).mean())
    assert found.moved == pytest.approx(want, rel=1e-4)
    assert found.path == pytest.approx(want, rel=1e-4)
    assert found.drift == pytest.approx(want, rel=1e-4)
    assert found.noise == 0
    assert found.data == pytest.approx(float((data - x0).norm(dim=1).mean()), rel=1e-5)


def test_reach_of_noise_alone() -> None:
    """1,000 elements: |x_K - x_0| is within 5 standard errors, 1 / sqrt(2 x 1,000 x 200)."""
    flat = fl.LangevinSampler(lambda x: 0 * x.sum(1), steps=4, noise_std=[0.1, 0.2, 0.3, 0.1])
    found = reach(flat, normal(200, 1000))
    assert found.noise == pytest.approx(math.sqrt(0.15 * 1000))
    assert found.moved == pytest.approx(found.noise, rel=5 / math.sqrt(400_000))
    assert found.drift == 0


@pytest.mark.parametrize(
    ("energy", "verdict"),
    [
        (lambda x: x.square().sum(1), "steady"),
        (lambda x: -0.3 * x.square().sum(1), "saturates"),
        (lambda x: 50 * (x - 0.5 * torch.tanh(x)).square().sum(1), "drifts"),
        (lambda x: -x.pow(4).sum(1), "diverges"),
    ],
    ids=["steady", "saturates", "drifts", "diverges"],
)
def test_long_run(energy: Any, verdict: str) -> None:
    step_size = {"drifts": 0.0003, "steady": 0.4}.get(verdict, 0.1)
    sampler = fl.LangevinSampler(energy, steps=5, step_size=step_size, noise_std=0.01)
    data = 0.1 * normal(64, 20)
    found = long_run(sampler, data, long=20)
    assert found.verdict == verdict
    assert found.data_energy == pytest.approx(float(energy(data).mean()), rel=1e-4)
    assert found.data_std == pytest.approx(float(energy(data).std()), rel=1e-4)
    if verdict != "diverges":
        assert found.steps == list(range(5, 101, 5))
        assert found.shift == (found.energy[-1] - found.energy[0]) / found.data_std
        # The chain is one chain, cut: the K steps' noise goes on, and does not begin again.
        whole = fl.LangevinSampler(energy, steps=100, step_size=step_size, noise_std=0.01)
        x0 = 2 * fl.noise.uniform((64, 20), seed=0, step=0) - 1
        assert found.energy[-1] == float(whole.diagnose(x0, seed=0).energy[-1].mean())


def test_a_long_run_repeats_a_schedule() -> None:
    energy, sizes, data = fl.GaussianEnergy(), [0.4, 0.1], 0.1 * normal(16, 20)
    sampler = fl.LangevinSampler(energy, steps=2, step_size=sizes, noise_std=[0.3, 0.0])
    found = long_run(sampler, data, long=3)
    assert found.data_energy == pytest.approx(float(energy(data).mean()), rel=1e-4)
    whole = fl.LangevinSampler(energy, steps=6, step_size=3 * sizes, noise_std=3 * [0.3, 0.0])
    x0 = 2 * fl.noise.uniform((16, 20), seed=0, step=0) - 1
    assert found.energy[-1] == float(whole.diagnose(x0, seed=0).energy[-1].mean())


@pytest.mark.parametrize("noise_std", [0.0, 0.1, 1.0])
def test_mixing_of_a_linear_chain(noise_std: float) -> None:
    """x_K = c^K z + sum c^j b u: variances c^2K / 3 and b^2 (1 - c^2K) / (1 - c^2), no interaction.

    Over 4,000 elements and 16 x 16 runs a share s (1 - s) scatters by 2 / sqrt(16 x 4,000) of it.
    """
    c, steps = 0.8, 4
    sampler = fl.LangevinSampler(fl.GaussianEnergy(), steps, step_size=1 - c, noise_std=noise_std)
    of_z = c ** (2 * steps) / 3
    of_u = noise_std**2 * (1 - c ** (2 * steps)) / (1 - c * c)
    found = mixing(sampler, (4000,), seed=1)
    share = of_z / (of_z + of_u)
    assert found.start == pytest.approx(share, abs=5 * share * (1 - share) * 2 / 250 + 1e-6)
    assert found.noise == pytest.approx(1 - share, abs=5 * share * (1 - share) * 2 / 250 + 1e-6)
    assert found.both < 1e-5
    assert sum(found) == pytest.approx(1)


def test_mixing_of_starts_and_noise() -> None:
    """A sign that noise or start may turn: with sin(6 x) neither alone decides."""
    sampler = fl.LangevinSampler(
        lambda x: torch.cos(9 * x).sum(1), steps=10, step_size=0.02, noise_std=0.15
    )
    found = mixing(sampler, (200,))
    assert found.both > 0.05
    assert found.start > 0.05
    assert sum(found) == pytest.approx(1)
    with pytest.raises(ValueError, match="starts must be 2 or more, got 1"):
        mixing(sampler, (200,), starts=1)


def test_noisy_batch() -> None:
    data = load_images("digits")
    clean = noisy_batch(data, 2000, 0.0)
    assert len(clean) == 1797
    assert clean.sum() == pytest.approx(float(data.batch(np.arange(1797)).sum()), rel=1e-6)
    assert not torch.equal(noisy_batch(data, 64, 0.0), noisy_batch(data, 64, 0.0, seed=1))
    noise = noisy_batch(data, 1797, 0.3) - clean
    assert float(noise.std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * noise.numel()))


def test_diagnose_refuses_before_it_runs(net: fl.ConvEnergy) -> None:
    """A log of another version, an energy without layers, a long run of no length."""
    called = []
    energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    energy.register_forward_hook(lambda *_: called.append(1))
    sampler, data = fl.LangevinSampler(energy, steps=2), normal(32, 1, 8, 8)
    with pytest.raises(
        ValueError, match="records without gap or grad_norm; is it from another version"
    ):
        diagnose(sampler, data, records=[{"iteration": 1, "loss": 0.0}])
    with pytest.raises(ValueError, match="long"):
        diagnose(sampler, data, long=0)
    with pytest.raises(TypeError, match=r"energy must be an nn\.Module, got function"):
        diagnose(fl.LangevinSampler(lambda x: x.flatten(1).sum(1)), data)
    assert called == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diagnose") / "run"
    settings = {
        "width": 2, "steps": 3, "batch_size": 4, "iterations": 40, "log_every": 2,
        "sample_every": 40, "save_every": 40, "samples": 4, "device": "cpu",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=settings), out)
    return out


@pytest.fixture
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the picture, which takes longer than the diagnosis."""
    monkeypatch.setattr(write_diagnosis, "_plot", lambda diagnosis, path, title: path.touch())


def command(*arguments: Any) -> Any:
    return run_command("diagnose", *arguments, "--n=32", "--long=2", "--starts=3")


def test_command(run: Path, tmp_path: Path) -> None:
    result = command(run, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "diagnose.json").read_text())
    assert (found["format"], found["version"]) == ("fastlangevin diagnosis", 1)
    assert (found["every"]["values"], found["every"]["spacing"]) == (40, 1)
    assert (found["measured"]["values"], found["measured"]["spacing"]) == (20, 2)
    assert [row["name"] for row in found["layers"]] == [f"layers.{i}" for i in range(5)]
    assert found["top"] == found["layers"][3]
    assert found["long_run"]["steps"] == [3, 6]
    assert (found["every"]["oscillation"]["values"], len(found["every"]["d"])) == (20, 11)
    for why in ("too few values", "values are 2 iterations apart"):
        assert f"no verdict on oscillation, {why}" in result.stdout
    assert f"Long run: {found['long_run']['verdict']}" in result.stdout
    assert f"{found['every']['d_mean']:+.4g} +- {found['every']['d_std']:.4g}" in result.stdout
    assert "layers.3" in result.stdout.split("<- h of the top layer")[0].splitlines()[-1]
    for name in result.stdout.splitlines()[-2:]:
        if name.endswith(".png"):
            assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_series_of_a_run(run: Path) -> None:
    """Every iteration once; where there is a record, its gap and reach."""
    series = [json.loads(line) for line in (run / "series.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in series] == list(range(1, 41))
    for record in records:
        line = series[record["iteration"] - 1]
        for name in ("gap", "reach"):
            assert line[name] == pytest.approx(record[name], rel=1e-8)


@pytest.mark.usefixtures("without_plot")
def test_a_run_without_a_log(run: Path, tmp_path: Path) -> None:
    """An older run has no series, a lone checkpoint nothing: the rest is measured all the same."""
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    (copied / "series.jsonl").unlink()
    result = command(copied)
    assert result.exit_code == 0, result.output
    found = json.loads((copied / "diagnose.json").read_text())
    assert found["every"] is None
    assert found["measured"]["values"] == 20
    (lone,) = (copied / "checkpoints").iterdir()
    lone = lone.rename(tmp_path / "lone.safetensors")
    result = command(lone, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "diagnose.json").read_text())["measured"] is None
    assert result.stdout.count("no log, or fewer than 16 values in it, nothing to correlate") == 2


@pytest.mark.usefixtures("without_plot")
def test_a_model_alone_takes_nothing_from_the_run_around_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shipped model's name, and an exported one, in a folder that is another run's."""
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    (checkpoint,) = (copied / "checkpoints").iterdir()
    shutil.copy(checkpoint, copied / "exported.safetensors")
    before = sorted(copied.rglob("*"))
    monkeypatch.chdir(copied)
    for model in ("exported.safetensors", "digits"):
        result = command(model)
        assert result.exit_code == 0, result.output
        assert (
            result.stdout.count("no log, or fewer than 16 values in it, nothing to correlate") == 2
        )
    assert sorted(copied.rglob("*")) == before


@pytest.mark.usefixtures("without_plot")
def test_an_older_checkpoint_has_the_log_as_far_as_itself(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    (checkpoint,) = (copied / "checkpoints").iterdir()
    tensors, info = read_checkpoint(checkpoint)
    older = checkpoint.with_name(f"{34:08d}.safetensors")
    save_checkpoint(older, tensors, info | {"iteration": 34})
    monkeypatch.chdir(older.parent)
    for path in (older, older.name):
        result = command(path)
        assert result.exit_code == 0, result.output
        found = json.loads((copied / "diagnose.json").read_text())
        assert (found["every"]["values"], found["measured"]["values"]) == (34, 17)
        (copied / "diagnose.json").unlink()


def test_command_refuses(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    (checkpoint,) = (copied / "checkpoints").iterdir()
    tensors, info = read_checkpoint(checkpoint)
    (copied / "metrics.jsonl").write_text('{"iteration": 1, "loss": 0.5}\n')
    save_checkpoint(tmp_path / "later.safetensors", tensors, info | {"version": 9})
    save_checkpoint(tmp_path / "own.safetensors", tensors, info | {"config": None})
    few = tmp_path / "few.npy"
    np.save(few, np.zeros((5, 8, 8), dtype=np.uint8))
    for arguments, message in (
        ((copied,), "records without gap or grad_norm; is it from another version"),
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path / "later.safetensors",), "of version 9; this fastlangevin reads version 1"),
        ((tmp_path / "own.safetensors",), "it names no data"),
        ((run, f"--data={few}"), "needs 16 images or more, the data have 5"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert result.stdout == ""
    assert not list(tmp_path.rglob("diagnose.*"))


def test_json_has_no_nan(net: fl.ConvEnergy) -> None:
    """A long run that diverges is told in words and in JSON that any reader takes."""
    energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Quartic())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(energy[1].weight)
    sampler = fl.LangevinSampler(energy, steps=2, step_size=1e-5)
    found = diagnose(sampler, normal(16, 1, 8, 8), long=40, starts=2)
    assert found.long_run.verdict == "diverges"
    assert "Long run: diverges" in to_text(found)
    json.dumps(to_json(found), allow_nan=False)
    assert to_json(found)["long_run"]["energy"][-1] is None


class Quartic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x.pow(4).sum(1)
