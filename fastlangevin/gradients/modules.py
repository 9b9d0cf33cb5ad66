"""The network behind an energy or a score: its module, its device, and the dtype that it takes."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.gradients.packing import PackedEnergy


class Network:
    """Calls an energy or a score network with x in a dtype that the network takes.

    The first choice is x's own dtype, as in a plain loop. If the network raises a RuntimeError for
    it and all its floating parameters and buffers have one other dtype, this call and all later
    ones pass x in that dtype. If the network has several dtypes, the RuntimeError says what can be
    done.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.dtype: torch.dtype | None = None  # set if the network rejects the state's dtype

    def __call__(self, x: Tensor, **model_kwargs: Any) -> Any:
        if self.dtype is not None:
            return self.call(x.to(self.dtype), **model_kwargs)
        try:
            return self.call(x, **model_kwargs)
        except RuntimeError as error:
            dtype = network_dtype(self.call, x.dtype)
            if dtype == x.dtype:
                raise _hinted(error, _dtypes_of(self.call), x.dtype) from error
        out = self.call(x.to(dtype), **model_kwargs)
        self.dtype = dtype
        return out


def call_network(network: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Return network(x, **model_kwargs), called as :class:`Network` does."""
    network = network if isinstance(network, Network) else Network(network)
    return network(x, **model_kwargs)


def _hinted(
    error: RuntimeError, dtypes: set[torch.dtype], state_dtype: torch.dtype
) -> RuntimeError:
    """Return the error, with advice if it is torch's error for operands of different dtypes."""
    if not dtypes - {state_dtype} or not re.search(r"dtype|type .*(same|but)", str(error)):
        return error
    names = [str(dtype).removeprefix("torch.") for dtype in (state_dtype, *sorted(dtypes, key=str))]
    return RuntimeError(
        f"{error}. The network is given x in the state's dtype, {names[0]}, and has tensors of "
        f'{", ".join(names[1:])}: cast x inside the network, or use precision="bf16"'
    )


def network_dtype(network: Callable[..., Any], state_dtype: torch.dtype) -> torch.dtype:
    """Return the one dtype of a network's floating parameters and buffers.

    Returns ``state_dtype`` if they have several dtypes or there are none.
    """
    dtypes = _dtypes_of(network)
    return dtypes.pop() if len(dtypes) == 1 else state_dtype


def _dtypes_of(network: Callable[..., Any]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of(network) if tensor.is_floating_point()}


def module_of(energy: Callable[..., Tensor]) -> nn.Module | None:
    """Return the module behind an energy, or None if there is none.

    The energy may be the module, a method bound to it, or a partial or a packing of either.
    """
    # Checked first because getattr on an nn.Module is slow for missing names.
    if isinstance(energy, nn.Module):
        return energy
    while isinstance(energy, functools.partial | PackedEnergy):
        energy = energy.func
    owner = getattr(energy, "__self__", energy)
    return owner if isinstance(owner, nn.Module) else None


def submodules_of(energy: Callable[..., Tensor]) -> list[nn.Module]:
    """Return all modules of an energy in the order of ``nn.Module.modules``, each once.

    Faster than ``nn.Module.modules``, which also builds names: each sampler call runs this several
    times.
    """
    modules: dict[int, nn.Module] = {}
    stack = [module_of(energy)]
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in modules:
            modules[id(module)] = module
            stack += list(module._modules.values())[::-1]
    return list(modules.values())


def parameters_of(energy: Callable[..., Tensor]) -> list[Tensor]:
    """Return the parameters of the module behind an energy, each once."""
    module = module_of(energy)
    return [] if module is None else list(module.parameters())


def tensors_of(energy: Callable[..., Tensor]) -> list[Tensor]:
    """Return the parameters of an energy's modules, then their buffers; shared ones repeatedly."""
    modules = submodules_of(energy)
    tensors = [t for module in modules for t in module._parameters.values() if t is not None]
    return tensors + [t for module in modules for t in module._buffers.values() if t is not None]


def device_of(energy: Callable[..., Tensor]) -> torch.device | None:
    """Return the device of the energy's first parameter or buffer, or None if it has none."""
    tensors = tensors_of(energy)
    return tensors[0].device if tensors else None
