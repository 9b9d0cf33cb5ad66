"""Models that come with the package: there, repeatable, and good for what they say."""

import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn import (
    TrainConfig,
    checkpoint,
    interpolate,
    load_images,
    reconstruct,
    resolve,
)
from fastlangevin.learn.config import FIELDS, resolve_saved
from fastlangevin.learn.diagnosis import write_diagnosis
from fastlangevin.learn.evaluation.classifier import ClassifierCheck
from fastlangevin.learn.images import to_grid
from fastlangevin.learn.run_data import packaged_images
from tests.command import run_command

MODELS = checkpoint.shipped()
PACKAGE = Path(fl.__file__).parent


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in an empty folder, with no network to reach."""

    def refuse(*arguments: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    return run_command


def config_of(command: str) -> tuple[TrainConfig, str]:
    """The settings and the folder that a command of a record stands for."""
    words = shlex.split(command)
    assert words[:2] == ["fastlangevin", "train"]
    given, left = {}, words[2:]
    while left:
        option = left.pop(0).removeprefix("--").replace("-", "_")
        given[option] = "true" if not left or left[0].startswith("--") else left.pop(0)
    config, out = given.pop("config"), given.pop("out")
    assert set(given) <= set(FIELDS)
    values = {k: None if v == "none" else yaml.safe_load(v) for k, v in given.items()}
    return resolve(config, overrides=values), out


@pytest.mark.parametrize("name", MODELS)
def test_its_record_says_how_to_repeat_it(name: str) -> None:
    """The command in the YAML resolves to the settings that the weights were trained with."""
    record = yaml.safe_load(MODELS[name].with_suffix(".yaml").read_text("utf-8"))
    asked, _ = config_of(record["train"])
    tensors, info = checkpoint.read_checkpoint(name)
    assert asked == resolve_saved(info, name, {})
    assert info["iteration"] == asked.iterations
    count = sum(tensor.numel() for tensor in tensors.values())
    assert f"{count:,} parameters" in record["weights"]
    sampler = fl.load(name)
    start, cooldown = asked.start, 0
    for command in reversed(record.get("first", [])):
        if command.startswith("fastlangevin export"):
            _, _, run, _, steps, _, out = shlex.split(command)  # RUN --cooldown STEPS --out FILE
            assert start == out
            start, cooldown = run, int(steps)
            continue
        before, out = config_of(command)
        assert start == out
        assert sampler.start is not None
        sampler, start = sampler.start, before.start
        assert sampler.energy.shape == (before.channels or 3, before.size, before.size)
        assert (sampler.steps, sampler.energy.width) == (before.steps + cooldown, before.width)
        cooldown = 0
    assert start is None
    assert sampler.start is None


def test_it_is_small_and_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["fastlangevin"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    for path in MODELS.values():
        assert {path, path.with_suffix(".yaml")} <= packaged
        assert path.stat().st_size < 4e6
    assert PACKAGE / "models" / "cifar10.npz" in packaged
    assert PACKAGE / "learn" / "html_report.html" in packaged


def test_sampling_right_after_install(command: Any, tmp_path: Path) -> None:
    found = command("sample", "--n", "16")
    assert found.exit_code == 0, found.output
    x = fl.load("digits")(n=16, seed=0)
    assert x.shape == (16, 1, 8, 8)
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.array_equal(np.asarray(picture), to_grid(x))


def test_its_samples_pass_the_check(command: Any) -> None:
    found = command("check", "digits")
    assert found.exit_code == 0, found.output
    assert found.stdout.rstrip().endswith("pass")


@pytest.mark.slow
def test_it_reconstructs_digits_that_it_has_not_seen() -> None:
    """At most half the error of the best of 64 random samples, in 40 steps from one start each."""
    sampler = fl.load("digits")
    held_out = load_images("digits").batch(1500 + torch.arange(8) * 297 // 8)
    drawn = sampler(n=64, seed=0)
    best = (held_out[:, None] - drawn).square().flatten(2).mean(2).amin(1).mean()
    fit = reconstruct(sampler, held_out, restarts=1, iterations=40).best()
    chains = fl.LangevinSampler(sampler.energy, **sampler.settings() | {"noise_std": 0.0})
    x = chains(fit.z, seed=0)  # the starts are starts: their chains end there
    assert (x - held_out).square().mean() <= 0.5 * best


def test_what_lies_between_two_samples_is_as_sure_a_digit() -> None:
    """A classifier's mean confidence on the way is at least 80 % of that at the end points.

    A cross-fade of the end points' pixels keeps some 90 % as well: more than that, too.
    """
    sampler, n = fl.load("digits"), 64
    z = 2 * fl.noise.uniform((2 * n, *sampler.energy.shape), seed=0, step=0) - 1
    x = interpolate(sampler, z[::2], z[1::2], frames=9)
    check = ClassifierCheck(load_images("digits", limit=1500))

    def kept(frames: Tensor) -> float:
        confidence = check.probabilities(frames.flatten(0, 1)).max(1).reshape(9, n)
        assert confidence[[0, -1]].mean() >= 0.7  # of uniform noise it is 0.56 sure
        return float(confidence[1:-1].mean() / confidence[[0, -1]].mean())

    part = torch.linspace(0, 1, 9).view(9, 1, 1, 1, 1)
    assert kept(x) >= 0.8
    assert kept(x) > kept((1 - part) * x[0] + part * x[-1])


FEW = ("--n", 2, "--iterations", 1, "--restarts", 1)
OFFLINE = {
    "reconstruct": (*FEW, "--steps", 1, "--samples", 2),
    "restore": ("--n", 2, "--answers", 1, "--samples", 64),
    "diagnose": ("--n", 16, "--long", 1, "--starts", 2),
}


@pytest.fixture
def short_chains(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the package's models. That of CIFAR-10 is narrow and takes a single step."""
    folder = tmp_path_factory.mktemp("models")
    for path in MODELS["cifar10"].parent.iterdir():
        shutil.copy(path, folder)
    _, info = checkpoint.read_checkpoint(MODELS["cifar10"])
    info["sampler"]["steps"], info["energy"]["width"] = 1, 2
    info["start"]["sampler"] |= {"steps": 1, "step_size": 1.0, "noise_std": 0.01}
    info["start"]["energy"]["width"] = 2
    energy = fl.ConvEnergy(**info["energy"])
    tensors = {f"model.{name}": value for name, value in energy.state_dict().items()}
    start = fl.ConvEnergy(**info["start"]["energy"])
    tensors |= {f"start.model.{name}": value for name, value in start.state_dict().items()}
    checkpoint.save_checkpoint(folder / MODELS["cifar10"].name, tensors, info)
    monkeypatch.setattr(checkpoint, "_MODELS", folder)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_cifar10_model_brings_test_images_of_its_own(
    name: str, command: Any, short_chains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTLANGEVIN_DATA", raising=False)
    monkeypatch.setattr(write_diagnosis, "_plot", lambda diagnosis, path, title: path.touch())
    result = command(name, "cifar10", *OFFLINE[name])
    assert result.exit_code == 0, result.output
    assert "64 test images of the package" in result.output


def test_the_images_of_the_package_are_for_its_models_alone(command: Any, tmp_path: Path) -> None:
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(MODELS["cifar10"].read_bytes())
    assert packaged_images(copy) is None
    assert packaged_images("digits") is None  # scikit-learn brings its images
    images = packaged_images("cifar10")
    assert images is not None
    assert images.shape == (3, 32, 32)
    assert images.labels is not None
    assert images.labels.tolist() == [i % 10 for i in range(64)]
    result = command("reconstruct", "digits", "--n", 65, "--iterations", 1, "--restarts", 1)
    assert "65 of digits, those past the run's limit of 1500" in result.stdout


def test_names_paths_and_what_there_is(command: Any, tmp_path: Path) -> None:
    model = MODELS["digits"]
    (tmp_path / "digits").mkdir()  # a folder of that name that is no run is not in the way
    assert checkpoint.find_checkpoint("digits") == model
    assert checkpoint.find_checkpoint(Path("digits")) == model
    run = tmp_path / "digits" / "checkpoints" / "00000007.safetensors"
    run.parent.mkdir()
    run.write_bytes(model.read_bytes())
    assert checkpoint.find_checkpoint("digits") == Path("digits/checkpoints/00000007.safetensors")
    found = command("sample", "digit")
    assert found.exit_code == 1
    assert "digit does not exist" in found.stderr
    assert "models that come with the package: cifar10, digits, faces" in found.stderr


def test_export_keeps_the_averaged_weights_and_what_sampling_needs(
    command: Any, tmp_path: Path
) -> None:
    from fastlangevin.learn import train

    tiny = {"width": 2, "steps": 2, "batch_size": 4, "iterations": 3, "ema": 0.5, "samples": 1}
    last = train(resolve(overrides=tiny | {"device": "cpu"}), tmp_path / "run")
    assert command("export", "run", "--out", "small.safetensors").exit_code == 0
    whole, small = fl.load(last), fl.load(tmp_path / "small.safetensors")
    assert torch.equal(whole(n=3, seed=1), small(n=3, seed=1))
    assert not torch.equal(fl.load(last, averaged=False)(n=3, seed=1), small(n=3, seed=1))
    assert whole.settings() == small.settings()
    tensors, info = checkpoint.read_checkpoint(tmp_path / "small.safetensors")
    assert all(name.startswith("model.") for name in tensors)
    assert info == checkpoint.read_checkpoint(last)[1]
    assert command("export", "run", "--cooldown", "4", "--out", "cooled.safetensors").exit_code == 0
    cooled = fl.load(tmp_path / "cooled.safetensors")
    assert cooled.settings() == fl.anneal.cooldown(small.settings(), 4)
    again = command("export", "cooled.safetensors", "--cooldown", "4", "--out", "twice.safetensors")
    assert again.exit_code == 1
    assert "cooled.safetensors cannot be given a cooldown: cooldown: step_size" in again.stderr
    refused = command("export", "run", "--out", "small.pt")
    assert refused.exit_code == 1
    assert "--out must end in .safetensors" in refused.stderr
