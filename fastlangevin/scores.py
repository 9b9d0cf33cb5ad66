"""Which score a call runs with: the fastest that computes what the energy's own code would."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlangevin.lean import LeanScore
from fastlangevin.network import Graph
from fastlangevin.recorder import recognise
from fastlangevin.score import modules_of

SCORES = ("auto", "general", "lean", "fused", "compiled")
# Batches of this many shapes are planned for at a time; each holds a copy of the weights.
_PLANS = 4


class Choice(NamedTuple):
    """The score of a call: ``run`` (None for the general one), and why none faster."""

    name: str
    run: LeanScore | None
    why_not: dict[str, str]


class Recognised:
    """What a sampler remembers of its energy between calls: its graph, and plans made from it."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._plans: dict[tuple[Any, ...], LeanScore] = {}
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Recognised, ()  # a copy of a sampler starts anew

    def graph(self, energy: Callable[..., Tensor], x: Tensor) -> Graph | str:
        if self._graph is not None and self._graph.is_current(energy, x):
            return self._graph
        graph, before = recognise(energy, x), self._graph
        if isinstance(graph, str):
            self._graph = None
        else:
            self._graph = graph
        if before is not None and (isinstance(graph, str) or graph.key != before.key):
            self._plans.clear()
        return graph

    def lean(self, graph: Graph, x: Tensor, precision: str | None) -> LeanScore:
        key = x.shape, precision, torch.backends.mkldnn.enabled
        plan = self._plans.pop(key, None) or LeanScore(graph, x, precision)
        self._plans[key] = plan
        if len(self._plans) > _PLANS:
            self._plans.pop(next(iter(self._plans)))
        return plan


def check_score(score: str, device: torch.device | None = None) -> None:
    """ValueError unless the name is a score's; RuntimeError where none such serves the device."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if device is not None and score in _MISSING:
        raise RuntimeError(f'score "{score}" cannot run on {device}: {_MISSING[score]}')


_MISSING = {
    "fused": "this version has no fused kernels for convolutional stacks",
    "compiled": "this version does not compile energies",
}


def choose_score(
    score: str,
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
) -> Choice:
    """The score for chains like x [n, ...]. One asked for by name that cannot run: RuntimeError."""
    check_score(score, x.device)
    why_not = dict(_MISSING)
    if score == "general":
        return Choice("general", None, {})
    graph = _recognised(energy, x, precision, model_kwargs, known)
    if not isinstance(graph, str):
        return Choice("lean", known.lean(graph, x, precision), why_not)
    if score != "auto":
        raise RuntimeError(f'LangevinSampler: score "{score}" cannot run: {graph}')
    return Choice("general", None, why_not | {"lean": graph})


def _recognised(
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
) -> Graph | str:
    if model_kwargs:
        return f"the energy is given {', '.join(model_kwargs)}"
    if precision is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        return "autocast is on" + (f'; precision="{name}" needs no autocast' if name else "")
    return known.graph(energy, x)


def warn_of_modes(energy: Callable[..., Tensor]) -> bool:
    """Warn of modules whose train mode makes a chain another one than is meant; True if any."""
    found = []
    for root in modules_of(energy):
        for name, module in root.named_modules():
            called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            if not module.training:
                continue
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                found.append(f"{called} makes the energy another random function at every step")
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                found.append(f"{called} makes every chain depend on the others of its batch")
    if found:
        warnings.warn(
            f"LangevinSampler: in train mode {found[0]}"
            + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
            + "; energy.eval() samples from the energy itself",
            stacklevel=6,  # the sampler's caller
        )
    return bool(found)
