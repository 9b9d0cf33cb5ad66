"""The commands reconstruct, interpolate, restore, transfer and sample --gif; held-out images."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastlangevin as fl
from fastlangevin.cli.outputs import count_images
from fastlangevin.learn import (
    interpolate,
    load_images,
    reconstruct,
    resolve,
    restore,
    save_gif,
)
from fastlangevin.learn.build import load_data
from fastlangevin.learn.checkpoint import checkpoint_path, read_checkpoint, save_checkpoint
from fastlangevin.learn.evaluation.features import quantise
from fastlangevin.learn.evaluation.metrics import kernel_distance
from fastlangevin.learn.images import to_grid
from fastlangevin.learn.run_data import load_held_out, run_config, spaced_images, suggesting
from fastlangevin.learn.tasks.measurements import (
    make_operator,
)
from tests.command import run_command
from tests.learn.tasks.shared import images, start


def test_held_out_images_are_those_past_the_limit() -> None:
    config = resolve(overrides={"data": "digits", "limit": 1500})
    held, every = load_held_out(config, (1, 8, 8)), load_images("digits")
    assert len(held) == 297
    assert torch.equal(held.batch([0, 296]), every.batch([1500, 1796]))
    assert held.labels is not None
    assert every.labels is not None
    assert held.labels.tolist() == every.labels[1500:].tolist()
    assert load_held_out(config, (3, 4, 4), "digits").shape == (3, 4, 4)


def test_held_out_images_of_a_test_split(tmp_path: Path) -> None:
    for split, grey in (("train", 10), ("test", 200)):
        (tmp_path / split).mkdir()
        Image.new("L", (8, 8), grey).save(tmp_path / split / "a.png")
    held = load_held_out(resolve(overrides={"data": str(tmp_path)}), (1, 8, 8))
    assert torch.equal(held.batch([0]), torch.full((1, 1, 8, 8), 200 / 127.5 - 1))


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        (None, r"trained on every image of digits; train with --limit N \(in Python limit=N\)"),
        (1797, "holds out none"),
    ],
)
def test_nothing_held_out(limit: int | None, match: str) -> None:
    config = resolve(overrides={"data": "digits", "limit": limit})
    advice = r".*; give --images PATH \(in Python images=\) to use other images$"
    with pytest.raises(ValueError, match=match + advice), suggesting("images", None):
        load_held_out(config, (1, 8, 8))


def test_images_are_spread_over_the_data_and_its_classes() -> None:
    """Classes in turn, as in many files, would otherwise give some classes only."""
    labels = np.arange(64) % 10
    pixels = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None], (64, 1, 8, 8))
    data = dataclasses.replace(
        load_images("digits"), pixels=pixels, labels=labels, divisor=1, offset=0
    )

    def chosen(data: Any, n: int) -> list[int]:
        return spaced_images(data, n, None)[:, 0, 0, 0].int().tolist()

    assert len({labels[i] for i in chosen(data, 8)}) == 8
    assert len({labels[i] for i in chosen(data, 10)}) == 10
    assert all(i * 64 // 8 <= k < (i + 1) * 64 // 8 for i, k in enumerate(chosen(data, 8)))
    assert chosen(data, 64) == list(range(64))
    assert chosen(dataclasses.replace(data, labels=None), 8) == list(range(0, 64, 8))


def test_one_image_is_not_called_images() -> None:
    assert [count_images(n) for n in (1, 2)] == ["1 image", "2 images"]


def test_gif(tmp_path: Path) -> None:
    frames = images(6, 1).view(3, 2, 1, 8, 8)
    save_gif(frames, tmp_path / "a.gif", columns=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown, times = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            shown.append(np.asarray(gif.convert("RGB")))
            times.append(gif.info["duration"])
    assert times == [1000, 80, 1000]
    for frame, want in zip(shown, frames, strict=True):
        assert np.array_equal(frame, to_grid(want, columns=2))
    with pytest.raises(
        ValueError, match=r"frames must be \[F >= 1, n, C, H, W\], got \[2, 1, 8, 8"
    ):
        save_gif(frames[0], tmp_path / "b.gif")


TINY = {"width": 2, "steps": 2, "batch_size": 4, "iterations": 1, "samples": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has hardly begun, and holds out ten digits."""
    from fastlangevin.learn import train

    out = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=TINY | {"limit": 1787}), out)
    return out


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return run_command


def numbers(result: Any) -> dict[str, float]:
    """The number of each line that has one after its name."""
    assert result.exit_code == 0, result.output
    found = re.findall(r"^(\S.*?) +([+-]?\d+\.\d+)(?:   |$)", result.stdout, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_reconstruct_command(command: Any, run: Path) -> None:
    options = ("--n", 3, "--iterations", 4, "--samples", 5, "--restarts", 2, "--seed", 8)
    said = numbers(command("reconstruct", run, *options, "--out", "a.npz"))
    found = np.load("a.npz")
    held = load_images("digits").batch([1787, 1790, 1793])
    assert torch.equal(torch.from_numpy(found["images"]), held)
    error = ((found["images"] - found["x"]) ** 2).mean((1, 2, 3))
    assert found["error"] == pytest.approx(error, rel=1e-5)
    assert said["reconstruction"] == pytest.approx(error.mean(), abs=1e-5)
    drawn = fl.load(run)(n=5, seed=8)
    best = (held[:, None] - drawn).square().mean((2, 3, 4)).amin(1).mean()
    assert said["best of 5"] == pytest.approx(float(best), abs=1e-5)
    assert said["ratio"] == pytest.approx(float(error.mean() / best), abs=1e-3)

    assert command("reconstruct", run, *options, "--out", "a.png").exit_code == 0
    x = torch.from_numpy(found["x"])
    nearest = drawn[(held[:, None] - drawn).square().mean((2, 3, 4)).argmin(1)]
    want = to_grid(torch.cat([held, x, nearest]), 3)
    assert np.abs(np.asarray(Image.open("a.png")).astype(int) - want).max() <= 1


def test_interpolate_command(command: Any, run: Path) -> None:
    said = numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.npy"))
    x = torch.from_numpy(np.load("a.npy"))
    assert x.shape == (3, 2, 1, 8, 8)
    z = start(4, 0, channels=1)
    torch.testing.assert_close(x, interpolate(fl.load(run), z[::2], z[1::2], 3))
    real = spaced_images(load_data(run_config(run)), 512, None).flatten(1)
    sets = {
        "end points": x[[0, 2]],
        "between": x[1],
        "crossfade": (x[0] + x[2]) / 2,
    }
    for name, shown in sets.items():
        distance = kernel_distance(quantise(shown.reshape(-1, 64)), real)  # of pixels, for grey
        assert said[name] == pytest.approx(distance, abs=1e-4)
    assert numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.png"))
    want = to_grid(x.transpose(0, 1).flatten(0, 1), 3)
    assert np.array_equal(np.asarray(Image.open("a.png")), want)
    assert numbers(command("interpolate", run, "--n", 2, "--frames", 3, "--out", "a.gif"))
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 4  # there and back


def test_a_model_whose_data_are_not_here(command: Any, run: Path) -> None:
    tensors, info = read_checkpoint(run)
    info = {name: value for name, value in info.items() if name not in ("format", "version")}

    def save(config: dict[str, Any], **others: Any) -> None:
        save_checkpoint("m.safetensors", tensors, info | {"config": config} | others)

    save(info["config"] | {"data": "not/here"})
    found = command("interpolate", "m.safetensors", "--n", 2, "--out", "i.npy")
    assert found.exit_code == 0, found.output
    assert found.stdout == "i.npy\n"
    assert "no features to judge the frames by: load_images: 'not/here' is neither" in found.stderr
    assert np.load("i.npy").shape == (9, 2, 1, 8, 8)
    save(info["config"] | {"momentum": 0.9})
    for name in ("interpolate", "diagnose"):
        found = command(name, "m.safetensors")
        assert found.exit_code == 1
        assert "m.safetensors has settings that fastlangevin" in found.stderr
        assert "perhaps from another version: momentum" in found.stderr
    save(info["config"], iteration=None)
    found = command("diagnose", "m.safetensors")
    assert found.exit_code == 1
    assert "m.safetensors has a damaged header: no iteration in it" in found.stderr


def test_interpolate_command_between_images(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 2, "--frames", 3, "--iterations", 4, "--restarts", 2)
    result = command("interpolate", run, *options, "--seed", 8, "--out", "a.npy")
    said, x = numbers(result), torch.from_numpy(np.load("a.npy"))
    truth = spaced_images(load_images("digits"), 4, None)
    fit = reconstruct(fl.load(run), truth, restarts=2, iterations=4, seed=8).best()
    assert said["their fit"] == pytest.approx(float(fit.error.mean()), abs=1e-5)
    assert "4 of digits, 1797 x 1x8x8" in result.stdout
    torch.testing.assert_close(x[0], fit.x[::2], rtol=0, atol=1e-5)
    torch.testing.assert_close(x[2], fit.x[1::2], rtol=0, atol=1e-5)
    middle = interpolate(fl.load(run), fit.z[::2], fit.z[1::2], 3)[1]
    torch.testing.assert_close(x[1], middle, rtol=0, atol=1e-5)


def test_restore_command_takes_the_options_of_a_fit(command: Any, run: Path) -> None:
    fit: dict[str, Any] = {
        "restarts": 2,
        "iterations": 3,
        "optimizer": "gd",
        "lr": 0.3,
        "noise": "frozen",
        "grad_through": "straight",
        "checkpoint": 2,
    }
    options = [
        part for name, value in fit.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    common = ("--method", "latent", "--n", 2, "--answers", 2, "--seed", 3, "--out", "a.npz")
    assert command("restore", run, *common, *options).exit_code == 0
    y, x = (torch.from_numpy(np.load("a.npz")[name]) for name in ("y", "x"))
    box = make_operator("mask", (1, 8, 8))
    want = restore(fl.load(run), y, box, method="latent", answers=2, seed=3, **fit)
    torch.testing.assert_close(x, want.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["reconstruct", "interpolate", "restore", "transfer", "sample"])
def test_help_shows_shapes_and_what_is_done_by_default(command: Any, name: str) -> None:
    text = " ".join(command(name, "--help").stdout.split())
    shapes = {
        "interpolate": "[frames, n, C, H, W]",
        "restore": "[n, answers, C, H, W]",
        "transfer": "[n, C, H, W]",
        "sample": "[n, C, H, W]",
    }
    assert shapes.get(name, "") in text
    fits = name in ("reconstruct", "interpolate", "restore")
    assert ("best one counts (default: 4; restore: 1)" in text) == fits


@pytest.mark.parametrize(
    "options",
    [
        ("--operator", "mask", "--mask", "half"),
        ("--operator", "mask", "--method", "clamped"),
        ("--operator", "mask", "--method", "latent", "--iterations", 2),
        ("--operator", "downsample", "--factor", 4),
        ("--operator", "blur", "--sigma", 0.6, "--method", "posterior", "--zeta", 2),
        ("--operator", "blur", "--measurement-noise", 0.1, "--samples", 40),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_restore_command(command: Any, run: Path, options: tuple[Any, ...]) -> None:
    options = (*options, "--n", 2, "--answers", 3)
    said = numbers(command("restore", run, *options, "--out", "a.npz"))
    found = {name: torch.from_numpy(array) for name, array in np.load("a.npz").items()}
    assert found["x"].shape == (2, 3, 1, 8, 8)
    off = (found["images"] - found["mean"]).square().mean()
    assert said["their mean"] == pytest.approx(float(off), abs=1e-5)
    squares = (found["images"][:, None] - found["x"]).square().mean((2, 3, 4))
    assert said["answers"] == pytest.approx(float(squares.mean()), abs=1e-5)
    assert said["best"] == pytest.approx(float(squares.amin(1).mean()), abs=1e-5)
    if "half" not in options:  # the picture of one will do
        return
    result = command("restore", run, *options, "--out", "a.png")
    assert result.exit_code == 0, result.output
    with Image.open("a.png") as shown:
        assert shown.size == (6 * 34 + 2, 2 * 34 + 2)


def test_transfer_command(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 3, "--style", run.parent / "style.npy")
    np.save(run.parent / "style.npy", np.zeros((2, 8, 8), np.uint8))
    said = numbers(command("transfer", run, *options, "--content", 2, "--out", "a.npy"))
    x0 = load_images("digits").batch([0, 599, 1198])
    x = torch.from_numpy(np.load("a.npy"))
    assert said["change"] == pytest.approx(float((x - x0).square().mean()), abs=1e-5)
    result = command("transfer", run, *options, "--steps", 5, "--out", "a.gif")
    assert result.exit_code == 0, result.output
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 6
        assert np.array_equal(np.asarray(gif.convert("RGB")), to_grid(x0))
    assert command("transfer", run, *options, "--out", "a.png").exit_code == 0
    assert np.array_equal(np.asarray(Image.open("a.png"))[:36], to_grid(x0, 3))


def test_transfer_command_warns_of_chains_that_left_the_images(command: Any, run: Path) -> None:
    options = ("--images", "digits", "--n", 3, "--style", "digits.npy", "--out", "a.npy")
    np.save("digits.npy", np.zeros((2, 8, 8), np.uint8))
    for weight in (1e-3, 1e4):
        result = command("transfer", run, *options, "--weight", weight, "--overwrite")
        assert result.exit_code == 0, result.output
        reached = np.abs(np.load("a.npy")).max()
        warned = f"warning: chains ended at up to {reached:.3g}, but images lie in [-1, 1]"
        assert (warned in result.stderr.splitlines()) == (weight > 1) == (reached > 3)


def test_interpolate_command_of_two_frames_prints_the_file_alone(command: Any, run: Path) -> None:
    done = command("interpolate", run, "--n", 2, "--frames", 2, "--out", "a.npy")
    assert (done.exit_code, done.stdout) == (0, "a.npy\n"), done.output


def test_sample_command_draws_chains_as_a_gif(command: Any, run: Path) -> None:
    assert command("sample", run, "--n", 4, "--steps", 120, "--out", "a.gif").exit_code == 0
    with Image.open("a.gif") as gif:
        assert 2 < gif.n_frames <= 51
        first = np.asarray(gif.convert("RGB"))
    assert np.array_equal(first, to_grid(start(4, 0, channels=1)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("reconstruct", "--n", 11), "n must be at most 10, the images of digits, those past"),
        (("reconstruct", "--out", "a.gif"), r"--out must end in .png or .npz, got a.gif"),
        (("reconstruct", "--checkpoint", "some", "--n", 1), "checkpoint"),
        (("interpolate", "--out", "a.npz"), "--out must end in .png, .gif or .npy, got a.npz"),
        (("restore", "--operator", "smear"), "operator must be one of mask, .*, got 'smear'"),
        (("restore", "--operator", "grey"), "several channels, got 1"),
        (
            ("restore", "--operator", "blur", "--factor", 2),
            "--factor belongs to another operator than blur",
        ),
        (("restore", "--operator", "blur", "--method", "clamped"), "must be a Mask, got Blur"),
        (("restore", "--iterations", 3), "--iterations belongs to --method latent"),
        (("restore", "--mask", "mask.npy"), r"must have the images' shape \[8, 8\]"),
        (
            ("restore", "--lr", 3, "--grad-through", "exact", "--method", "clamped"),
            "--grad-through, --lr belong to --method latent, got 'clamped'",
        ),
        (("restore", "--out", "folder.png"), "--out must be a file, got the folder folder.png"),
        (("interpolate", "--iterations", 3), "--iterations belongs to --images"),
        (
            ("interpolate", "--images", "digits", "--noise", "frozen"),
            "--noise belongs to random st",
        ),
        (("interpolate", "--images", "digits", "--n", 899), "at most 898, of 2 images each, .*899"),
        (("transfer", "--images", "digits", "--zeta", 1), "--zeta belongs to --content"),
        (
            ("transfer", "--images", "digits", "--content", 2, "--zeta", 0.01),
            "^error: transfer: zeta must be at least",
        ),
        (("transfer", "--images", "digits", "--weight", 2), "--weight belongs to --style"),
        (("transfer", "--images", "nowhere"), "'nowhere' is neither an existing path"),
        (("transfer", "--images", "digits", "--n", 2000), "at most 1797"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_commands_refuse(command: Any, run: Path, arguments: tuple[Any, ...], match: str) -> None:
    np.save("mask.npy", np.eye(5))
    Path("folder.png").mkdir()
    name, *options = arguments
    assert_refused(command(name, run, *options), match)


@pytest.mark.parametrize("name", ["reconstruct", "interpolate", "restore", "transfer"])
def test_runs_of_another_version(command: Any, run: Path, tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    tensors, info = read_checkpoint(other)
    save_checkpoint(
        checkpoint_path(other, 1), tensors, json.loads(json.dumps(info)) | {"version": 9}
    )
    options = ("--images", "digits") if name == "transfer" else ()
    assert_refused(command(name, other, *options), "of version 9; this fastlangevin reads")


def assert_refused(result: Any, match: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    # The chains may have been announced before.
    (line,) = (line for line in result.stderr.splitlines() if " steps on " not in line)
    assert line.startswith("error: ")
    assert re.search(match, line), line
