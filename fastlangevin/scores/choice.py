"""Which score a call runs with: the fastest that computes what the energy's own code would."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import all_in_memory, in_memory
from fastlangevin.packing import PackedEnergy
from fastlangevin.scores import fused_cpu, fused_gpu
from fastlangevin.scores.compiled import CompiledScore
from fastlangevin.scores.compiled import refusal as compiled_refusal
from fastlangevin.scores.general import modules_of
from fastlangevin.scores.lean import LeanScore
from fastlangevin.scores.network import Graph
from fastlangevin.scores.precision import convolutions_use_tf32
from fastlangevin.scores.recorder import recognise
from fastlangevin.scores.stack import conv_stack

SCORES = ("auto", "general", "lean", "fused", "compiled", "network")
# Batches of this many shapes are planned for at a time; each holds a copy of the weights.
_PLANS = 4
_PARTS = "the state has several parts"
_NOT_HERE = "not in memory (fake, meta, or of a torch.func transform)"


class Score(Protocol):
    """Energies and input gradients of batches of one shape."""

    def begin(self) -> None:
        """Read the weights, before a chain."""

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """(energies [n] or None, d energy / d x) of x [n, ...]."""

    def held_bytes(self) -> int | None:
        """What is held between calls and during them at most, beside the gradient, if known."""


class Choice(NamedTuple):
    """The score of a call: ``run`` (None for autograd and score networks), and why none faster."""

    name: str
    run: Score | None
    why_not: dict[str, str]
    graph: Graph | None = None


class Recognised:
    """What a sampler remembers of its energy between calls: its graph, and plans made from it."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._plans: dict[tuple[Any, ...], Score] = {}
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

    def plan(self, make: Callable[[], Score], *key: Any) -> Score:
        """The plan of this key, made where there is none."""
        plan = self._plans.pop(key, None) or make()
        self._plans[key] = plan
        if len(self._plans) > _PLANS:
            self._plans.pop(next(iter(self._plans)))
        return plan


def check_score(score: str) -> None:
    """ValueError unless the name is a score's."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")


def choose_score(
    score: str,
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
) -> Choice:
    """The score for chains like x [n, ...]. One asked for by name that cannot run: RuntimeError."""
    if score in ("general", "network"):
        return Choice(score, None, {})
    why_not: dict[str, str] = {}
    if score == "compiled":
        reason = _PARTS if isinstance(energy, PackedEnergy) else None
        reason = reason or compiled_refusal(energy, model_kwargs)
        if reason is None:
            run = known.plan(
                lambda: CompiledScore(energy, precision), "compiled", precision, id(energy)
            )
            return Choice("compiled", run, why_not)
        raise RuntimeError(f'LangevinSampler: score "compiled" cannot run: {reason}')
    graph = recognised(energy, x, precision, model_kwargs, known)
    if isinstance(graph, str):
        if score != "auto":
            raise RuntimeError(f'LangevinSampler: score "{score}" cannot run: {graph}')
        return Choice("general", None, {"fused, lean": graph})
    if any(base.grad_fn is not None for base in graph.bases):
        known = Recognised()  # functional_call's weights: nothing of them outlives the call
    if score != "lean":
        fused = _fused(graph, x, precision, known, by_name=score == "fused")
        if not isinstance(fused, str):
            return Choice("fused", fused, why_not, graph)
        if score == "fused":
            raise RuntimeError(f'LangevinSampler: score "fused" cannot run: {fused}')
        why_not["fused"] = fused
    lean = known.plan(
        lambda: LeanScore(graph, x, precision),
        "lean", x.shape, precision, torch.backends.mkldnn.enabled,
    )  # fmt: skip
    return Choice("lean", lean, why_not, graph)


def _fused(
    graph: Graph, x: Tensor, precision: str | None, known: Recognised, by_name: bool
) -> Score | str:
    """The score by kernels of our own, or why there is none."""
    stack = conv_stack(graph)
    if isinstance(stack, str):
        return stack
    chains, device = x.shape[0], x.device
    if device.type == "cpu":
        reason = fused_cpu.refusal(stack, x, precision)
        if reason is not None:
            return reason
        return known.plan(
            lambda: fused_cpu.ConvNetScore(graph, chains, precision),
            "native", chains, precision, torch.get_num_threads(),
            extension.library.instruction_set(),
        )  # fmt: skip
    if precision is None and graph.dtype == torch.float32:
        precision = "tf32" if convolutions_use_tf32() else "fp32"
    precision = precision or {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(graph.dtype)
    reason = fused_gpu.refusal(stack, device, precision)
    if reason is None and not by_name:
        reason = fused_gpu.OFF
    if reason is not None:
        return reason
    assert precision is not None
    score = known.plan(
        lambda: fused_gpu.FusedScore(stack, chains, device, precision),
        "triton", chains, precision,
    )  # fmt: skip
    assert isinstance(score, fused_gpu.FusedScore)
    score.stack = stack  # the weights may have moved
    return score


def recognised(
    energy: Callable[..., Tensor],
    x: Tensor,
    precision: str | None,
    model_kwargs: dict[str, Any],
    known: Recognised,
) -> Graph | str:
    """The graph that lean and fused scores run, or why there is none."""
    if model_kwargs:
        return f"the energy is given {', '.join(model_kwargs)}"
    if isinstance(energy, PackedEnergy):
        return _PARTS
    if not in_memory(x):
        return f"the state is {_NOT_HERE}"
    if precision is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        return "autocast is on" + (f'; precision="{name}" needs no autocast' if name else "")
    graph = known.graph(energy, x)
    here = isinstance(graph, str) or all_in_memory(*graph.bases)
    return graph if here else f"a parameter or buffer is {_NOT_HERE}"


def _levels_to_the_caller() -> int:
    """How far up the stack, from the function that calls this one, the sampler was called."""
    package, frame, levels = __name__.partition(".")[0] + ".", sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(package):
        frame, levels = frame.f_back, levels + 1
    return levels


def warn_of_modes(energy: Callable[..., Tensor]) -> bool:
    """Warn of modules whose train mode makes a chain another one than is meant; True if any."""
    found = []
    for root in modules_of(energy):
        for name, module in root.named_modules():
            called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            if not getattr(module, "training", False):  # torch.jit.freeze leaves no mode
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
            stacklevel=_levels_to_the_caller(),
        )
    return bool(found)
