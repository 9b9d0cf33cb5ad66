"""Run an unmodified loop with chosen noise; record its gradients, their states, its result."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlangevin.gradients.autograd import leaves_of, nodes_of
from fastlangevin.testing.measure import buffers_of

OP = "compare"
BufferCopies = list[tuple[nn.Module, str, Tensor]]


class Record(TorchFunctionMode):
    """Replaces a loop's normal numbers by z [K, n, ...] and records its gradients and their states.

    At each gradient it also records the buffers of those of ``modules`` that are in eval mode, with
    which the next evaluation begins. (A sampler restores buffers in train mode after every step.)
    The first ``skip`` draws are left to the loop.
    """

    def __init__(self, z: Tensor, skip: int, modules: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.modules = modules
        self.buffers: list[BufferCopies] = []
        self.z, self.shape, self.skip = z, z.shape[1:], skip
        self.draws = 0
        self.points: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return self._grad(func, args, kwargs)
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(func, args, kwargs)
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like", "normal", "normal_"):
            self._supply_noise(name, out, args, kwargs)
        return out

    def _supply_noise(
        self, name: str, out: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        if not isinstance(out, Tensor) or out.shape not in (self.shape, self.z.shape):
            return
        if out.shape == self.z.shape:  # the noise of all steps at once
            z = self.z
            self.draws += len(z)
        else:
            k, self.draws = self.draws - self.skip, self.draws + 1
            if not 0 <= k < len(self.z):
                return
            z = self.z[k]
        mean, std = 0.0, 1.0
        if name.startswith("normal"):
            moments = args[name == "normal_" :]
            mean = kwargs.get("mean", moments[0] if moments else mean)
            std = kwargs.get("std", moments[1] if len(moments) > 1 else std)
        with torch.no_grad():
            out.copy_(z.to(out.dtype) * std + mean)

    def _grad(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        index = next((i for i, x in enumerate(inputs) if x.shape == self.shape), None)
        if index is None:
            return func(*args, **kwargs)
        self._record_state(inputs[index])
        grads = func(*args, **kwargs)
        self._record_grad(grads[index])
        return grads

    def _backward(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        root = args[0] if args else kwargs["tensors"]
        roots = (root,) if isinstance(root, Tensor) else tuple(root)
        leaves = [leaf for out in roots for leaf in leaves_of(nodes_of(out))]
        x = next((leaf for leaf in leaves if leaf.shape == self.shape), None)
        if x is None:
            return func(*args, **kwargs)
        self._record_state(x)
        before = 0 if x.grad is None else x.grad.detach().clone()
        func(*args, **kwargs)
        assert x.grad is not None
        self._record_grad(x.grad.detach() - before)
        return None

    def _record_state(self, x: Tensor) -> None:
        self.points.append(x.detach().clone())
        self.buffers.append(snapshot(self.modules))

    def _record_grad(self, grad: Tensor | None) -> None:
        self.grads.append(None if grad is None else grad.detach().clone())


def snapshot(modules: Sequence[nn.Module]) -> BufferCopies:
    """Copy the buffers of the modules that are in eval mode."""
    return [
        (module, name, buffer.detach().clone())
        for module, name, buffer in buffers_of(modules)
        if not getattr(module, "training", False)
    ]


def replay(buffers: BufferCopies) -> None:
    """Write the buffers that a :class:`Record` has copied back to their modules."""
    for module, name, value in buffers:
        module._buffers[name].data.copy_(value)  # type: ignore[union-attr]


def follow(
    loop: Callable[[], Any], z: Tensor, ours: Tensor, modules: Sequence[nn.Module] = ()
) -> tuple[Tensor, Record]:
    """Run a loop and return (x_K, its record).

    A loop may draw more often than it steps, before its first step: for its start, or to allocate
    memory. It is then run a second time with its first draws left to itself, and the run that is
    closer to ``ours`` counts.
    """

    def run(skip: int) -> tuple[Tensor, Record]:
        with Record(z, skip, modules) as record:
            out = loop()
        return state(out, z.shape[1:]), record

    runs = [run(skip=0)]
    extra = runs[0][1].draws - len(z)
    if extra > 0:
        runs.append(run(skip=extra))
    return min(runs, key=lambda run: distance(run[0], ours))


def state(out: Any, shape: Sequence[int]) -> Tensor:
    """Find the last state in what a run returned."""
    if isinstance(out, list):
        out = out[::-1]
    for value in out if isinstance(out, list | tuple) else (out,):
        if isinstance(value, Tensor) and value.shape == shape:
            return value.detach()
        if isinstance(value, Tensor) and value.shape[1:] == shape and len(value):
            return value[-1].detach()
    raise ValueError(f"{OP}: a run must return states of shape {list(shape)}, got {described(out)}")


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite if either has a NaN."""
    differences = (a.to(b.device, torch.float64) - b.to(torch.float64)).abs()
    return float(differences.nan_to_num(nan=torch.inf).max()) if differences.numel() else 0.0


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return type(value).__name__
