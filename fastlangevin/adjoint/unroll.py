"""Differentiating through the chain: unrolled, or with steps computed again.

Backward through x' = x_K(x_0, theta) takes, at each step's own x, one product of a vector v with
the step's Jacobian, by differentiating d E / d x once more:

    d / d x     = M v + s a M (d^2 E / d x^2) C v          (M, C: what clamp and clip let through)
    d / d theta = s a (d^2 E / d theta d x) C M v          (and likewise a, b and the noise)

``grad_through="straight"`` drops the Hessian from the first line, as if each gradient were taken at
a constant: exact where the energy is piecewise linear in x, almost everywhere.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastlangevin.adjoint.memory import free_memory
from fastlangevin.adjoint.one_step import (
    advance,
    check_graph,
    given,
    leaves_of,
    nodes_of,
    parameters_of,
    transition,
)
from fastlangevin.adjoint.recompute import Adjoint, Trace
from fastlangevin.adjoint.schedules import (
    Budget,
    Checkpoint,
    Sizes,
    check_checkpoint,
    choose_states,
    cost_text,
    states_for,
)
from fastlangevin.arguments import check_count
from fastlangevin.chain.chain import Chain
from fastlangevin.kernels import reference

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
    """The chain from x as a differentiable function of x0 and of all tensors that a step reads.

    Raises TypeError or ValueError for options that cannot be, for a budget that is too small and
    for a chain in which nothing requires grad; RuntimeError for an energy that autograd cannot
    differentiate twice.
    """
    steps = chain.settings.steps
    schedule = check_checkpoint(_OP, checkpoint)
    traced = steps if grad_steps is None else check_count(_OP, "grad_steps", grad_steps)
    if traced > steps:
        raise ValueError(f"{_OP}: grad_steps must be at most steps={steps}, got {traced}")
    if grad_through not in GRAD_THROUGH:
        raise ValueError(
            f"{_OP}: grad_through must be one of {', '.join(GRAD_THROUGH)}, got {grad_through!r}"
        )
    if offload and schedule == "none":
        raise ValueError(f'{_OP}: offload keeps states elsewhere; checkpoint="none" keeps none')
    if x.numel() == 0:
        return x.clone()
    chain = chain.isolated(x.device, twice=True)
    straight, first = grad_through == "straight", steps - traced
    if not torch.is_grad_enabled():
        first = steps
    elif not _something_requires_grad(chain, x, first):
        raise _nothing_requires_grad()
    energies: Tensor | None = None
    for k in range(first):
        x, energies = advance(chain, x, k)
    if first == steps:
        out = x
    elif only_masks(chain, x):
        out, energies = _masked(chain, x, first)
    else:
        out, energies = _traced(chain, x, first, schedule, straight, offload)
    chain.check_finite(out, energies)
    return out


def only_masks(chain: Chain, x: Tensor) -> bool:
    """Whether x alone requires grad, and the energy is known to be piecewise linear in it."""
    others = (*parameters_of(chain.energy), *given(chain))
    if not x.requires_grad or any(tensor.requires_grad for tensor in others):
        return False
    # None for energies that may read other tensors than their parameters.
    graph = chain.choose(x).graph
    return graph is not None and all(node.kind in _PIECEWISE_LINEAR for node in graph.nodes)


def explain(chain: Chain, x: Tensor) -> list[str]:
    """What each schedule takes, from x: lines of text. Runs a step and its backward pass."""
    x, steps = x.detach().requires_grad_(), chain.settings.steps
    try:
        chain = chain.isolated(x.device, twice=True)
        trace = Trace(chain, 0, False, x)
        check_graph(chain, trace.begin(x)[-1])
        sizes = trace.measure(x)
    except Exception as error:  # whatever an energy raises: a call without gradients may serve
        return [f"gradients  not with this energy: {error}"]
    free = free_memory(x.device)
    rows = []
    for checkpoint in ("none", "step", states_for(steps), 1, "auto"):
        states = choose_states(_OP, checkpoint, steps, sizes, free, offload=False)
        rows.append(f"checkpoint {checkpoint!r}: {cost_text(steps, states, sizes)}")
    rows = list(dict.fromkeys(rows))
    rows.append(
        f"computed again, a step is differentiated by autograd, twice: {trace.graph}"
        if isinstance(trace.graph, str)
        else "computed again, a step is differentiated by an explicit second-order pass"
    )
    if only_masks(chain, x):
        rows.append("d x_K / d x_0 is the identity where no clamp held: no step is run for it")
    return [f"{'' if i else 'gradients':11}{row}" for i, row in enumerate(rows)]


def _traced(
    chain: Chain, x: Tensor, first: int, schedule: Checkpoint, straight: bool, offload: bool
) -> tuple[Tensor, Tensor | None]:
    """Steps first, first + 1, ... by a schedule: the last state, with its graph, and energies."""
    steps = chain.settings.steps - first
    if schedule == "none":
        return _plain(chain, x, first, straight)
    trace = Trace(chain, first, straight, x)
    after, energies, tensors, nodes = trace.begin(x)
    if straight and not tensors and x.requires_grad:
        del after, nodes
        return _masked(chain, x, first)
    check_graph(chain, nodes)
    del nodes
    if not (x.requires_grad or tensors):
        raise _nothing_requires_grad()
    sizes = Sizes(x.numel() * x.element_size())
    if isinstance(schedule, Budget):
        sizes = trace.measure(x)
    states = choose_states(_OP, schedule, steps, sizes, free_memory(x.device), offload)
    if states is None:
        del after, trace
        return _plain(chain, x, first, straight)
    out, energies = trace.forward(x, after, energies, tensors, steps, states, offload)
    return Adjoint.apply(trace, out, x, *tensors), energies


def _plain(chain: Chain, x: Tensor, first: int, straight: bool) -> tuple[Tensor, Tensor]:
    start = x if x.requires_grad else x.detach().requires_grad_()
    state = start
    for k in range(first, chain.settings.steps):
        state, energies = transition(chain, state, k, create_graph=True, straight=straight)
        if k == first:
            nodes = nodes_of(state)
            if not x.requires_grad and leaves_of(nodes) == [start]:
                raise _nothing_requires_grad()
            check_graph(chain, nodes + nodes_of(energies))
            del nodes
    return state, energies


def _masked(chain: Chain, x: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
    """Gradients to x alone where a step's Jacobian is what its clamps let through."""
    state, passed = x.detach(), torch.ones_like(x)
    engine = chain.choose(x).engine
    last = chain.settings.steps - 1
    if engine is not None:
        engine.begin()
    for k in range(first, last + 1):
        state.requires_grad_()
        evaluate = None if engine is None else functools.partial(engine, want_energies=k == last)
        with torch.enable_grad():
            step = chain.transition(reference.step, state, k, evaluate)
        (passed,) = torch.autograd.grad(step.x, state, passed)
        state = step.x.detach()
    return _Masked.apply(x, state, passed.bool()), step.energies


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, passed: Tensor) -> Tensor:
        ctx.save_for_backward(passed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (passed,) = ctx.saved_tensors
        return grad * passed, None, None


def _something_requires_grad(chain: Chain, x: Tensor, first: int) -> bool:
    """Whether the traced steps can have a gradient; runs one only if none is in sight."""
    others = (*parameters_of(chain.energy), *given(chain))
    if any(tensor.requires_grad for tensor in others):
        return True
    if x.requires_grad and first == 0:
        return True
    start = x.detach().requires_grad_()
    after, _ = transition(chain, start, first, create_graph=True)
    return leaves_of(nodes_of(after)) != [start]


def _nothing_requires_grad() -> ValueError:
    return ValueError(
        f"{_OP}: differentiable=True, but the chain depends on nothing that requires grad: not "
        "x0 (or grad_steps cuts it off), nor what the energy's gradient is computed from (is it "
        "detached inside the energy?), nor step_size or noise_std"
    )
