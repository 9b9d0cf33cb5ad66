"""Devices by name: which exist here, and the index that "cuda" alone does not have."""

import torch


def check_device_exists(op: str, device: torch.device | str | None) -> None:
    """ValueError for a CUDA device if torch sees none."""
    if device is None or torch.device(device).type != "cuda" or torch.cuda.is_available():
        return
    raise ValueError(f"{op}: device {str(device)!r} was asked for, but torch sees no CUDA device")


def indexed(device: torch.device) -> torch.device:
    """The device; for "cuda" without an index, which equals no tensor's device, the current GPU.

    Without a GPU, the device stays as it is.
    """
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
