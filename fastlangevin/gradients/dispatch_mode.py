"""The base of the package's dispatch modes."""

import importlib

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import torch's compiler, which takes seconds.

    Otherwise torch wraps ``__torch_dispatch__`` in a function that does so when it first runs.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def prepare(cls) -> None:
        """Import the compiler now if this version of torch wraps the method all the same."""
        if hasattr(cls.__torch_dispatch__, "__wrapped__"):
            importlib.import_module("torch._dynamo")
