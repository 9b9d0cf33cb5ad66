"""Checks of a call's inputs before any work: the energy, the starting state and the noise."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin.noise as _noise
from fastlangevin.arguments import (
    check_chain_dimension,
    check_device,
    check_floating,
    check_shape,
    check_strided,
    check_tensor,
)
from fastlangevin.gradients.modules import module_of, tensors_of
from fastlangevin.kernels.memory import in_memory, is_dense
from fastlangevin.names import nearest

# The least similarity at which a name is taken for a mistake although the energy accepts it: "sede"
# and "seed" have 0.75.
_NEAR_ANY = 0.75


def check_energy(op: str, energy: Any) -> None:
    """TypeError unless the energy can be called with a state.

    A class, a function without arguments and a module without a forward method would otherwise
    fail at the first step only, with an unhelpful message.
    """
    if not callable(energy):
        hint = ""
        if isinstance(energy, Mapping):
            hint = "; a state_dict holds only weights: load it into a module and give the module"
        elif isinstance(energy, str | os.PathLike):
            hint = "; fastlangevin.load reads a sampler from a checkpoint"
        raise TypeError(f"{op}: energy must be callable, got {type(energy).__name__}{hint}")
    function = energy
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        kind = "the class" if function is energy else "a partial of the class"
        raise TypeError(
            f"{op}: energy must be an instance, got {kind} {function.__name__}; call it first"
        )
    if isinstance(energy, nn.Module) and _has_no_forward(energy):
        raise TypeError(
            f"{op}: energy must have a forward method, {type(energy).__name__} has none; use "
            "nn.Sequential or write a module that says in which order its parts are called"
        )
    call = energy.forward if isinstance(energy, nn.Module) else energy
    try:
        inspect.signature(call).bind_partial(None)
    except TypeError:
        name = getattr(energy, "__name__", type(energy).__name__)
        raise TypeError(
            f"{op}: energy must take the state x as its first argument, {name} takes none; if "
            "it is a function that makes an energy, give what it returns"
        ) from None
    except ValueError:  # some builtins have no signature
        pass


def check_model_kwargs(
    op: str,
    energy: Callable[..., Any],
    model_kwargs: Mapping[str, Any],
    options: Collection[str],
    settings: Collection[str],
) -> None:
    """TypeError if a keyword argument of a call is probably not meant for the energy.

    This is a name that the energy does not list in its signature, and that equals or resembles an
    option of calls or a setting of samplers. An energy that accepts any keyword would otherwise
    take it, and the sampler would ignore it.
    """
    if not model_kwargs:
        return
    accepted, takes_any = _keywords(energy, model_kwargs.keys())
    for name in model_kwargs.keys() - accepted:
        if name in settings:
            raise TypeError(
                f"{op}: {name} is a setting of the sampler and not an argument of its calls; give "
                f"it to {op}(energy, {name}=...)"
            )
        near = nearest(name, {*options, *settings, *accepted}, _NEAR_ANY if takes_any else 0.6)
        if near is not None:
            hint = " If it is the energy's, name it in the energy's signature." * takes_any
            raise TypeError(
                f"{op}: no argument of a call or of the energy is called {name}; did you mean "
                f"{near}?{hint}"
            )


def _keywords(energy: Callable[..., Any], wanted: Set[str]) -> tuple[set[str], bool]:
    """Return the names that an energy accepts as keywords besides x, and whether any other too.

    What an energy with ``**kwargs`` passes them on to is not known: it accepts the names that one
    of its submodules, attributes or closed-over functions accepts.
    The search ends as soon as all ``wanted`` names are accepted.
    """
    names: set[str] = set()
    takes_any, waiting, visited = False, [energy], set()
    while waiting and not wanted <= names:
        function = waiting.pop()
        if id(function) in visited:
            continue
        visited.add(id(function))
        call = function.forward if isinstance(function, nn.Module) else function
        if (schema := getattr(call, "schema", None)) is not None:  # of TorchScript
            names |= {argument.name for argument in schema.arguments[2:]}
            continue
        try:
            parameters = list(inspect.signature(call).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            takes_any = True
            continue
        names |= {
            p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            takes_any = True
            waiting += _callables_in(function)
    return names, takes_any


def _callables_in(function: Any) -> Iterator[Callable[..., Any]]:
    """Yield the functions and modules that a function or object can reach directly."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    parts = [owner, *getattr(function, "__dict__", {}).values()]
    if isinstance(function, nn.Module):
        parts += function.children()
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it is empty
            parts.append(cell.cell_contents)
    yield from (part for part in parts if callable(part) and not isinstance(part, type))


def check_tensors(op: str, energy: Callable[..., Any], device: torch.device) -> None:
    """ValueError unless the energy's tensors have values and some of them are on ``device``."""
    tensors = tensors_of(energy)
    for tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{op}: the energy's {_name_of(tensor, energy)} has no shape yet because its "
                "module is lazy; call energy(x0) once before you make optimizers and samplers"
            )
        if tensor.is_meta and device.type != "meta":
            raise ValueError(
                f"{op}: the energy's {_name_of(tensor, energy)} is on the meta device, which holds "
                "no values; load weights by load_state_dict(..., assign=True), or after "
                "to_empty(device=)"
            )
    if tensors and all(tensor.device != device for tensor in tensors):
        owner = tensors[0].device
        raise ValueError(f"{op}: x0 is on {device}, the energy on {owner}; move one of them")


def choose_seed(op: str, seed: int | None, generator: torch.Generator | None) -> int:
    """``seed``, or without one a seed drawn from the generator, by default torch's."""
    if seed is not None and generator is not None:
        raise ValueError(f"{op}: give seed or generator, not both")
    return _noise.draw_seed(generator) if seed is None else _noise.check_seed(seed)


def read_state(op: str, x0: Any, energy: Callable[..., Any]) -> tuple[Tensor, bool]:
    """The detached state x0 [n, ...], in float64 for a float64 x0 and in float32 otherwise.

    Also returns whether it is a copy. It is x0's own memory if that has the dtype and layout of a
    copy. Raises TypeError or ValueError if x0 is not a state, or is on another device than the
    energy.
    """
    if isinstance(x0, int):
        hint = f"; n={x0} starts that many chains from U(-1, 1)"
    else:
        hint = "; torch.as_tensor(numpy.asarray(x0)) converts arrays, numbers and pictures"
    check_tensor(op, "x0", x0, hint)
    check_strided(op, "x0", x0)
    scale = "" if x0.is_complex() else "; give x0.float(), scaled as the energy expects"
    check_floating(op, "x0", x0, scale)
    check_chain_dimension(op, "x0", x0)
    check_tensors(op, energy, x0.device)
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    as_it_is = (
        x0.dtype == dtype
        and type(x0) in (Tensor, nn.Parameter)
        and in_memory(x0)
        and not x0.is_inference()
        and is_dense(x0)
    )
    return (x0.detach() if as_it_is else x0.detach().to(dtype, copy=True)), not as_it_is


def check_noise(op: str, noise: Any, shape: Sequence[int], device: torch.device) -> None:
    """TypeError or ValueError unless noise is None or normals [steps, *x0.shape] on x0's device."""
    if noise is None:
        return
    check_tensor(op, "noise", noise)
    check_strided(op, "noise", noise)
    check_floating(op, "noise", noise)
    check_shape(op, "noise", noise, shape, "shape [steps, *x0.shape] =")
    check_device(op, "noise", noise, device, "x0")


def _name_of(tensor: Tensor, energy: Callable[..., Any]) -> str:
    """The name of a parameter or buffer of the energy's module."""
    module = module_of(energy)
    assert module is not None
    named = (*module.named_parameters(), *module.named_buffers())
    return next(name for name, candidate in named if candidate is tensor)


def _has_no_forward(module: nn.Module) -> bool:
    """Whether a module inherits the forward that raises, as containers such as ModuleList do."""
    kind = type(module)
    return (
        kind.__call__ is nn.Module.__call__
        and getattr(kind, "forward", None) is nn.Module.forward
        and "forward" not in module.__dict__
    )
