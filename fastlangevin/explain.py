"""The plan of a call as text: which engine and backend run, and why each faster one does not.

This is the layout of the text. Each reason is worded where it is decided.
"""

import torch
from torch import Tensor

from fastlangevin.adjoint.unroll import explain_gradients
from fastlangevin.chain.chain import Chain
from fastlangevin.chain.cuda_graphs import Graphs
from fastlangevin.chain.settings import Settings
from fastlangevin.gradients.fused_cpu import ConvNetGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.gradients.modules import device_of
from fastlangevin.gradients.own_last_step import OwnLastStep
from fastlangevin.gradients.precision import check_precision
from fastlangevin.gradients.select import EngineChoice
from fastlangevin.roofline import cost
from fastlangevin.step import backend_status, choose_backend

_ORDER_TEXT = {
    "after": "noise is added with the gradient step",
    "before": "noise is added before the gradient is computed",
    "last": "noise is added after the clamp",
}
_ENGINE_TEXT = {
    "autograd": "forward pass and input gradient by autograd",
    "explicit": "recorded forward pass and input gradient in torch operators, without autograd",
    "fused": "kernels that take a few chains at a time through the whole network and back",
    "network": "the output of the network itself, without energies",
}
_INDENT = " " * 11


def explain(chain: Chain, x: Tensor | None, started: bool, graphs: Graphs) -> str:
    """Describe the plan of a chain from x, or as much of it as is known if x is None.

    ``started`` is whether x is a caller's state and not zeros in the energy's shape. Only then are
    costs and gradients described. Raises the errors that a call raises.
    """
    device = x.device if x is not None else device_of(chain.energy) or torch.device("cpu")
    settings = chain.settings
    check_precision(settings.precision, device)
    backend = choose_backend(settings.backend, device)
    lines = [
        f"chain      {settings.steps} steps, {_direction(settings)}, "
        f"{_ORDER_TEXT[settings.noise_order]}"
        + (", each step is accepted or rejected (MALA)" if settings.metropolis else ""),
        *_explain_engine(chain, x, started, graphs),
        f"update     backend {backend} on {device}; with differentiable=True, backend reference",
    ]
    lines += [
        f"{_INDENT}not {name}: {reason}"
        for name, reason in backend_status(device).items()
        if reason is not None
    ]
    if x is not None and started:
        size = x.numel() * x.element_size() / 2**20
        lines.append(f"state      {list(x.shape)}, {size:.1f} MiB")
        if settings.metropolis:
            lines.append("gradients  not through steps that are accepted or rejected")
        elif x.shape[0]:
            lines += explain_gradients(chain, x)
    return "\n".join(lines)


def _direction(settings: Settings) -> str:
    if settings.gradient == "network":
        return "along the score" if settings.maximize else "against the network's output"
    return "ascending f" if settings.maximize else "descending E"


def _explain_engine(chain: Chain, x: Tensor | None, started: bool, graphs: Graphs) -> list[str]:
    name, precision = chain.settings.gradient, chain.settings.precision
    precision_text = f"precision {precision or 'as set in torch'}"
    if x is None:
        fixed = name in ("autograd", "network")
        text = _ENGINE_TEXT[name] if fixed else "depends on the state's shape; pass x0"
        return [f"gradient   {name}: {text}; {precision_text}"]
    choice = chain.choose(x)
    lines = [f"gradient   {choice.name}: {_ENGINE_TEXT[choice.name]}; {precision_text}"]
    engine = choice.engine
    if isinstance(engine, OwnLastStep):
        engine = engine.engine
        lines.append(
            f"{_INDENT}the last step runs the energy itself, whose modules keep its values"
        )
    if isinstance(engine, ConvNetGradient):
        if engine.precision != precision:
            lines[0] += f", computed in {engine.precision}"
        lines[0] += f"; instruction set {engine.net.instruction_set}"
        lines += _explain_tiles(engine)
    lines += [f"{_INDENT}not {names}: {reason}" for names, reason in rejected(choice).items()]
    if started and x.shape[0] and choice.name != "network":
        graph: Graph | str | None = choice.graph
        if choice.engine is None:
            graph = recognise(chain.energy, x, chain.model_kwargs)
        lines += _explain_cost(choice, graph if isinstance(graph, Graph) else None, x.shape[0])
    lines.append(f"graph      {graphs.explain(chain, x, choice)}")
    return lines


def rejected(choice: EngineChoice) -> dict[str, str]:
    """The reasons why faster engines were rejected, by the names of the engines that share one."""
    names: dict[str, list[str]] = {}
    for engine, reason in choice.why_not:
        names.setdefault(reason, []).append(engine)
    return {", ".join(engines): reason for reason, engines in names.items()}


def _explain_tiles(engine: ConvNetGradient) -> list[str]:
    """Say whether a matrix unit for bfloat16 computes float32 products, if there is one."""
    estimate = engine.tiles_estimate
    if estimate is None:
        return []
    if engine.net.by_matrix_unit:
        text = f"float32 products by bfloat16 tiles (bf16x6), in an estimated {estimate:.2f} of the"
    else:
        text = f"not bf16x6: bfloat16 tiles would take an estimated {estimate:.2f} times the"
    return [f"{_INDENT}{text} time of vectors"]


def _explain_cost(choice: EngineChoice, graph: Graph | None, chains: int) -> list[str]:
    """Describe the work and the memory of a step of some chains, as far as they are known."""
    lines, held_bytes, copies = [], None, ""
    if graph is not None:
        costs = cost(graph)
        lines.append(f"work       {costs.flops * chains / 1e9:.3g} GFLOP a step")
        # Autograd saves the input and the output of every activation.
        held_bytes = 2 * costs.activations * chains * graph.dtype.itemsize
    if choice.engine is not None:
        held_bytes = choice.engine.held_bytes()
        copies = f", {choice.engine.weight_bytes() / 2**20:.3g} MiB of them copies of the weights"
    if held_bytes is not None:
        lines.append(f"memory     the engine holds about {held_bytes / 2**20:.3g} MiB{copies}")
    return lines
