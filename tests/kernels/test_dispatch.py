"""Who runs a step: the choice of a backend, and the op that torch.compile sees."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels import native, reference
from fastlangevin.kernels import triton_backend as triton
from fastlangevin.step import backend_status, choose_backend, resolve_backend
from tests.backends import SERVING
from tests.pairwise import pairwise

CPU = torch.device("cpu")
OP = torch.ops.fastlangevin.langevin_step_.default


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(device: torch.device, *values: Any) -> list[Any]:
    """The values, those of them that are tensors on the device."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


# The choice --------------------------------------------------------------------------------------


def test_every_backend_resolves_to_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "available", lambda device: None)
    assert resolve_backend("triton", CPU) is triton.step_
    monkeypatch.setattr(native, "available", lambda device: None)
    assert resolve_backend("native", CPU) is native.step_
    assert resolve_backend("reference", CPU) is reference.step_


REASONS = {
    "no triton": ("cuda", None, "triton is not installed; pip install triton"),
    "no triton to interpret": ("cpu", None, "triton is not installed; pip install triton"),
    "no interpreter": ("cpu", "0", "on a CPU it runs interpreted.*TRITON_INTERPRET=1"),
    "no kernels": ("mps", "0", "its kernels are for CUDA and ROCm devices, not mps"),
    "no device": ("cuda", "0", "torch sees no CUDA device"),
}


@pytest.mark.parametrize(("device", "interpret", "match"), REASONS.values(), ids=REASONS)
def test_why_triton_cannot_run(
    monkeypatch: pytest.MonkeyPatch, device: str, interpret: str | None, match: str
) -> None:
    """interpret: what TRITON_INTERPRET says, None for a machine without Triton."""
    monkeypatch.setattr(triton, "_installed", lambda: interpret is not None)
    monkeypatch.setenv("TRITON_INTERPRET", interpret or "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f'backend "triton" cannot run on {device}: {match}'):
        choose_backend("triton", torch.device(device))
    assert backend_status(torch.device(device))["reference"] is None


def test_importing_the_package_imports_no_triton_and_asks_for_no_device() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; torch.cuda.is_available = None\n"
        "import fastlangevin as fl\n"
        "x = fl.langevin_step_(torch.zeros(2, 3), None, step_size=0, noise_std=1, seed=0, step=0)\n"
        "assert x.all()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The op ------------------------------------------------------------------------------------------

POSITIONAL = (0.3, None, 0.1, None, -1, 5, 2**32 - 4, None, None, "element", False, False)
SAMPLES = {
    "plain": (None, *POSITIONAL),
    "given noise": (numbers(4, 3, 5, 7, seed=2), *POSITIONAL),
    "per chain": (None, 0.0, torch.rand(4), 0.0, torch.rand(4), *POSITIONAL[4:]),
    "all": (None, *POSITIONAL[:7], [-0.9, 0.8], 5.0, "chain_norm", True, True),
}


@pytest.mark.parametrize(
    ("name", "place", "with_grad"),
    pairwise(SAMPLES, SERVING, [True, False]),
    ids=str,
)
def test_opcheck(name: str, place: tuple[str, torch.device], with_grad: bool) -> None:
    """Schema, mutation, fake tensors and dynamic shapes, by torch's own check."""
    backend, device = place
    grad = numbers(4, 3, 5, 7, seed=1) if with_grad else None
    x, *others = moved(device, numbers(4, 3, 5, 7), grad, *SAMPLES[name])
    results = torch.library.opcheck(OP, (x, *others, backend))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


def test_the_op_takes_the_seeds_bits(backend: str, device: torch.device) -> None:
    """Schemas know no unsigned integers: -1 stands for 2**64 - 1."""
    x, grad = moved(device, numbers(4, 5), numbers(4, 5, seed=1))
    want = x.clone()
    OP(x, grad, None, *POSITIONAL, backend)
    address = {"seed": 2**64 - 1, "step": 5, "first_chain": 2**32 - 4}
    fl.langevin_step_(want, grad, step_size=0.3, noise_std=0.1, backend=backend, **address)
    assert torch.equal(x, want)


# torch.compile -----------------------------------------------------------------------------------


def walk(x: Tensor, seed: int, step: int, step_size: Any, **options: Any) -> Tensor:
    """A function that uses x before the step, after it, and what the step returns."""
    before = 2 * x
    moved = fl.langevin_step_(
        x, before, step_size=step_size, noise_std=0.1, seed=seed, step=step, **options
    )
    return before + 3 * moved + x


OPTIONS: dict[str, dict[str, Any]] = {
    "norm clip": {"clamp": (-0.9, 0.8), "grad_clip": ("batch_norm", 2.0), "maximize": True,
                  "noise": numbers(4, 3, 5, 7, seed=2)},
    "noise last": {"clamp": (-0.9, 0.8), "grad_clip": 0.5, "noise_last": True, "first_chain": 3},
}  # fmt: skip


@pytest.fixture
def compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(walk, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "per_chain", "place"),
    [
        (*(("norm clip", True), ("noise last", False))[i % 2], place)
        for i, place in enumerate(SERVING)
    ],
    ids=str,
)
def test_compiled_functions_match(
    compiled: Callable[..., Tensor], name: str, per_chain: bool, place: tuple[str, torch.device]
) -> None:
    """The backend is an argument of the op like any other."""
    backend, device = place
    options = dict(zip(OPTIONS[name], moved(device, *OPTIONS[name].values()), strict=True))
    step_size = torch.rand(4, device=device) if per_chain else 0.3
    x, y = moved(device, numbers(4, 3, 5, 7), numbers(4, 3, 5, 7))
    got = compiled(x, 3, 5, step_size, backend=backend, **options)
    assert torch.equal(got, walk(y, 3, 5, step_size, backend=backend, **options))
    assert torch.equal(x, y)


def test_the_op_takes_any_strides_so_that_inductor_copies_no_gradient() -> None:
    assert torch.Tag.flexible_layout in OP.tags


@pytest.mark.slow
def test_inductor(backend: str, device: torch.device) -> None:
    """Above all that ``before`` is not computed again from the moved x."""
    import torch._functorch.config
    import torch._inductor.config  # takes seconds

    torch._dynamo.reset()
    compiled = torch.compile(walk, fullgraph=True)
    x, y = moved(device, numbers(4, 3, 5, 7), numbers(4, 3, 5, 7))
    # Cached code would hide what a change of the op's registration does.
    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        got = compiled(x, 3, 5, 0.3, backend=backend, clamp=(-0.9, 0.8))
    torch.testing.assert_close(got, walk(y, 3, 5, 0.3, backend=backend, clamp=(-0.9, 0.8)))
    assert torch.equal(x, y)


def test_a_loop_over_steps_and_seeds_is_compiled_a_few_times(
    compiled: Callable[..., Tensor],
) -> None:
    """Steps, seeds and values of tensors are data; seeds in the upper half are, too."""
    counts = []
    for step in range(12):
        x, y = numbers(4, 5), numbers(4, 5)
        seed, step_size = 7 * step + (2**63 if step % 4 == 3 else 0), torch.tensor(0.1 * step)
        assert torch.equal(compiled(x, seed, step, step_size), walk(y, seed, step, step_size))
        assert torch.equal(x, y)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[7]


def test_errors_of_compiled_functions(
    compiled: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and options when it is compiled, values when it runs, before x is touched."""
    x, before = numbers(4, 5), numbers(4, 5)
    with pytest.raises(Exception, match=r"seed must be in \[0, 2\*\*64\), got -1"):
        compiled(x, -1, 5, 0.1)
    with pytest.raises(Exception, match=r"one value per chain \[4\], got shape \[3\]"):
        compiled(x, 3, 5, torch.rand(3))
    with pytest.raises(ValueError, match=r"step_size must be finite and >= 0, got -2\.0"):
        compiled(x, 3, 5, torch.tensor([1.0, -2.0, 1.0, 1.0]))
    monkeypatch.setattr(triton, "available", lambda device: "it is switched off")
    with pytest.raises(RuntimeError, match='"triton" cannot run on cpu: it is switched off'):
        compiled(x, 3, 5, 0.1, backend="triton")
    assert torch.equal(x, before)


def test_gradients_that_require_grad_leave_the_state_without() -> None:
    x, grad = numbers(4, 5), numbers(4, 5, seed=1).requires_grad_()
    fl.langevin_step_(x, grad, step_size=0.3, noise_std=0.1, seed=0, step=0)
    assert not x.requires_grad
    assert x.grad_fn is None
