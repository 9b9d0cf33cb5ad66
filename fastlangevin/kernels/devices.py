"""Devices by index: "cuda" alone stands for the current GPU, and equals none of them."""

import torch


def indexed(device: torch.device) -> torch.device:
    """The device, and for "cuda" without an index the current one, where there is a GPU."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
