"""Energies and d energy / d x of a batch of chains by autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.gradients.network import call_network
from fastlangevin.gradients.precision import network_autocast, network_precision


def energy_and_grad(
    energy: Callable[..., Tensor],
    x: Tensor,
    model_kwargs: dict[str, Any],
    precision: str | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the energies [n] and d energy / d x, of x's shape, for a batch x [n, ...].

    The energy may return the shape [n], [n, 1], [n, 1, 1, 1] or, for n = 1, []. With
    ``create_graph`` the gradient is itself differentiable, and an x that requires grad is used as
    it is; otherwise a new leaf takes its place. Parameters keep their requires_grad flags:
    autograd computes only what leads to x, so it forms no gradient of a parameter.

    Raises TypeError or ValueError for an energy that returns a wrong shape or dtype or ignores x,
    and the RuntimeError of :class:`~fastlangevin.gradients.network.Network`.
    """
    leaf = x if create_graph and x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad(), network_precision(precision, x.device):
        with network_autocast(precision, x.device):
            out = call_network(energy, leaf, model_kwargs)
        energies = _check_energies(out, x.shape)
        (grad,) = torch.autograd.grad(
            energies.sum(), leaf, create_graph=create_graph, allow_unused=True
        )
    if grad is None:
        raise ValueError(
            "energy: its output does not depend on x, so there is no gradient (quantised kernels "
            "have none)"
        )
    return energies if create_graph else energies.detach(), grad


def _check_energies(out: Any, shape: Sequence[int]) -> Tensor:
    """Return an energy's output as [n], or raise TypeError or ValueError.

    ``shape`` is the shape [n, ...] of the batch that the energy was given.
    """
    chains = shape[0]
    if not isinstance(out, Tensor):
        hint = ""
        if isinstance(out, list | tuple | dict):
            hint = "; wrap it in a module whose forward returns only the energies"
        elif isinstance(out, nn.Module):
            hint = "; if this function makes an energy, pass what it returns"
        raise TypeError(f"energy: must return a tensor, got {type(out).__name__}{hint}")
    if not out.is_floating_point():
        raise TypeError(f"energy: must return a floating dtype, got {out.dtype}")
    if out.numel() != chains or (out.ndim > 0 and out.shape[0] != chains):
        hint = "; a network of x's shape is a score: LangevinSampler.from_score"
        raise ValueError(
            f"energy: must return one value per chain, [{chains}] or [{chains}, 1] or "
            f"[{chains}, 1, 1, 1], got shape {list(out.shape)}" + hint * (out.shape == shape)
        )
    if not out.requires_grad:
        raise ValueError(
            "energy: its output does not depend on x through autograd (was it detached, or "
            "computed under torch.no_grad or by kernels for inference?)"
        )
    return out.reshape(chains)
