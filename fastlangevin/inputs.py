"""What a call is given, checked before any work: the energy, the starting state, the noise."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.arguments import check_strided
from fastlangevin.gradients.network import modules_of

_ARRAYS = "; torch.as_tensor(numpy.asarray(x0)) makes one of arrays, numbers and pictures"


def check_energy(op: str, energy: Any) -> None:
    """TypeError unless the energy is something that can be called with a state.

    A class, a function without arguments and a module without a forward would fail at the first
    step only, in words of theirs.
    """
    if not callable(energy):
        hint = ""
        if isinstance(energy, Mapping):
            hint = "; a state_dict holds weights alone: load it into a module, and give that"
        elif isinstance(energy, str | os.PathLike):
            hint = "; fastlangevin.load reads a checkpoint's sampler"
        raise TypeError(f"{op}: energy must be callable, got {type(energy).__name__}{hint}")
    made = energy
    while isinstance(made, functools.partial):
        made = made.func
    if isinstance(made, type):
        kind = "the class" if made is energy else "a partial of the class"
        raise TypeError(
            f"{op}: energy must be an instance, got {kind} {made.__name__}; call it first"
        )
    if isinstance(energy, nn.Module) and _has_no_forward(energy):
        raise TypeError(
            f"{op}: energy must have a forward method, {type(energy).__name__} has none; "
            "nn.Sequential or a module of your own says in which order its parts are called"
        )
    call = energy.forward if isinstance(energy, nn.Module) else energy
    try:
        inspect.signature(call).bind_partial(None)
    except TypeError:
        name = getattr(energy, "__name__", type(energy).__name__)
        raise TypeError(
            f"{op}: energy must take the state x as its first argument, {name} takes none; of a "
            "function that makes an energy give what it returns"
        ) from None
    except ValueError:  # it does not tell
        pass


def check_tensors(op: str, energy: Callable[..., Any], device: torch.device) -> None:
    """ValueError unless the energy's tensors have values, and x0's device is one of theirs."""
    devices = []
    for module in modules_of(energy):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"{op}: the energy's {name} has no shape yet, as it is a lazy module's; call "
                    "energy(x0) once, before optimizers and samplers are made"
                )
            if tensor.is_meta and device.type != "meta":
                raise ValueError(
                    f"{op}: the energy's {name} is on the meta device, which holds no values; "
                    "load weights by load_state_dict(..., assign=True), or after to_empty(device=)"
                )
            devices.append(tensor.device)
    if devices and device not in devices:
        raise ValueError(f"{op}: x0 is on {device}, the energy on {devices[0]}; move one of them")


def copy_state(op: str, x0: Any, energy: Callable[..., Any]) -> Tensor:
    """x0 [n, ...] as a state to walk on, a copy in float32 or float64.

    TypeError or ValueError for an x0 that is none, or that the energy cannot be given.
    """
    if not isinstance(x0, Tensor):
        hint = _ARRAYS
        if isinstance(x0, int):
            hint = f"; n={x0} starts that many chains from U(-1, 1)"
        raise TypeError(f"{op}: x0 must be a tensor, got {type(x0).__name__}{hint}")
    check_dense(op, "x0", x0)
    if x0.ndim == 0:
        raise ValueError(f"{op}: x0 must have a leading chain dimension, got shape []")
    check_tensors(op, energy, x0.device)
    state = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return x0.detach().to(state, copy=True)


def check_dense(op: str, name: str, value: Tensor) -> None:
    """TypeError unless a tensor is dense and of floating dtype."""
    if value.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got a nested one; chains of one shape are "
            f"torch.stack({name}.unbind())"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got {value.layout}; give {name}.to_dense()"
        )
    if not value.is_floating_point():
        hint = "" if value.is_complex() else f"; give {name}.float(), scaled as the energy expects"
        raise TypeError(f"{op}: {name} must be of floating dtype, got {value.dtype}{hint}")


def check_noise(op: str, noise: Any, shape: Sequence[int], device: torch.device) -> None:
    """TypeError or ValueError unless noise is None or normals [steps, *x0.shape] on x0's device."""
    if noise is None:
        return
    if not isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a tensor, got {type(noise).__name__}")
    check_strided(op, "noise", noise)
    if not noise.is_floating_point():
        raise TypeError(f"{op}: noise must be of floating dtype, got {noise.dtype}")
    if noise.shape != tuple(shape):
        raise ValueError(
            f"{op}: noise must have shape [steps, *x0.shape] = {list(shape)}, "
            f"got {list(noise.shape)}"
        )
    if noise.device != device:
        raise ValueError(f"{op}: noise must be on x0's device {device}, got {noise.device}")


def _has_no_forward(module: nn.Module) -> bool:
    """Containers such as ModuleList, whose forward is the one that raises."""
    kind = type(module)
    return (
        kind.__call__ is nn.Module.__call__
        and getattr(kind, "forward", None) is nn.Module.forward
        and "forward" not in module.__dict__
    )
