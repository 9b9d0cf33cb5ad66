"""The plan of a call as readable text: what will run, on what, and why nothing faster."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlangevin.adjoint.unroll import explain as explain_gradients
from fastlangevin.chain.chain import Chain
from fastlangevin.gradients.autograd import check_precision, device_of
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.gradients.select import Choice
from fastlangevin.inputs import copy_state
from fastlangevin.roofline import HALVES, copy_bandwidth, cost, matrix_rate
from fastlangevin.step import backend_status, choose_backend

if TYPE_CHECKING:
    from fastlangevin.sampler import LangevinSampler

_ORDER_TEXT = {
    "after": "noise together with the gradient step",
    "before": "noise before the gradient is taken",
    "last": "noise after the clamp",
}
_SCORE_TEXT = {
    "general": "forward and input gradient by autograd",
    "lean": "an explicit forward and input gradient, no gradient of weights, no graph",
    "fused": "the same in kernels of our own, a few chains through the whole network at a time",
    "compiled": "forward and input gradient as one graph, by torch.compile",
    "network": "the output of the network itself; no energies",
}
# Part of the rate of torch's matrix products that a chain reaches, in float32 and on the CPU, as
# measured for the paper's networks of width 16 to 64 at batch 64 with AVX2 and with AVX-512.
_EXPECTED = {"general": (0.3, 0.8), "lean": (0.4, 1.0), "fused": (0.55, 1.0)}


def explain(sampler: "LangevinSampler", x0: Tensor | None) -> str:
    """The plan of a call from x0, or from what is known without it. Raises as a call does."""
    if x0 is not None:
        copy_state("LangevinSampler", x0, sampler.energy)
    device = device_of(sampler.energy) or torch.device("cpu") if x0 is None else x0.device
    check_precision(sampler.precision, device)
    backend = choose_backend(sampler.backend, device)
    lines = [
        f"chain      {sampler.steps} steps, "
        f"{_direction(sampler)}, "
        f"{_ORDER_TEXT[sampler.noise_order]}"
        + (", accepted or rejected (MALA)" if sampler.metropolis else ""),
        *_explain_score(sampler, x0, device),
        f"update     backend {backend} on {device}; reference with differentiable=True",
    ]
    lines += [
        f"           not {name}: {reason}"
        for name, reason in backend_status(device).items()
        if reason is not None
    ]
    if x0 is not None:
        state = x0.numel() * (8 if x0.dtype == torch.float64 else 4)
        lines.append(f"state      {list(x0.shape)}, {state / 2**20:.1f} MiB")
        if sampler.metropolis:
            lines.append("gradients  not through steps that are accepted or rejected")
        elif x0.shape[0]:
            start, chain = sampler._prepare(x0, seed=0)
            lines += explain_gradients(chain, start)
    return "\n".join(lines)


def _direction(sampler: "LangevinSampler") -> str:
    if sampler.score == "network":
        return "along the score" if sampler.maximize else "against the network's output"
    return "ascending f" if sampler.maximize else "descending E"


def _explain_score(
    sampler: "LangevinSampler", x0: Tensor | None, device: torch.device
) -> list[str]:
    precision = f"precision {sampler.precision or 'as torch is set'}"
    shape = getattr(sampler.energy, "shape", None)
    x = x0
    if x0 is None and shape is not None:
        x = torch.zeros((1, *shape), dtype=torch.float32, device=device)
    if x is None:
        known = sampler.score in ("general", "compiled", "network")
        text = _SCORE_TEXT[sampler.score] if known else "depends on the state's shape; give x0"
        return [f"score      {sampler.score}: {text}, {precision}"]
    choice = sampler.choose_score(x, {})
    lines = [f"score      {choice.name}: {_SCORE_TEXT[choice.name]}, {precision}"]
    lines += [f"           not {name}: {why}" for name, why in choice.why_not.items()]
    if x0 is not None and x0.shape[0] and choice.name != "network":
        found = choice.graph or recognise(sampler.energy, x0)
        graph = None if isinstance(found, str) else found
        lines += _explain_cost(choice._replace(graph=graph), x0, sampler.precision)
    state = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    chain = Chain(sampler, 0, 0, 0, None, {})
    lines.append(f"graph      {sampler._graphs.explain(chain, state, choice)}")
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
        lines.append(f"memory     about {held / 2**20:.3g} MiB held by the score")
    return lines
