"""Choose the extension's instruction set and the number of threads for one case."""

import contextlib
from collections.abc import Iterator

import torch

from fastlangevin.kernels import extension

_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def instruction_sets() -> list[str]:
    """The instruction sets of the extension that this processor runs, slowest first."""
    if extension.library is None:
        return []
    best = extension.library.instruction_set()
    names = [name for name in _NAMES if extension.library.choose_instruction_set(name)]
    extension.library.choose_instruction_set(best)
    return names


@contextlib.contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Run the extension with an instruction set; None keeps its own choice."""
    if name is None:
        yield
        return
    best = extension.library.instruction_set()
    if not extension.library.choose_instruction_set(name):
        raise ValueError(f"fuzz: this processor does not run the instruction set {name!r}")
    try:
        yield
    finally:
        extension.library.choose_instruction_set(best)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
