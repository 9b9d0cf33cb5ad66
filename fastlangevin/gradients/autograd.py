"""Energies and d energy / d x of a batch of chains by autograd."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from fastlangevin.gradients.modules import Network
from fastlangevin.gradients.precision import network_autocast, network_precision


class EnergyGradient:
    """Energies and d energy / d x by autograd, for any number of evaluations of one energy.

    The contexts that every evaluation needs are made once. Evaluations must not be nested or run in
    several threads at a time.
    """

    def __init__(
        self, energy: Callable[..., Tensor], precision: str | None, device: torch.device
    ) -> None:
        self._network = energy if isinstance(energy, Network) else Network(energy)
        self._grad_mode = torch.enable_grad()
        self._precision = network_precision(precision, device)
        self._autocast = network_autocast(precision, device)

    def __call__(
        self,
        x: Tensor,
        model_kwargs: dict[str, Any],
        create_graph: bool = False,
        want_energies: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n], or None if they are not wanted; d energy / d x).

        See :func:`energy_and_grad`.
        """
        leaf = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        energies: Tensor | None = None
        grad: Tensor | None
        with self._grad_mode, self._precision:
            with self._autocast:
                out = self._network(leaf, **model_kwargs)
            _check_energies(out, x.shape)
            if create_graph:
                energies = out.reshape(len(x))
                (grad,) = torch.autograd.grad(
                    energies.sum(), leaf, create_graph=True, allow_unused=True
                )
            else:
                grad = _gradient_of_sum(out, leaf)
        if grad is None:
            raise ValueError(
                "energy: its output does not depend on x, so there is no gradient (quantised "
                "kernels have none)"
            )
        if want_energies and not create_graph:
            energies = out.detach().reshape(len(x))
        return energies, grad


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
    and the RuntimeError of :class:`~fastlangevin.gradients.modules.Network`.
    """
    gradient = EnergyGradient(energy, precision, x.device)
    energies, grad = gradient(x, model_kwargs, create_graph)
    assert energies is not None
    return energies, grad


# The function behind torch.autograd.grad, whose checks of its arguments take as long as a linear
# layer of 128 units forward and back.
_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)


def _gradient_of_sum(out: Tensor, leaf: Tensor) -> Tensor | None:
    """Return d out.sum() / d leaf, or None if autograd finds no path from ``leaf`` to ``out``."""
    if _run_backward is None or is_compiling() or has_torch_function((out, leaf)):
        (grad,) = torch.autograd.grad(out.reshape(-1).sum(), leaf, allow_unused=True)
        return grad
    # What the backward pass of the sum would hand on. An energy may write to it, so it is new.
    ones = out.new_ones(()).expand(out.numel())
    if out.ndim != 1:
        ones = ones.reshape(out.shape)
    (grad,) = _run_backward((out,), (ones,), False, False, (leaf,), True, accumulate_grad=False)
    return grad


def nodes_of(out: Tensor) -> list[Any]:
    """Return the nodes of a tensor's graph, in an order that only the graph determines."""
    nodes = [] if out.grad_fn is None else [out.grad_fn]
    visited = set(nodes)
    for node in nodes:
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in visited:
                visited.add(next_node)
                nodes.append(next_node)
    return nodes


def leaves_of(nodes: Iterable[Any]) -> list[Tensor]:
    """Return the leaf tensors of a graph."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _check_energies(out: Any, shape: Sequence[int]) -> None:
    """Raise TypeError or ValueError unless an energy's output is one value per chain.

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
