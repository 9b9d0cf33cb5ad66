"""A stand-in for CUDA graphs: a tape of the operators that a CPU runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastlangevin as fl
from fastlangevin.chain.cuda_graphs import Graphs
from fastlangevin.gradients.layers import Activation
from fastlangevin.kernels import reference

CPU = torch.device("cpu")
K = 3
SHAPE = (2, 3, 8, 8)


def numbers(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(activation: str = "silu") -> fl.ConvEnergy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fl.ConvEnergy(size=8, width=4, activation=activation)


def is_chain(run: Callable[[], None]) -> bool:
    """Whether what is recorded is a chain, and not the packing of an engine's weights."""
    return run.__name__ != "begin"


class _Taping(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.detach.default:
            return out  # no launch: a graph would not see that its tensor has moved
        self.calls.append((op, args, kwargs or {}, out))
        return out


class Tape:
    """What a CUDA graph does, in operators and steps: nothing in Python is run again."""

    device_type = "cpu"
    calls: list[Any] | None = None  # of the tape that is being made

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, run: Callable[[], None], device: torch.device, shared_with: Any) -> Any:
        run()
        tape = Tape()
        Tape.calls = tape.calls = []
        try:
            with _Taping(tape.calls):
                run()
        finally:
            Tape.calls = None
        self.made += is_chain(run)
        return tape, 2**20

    def replay(self) -> None:
        assert self.calls
        for op, args, kwargs, out in self.calls:
            new = op(*args, **kwargs)
            if isinstance(out, Tensor):
                out, new = (out,), (new,)
            pairs = zip(out, new, strict=True) if isinstance(out, tuple | list) else ()
            for old, value in pairs:
                if (
                    old is not None
                    and old.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
                ):
                    old.copy_(value)  # not a view, nor what was changed in place


class Rerun:
    """For kernels that a tape does not see: Python is run again."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, run: Callable[[], None], device: torch.device, shared_with: Any) -> Any:
        run()
        self.made += is_chain(run)
        again = Rerun()
        again.replay = run
        return again, 0

    replay: Callable[[], None]


def taped_step_(x: Tensor, grad: Tensor | None, z: Tensor | None, **kwargs: Any) -> Tensor:
    """The step of a backend that reads ``rng_state``: interpreted, Triton's takes half a second.

    Its numbers come from ``fl.noise``, since the reference's own generator is as slow as a network.
    """
    if Tape.calls is not None:
        Tape.calls.append((taped_step_, (x, grad, z), dict(kwargs), x))
    with _disable_current_modes():
        rng_state = kwargs.pop("rng_state", None)
        if rng_state is not None:
            kwargs["seed"] = int(rng_state[0]) % 2**64
            kwargs["step"] += int(rng_state[1])
        if z is None and not reference.is_zero(kwargs["noise_std"]):
            address = {name: kwargs[name] for name in ("seed", "step", "first_chain")}
            z = fl.noise.normal(x.shape, device=x.device, **address)
        return reference.step_(x, grad, z, **kwargs)


class OnCuda(Activation):
    """Keeps what it would on a GPU: signs are packed by a kernel that no tape sees."""

    def __init__(self, node: Any, device: torch.device, wanted: bool) -> None:
        super().__init__(node, torch.device("cuda"), wanted)


as_on_cuda = pytest.mark.usefixtures("_as_on_cuda")
DEFAULTS: dict[str, Any] = {
    "steps": K, "step_size": 0.5, "noise_std": 0.05, "gradient": "explicit", "backend": "triton",
}  # fmt: skip


def plain(energy: nn.Module, **options: Any) -> fl.LangevinSampler:
    """A sampler of chains that are not recorded."""
    return fl.LangevinSampler(energy, **DEFAULTS | options)


def recorded(energy: nn.Module, record: Any = None, **options: Any) -> fl.LangevinSampler:
    run = plain(energy, **options)
    run._graphs = Graphs(record or Tape())
    return run


def made(run: fl.LangevinSampler) -> int:
    return run._graphs._record.made


def line(run: fl.LangevinSampler, x: Tensor) -> str:
    (found,) = (row for row in run.explain(x).split("\n") if row.startswith("graph "))
    return found.removeprefix("graph").strip()


def branched() -> nn.Module:
    """Values read by two, linear layers, and a part of the gradient that is the same everywhere."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 2, 2, bias=False)
            self.line = nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.silu(self.one(x)) + x
            return self.line(self.two(h).flatten(1)).flatten() + nn.functional.silu(x).sum(
                (1, 2, 3)
            )

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Energy()


def by_optimiser(energy: nn.Module) -> None:
    for parameter in energy.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    torch.optim.SGD(energy.parameters(), lr=1.0).step()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "an optimiser": by_optimiser,
    "values through .data": lambda e: [p.data.mul_(-1.5) for p in e.parameters()],
    "a swap of .data": lambda e: [setattr(p, "data", -p.data.flip(0)) for p in e.parameters()],
    "a loaded state": lambda e: e.load_state_dict({k: -v for k, v in e.state_dict().items()}),
}
