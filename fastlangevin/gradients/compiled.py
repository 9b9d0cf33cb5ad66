"""The compiled score: the energy and its input gradient as one graph, through torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.gradients.autograd import (
    call_network,
    check_energies,
    left_as_found,
    modules_of,
    network_autocast,
    network_precision,
)


def refusal(energy: Callable[..., Tensor], model_kwargs: dict[str, Any]) -> str | None:
    """None where an energy may be compiled, else why not."""
    if model_kwargs:
        return f"the energy is given {', '.join(model_kwargs)}"
    for root in modules_of(energy):
        for module in root.modules():
            if module.training and (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            ):
                return f"{type(module).__name__} is in train mode: it changes or draws as it runs"
    return None


class CompiledScore:
    """Energies and d energy / d x by torch.compile, for energies that it takes.

    The first call on a shape compiles, which takes from seconds to minutes; the weights are read
    where they lie. Energies of the wrong form raise as with the general score.
    """

    def __init__(self, energy: Callable[..., Tensor], precision: str | None) -> None:
        self.energy, self.precision = energy, precision

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            with network_autocast(precision, x.device):
                out = call_network(energy, x, {})
            return out.sum(), out

        self._run = torch.compile(torch.func.grad(total, has_aux=True), dynamic=False)
        self._checked: tuple[torch.Size, torch.dtype] | None = None

    def begin(self) -> None:
        pass

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        with left_as_found(self.energy, x.device), network_precision(self.precision, x.device):
            if self._checked != (x.shape, x.dtype):
                leaf = x.detach().requires_grad_()
                with torch.enable_grad(), network_autocast(self.precision, x.device):
                    out = call_network(self.energy, leaf, {})
                check_energies(out, x.shape)
                self._checked = x.shape, x.dtype
            grad, out = self._run(x)
        return (out.detach().reshape(x.shape[0]) if want_energies else None), grad

    def held_bytes(self) -> None:
        return None
