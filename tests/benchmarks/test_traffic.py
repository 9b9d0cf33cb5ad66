"""The predicted bytes of the fused engine's launches."""

import pytest
import torch
from torch import nn


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


def test_a_profile_is_read_launch_by_launch(load):
    traffic = load("traffic")
    metrics = {
        "dram__bytes.sum": ("byte", "4,352"),
        "gpu__time_duration.sum": ("us", "7.5"),
        "lts__t_bytes.sum": ("byte", "1,177,920"),
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "17.79"),
    }
    lines = ["==PROF== Connected to process 2179"]
    lines.append('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
    for number, kernel in enumerate(("void at::fill(int, T)", "forward_kernel", "image_kernel")):
        for name, (unit, value) in metrics.items():
            lines.append(f'"{number}","{kernel}","{name}","{unit}","{value}"')
    text = "\n".join(lines)
    rows = traffic.profiled(text, {"forward 0": 10, "image": 20})
    assert [(row["launch"], row["predicted_bytes"]) for row in rows] == [
        ("forward 0", 10),
        ("image", 20),
    ]
    assert rows[1]["bytes"] == 1177920
    assert rows[1]["seconds"] == pytest.approx(7.5e-6)
    assert rows[1]["tensor_percent"] == 17.79
    with pytest.raises(ValueError, match="has 2 launches, expected 3"):
        traffic.profiled(text, {"forward 0": 10, "forward 1": 10, "image": 20})
