"""Torch's switches for float32 products: TF32 on GPUs, bfloat16 and TF32 in oneDNN on CPUs.

Torch 2.9 replaced the old switches (``allow_tf32``, ``set_float32_matmul_precision``) by a tree of
``fp32_precision`` values: "generic" above "cuda" and "mkldnn", and those above "matmul", "conv" and
"rnn". "none" takes the value above. Once the new switches are used, reading the old ones raises an
error, so this module uses the new ones wherever torch has them, and nothing else reads either.

The switches belong to the process: while a call with precision="fp32" or "tf32" evaluates its
network, other threads see them changed. They are changed only where they differ from what the call
needs. Calls that overlap in time share them: the last one to begin decides, and the last one to end
puts back what was there before the first.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fastlangevin.locks import in_forked_child, new_rlock

_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_OPS = ("matmul", "conv", "rnn")
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}

_lock = new_rlock()
_wanted: dict[str, list[str]] = {"cpu": [], "cuda": []}  # of the calls in progress, oldest first
_undo: dict[str, contextlib.ExitStack] = {}  # by device type, where switches have been changed


@contextlib.contextmanager
def float32_products(wanted: str, device_type: str) -> Iterator[None]:
    """Compute float32 products on a device as "ieee" (strict float32) or as "tf32".

    Afterwards every switch of torch's, old and new, is as it was. Devices other than CPU and CUDA
    have no switches.
    """
    if device_type not in _wanted:
        yield
        return
    _enter(wanted, device_type)
    try:
        yield
    finally:
        _leave(wanted, device_type)


def convolutions_use_tf32() -> bool:
    """Whether torch computes float32 convolutions in TF32 on CUDA devices."""
    if _NEW:
        return bool(_get("cuda", "conv") == "tf32")
    return torch.backends.cudnn.allow_tf32


def switches() -> tuple[Any, ...]:
    """All switches by which torch chooses how to compute float32 products on CUDA devices."""
    if _NEW:
        return tuple(_get("cuda", op) for op in _OPS)
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def _enter(wanted: str, device_type: str) -> None:
    with _lock:
        calls = _wanted[device_type]
        if not calls or calls[-1] != wanted:
            _restore(device_type)
            if not _holds(wanted, device_type):
                _undo[device_type] = (_change if _NEW else _change_old)(wanted, device_type)
        calls.append(wanted)


def _leave(wanted: str, device_type: str) -> None:
    with _lock:
        calls = _wanted[device_type]
        if wanted in calls:  # not in a child forked meanwhile
            calls.remove(wanted)
        if not calls:
            _restore(device_type)
        elif calls[-1] != wanted:
            _enter(calls.pop(), device_type)


def _restore(device_type: str) -> None:
    _undo.pop(device_type, contextlib.ExitStack()).close()


def _holds(wanted: str, device_type: str) -> bool:
    """Whether float32 products are computed as wanted without any change."""
    if not _NEW:
        matmul = torch.get_float32_matmul_precision() != "highest"
        if device_type == "cpu":
            return matmul == (wanted == "tf32")
        return (matmul, torch.backends.cudnn.allow_tf32) == (wanted == "tf32",) * 2
    backend = _BACKENDS[device_type]
    allowed = ("ieee", "none") if wanted == "ieee" else (wanted,)
    return all(_get(backend, op) in allowed for op in _OPS)


def _change(wanted: str, device_type: str) -> contextlib.ExitStack:
    """Set the new switches; the stack, once closed, puts them back.

    A switch that takes the value above it cannot be told by its value from one that has been set to
    the same, and cuDNN's begin in a third state that no setter restores. So only those are set that
    have a value of their own: it alone does not follow when the one above is changed.
    """
    backend, stack = _BACKENDS[device_type], contextlib.ExitStack()
    own = _get(backend, "all") if _has_own_value(backend) else "none"
    stack.callback(_set, backend, "all", own)
    _set(backend, "all", wanted)
    for op in _OPS:
        value = _get(backend, op)
        if value != wanted:
            stack.callback(_set, backend, op, value)
            _set(backend, op, wanted)
    return stack


def _has_own_value(backend: str) -> bool:
    """Whether a backend's switch has been set, rather than taking the generic one's value."""
    generic, found = _get("generic", "all"), []
    for value in ("ieee", "tf32"):
        _set("generic", "all", value)
        found.append(_get(backend, "all"))
    _set("generic", "all", generic)
    return found != ["ieee", "tf32"]


def _change_old(wanted: str, device_type: str) -> contextlib.ExitStack:
    """Set the switches of torch before 2.9; the stack, once closed, puts them back."""
    stack, tf32 = contextlib.ExitStack(), wanted == "tf32"
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if device_type == "cuda":
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = tf32
    return stack


# torch.backends.mkldnn.fp32_precision = ... sets the generic switch (torch 2.9 to 2.13), so the
# functions behind these attributes are called instead.
def _get(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def _set(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


def _restore_in_child() -> None:
    """The threads whose calls had changed the switches do not exist in a forked child."""
    for device_type, calls in _wanted.items():
        calls.clear()
        _restore(device_type)


in_forked_child(_restore_in_child)
