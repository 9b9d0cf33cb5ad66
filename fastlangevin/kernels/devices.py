"""Devices: which exist here, their names, and the index that "cuda" alone does not have."""

import platform
from pathlib import Path

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


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or, as far as the system tells it, of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
