"""Learning coarse to fine: chains that start from a model of smaller images."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

import fastlangevin as fl
from fastlangevin.coarse import enlarged
from fastlangevin.learn import ShortRunLearner, TrainConfig, resolve, train
from fastlangevin.learn.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from fastlangevin.learn.diagnosis import write_diagnosis
from fastlangevin.learn.model import export
from fastlangevin.learn.sample_shards import sample_shards
from fastlangevin.learn.tasks.interpolate import interpolate as interpolate_images
from fastlangevin.learn.tasks.run_tasks import interpolate_run
from tests.command import run_command
from tests.learn.train_shared import SETTINGS, CutError, assert_same_end, cut_at

SUFFIX = {"evaluate": ".json", "report": ".html", "diagnose": ""}
FINE = {**SETTINGS, "size": 16, "buffer_size": 0, "reinit": 0.0, "iterations": 4, "limit": 64}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of 8 x 8."""
    out = tmp_path_factory.mktemp("coarse") / "small"
    train(
        resolve("paper-cifar10", {**SETTINGS, "data": "digits", "iterations": 3, "limit": 64}), out
    )
    return out


@pytest.fixture(scope="module")
def config(small: Path) -> TrainConfig:
    return resolve("paper-cifar10", {**FINE, "data": "digits", "start": str(small)})


@pytest.fixture(scope="module")
def fine(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coarse") / "fine"
    train(config, out)
    return out


def test_interpolations_begin_at_the_first_models_noise(fine: Path) -> None:
    """And run the chains of every model; frozen noise is that of the sampler's own chains."""
    sampler = fl.load(fine)
    start = sampler.start
    assert start is not None
    seed = fl.noise.fold_in(4, 2**42)
    z = start.starts(6, seed=seed)
    found = interpolate_run(fine, sampler, n=3, frames=3, noise="frozen", seed=4).arrays
    for frame, points in enumerate((z[1::2], (z[::2] + z[1::2]) / 2**0.5, z[::2])):
        small = start(points, seed=seed)
        x0 = enlarged(small, (1, 16, 16))
        torch.testing.assert_close(found[2 - frame], sampler(x0, seed=4))
    quiet = interpolate_run(fine, sampler, n=3, frames=3, seed=4).arrays
    assert not torch.equal(quiet, found)
    # Models of one size: what z starts is named, not guessed from its size.
    again = fl.LangevinSampler(start.energy, steps=2, noise_std=0.0, start=start)
    own = interpolate_images(again, z[::2], z[1::2], 2)
    assert not torch.equal(interpolate_images(again, z[::2], z[1::2], 2, first=True), own)
    torch.testing.assert_close(own[0], again(z[::2], seed=0))


def test_an_iteration_equals_the_plain_loop_from_enlarged_samples(small: Path) -> None:
    start = fl.load(small)
    images = fl.noise.uniform((9, 1, 16, 16), seed=1, step=0) * 2 - 1
    energy = fl.ConvEnergy(1, 16, width=4)
    sampler = fl.LangevinSampler(energy, steps=2, start=start)
    learner = ShortRunLearner(sampler, images, batch_size=5, data_noise=0.0, seed=3)
    seed = fl.noise.fold_in(3, 0)
    coarse = start(n=5, seed=fl.noise.fold_in(seed, 2**42))
    x0 = enlarged(coarse, (1, 16, 16))
    with torch.no_grad():
        samples = fl.LangevinSampler(energy, steps=2)(x0, seed=seed)
        expected = energy(samples).mean()
    assert learner.step().energy_samples == pytest.approx(float(expected), abs=1e-5)


def test_a_run_is_loaded_with_its_start(fine: Path, small: Path, tmp_path: Path) -> None:
    sampler = fl.load(fine)
    assert sampler.start is not None
    whole = sampler(n=3, seed=5)
    assert torch.equal(sampler.start(n=3, seed=5), fl.load(small)(n=3, seed=5))
    export(fine, tmp_path / "exported.safetensors")
    fl.save(sampler, tmp_path / "saved.safetensors")
    for name in ("exported", "saved"):
        assert torch.equal(fl.load(tmp_path / f"{name}.safetensors")(n=3, seed=5), whole)
    other = fl.load(fine, start=None)
    assert other.start is None
    assert not torch.equal(other(n=3, seed=5), whole)
    assert fl.load(fine, steps=7).start is not None


def test_three_levels_are_saved_in_one_file(fine: Path, tmp_path: Path) -> None:
    sampler = fl.LangevinSampler(fl.ConvEnergy(1, 32, width=4), steps=2, start=fl.load(fine))
    fl.save(sampler, tmp_path / "three.safetensors")
    again = fl.load(tmp_path / "three.safetensors")
    assert torch.equal(again(n=2, seed=1), sampler(n=2, seed=1))


def test_a_run_that_is_cut_before_its_first_checkpoint_ends_as_one_that_is_not(
    config: TrainConfig, fine: Path, tmp_path: Path
) -> None:
    with pytest.raises(CutError):
        train(config, tmp_path / "run", report=cut_at(2))
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", fine)


def test_a_run_finds_its_start_from_any_directory(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.parent)
    assert resolve("digits", {"start": small.name}).start == str(small)
    assert resolve("digits", {"start": "cifar10"}).start == "cifar10"


def test_a_run_is_resumed_with_the_start_in_its_checkpoint(
    config: TrainConfig, small: Path, tmp_path: Path
) -> None:
    """The model that the run began with is no longer there. Its chains are clipped and clamped."""
    start = fl.load(small, averaged=False, clamp=(-1.0, 1.0), grad_clip=0.5)
    fl.save(start, tmp_path / "small.safetensors")
    config = dataclasses.replace(config, start=str(tmp_path / "small.safetensors"))
    train(config, tmp_path / "whole")
    with pytest.raises(CutError):
        train(config, tmp_path / "run", report=cut_at(3))
    (tmp_path / "small.safetensors").unlink()
    train(config, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("start", ["none", "other"])
def test_a_learner_refuses_a_checkpoint_with_another_start(
    start: str, fine: Path, small: Path
) -> None:
    other = None if start == "none" else fl.load(small, noise_std=0.5)
    learner = ShortRunLearner(fl.load(fine, start=other), torch.zeros(4, 1, 16, 16), batch_size=2)
    with pytest.raises(CheckpointError, match="another start"):
        learner.load(fine)


def test_persistent_chains_have_no_start(small: Path) -> None:
    sampler = fl.LangevinSampler(fl.ConvEnergy(1, 16, width=4), steps=1, start=fl.load(small))
    buffer = fl.ReplayBuffer(8, (1, 16, 16), seed=0)
    with pytest.raises(ValueError, match="leave out the buffer or the start"):
        ShortRunLearner(sampler, torch.zeros(4, 1, 16, 16), batch_size=2, buffer=buffer)


def test_a_file_with_endless_starts_is_refused(fine: Path, tmp_path: Path) -> None:
    tensors, info = read_checkpoint(fine)
    info["start"] = start = dict(info["start"])
    for _ in range(2000):
        start["start"] = start = dict(start)
    path = tmp_path / "deep.safetensors"
    header = {k: v for k, v in info.items() if k not in ("format", "version")}
    with contextlib.suppress(RecursionError):  # which json may raise
        save_checkpoint(path, tensors, header)
        with pytest.raises(CheckpointError):
            fl.load(path)


def test_a_file_may_have_eight_models_that_start_one_from_the_other(tmp_path: Path) -> None:
    def chain(n: int) -> fl.LangevinSampler:
        energy = fl.ConvEnergy(1, 8, width=2)
        return fl.LangevinSampler(energy, steps=1, start=chain(n - 1) if n else None)

    fl.save(chain(8), tmp_path / "eight.safetensors")
    assert fl.load(tmp_path / "eight.safetensors")(n=1, seed=0).shape == (1, 1, 8, 8)
    fl.save(chain(9), tmp_path / "nine.safetensors")
    with pytest.raises(CheckpointError, match="more than 8 models"):
        fl.load(tmp_path / "nine.safetensors")


def test_a_warning_points_to_the_caller_of_load(fine: Path) -> None:
    class Other(fl.ConvEnergy):
        pass

    with pytest.warns(UserWarning, match="an energy of the class") as warned:
        fl.load(fine, energy=Other(1, 16, width=2))
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "nowhere"}, "nowhere does not exist"),
        ({"buffer_size": 8}, "start cannot be used with persistent chains"),
        ({"size": 8, "start": "cifar10"}, r"start's images \[3, 32, 32\] must have"),
    ],
)
def test_a_start_that_does_not_fit_is_an_error_before_any_work(
    changes: dict[str, object], message: str, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(dataclasses.replace(config, **changes), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_only_starts_that_a_file_can_describe_are_saved(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        shape = (1, 8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square().flatten(1).sum(1)

    sampler = fl.LangevinSampler(
        fl.ConvEnergy(1, 16, width=4), start=fl.LangevinSampler(Plain(), steps=1)
    )
    with pytest.raises(TypeError, match="the energy of a start must be a ConvEnergy"):
        fl.save(sampler, tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="the energy of a start must be a ConvEnergy"):
        ShortRunLearner(sampler, torch.zeros(4, 1, 16, 16), batch_size=2)
    assert not (tmp_path / "model.safetensors").exists()


def test_sample_files_of_another_start_are_not_continued(
    fine: Path, small: Path, tmp_path: Path
) -> None:
    sampler = fl.load(fine)
    sample_shards(sampler, 4, tmp_path / "out", seed=1, per_file=2)
    _, info = read_checkpoint(small)
    other = fl.load(fine, start=fl.load(small, steps=info["sampler"]["steps"] + 1))
    with pytest.raises(FileExistsError, match="holds other samples: start"):
        sample_shards(other, 4, tmp_path / "out", seed=1, per_file=2)
    with pytest.raises(FileExistsError, match="holds other samples: start"):
        sample_shards(fl.load(fine, start=None), 4, tmp_path / "out", seed=1, per_file=2)


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--n", 2, "--cooldown", 2],
        ["interpolate", "--n", 1, "--frames", 3],
        ["reconstruct", "--n", 2, "--restarts", 1, "--iterations", 2, "--samples", 2],
        ["restore", "--n", 2, "--answers", 1, "--samples", 16],
        ["evaluate", "--n", 8, "--features", "pixels", "--reference", 8],
        ["diagnose", "--n", 16, "--long", 1, "--starts", 2],
        ["report"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_a_run_with_a_start(
    command: list[object], fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_diagnosis, "_plot", lambda diagnosis, path, title: path.touch())
    name, *options = command
    out = tmp_path / f"result{SUFFIX.get(str(name), '.png')}"
    result = run_command(name, fine, *options, "--out", out)
    assert result.exit_code == 0, result.output


def test_explain_names_the_chain_that_chains_start_from(fine: Path) -> None:
    text = fl.load(fine).explain()
    assert text.count("chain      2 steps") == 2
    assert "start      enlarged samples of this chain" in text
