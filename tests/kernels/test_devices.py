"""Devices are compared by index, and "cuda" alone is the current GPU; the GPUs are pretended."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastlangevin as fl
from fastlangevin.gradients import fused_gpu
from fastlangevin.gradients.graph.conv_stack import ConvStack, conv_stack
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import extension
from fastlangevin.kernels.devices import indexed
from fastlangevin.learn.build import choose_device

CURRENT = 2


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, the third of them current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CURRENT)


def test_a_device_without_an_index_is_the_current_one(gpus: None) -> None:
    assert indexed(torch.device("cuda")) == torch.device("cuda", CURRENT)
    assert indexed(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert indexed(torch.device("cpu")) == torch.device("cpu")


def test_without_a_gpu_there_is_no_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert indexed(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize(("name", "index"), [("cuda", CURRENT), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_extension_is_asked_for_the_gpu_that_is_meant(
    name: str, index: int, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    library = SimpleNamespace(CUDA=True, cuda_reason=lambda i: asked.append(i) or f"GPU {i}")
    monkeypatch.setattr(extension, "library", library)
    monkeypatch.setattr(torch.version, "hip", None)
    extension._cuda_reason.cache_clear()
    try:
        assert extension.available(torch.device(name)) == f"GPU {index}"
    finally:
        extension._cuda_reason.cache_clear()
    assert asked == [index]


@pytest.mark.parametrize(
    ("weights", "states", "fits"),
    [
        ("cuda:0", "cuda:0", True),
        ("cuda:0", "cuda:1", False),
        ("cuda:0", "cuda", False),
        (f"cuda:{CURRENT}", "cuda", True),
        ("cpu", "cuda:0", False),
    ],
)
def test_the_fused_engine_wants_weights_and_states_on_one_gpu(
    weights: str, states: str, fits: bool, gpus: None
) -> None:
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device(weights))
    conv: Any = SimpleNamespace(
        groups=1, dilation=(1, 1), stride=(1, 1), activation=SimpleNamespace(kind="relu"),
        weight=weight,
    )  # fmt: skip
    reason = fused_gpu._refused(conv, torch.device(states))
    assert reason == (None if fits else f"its weights are on {weights}, the states on {states}")


def test_a_stack_on_the_states_own_device_is_not_refused_for_it() -> None:
    graph = recognise(fl.ConvEnergy(1, 8, 4), torch.zeros(2, 1, 8, 8))
    assert not isinstance(graph, str)
    stack = conv_stack(graph)
    assert isinstance(stack, ConvStack)
    assert all(fused_gpu._refused(conv, torch.device("cpu")) is None for conv in stack.convs)


@pytest.mark.parametrize(("name", "index"), [("cuda", CURRENT), ("auto", CURRENT), ("cuda:1", 1)])
def test_a_run_goes_to_the_current_gpu(name: str, index: int, gpus: None) -> None:
    assert choose_device(name) == torch.device("cuda", index)
