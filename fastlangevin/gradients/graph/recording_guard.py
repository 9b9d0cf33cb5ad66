"""Tells whether a recording still holds: whether recording again would give the same operators."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as _module

from fastlangevin.gradients.graph.snapshot import Snapshot
from fastlangevin.kernels.memory import in_memory

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
_SIMPLE = (int, float, bool, str, type(None), torch.dtype)


class Numbers(Protocol):
    """Python numbers that a run read from tensors."""

    def hold(self, model_kwargs: dict[str, Any]) -> bool:
        """Return whether a run with these arguments would read the same numbers."""


class Guard:
    """What a recording depended on, apart from the values of tensors.

    These are the energy, the layout of the states and of the keyword arguments, torch's defaults,
    and the state of all modules, objects and functions that the run could reach.
    """

    def __init__(
        self,
        energy: Callable[..., Any],
        x: Tensor,
        model_kwargs: dict[str, Any],
        snapshot: Snapshot,
        leaves: dict[int, Tensor],
        numbers: Numbers | None = None,
    ) -> None:
        self.energy, self.snapshot, self.numbers = energy, snapshot, numbers
        self._call = _described(x, model_kwargs)
        self._forwards = [(module, type(module).forward) for module in snapshot.modules]
        passed = {id(value) for value in model_kwargs.values()}
        self._layouts = [(t, _layout(t)) for t in leaves.values() if id(t) not in passed]
        self._hooks = _hooks(snapshot.modules)

    def holds(self, energy: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]) -> bool:
        """Return whether a call with these arguments would run the recorded operators.

        Raises RuntimeError if the memory of a weight was freed.
        """
        return (
            energy == self.energy
            and self._call == _described(x, model_kwargs)
            and all(type(module).forward is forward for module, forward in self._forwards)
            and all(in_memory(t) and _layout(t) == layout for t, layout in self._layouts)
            and self._hooks == _hooks(module for module, _ in self._forwards)
            and self.snapshot.changed() is None
            and (self.numbers is None or self.numbers.hold(model_kwargs))
        )


def may_be_kept(
    snapshot: Snapshot, model_kwargs: dict[str, Any], leaves: dict[int, Tensor]
) -> bool:
    """Return whether a :class:`Guard` would notice everything that could change a recording."""
    passed = [value for value in model_kwargs.values() if isinstance(value, Tensor)]
    ids = {id(value) for value in passed}
    return (
        snapshot.is_complete
        and len(ids) == len(passed)
        and ids.isdisjoint(snapshot.tensors)
        and all(isinstance(value, (Tensor, *_SIMPLE)) for value in model_kwargs.values())
        and all(
            id(leaf) in ids or id(leaf) in snapshot.tensors or _is_number(leaf)
            for leaf in leaves.values()
        )
        # functional_call passes such tensors, for a single call.
        and all(leaf.grad_fn is None for leaf in leaves.values())
    )


def global_hooks() -> bool:
    """Return whether hooks are set for all modules of the process."""
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


def _described(x: Tensor, model_kwargs: dict[str, Any]) -> tuple[Any, ...]:
    if not all(isinstance(value, (Tensor, *_SIMPLE)) for value in model_kwargs.values()):
        return (object(),)  # equal to no other call
    kwargs = [  # in order, since the energy may follow it
        (name, _layout(value) if isinstance(value, Tensor) else (type(value), repr(value)))
        for name, value in model_kwargs.items()
    ]
    defaults = torch.get_default_dtype(), torch.get_default_device(), torch.backends.mkldnn.enabled
    # The run differentiates with respect to the states, whether a caller does or not.
    return (_layout(x.detach()), kwargs, *defaults)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return *layout, tensor.requires_grad


def _hooks(modules: Any) -> list[tuple[int, ...]]:
    """Return the ids of all hooks, of single modules and of all modules."""
    found = [tuple(map(id, getattr(_module, name).values())) for name in _GLOBAL_HOOKS]
    return found + [
        tuple(map(id, hooks.values()))
        for module in modules
        for name in HOOKS
        if (hooks := module.__dict__.get(name))
    ]


def _is_number(tensor: Tensor) -> bool:
    """Return whether an unknown tensor may be a Python number that torch has made a tensor of."""
    return not tensor.ndim and tensor.device.type == "cpu"
