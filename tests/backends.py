"""The backends, devices and instruction sets that the tests can use here."""

import pytest
import torch

from fastlangevin.kernels import extension
from fastlangevin.step import backend_status

SERVING = [
    (name, device)
    for device in (torch.device("cpu"), torch.device("cuda", 0))
    if device.type == "cpu" or torch.cuda.is_available()
    for name, reason in backend_status(device).items()
    if reason is None
]


needs_native = pytest.mark.skipif(
    extension.library is None,
    reason=f"native kernels: {extension.available(torch.device('cpu'))}",
)


def instruction_sets() -> list[str]:
    """The extension's instruction sets that this processor supports."""
    if extension.library is None:
        return []
    best = extension.library.instruction_set()
    names = [n for n in ("baseline", "avx2", "avx512", "avx512_bf16", "amx") if choose(n)]
    choose(best)
    return names


def choose(name: str) -> bool:
    return extension.library.choose_instruction_set(name)
