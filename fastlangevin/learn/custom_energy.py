"""Energies of the user's own code, named as module:attribute."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlangevin.learn.user_code import find_attribute
from fastlangevin.reprs import short
from fastlangevin.sampler import LangevinSampler


def open_energy(target: str, shape: Sequence[int], seed: int = 0) -> nn.Module:
    """Return the energy that :func:`import_energy` finds, tried on two states of ``shape``.

    The energy has the attribute ``shape`` afterwards. The weights that a class or a function makes
    depend on ``seed``; an instance keeps its own. torch's own random numbers do not advance. Raises
    as :func:`import_energy` does, and ValueError if the energy does not fit the states or has no
    weights to learn.
    """
    sizes = ", ".join(map(str, shape))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        value = find_attribute("energy", target)
        torch.manual_seed(seed)  # how much the import drew depends on what was imported before
        energy = _make(target, value)
        own: Any = getattr(energy, "shape", None)
        if own is None:
            energy.shape = tuple(shape)  # type: ignore[assignment]
        elif not isinstance(own, Sequence) or tuple(own) != tuple(shape):
            raise ValueError(
                f"energy {target!r} must take the data's images of shape [{sizes}], but "
                f"its attribute shape is {list(own) if isinstance(own, Sequence) else short(own)}"
            )
        try:
            _try(energy, tuple(shape))
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"energy {target!r} must take images [n, {sizes}] and return energies [n], but on "
                f"two images it raised {type(error).__name__}: {error}"
            ) from error
    if not any(parameter.requires_grad for parameter in energy.parameters()):
        raise ValueError(f"energy {target!r} has no parameter that requires grad, so none to learn")
    return energy


def _try(energy: nn.Module, shape: tuple[int, ...]) -> None:
    """Run one step of two chains; give lazy modules their shapes first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # learning itself warns of train mode
        if any(nn.parameter.is_lazy(parameter) for parameter in energy.parameters()):
            modes = [(module, module.training) for module in energy.modules()]
            with torch.no_grad():  # eval mode changes no statistics
                energy.eval()(torch.zeros((2, *shape), dtype=torch.float32, device="cpu"))
            for module, mode in modes:
                module.training = mode
        LangevinSampler(energy, steps=1, gradient="autograd")(n=2, shape=shape, seed=0)


def import_energy(target: str) -> nn.Module:
    """Return a new nn.Module from module:attribute, whose module is imported as Python would.

    The attribute is a class of an nn.Module or a function that returns one, which is called without
    arguments, or a module, which is copied. Raises ValueError as :func:`find_attribute` does and
    for a call that fails, and TypeError for anything but an nn.Module.
    """
    return _make(target, find_attribute("energy", target))


def _make(target: str, value: Any) -> nn.Module:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if callable(value):
        try:
            value = value()
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"energy {target!r} is called without arguments, and raised "
                f"{type(error).__name__}: {error}; a function without arguments can give others to "
                "your class"
            ) from error
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"energy {target!r} must be an nn.Module, its class, or a function that returns one, "
            f"got {type(value).__name__}"
        )
    return value
