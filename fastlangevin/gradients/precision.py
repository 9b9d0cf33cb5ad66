"""The precision of a network: "fp32", "tf32", "fp16", "bf16", or None for torch as it is set.

"fp16" and "bf16" run the forward pass under autocast. "fp32" and "tf32" set torch's switches for
float32 products, which allow TF32 on GPUs and bfloat16 and TF32 in oneDNN on CPUs.

Torch 2.9 replaced the old switches (``allow_tf32``, ``set_float32_matmul_precision``) by a tree of
``fp32_precision`` values: "generic" at the root, "cuda" and "mkldnn" below it, and "matmul",
"conv" and "rnn" below each of these. The value "none" stands for the value one level up. Once the
new switches have been used, reading the old ones raises an error. This module therefore uses the
new ones if torch has them, and no other module reads either kind.

The switches belong to the process: while a call with precision="fp32" or "tf32" evaluates its
network, other threads see them changed. They are changed only if they differ from what the call
needs. Calls that overlap in time share them: the call that began last decides, and the call that
ends last restores the values from before the first.
"""

import contextlib
from typing import Any

import torch

from fastlangevin.kernels import extension
from fastlangevin.locks import in_forked_child, new_rlock
from fastlangevin.names import did_you_mean

PRECISIONS = (None, "fp32", "tf32", "fp16", "bf16")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_OPS = ("matmul", "conv", "rnn")
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}

_lock = new_rlock()
_wanted: dict[str, list[str]] = {"cpu": [], "cuda": []}  # by the calls in progress, oldest first
_undo: dict[str, contextlib.ExitStack] = {}  # by device type, if switches have been changed


def check_precision(precision: str | None, device: torch.device | None = None) -> None:
    """Raise ValueError unless the precision exists and the device, if given, supports it."""
    if precision not in PRECISIONS:
        raise ValueError(
            f'precision must be None, "fp32", "tf32", "fp16" or "bf16", got {precision!r}'
            f"{did_you_mean(precision, [name for name in PRECISIONS if name])}"
        )
    if device is None or device.type != "cpu":
        return
    if precision == "fp16" or (precision == "tf32" and not extension.has_matrix_unit()):
        other = " or a CPU with AMX" if precision == "tf32" else ""
        raise ValueError(f'precision "{precision}" needs a CUDA device{other}; here use "bf16"')


def half_name(dtype: torch.dtype) -> str | None:
    """Return the precision of a 16-bit dtype, or None for another dtype."""
    return next((name for name, half in HALVES.items() if half == dtype), None)


def network_precision(
    precision: str | None, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Return the context for a network's forward and backward pass.

    None leaves torch as it is set. Any other precision turns autocast off; "fp32" and "tf32" also
    compute float32 products strictly or in TF32, on any device. On exit every switch, old and new,
    has its previous value. The context can be used again, but not nested.
    """
    return contextlib.nullcontext() if precision is None else _Precision(precision, device)


class _Precision:
    """See :func:`network_precision`."""

    def __init__(self, precision: str, device: torch.device) -> None:
        products = {"fp32": "ieee", "tf32": "tf32"}.get(precision)
        self._products = products if device.type in _wanted else None
        self._device_type = device.type
        self._no_autocast = torch.autocast(device.type, enabled=False)
        self._was_autocast = False

    def __enter__(self) -> None:
        if self._products is not None:
            _enter(self._products, self._device_type)
        self._was_autocast = torch.is_autocast_enabled(self._device_type)
        if self._was_autocast:
            self._no_autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._was_autocast:
            self._no_autocast.__exit__(*error)
        if self._products is not None:
            _leave(self._products, self._device_type)


def network_autocast(
    precision: str | None, device: torch.device, cache: bool = True
) -> contextlib.AbstractContextManager[None]:
    """Return the context for the forward pass alone: autocast in "fp16" or "bf16".

    The backward pass runs outside it, as autocast requires, in the dtypes of the forward pass. The
    context can be used again, but not nested. With ``cache``, autocast casts a weight once; the
    gradients of all its uses are then added in half precision.
    """
    if precision not in HALVES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=HALVES[precision], cache_enabled=cache)


def convolutions_use_tf32() -> bool:
    """Return whether torch computes float32 convolutions in TF32 on CUDA devices."""
    if _NEW:
        return bool(_get("cuda", "conv") == "tf32")
    return torch.backends.cudnn.allow_tf32


def switches() -> tuple[Any, ...]:
    """Return all switches that decide how torch computes float32 products on CUDA devices."""
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
        if wanted in calls:  # false in a child that was forked during the call
            calls.remove(wanted)
        if not calls:
            _restore(device_type)
        elif calls[-1] != wanted:
            _enter(calls.pop(), device_type)


def _restore(device_type: str) -> None:
    stack = _undo.pop(device_type, None)
    if stack is not None:
        stack.close()


def _holds(wanted: str, device_type: str) -> bool:
    """Return whether float32 products are already computed as wanted."""
    if not _NEW:
        matmul = torch.get_float32_matmul_precision() != "highest"
        if device_type == "cpu":
            return matmul == (wanted == "tf32")
        return (matmul, torch.backends.cudnn.allow_tf32) == (wanted == "tf32",) * 2
    backend = _BACKENDS[device_type]
    allowed = ("ieee", "none") if wanted == "ieee" else (wanted,)
    return all(_get(backend, op) in allowed for op in _OPS)


def _change(wanted: str, device_type: str) -> contextlib.ExitStack:
    """Set the new switches, and return a stack that restores them when it is closed.

    A switch that inherits its value reads the same as one that was set to that value, and cuDNN's
    switches start in a third state that no setter restores. So the backend's switch is set first,
    and below it only those switches that do not follow the change: they have a value of their own.
    """
    backend, stack = _BACKENDS[device_type], contextlib.ExitStack()
    before = _get(backend, "all") if _has_own_value(backend) else "none"
    stack.callback(_set, backend, "all", before)
    _set(backend, "all", wanted)
    for op in _OPS:
        value = _get(backend, op)
        if value != wanted:
            stack.callback(_set, backend, op, value)
            _set(backend, op, wanted)
    return stack


def _has_own_value(backend: str) -> bool:
    """Return whether a backend's switch has been set, so that it ignores the generic one."""
    generic, values = _get("generic", "all"), []
    for value in ("ieee", "tf32"):
        _set("generic", "all", value)
        values.append(_get(backend, "all"))
    _set("generic", "all", generic)
    return values != ["ieee", "tf32"]


def _change_old(wanted: str, device_type: str) -> contextlib.ExitStack:
    """Set the switches of torch before 2.9, and return a stack that restores them."""
    stack, tf32 = contextlib.ExitStack(), wanted == "tf32"
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if device_type == "cuda":
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = tf32
    return stack


# In torch 2.9 to 2.13, assigning torch.backends.mkldnn.fp32_precision sets the generic switch, so
# these call the functions behind the attributes.
def _get(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def _set(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


def _restore_in_child() -> None:
    """Restore the switches in a forked child, which lacks the threads that changed them."""
    for device_type, calls in _wanted.items():
        calls.clear()
        _restore(device_type)


in_forked_child(_restore_in_child)
