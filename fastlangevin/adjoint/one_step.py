"""A step of a chain as a differentiable function, and the leaves of its autograd graph."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.chain.chain import Chain, norms
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.second_order import SecondOrderGradient, refusal
from fastlangevin.gradients.select import proved_graph

_OP = "LangevinSampler"


def transition(
    chain: Chain,
    x: Tensor,
    k: int,
    create_graph: bool,
    straight: bool = False,
    second_order: SecondOrderGradient | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(state after step k, energies before it) as a function of x and all tensors of the step.

    A score network has no energies, and the norms of its scores take their place.
    ``second_order`` computes the gradient and its derivatives; if it is None, autograd does. ``z``
    are normals that replace those of the chain.
    """

    def at_constant_x(state: Tensor) -> tuple[Tensor | None, Tensor]:
        return chain.evaluate(_Detached.apply(state), k, create_graph=True)

    evaluate: Callable[[Tensor], tuple[Tensor | None, Tensor]] | None = None
    if second_order is not None and create_graph:
        evaluate = functools.partial(second_order.differentiable, straight=straight)
    elif second_order is not None:
        evaluate = functools.partial(second_order, want_energies=True)
    elif straight and create_graph:
        evaluate = at_constant_x
    step = chain.transition(x, k, evaluate, create_graph, z)
    if step.energies is not None:
        return step.x, step.energies
    assert step.grad is not None
    return step.x, norms(step.grad.detach())


class _Detached(torch.autograd.Function):
    """The identity with no gradient. Unlike the result of detach(), its output is not a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def advance(
    chain: Chain, x: Tensor, k: int, second_order: SecondOrderGradient | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`transition` without a graph."""
    with torch.no_grad():
        return transition(chain, x.detach(), k, create_graph=False, second_order=second_order)


def explicit_graph(chain: Chain, x: Tensor) -> Graph | str:
    """The graph for an explicit second-order pass, or the reason why autograd differentiates."""
    settings = chain.settings
    if settings.gradient not in ("auto", "explicit", "fused"):
        return f'the gradient is "{settings.gradient}"'
    graph = proved_graph(chain.energy_call(x.detach()), chain.cache, chain.step_kwargs)
    if isinstance(graph, str):
        return graph
    return refusal(graph, settings.precision) or graph


def arguments_of(chain: Chain) -> list[Tensor]:
    """The tensors among the arguments of a chain."""
    settings = chain.settings
    sequences = [v for v in chain.step_kwargs.values() if not isinstance(v, Tensor)]
    values = [settings.step_size, settings.noise_std, chain.noise, *chain.model_kwargs.values()]
    values += [*chain.step_kwargs.values(), *(v for entries in sequences for v in entries)]
    return [value for value in values if isinstance(value, Tensor)]


def check_graph(chain: Chain, nodes: Iterable[Any]) -> None:
    """RuntimeError if the graph of a step has no derivative, which autograd may not report."""
    if chain.settings.gradient == "network":
        return  # it is differentiated only once
    for node in nodes:
        # once_differentiable's wrapper leaves a node only if the incoming gradient has a graph.
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        code = getattr(backward, "__code__", None)
        once_only = code is not None and code.co_filename == torch.autograd.function.__file__
        if once_only or node.name() in ("torch::autograd::Error", "NotImplemented"):
            raise RuntimeError(
                f"{_OP}: the energy cannot be differentiated twice, which gradients through a "
                "chain require: it contains a function whose backward pass has no derivative (for "
                "instance one marked once_differentiable)"
            )
