"""The plan of a call as readable text: what will run, on what, and why nothing faster."""

import torch
from torch import Tensor

from fastlangevin.adjoint.unroll import explain as explain_gradients
from fastlangevin.chain.chain import Chain
from fastlangevin.chain.cuda_graphs import Graphs
from fastlangevin.chain.settings import Settings
from fastlangevin.gradients.autograd import check_precision, device_of
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.gradients.select import Choice
from fastlangevin.roofline import HALVES, copy_bandwidth, cost, matrix_rate
from fastlangevin.step import backend_status, choose_backend

_ORDER_TEXT = {
    "after": "noise together with the gradient step",
    "before": "noise before the gradient is taken",
    "last": "noise after the clamp",
}
_GRADIENT_TEXT = {
    "autograd": "forward and input gradient by autograd",
    "explicit": "an explicit forward and input gradient, no gradient of weights, no graph",
    "fused": "the same in kernels of our own, a few chains through the whole network at a time",
    "network": "the output of the network itself; no energies",
}
# Part of the rate of torch's matrix products that a chain reaches, in float32 and on the CPU, as
# measured for the paper's networks of width 16 to 64 at batch 64 with AVX2 and with AVX-512.
_EXPECTED = {"autograd": (0.3, 0.8), "explicit": (0.4, 1.0), "fused": (0.55, 1.0)}


def explain(chain: Chain, x: Tensor | None, started: bool, graphs: Graphs) -> str:
    """The plan of a chain from x, or of what is known without it.

    ``started``: whether x is a caller's state, with which costs and gradients are told as well,
    rather than zeros in the energy's shape. Raises as a call does.
    """
    device = x.device if x is not None else device_of(chain.energy) or torch.device("cpu")
    settings = chain.settings
    check_precision(settings.precision, device)
    backend = choose_backend(settings.backend, device)
    lines = [
        f"chain      {settings.steps} steps, {_direction(settings)}, "
        f"{_ORDER_TEXT[settings.noise_order]}"
        + (", accepted or rejected (MALA)" if settings.metropolis else ""),
        *_explain_gradient(chain, x, started, graphs),
        f"update     backend {backend} on {device}; reference with differentiable=True",
    ]
    lines += [
        f"           not {name}: {reason}"
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


def _explain_gradient(chain: Chain, x: Tensor | None, started: bool, graphs: Graphs) -> list[str]:
    name, precision = chain.settings.gradient, chain.settings.precision
    as_set = f"precision {precision or 'as torch is set'}"
    if x is None:
        known = name in ("autograd", "network")
        text = _GRADIENT_TEXT[name] if known else "depends on the state's shape; give x0"
        return [f"gradient   {name}: {text}, {as_set}"]
    choice = chain.choose(x)
    lines = [f"gradient   {choice.name}: {_GRADIENT_TEXT[choice.name]}, {as_set}"]
    lines += [f"           not {name}: {why}" for name, why in choice.why_not.items()]
    if started and x.shape[0] and choice.name != "network":
        graph = choice.graph or recognise(chain.energy, x, chain.model_kwargs)
        known_graph = None if isinstance(graph, str) else graph
        lines += _explain_cost(choice._replace(graph=known_graph), x, precision)
    lines.append(f"graph      {graphs.explain(chain, x, choice)}")
    return lines


def _explain_cost(choice: Choice, x: Tensor, precision: str | None) -> list[str]:
    """Lines of a plan: work and memory of a step of these states, and the machine's limit."""
    lines = []
    graph, chains, threads = choice.graph, x.shape[0], torch.get_num_threads()
    if graph is not None:
        each = cost(graph)
        item = 2 if precision in HALVES else graph.dtype.itemsize
        flops = each.flops * chains
        # Weights once each way; the state and its gradient read, the state written.
        least = 2 * item * each.weights + 3 * 4 * x.numel()
        rate = matrix_rate(x.device, precision, threads if x.device.type == "cpu" else 0)
        limit = max(flops / rate, least / copy_bandwidth(x.device, threads))
        text = (
            f"work       {flops / 1e9:.3g} GFLOP a step, at least {least / 2**20:.3g} MiB to move; "
            f"at this machine's {rate / 1e9:.3g} GFLOP/s (torch's matrix product) "
            f"{limit * 1e3:.3g} ms"
        )
        lines.append(text)
        expected = _EXPECTED.get(choice.name) if x.device.type == "cpu" else None
        if expected is None or precision in HALVES:
            lines.append(
                "           distance from that limit: not measured; fastlangevin bench does"
            )
        else:
            low, high = expected
            lines.append(
                f"           expected {limit / high * 1e3:.3g} to {limit / low * 1e3:.3g} ms, "
                "as seen elsewhere; fastlangevin bench measures it here"
            )
    held = None if choice.run is None else choice.run.held_bytes()
    if held is None and graph is not None and choice.run is None:
        # Autograd keeps what every activation reads and what it puts out.
        held = 2 * each.activations * chains * graph.dtype.itemsize
    if held is not None:
        lines.append(f"memory     about {held / 2**20:.3g} MiB held by the engine")
    return lines
