"""Devices with an index: "cuda" alone means the current GPU, but equals none by comparison."""

import torch


def indexed(device: torch.device) -> torch.device:
    """The device; for "cuda" without an index the current GPU, if there is one."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
