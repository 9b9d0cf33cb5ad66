"""The predicted bytes of the fused engine's launches."""

import json

import pytest
import torch
from torch import nn

from tests.benchmarks.shared import ROOT


def test_the_bytes_of_a_launch_are_those_of_its_tiles(load):
    """64 to 128 channels by 4x4 taps at stride 2, in 128 tiles of 128 pixels by all columns."""
    traffic = load("traffic")
    launches = traffic.predicted(64, 64, "fp16")["launches"]
    assert list(launches) == [
        *(f"forward {i}" for i in range(4)),
        *(f"backward {i}" for i in (3, 2, 1)),
        "image",
    ]
    pixels = 64 * (16 * 4 - 2) ** 2 * 64 * 2  # the first and the last tap miss the padded ends
    weights = 128 * 128 * (16 * 64) * 2
    written = 64 * 16 * 16 * 128 * 2
    assert launches["forward 1"] == pixels + weights + written


def test_pairs_of_taps_and_pixels_are_those_of_a_convolution_of_ones(load):
    traffic = load("traffic")
    for layer, size in (
        (nn.Conv2d(1, 1, 4, 2, 1), (32, 32)),
        (nn.Conv2d(1, 1, (3, 2), (1, 2), (0, 1)), (9, 7)),
        (nn.Conv2d(1, 1, 2, 1, 2, dilation=(1, 2)), (5, 4)),
    ):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        counts = layer(torch.ones(1, 1, *size))
        assert traffic.pairs(layer, (1, *size), tuple(counts.shape[1:])) == int(counts.sum())


def test_the_file_of_predictions_is_the_plans(load):
    path = ROOT / "benchmarks" / "results" / "fused-predicted.json"
    for row in json.loads(path.read_text())["results"]:
        if row["batch"] == 64:
            assert load("traffic").predicted(row["width"], 64, row["precision"]) == row


def test_the_profilers_launches_stand_beside_the_prediction(load):
    profile = load("profile")
    metrics = ("gpu__time_duration.sum", "lts__t_bytes.sum")
    lines = ["==PROF== a line of ncu's own", '"ID","Kernel Name","Metric Name","Metric Value"']
    for number, kernel in enumerate(("fill", "forward_kernel", "image_kernel")):
        lines += [f'"{number}","{kernel}","{m}","{10 + number},000"' for m in metrics]
    rows = profile.launches("\n".join(lines), {"forward 0": 9000, "image": 8000})
    assert rows == [
        {"launch": "forward 0", "ns": 11000, "l2_bytes": 11000, "predicted_l2_bytes": 9000},
        {"launch": "image", "ns": 12000, "l2_bytes": 12000, "predicted_l2_bytes": 8000},
    ]
    with pytest.raises(ValueError, match="expected 1 launches"):
        profile.launches("\n".join(lines), {"forward 0": 9000})
