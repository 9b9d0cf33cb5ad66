"""Differentiating through the chain: unrolled, or with each step computed again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.chain import Chain
from fastlangevin.kernels import reference
from fastlangevin.score import left_as_found, modules_of

Transition = Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
_OP = "LangevinSampler"


def unroll(chain: Chain, x: Tensor, checkpoint: str, grad_steps: int | None) -> Tensor:
    """The chain from x as a differentiable function of x0, parameters, step_size and noise_std.

    Raises ValueError for a schedule or a number of steps that cannot be.
    """
    sampler, modules = chain.sampler, modules_of(chain.sampler.energy)
    if checkpoint not in ("auto", "none", "step"):
        raise ValueError(f'{_OP}: checkpoint must be "auto", "none" or "step", got {checkpoint!r}')
    if checkpoint == "step" and not modules:
        raise ValueError(
            f'{_OP}: checkpoint="step" needs an nn.Module (or its method) as energy, to know the '
            'tensors that gradients go to; for a plain callable use "none"'
        )
    traced = sampler.steps if grad_steps is None else check_count(_OP, "grad_steps", grad_steps)
    if traced > sampler.steps:
        raise ValueError(f"{_OP}: grad_steps must be at most steps={sampler.steps}, got {traced}")

    def transition(x: Tensor, k: int, create_graph: bool) -> tuple[Tensor, Tensor]:
        with left_as_found(sampler.energy, x.device, freeze=not create_graph):
            step = chain.transition(reference.step, x, k, create_graph)
            return step.x, step.energies

    candidates = (
        sampler.step_size,
        sampler.noise_std,
        *chain.model_kwargs.values(),
        *(parameter for module in modules for parameter in module.parameters()),
    )
    tensors = {id(t): t for t in candidates if isinstance(t, Tensor) and t.requires_grad}
    energies = x.new_zeros(0)
    for k in range(sampler.steps if x.shape[0] else 0):
        if k < sampler.steps - traced:
            with torch.no_grad():
                x, energies = transition(x.detach(), k, False)
        elif modules and checkpoint != "none":
            x, energies = recomputed_step(transition, x, k, list(tensors.values()))
        else:
            x, energies = transition(x, k, True)
    chain.check_finite(x, energies)
    return x


def recomputed_step(
    transition: Transition, x: Tensor, k: int, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``transition(x, k, create_graph)`` as (x', energies), keeping x alone for the backward pass.

    The forward pass evaluates the energy once without a graph of it, the backward pass once with
    one. Gradients go to x and to ``tensors``, which must be all that the transition reads and a
    gradient is wanted for; a change of any of them in between is noticed by autograd. Energies are
    not differentiable. (torch.utils.checkpoint serves as well, but evaluates each step twice in
    the forward pass, since the gradient taken inside needs what it has just thrown away.)
    """
    x, energies = _Recomputed.apply(transition, k, x, *tensors)
    return x, energies


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transition: Transition, k: int, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.transition, ctx.k = transition, k
        ctx.save_for_backward(x, *tensors)
        x, energies = transition(x.detach(), k, False)
        ctx.mark_non_differentiable(energies)
        return x, energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[2])
            after, _ = ctx.transition(x, ctx.k, True)
        inputs = [x, *tensors]
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[2:]) if wanted]
        found = torch.autograd.grad(after, [inputs[i] for i in needed], grad_x, allow_unused=True)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(needed, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients
