"""What torchrun tells a process of a sweep, in environment variables."""

import os

import torch


def read_number(variable: str, default: int) -> int:
    """Return an environment variable as a whole number; ValueError if it is not one."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a whole number, got {text!r}")
    return int(text)


def own_device(device: str) -> str | None:
    """Return the GPU of a process of torchrun; None if there is none or the user named a device."""
    if "LOCAL_RANK" not in os.environ or device != "auto" or not torch.cuda.is_available():
        return None
    return f"cuda:{read_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
