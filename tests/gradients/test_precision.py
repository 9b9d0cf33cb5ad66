"""Torch's precision switches: "fp32" is strict, and all are put back, whatever API set them."""

import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlangevin import LangevinSampler
from fastlangevin.gradients import precision
from fastlangevin.gradients.precision import network_precision

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="torch before 2.9 has the old switches only")
LEAVES = list(itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")))


def products(wanted: str, device: str) -> AbstractContextManager[None]:
    with warnings.catch_warnings(record=True):  # autocast warns where there is no CUDA device
        return network_precision({"ieee": "fp32"}.get(wanted, wanted), torch.device(device))


def old_matmul(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def old_flag(place: Any, value: bool) -> Callable[[], None]:
    return lambda: setattr(place, "allow_tf32", value)


def new(backend: str, op: str, value: str) -> Callable[[], None]:
    return lambda: precision._set(backend, op, value)


def settings() -> dict[str, list[Callable[[], None]]]:
    """What users may have set before a call, by name."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    single = {
        "nothing": [],
        "matmul high": [old_matmul("high")],
        "matmul medium": [old_matmul("medium")],
        "cuda.matmul.allow_tf32": [old_flag(matmul, True)],
        "no cudnn.allow_tf32": [old_flag(cudnn, False)],
    }
    if not NEW:
        return single
    for value in ("ieee", "tf32", "bf16"):
        single[f"generic {value}"] = [new("generic", "all", value)]
    for (backend, op), value in itertools.product(LEAVES, ("none", "ieee", "tf32", "bf16")):
        if backend == "mkldnn" or value != "bf16":
            single[f"{backend} {op} {value}"] = [new(backend, op, value)]
    pairs = itertools.product(("matmul medium", "generic tf32", "cuda all ieee"), list(single))
    mixed = {f"{a}, {b}": single[a] + single[b] for a, b in pairs}
    return single | mixed


SETTINGS = settings()


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Each case begins with torch's own settings: those of cuDNN cannot be set again."""
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    if NEW:
        for backend, op in [("generic", "all"), *LEAVES]:
            precision._set(backend, op, "none")
    torch.backends.cudnn.allow_tf32 = True


def read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return "raises"


def all_switches() -> list[Any]:
    """Every switch of both APIs, and what each would be under other values of those above it."""
    found = [
        read(torch.get_float32_matmul_precision),
        read(lambda: torch.backends.cuda.matmul.allow_tf32),
        read(lambda: torch.backends.cudnn.allow_tf32),
    ]
    if not NEW:
        return found
    generic = precision._get("generic", "all")
    for value in ("none", "ieee", "tf32", "bf16", generic):
        precision._set("generic", "all", value)
        found += [precision._get(*leaf) for leaf in LEAVES]
    return found


def test_switches_are_set_and_put_back_whatever_they_were() -> None:
    for name in SETTINGS:
        check_switches(name)
        reset()


def check_switches(name: str) -> None:
    for act in SETTINGS[name]:
        act()
    before = all_switches()
    for device, wanted in itertools.product(("cpu", "cuda"), ("ieee", "tf32")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with products(wanted, device):
                assert precision._holds(wanted, device)
                with products("ieee", device):
                    assert precision._holds("ieee", device)
                assert precision._holds(wanted, device)
            precision.switches()
            precision.convolutions_use_tf32()
        assert all_switches() == before, (device, wanted)


@needs_new
def test_a_value_set_above_later_is_inherited_as_before() -> None:
    for leaf in LEAVES:
        precision._set(*leaf, "none")
    torch.backends.fp32_precision = "tf32"
    with products("ieee", "cuda"), products("ieee", "cpu"):
        pass
    torch.backends.fp32_precision = "ieee"
    assert {precision._get(*leaf) for leaf in LEAVES} == {"ieee"}


def test_overlapping_calls_share_the_switches_and_the_last_puts_them_back() -> None:
    torch.set_float32_matmul_precision("medium")
    before, first, second = all_switches(), threading.Event(), threading.Event()

    def other() -> None:
        with products("ieee", "cpu"):
            first.set()
            second.wait(20)

    thread = threading.Thread(target=other)
    with products("ieee", "cpu"):
        thread.start()
        first.wait(20)
    assert precision._holds("ieee", "cpu")
    second.set()
    thread.join()
    assert all_switches() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_the_switches_of_the_user() -> None:
    torch.set_float32_matmul_precision("medium")
    before = all_switches()
    with products("ieee", "cpu"):
        child = os.fork()
        if child == 0:
            os._exit(0 if all_switches() == before else 1)
        assert os.waitpid(child, 0)[1] == 0


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 36, 1))


class Products(TorchDispatchMode):
    """Notes whether float32 products are strict at every product that is computed."""

    OPS = ("convolution", "convolution_backward", "addmm", "mm", "mkldnn_convolution")

    def __init__(self) -> None:
        super().__init__()
        self.strict: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname.strip("_").startswith(self.OPS):
            self.strict.append(precision._holds("ieee", "cpu"))
        return func(*args, **(kwargs or {}))


RUNS: dict[str, Callable[[LangevinSampler, Tensor], Any]] = {
    "call": lambda run, x0: run(x0, seed=0),
    "differentiable": lambda run, x0: run(x0, seed=0, differentiable=True).sum().backward(),
    "unrolled": lambda run, x0: (
        run(x0, seed=0, differentiable=True, checkpoint="none").sum().backward()
    ),
    "diagnose": lambda run, x0: run.diagnose(x0, seed=0),
}


@pytest.mark.parametrize(
    ("run", "gradient", "name"),
    [
        ("call", "autograd", "matmul medium"),
        ("call", "explicit", "generic bf16" if NEW else "matmul medium"),
        ("differentiable", "autograd", "mkldnn conv tf32" if NEW else "matmul medium"),
        ("differentiable", "explicit", "matmul medium"),
        ("unrolled", "explicit", "generic bf16" if NEW else "matmul medium"),
        ("diagnose", "explicit", "mkldnn conv tf32" if NEW else "matmul medium"),
    ],
)
def test_fp32_is_strict_on_the_cpu_too(run: str, gradient: str, name: str) -> None:
    for act in SETTINGS[name]:
        act()
    assert not precision._holds("ieee", "cpu")
    sampler = LangevinSampler(net(), steps=2, precision="fp32", gradient=gradient)
    x0 = torch.zeros(2, 2, 8, 8, requires_grad=run != "diagnose")
    sampler(x0)  # which may record what the energy computes, and keeps that
    with Products() as products:
        RUNS[run](sampler, x0)
    assert len(products.strict) > 2
    # The gradient of an unrolled chain is taken by the caller, after the call.
    assert all(products.strict) or run == "unrolled"


@pytest.mark.parametrize("value", [None, "bf16"])
def test_other_precisions_leave_the_switches_alone(value: str | None) -> None:
    torch.set_float32_matmul_precision("medium")
    with Products() as products:
        LangevinSampler(net(), steps=2, precision=value, gradient="autograd")(
            torch.zeros(2, 2, 8, 8)
        )
    assert products.strict
    assert not any(products.strict)
