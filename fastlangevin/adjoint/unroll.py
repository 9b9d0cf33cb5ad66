"""Gradients through the chain: unrolled, or with steps that are recomputed.

The backward pass through x_K(x_0, theta) takes one product of a vector v with the Jacobian of each
step, at the step's own x. It differentiates dE/dx once more:

    d / d x     = M v + s a M (d^2 E / d x^2) C v          (M, C: what clamp and clip let through)
    d / d theta = s a (d^2 E / d theta d x) C M v          (and likewise a, b and the noise)

``grad_through="straight"`` drops the Hessian from the first line, as if each gradient were taken at
a constant x. For an energy that is piecewise linear in x this is exact almost everywhere.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.one_step import (
    advance,
    arguments_of,
    check_graph,
    transition,
)
from fastlangevin.adjoint.recompute import Adjoint, run_forward
from fastlangevin.adjoint.repeatable import RepeatableSteps
from fastlangevin.adjoint.schedules import (
    Budget,
    Checkpoint,
    Sizes,
    check_checkpoint,
    choose_states,
    cost_text,
    states_for,
)
from fastlangevin.adjoint.storage import free_memory
from fastlangevin.arguments import check_count
from fastlangevin.chain.chain import Chain, check_finite
from fastlangevin.gradients.autograd import leaves_of, nodes_of
from fastlangevin.gradients.modules import parameters_of
from fastlangevin.names import check_name

GRAD_THROUGH = ("exact", "straight")
_OP = "LangevinSampler"
_PIECEWISE_LINEAR = frozenset(
    ("conv", "linear", "add", "view", "mean", "sum", "avg_pool", "scale", "relu", "leaky_relu")
)


def unroll(
    chain: Chain,
    x: Tensor,
    checkpoint: str | int = "auto",
    grad_steps: int | None = None,
    grad_through: str = "exact",
    offload: bool = False,
) -> Tensor:
    """The last state of the chain, differentiable in x and in all tensors that a step reads.

    Raises TypeError or ValueError for options that do not fit, for a budget that is too small and
    for a chain in which nothing requires grad, and RuntimeError for an energy that autograd cannot
    differentiate twice.
    """
    steps = chain.settings.steps
    schedule = check_checkpoint(_OP, checkpoint)
    grad_steps = steps if grad_steps is None else check_count(_OP, "grad_steps", grad_steps)
    if grad_steps > steps:
        raise ValueError(f"{_OP}: grad_steps must be at most steps={steps}, got {grad_steps}")
    check_name(f"{_OP}: grad_through", grad_through, GRAD_THROUGH)
    if offload and schedule == "none":
        raise ValueError(
            f'{_OP}: offload stores states in host memory, and checkpoint="none" stores no states'
        )
    if x.numel() == 0:
        return x.clone()
    chain = chain.isolated(x.device, differentiated_twice=True)
    straight, first_traced = grad_through == "straight", steps - grad_steps
    if not torch.is_grad_enabled():
        first_traced = steps
    elif not _requires_grad(chain, x, first_traced):
        raise _nothing_requires_grad()
    energies: Tensor | None = None
    for k in range(first_traced):
        x, energies = advance(chain, x, k)
    if first_traced == steps:
        out = x
    elif only_masks(chain, x):
        out, energies = _masked(chain, x, first_traced)
    else:
        out, energies = _recomputed(chain, x, first_traced, schedule, straight, offload)
    check_finite(out, energies, steps)
    return out


def only_masks(chain: Chain, x: Tensor) -> bool:
    """Whether only x requires grad and the energy is known to be piecewise linear in it."""
    other_tensors = (*parameters_of(chain.energy), *arguments_of(chain))
    if not x.requires_grad or any(tensor.requires_grad for tensor in other_tensors):
        return False
    # The graph is None for an energy that may read tensors other than its parameters.
    graph = chain.choose(x).graph
    return graph is not None and all(node.kind in _PIECEWISE_LINEAR for node in graph.nodes)


def explain_gradients(chain: Chain, x: Tensor) -> list[str]:
    """Lines of text with the cost of each schedule from x. Runs a step and its backward pass."""
    x, steps = x.detach().requires_grad_(), chain.settings.steps
    try:
        chain = chain.isolated(x.device, differentiated_twice=True)
        repeatable = RepeatableSteps(chain, 0, False, x)
        check_graph(chain, repeatable.begin(x)[-1])
        sizes = repeatable.measure(x)
    except Exception as error:  # of any kind; calls without gradients may still work
        return [f"gradients  not with this energy: {error}"]
    free_bytes = free_memory(x.device)
    rows = []
    for checkpoint in ("none", "step", states_for(steps), 1, "auto"):
        states = choose_states(_OP, checkpoint, steps, sizes, free_bytes, offload=False)
        rows.append(f"checkpoint {checkpoint!r}: {cost_text(steps, states, sizes)}")
    rows = list(dict.fromkeys(rows))
    rows.append(
        "a recomputed step is differentiated by an explicit second-order pass"
        if repeatable.why_autograd is None
        else f"a recomputed step is differentiated twice by autograd: {repeatable.why_autograd}"
    )
    if only_masks(chain, x):
        rows.append("d x_K / d x_0 is the identity except where a clamp held; no step is rerun")
    return [f"{'' if i else 'gradients':11}{row}" for i, row in enumerate(rows)]


def _recomputed(
    chain: Chain, x: Tensor, first_traced: int, schedule: Checkpoint, straight: bool, offload: bool
) -> tuple[Tensor, Tensor | None]:
    """(last state with its graph, energies) of steps first_traced to K - 1, by a schedule."""
    steps = chain.settings.steps - first_traced
    if schedule == "none":
        return _unrolled(chain, x, first_traced, straight)
    repeatable = RepeatableSteps(chain, first_traced, straight, x)
    after, energies, tensors, nodes = repeatable.begin(x)
    if straight and not tensors and x.requires_grad:
        del after, nodes
        return _masked(chain, x, first_traced)
    check_graph(chain, nodes)
    del nodes
    if not (x.requires_grad or tensors):
        raise _nothing_requires_grad()
    sizes = Sizes(x.numel() * x.element_size())
    if isinstance(schedule, Budget):
        sizes = repeatable.measure(x)
    states = choose_states(_OP, schedule, steps, sizes, free_memory(x.device), offload)
    if states is None:
        del after, repeatable
        return _unrolled(chain, x, first_traced, straight)
    out, run = run_forward(repeatable, x, after, energies, tensors, steps, states, offload)
    return Adjoint.apply(run, out, x, *tensors), run.energies[-1]


def _unrolled(chain: Chain, x: Tensor, first_traced: int, straight: bool) -> tuple[Tensor, Tensor]:
    """(last state with its graph, energies) of steps first_traced to K - 1, with every graph."""
    start = x if x.requires_grad else x.detach().requires_grad_()
    state = start
    for k in range(first_traced, chain.settings.steps):
        state, energies = transition(chain, state, k, create_graph=True, straight=straight)
        if k == first_traced:
            nodes = nodes_of(state)
            if not x.requires_grad and leaves_of(nodes) == [start]:
                raise _nothing_requires_grad()
            check_graph(chain, nodes + nodes_of(energies))
            del nodes
    return state, energies


def _masked(chain: Chain, x: Tensor, first_traced: int) -> tuple[Tensor, Tensor | None]:
    """(last state with its graph, energies), if the Jacobian of a step is the mask of its clamp."""
    state, is_unclamped = x.detach(), torch.ones_like(x)
    engine = chain.choose(x).engine
    last_step = chain.settings.steps - 1
    if engine is not None:
        engine.begin()
    for k in range(first_traced, last_step + 1):
        state.requires_grad_()
        evaluate = (
            None if engine is None else functools.partial(engine, want_energies=k == last_step)
        )
        with torch.enable_grad():
            step = chain.transition(state, k, evaluate)
        (is_unclamped,) = torch.autograd.grad(step.x, state, is_unclamped)
        state = step.x.detach()
    return _Masked.apply(x, state, is_unclamped.bool()), step.energies


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, is_unclamped: Tensor) -> Tensor:
        ctx.save_for_backward(is_unclamped)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (is_unclamped,) = ctx.saved_tensors
        return grad * is_unclamped, None, None


def _requires_grad(chain: Chain, x: Tensor, first_traced: int) -> bool:
    """Whether steps first_traced to K - 1 have a gradient; runs one of them only if unsure."""
    other_tensors = (*parameters_of(chain.energy), *arguments_of(chain))
    if any(tensor.requires_grad for tensor in other_tensors):
        return True
    if x.requires_grad and first_traced == 0:
        return True
    start = x.detach().requires_grad_()
    after, _ = transition(chain, start, first_traced, create_graph=True)
    return leaves_of(nodes_of(after)) != [start]


def _nothing_requires_grad() -> ValueError:
    return ValueError(
        f"{_OP}: differentiable=True, but the chain depends on nothing that requires grad: "
        "neither x0 (or grad_steps cuts it off), nor a tensor that the energy reads (is one "
        "detached inside the energy?), nor step_size or noise_std"
    )
