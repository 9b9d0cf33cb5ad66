"""Differentiating through the chain: unrolled, or with each step computed again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.chain import Chain
from fastlangevin.kernels import reference
from fastlangevin.score import left_as_found, modules_of

_OP = "LangevinSampler"


def unroll(chain: Chain, x: Tensor, checkpoint: str, grad_steps: int | None) -> Tensor:
    """The chain from x as a differentiable function of x0 and of all tensors that a step reads.

    Raises ValueError for a schedule or a number of steps that cannot be.
    """
    steps = chain.sampler.steps
    if checkpoint not in ("auto", "none", "step"):
        raise ValueError(f'{_OP}: checkpoint must be "auto", "none" or "step", got {checkpoint!r}')
    traced = steps if grad_steps is None else check_count(_OP, "grad_steps", grad_steps)
    if traced > steps:
        raise ValueError(f"{_OP}: grad_steps must be at most steps={steps}, got {traced}")
    if x.shape[0] == 0:
        return x.clone()
    energies = x.new_zeros(0)
    recomputed = None if checkpoint == "none" else _RecomputedSteps(chain)
    for k in range(steps):
        if k < steps - traced:
            with torch.no_grad():
                x, energies = _transition(chain, x.detach(), k, create_graph=False)
        elif recomputed is None:
            x, energies = _transition(chain, x, k, create_graph=True)
        else:
            x, energies = recomputed(x, k)
    chain.check_finite(x, energies)
    return x


def _transition(chain: Chain, x: Tensor, k: int, create_graph: bool) -> tuple[Tensor, Tensor]:
    with left_as_found(chain.sampler.energy, x.device, freeze=not create_graph):
        step = chain.transition(reference.step, x, k, create_graph=create_graph)
        assert step.energies is not None
        return step.x, step.energies


class _RecomputedSteps:
    """Steps that keep their x alone for the backward pass, and evaluate the energy again there.

    Which tensors gradients go to is read off the graph of the first step, so that those which a
    closure holds are not lost. (torch.utils.checkpoint serves as well, but evaluates each step
    twice in the forward pass: the gradient taken inside needs what it has just thrown away.)
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.tensors: list[Tensor] | None = None
        # Those that want a gradient are guarded by autograd itself.
        self.frozen = [
            (parameter, parameter._version)
            for module in modules_of(chain.sampler.energy)
            for parameter in module.parameters()
            if not parameter.requires_grad
        ]

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.tensors is None:
            start = x.detach().requires_grad_()
            after, energies = _transition(self.chain, start, k, create_graph=True)
            self.tensors = [leaf for leaf in _leaves(after) if leaf is not start]
        else:
            with torch.no_grad():
                after, energies = _transition(self.chain, x.detach(), k, create_graph=False)
        return _Recomputed.apply(self, k, after.detach(), energies.detach(), x, *self.tensors)

    def check_frozen(self) -> None:
        if any(parameter._version != version for parameter, version in self.frozen):
            raise RuntimeError(
                f"{_OP}: a frozen parameter of the energy has been modified by an inplace "
                "operation between the chain and its backward pass, which computes the chain again"
            )


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        steps: _RecomputedSteps,
        k: int,
        after: Tensor,
        energies: Tensor,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.k = steps, k
        ctx.autocast = _autocast_state(x.device)
        ctx.save_for_backward(x, *tensors)
        ctx.mark_non_differentiable(energies)
        return after, energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_after: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        ctx.steps.check_frozen()
        wanted = ctx.needs_input_grad[4:]
        with torch.enable_grad(), ctx.autocast():
            x = x.detach().requires_grad_()
            after, _ = _transition(ctx.steps.chain, x, ctx.k, create_graph=True)
        inputs = [x, *tensors]
        if {id(leaf) for leaf in _leaves(after)} - {id(tensor) for tensor in inputs}:
            raise RuntimeError(
                f"{_OP}: the energy reads other tensors at step {ctx.k} than at the first one; "
                'use checkpoint="none"'
            )
        # retain_graph: a closure may hold tensors with a graph of their own, shared by all steps.
        found = torch.autograd.grad(
            after,
            [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed],
            grad_after,
            allow_unused=True,
            retain_graph=True,
        )
        rest = iter(found)
        return None, None, None, None, *(next(rest) if needed else None for needed in wanted)


def _leaves(out: Tensor) -> list[Tensor]:
    """The leaf tensors that a graph goes back to."""
    found: list[Tensor] = []
    nodes: list[Any] = [out.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def _autocast_state(device: torch.device) -> Callable[[], torch.autocast]:
    """Autocast as it is now, to be entered again."""
    kind = device.type
    return functools.partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
