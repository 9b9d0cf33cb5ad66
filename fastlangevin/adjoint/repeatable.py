"""The last steps of a chain as steps that can be differentiated one at a time."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.one_step import (
    advance,
    arguments_of,
    explicit_graph,
    transition,
)
from fastlangevin.adjoint.schedules import Sizes
from fastlangevin.adjoint.storage import Allocations
from fastlangevin.arguments import at_step
from fastlangevin.chain.chain import Chain
from fastlangevin.gradients.autograd import leaves_of, nodes_of
from fastlangevin.gradients.modules import parameters_of, submodules_of
from fastlangevin.gradients.precision import network_precision
from fastlangevin.gradients.second_order import SecondOrderGradient
from fastlangevin.kernels import reference

_OP = "LangevinSampler"


class RepeatableSteps:
    """Steps ``first`` to K - 1 of a chain, whose backward pass evaluates each of them again.

    They are differentiated by the package's second-order pass or, for the reason in
    ``why_autograd``, by autograd. ``allow_explicit`` permits the former.
    """

    def __init__(
        self, chain: Chain, first: int, straight: bool, x: Tensor, allow_explicit: bool = True
    ) -> None:
        self.chain, self.first, self.straight = chain, first, straight
        graph = explicit_graph(chain, x) if allow_explicit else "it is not requested"
        self.graph = None if isinstance(graph, str) else graph
        self.why_autograd = graph if isinstance(graph, str) else None
        self.second_order: SecondOrderGradient | None = None  # while steps are taken
        # If the given noise needs a gradient, each step reads its own entry as a leaf. A gradient
        # of the whole noise at every step would cost K^2 in total.
        stds = (at_step(chain.settings.noise_std, k) for k in range(first, chain.settings.steps))
        requires_grad = chain.noise is not None and chain.noise.requires_grad
        is_leaf = requires_grad and not all(map(reference.is_zero, stds))
        self.noise = chain.noise if is_leaf else None
        self.autocast = _autocast_state(x.device)
        self.mark = object()  # marks the nodes of the first step
        # torch.func.functional_call puts its tensors into these tables only for the forward pass.
        self.tables: list[tuple[dict[str, Any], str, Tensor]] = [
            (table, name, tensor)
            for module in submodules_of(chain.energy)
            # functional_call does not support scripted modules, whose tables are views.
            if not isinstance(module, torch.jit.ScriptModule)
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.versions = [
            (tensor, tensor._version)
            for tensor in (x, *parameters_of(chain.energy), *arguments_of(chain))
            if not tensor.is_inference()
        ]

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Any]]:
        """Runs the first step with a graph and collects every tensor that receives a gradient.

        The graph also shows the tensors that closures read. Returns the state after the step, its
        energies, those tensors and the nodes of both graphs. (torch.utils.checkpoint needs no such
        list, but it evaluates each step twice in the forward pass, because the inner gradient needs
        the values that it has just discarded.)
        """
        self.pack(x)
        start, z = x.detach().requires_grad_(), self._noise_leaf(0)
        with torch.enable_grad():
            after, energies = self._step(start, 0, z)
        nodes = nodes_of(after)
        for node in nodes:
            node.metadata[self.mark] = True
        tensors = [leaf for leaf in leaves_of(nodes) if leaf is not start and leaf is not z]
        if self.noise is not None:
            tensors.append(self.noise)  # always the last one
        return after.detach(), energies.detach(), tensors, nodes + nodes_of(energies)

    def measure(self, x: Tensor) -> Sizes:
        """Runs one step and its backward pass to measure their memory."""
        with Allocations() as forward_pass:
            *_, tensors, nodes = self.begin(x)
            graph = forward_pass.live
            del nodes
        with Allocations() as backward_pass, torch.no_grad():
            self.pack(x)
            wanted = (True,) * (1 + len(tensors))
            self.step_back(x, tensors, 0, torch.ones_like(x), wanted)
        # In addition to the gradients of a step there are their sums over the steps.
        sums = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        sizes = Sizes(x.numel() * x.element_size(), graph, backward_pass.peak + sums)
        if self.second_order is None:
            return sizes
        # Graphs are stored by autograd alone; the explicit pass only recomputes steps.
        by_autograd = RepeatableSteps(self.chain, self.first, self.straight, x, False)
        return by_autograd.measure(x)._replace(again=sizes.step)

    def pack(self, x: Tensor) -> None:
        """Reads the weights, if the second-order pass is explicit."""
        if self.graph is not None:
            self.second_order = None
            self.second_order = SecondOrderGradient(self.graph, x, self.chain.settings.precision)
            self.second_order.begin()

    def advance(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(state after step k, energies before it), without a graph."""
        return advance(self.chain, x, self.first + k, self.second_order)

    def step_back(
        self, x: Tensor, tensors: list[Tensor], k: int, grad: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, list[Tensor | None], Tensor]:
        """The gradients of step k with respect to x and the tensors, and its energies."""
        inputs, z = [x.detach().requires_grad_(), *tensors], self._noise_leaf(k)
        if z is not None:
            inputs[-1] = z
        with torch.enable_grad(), self.autocast():
            after, energies = self._step(inputs[0], k, z)
        nodes = nodes_of(after)
        if {id(leaf) for leaf in leaves_of(nodes)} - {id(tensor) for tensor in inputs}:
            raise RuntimeError(
                f"{_OP}: at step {self.first + k} the energy reads other tensors than at the "
                'first step; use checkpoint="none"'
            )
        # Parameters, coefficients and tensors of closures may have graphs of their own, which all
        # steps share and which must survive. Otherwise the pass frees a third of its memory early.
        inner_nodes = [node for node in nodes if not hasattr(node, "variable")]
        is_shared = any(self.mark in node.metadata for node in inner_nodes)
        del nodes, inner_nodes
        needed_inputs = [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed]
        settings, isolation = self.chain.settings, self.chain.isolation
        assert isolation is not None
        with isolation.backward(), network_precision(settings.precision, x.device):
            needed_grads = iter(
                torch.autograd.grad(
                    after, needed_inputs, grad, allow_unused=True, retain_graph=is_shared
                )
                if needed_inputs
                else ()
            )
        state_grad, *tensor_grads = [next(needed_grads) if needed else None for needed in wanted]
        return state_grad, tensor_grads, energies.detach()

    def _noise_leaf(self, k: int) -> Tensor | None:
        """The noise of step k as a leaf, if it needs a gradient."""
        return None if self.noise is None else self.noise[self.first + k].detach().requires_grad_()

    def _step(self, x: Tensor, k: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
        return transition(self.chain, x, self.first + k, True, self.straight, self.second_order, z)

    @contextlib.contextmanager
    def tables_put_back(self) -> Iterator[None]:
        """A context in which the energy has the tensors that it had in the forward pass."""
        current = [(table, name, table.get(name)) for table, name, _ in self.tables]
        try:
            for table, name, tensor in self.tables:
                table[name] = tensor
            yield
        finally:
            for table, name, current_tensor in current:
                table[name] = current_tensor

    def check_versions(self) -> None:
        """RuntimeError if a tensor that a step reads has changed since the forward pass."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError(
                f"{_OP}: x0, a parameter of the energy or an argument of the chain has been "
                "modified by an inplace operation between the chain and its backward pass, which "
                "recomputes the chain"
            )


def _autocast_state(device: torch.device) -> functools.partial[torch.autocast]:
    """A context manager that restores the current autocast settings."""
    kind = "cpu" if device.type == "meta" else device.type  # torch has no autocast for meta
    return functools.partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
