"""The score: energies and d energy / d x for a batch of chains, leaving the energy as it was."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin import noise as _noise
from fastlangevin.kernels.devices import indexed
from fastlangevin.packing import PackedEnergy

PRECISIONS = (None, "fp32", "tf32", "fp16", "bf16")
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def energy_and_grad(
    energy: Callable[..., Tensor],
    x: Tensor,
    model_kwargs: dict[str, Any],
    precision: str | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """(energies [n], d energy / d x in x's shape) of a batch x [n, ...] through autograd.

    The energy may return [n], [n, 1], [n, 1, 1, 1] or, for n = 1, []. With ``create_graph`` the
    gradient is itself differentiable; x is then used as it is, else as a new leaf. Raises
    TypeError or ValueError for an energy of wrong shape or dtype or one that ignores x.
    """
    leaf = x if create_graph and x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad(), network_precision(precision, x.device):
        with network_autocast(precision, x.device):
            out = energy(leaf.to(network_dtype(energy, x.dtype)), **model_kwargs)
        energies = check_energies(out, x.shape)
        (grad,) = torch.autograd.grad(
            energies.sum(), leaf, create_graph=create_graph, allow_unused=True
        )
    if grad is None:
        raise ValueError(
            "energy: its output does not depend on x, so there is no gradient (quantised kernels "
            "have none)"
        )
    return energies if create_graph else energies.detach(), grad


def check_energies(out: Any, shape: Sequence[int]) -> Tensor:
    """An energy's output as [n], or TypeError / ValueError saying what it should have been.

    shape [n, ...]: of the batch that it was given.
    """
    chains = shape[0]
    if not isinstance(out, Tensor):
        hint = ""
        if isinstance(out, list | tuple | dict):
            hint = "; wrap it in a module whose forward returns the energies among them"
        elif isinstance(out, nn.Module):
            hint = "; of a function that makes an energy give what it returns"
        raise TypeError(f"energy: must return a tensor, got {type(out).__name__}{hint}")
    if not out.is_floating_point():
        raise TypeError(f"energy: must return a floating dtype, got {out.dtype}")
    if out.numel() != chains or (out.ndim > 0 and out.shape[0] != chains):
        raise ValueError(
            f"energy: must return one value per chain, [{chains}] or [{chains}, 1] or "
            f"[{chains}, 1, 1, 1], got shape {list(out.shape)}"
            + (
                "; a network of x's shape is a score: LangevinSampler.from_score"
                * (out.shape == shape)
            )
        )
    if not out.requires_grad:
        raise ValueError(
            "energy: its output does not depend on x through autograd (was it detached, or "
            "computed under torch.no_grad or by kernels for inference?)"
        )
    return out.reshape(chains)


def network_dtype(energy: Callable[..., Tensor], state: torch.dtype) -> torch.dtype:
    """The dtype x enters the energy in: that of its parameters, where they have one.

    A module that casts by itself, and needs x as it is, says so: ``takes_state_dtype = True``.
    """
    for module in modules_of(energy):
        if getattr(module, "takes_state_dtype", False):
            return state
        for tensor in module.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
    return state


def check_precision(precision: str | None, device: torch.device | None = None) -> None:
    """ValueError unless the precision is one, and serves the device where one is given."""
    if precision not in PRECISIONS:
        raise ValueError(
            f'precision must be None, "fp32", "tf32", "fp16" or "bf16", got {precision!r}'
        )
    if device is not None and device.type == "cpu" and precision in ("tf32", "fp16"):
        raise ValueError(f'precision "{precision}" needs a CUDA device; on a CPU use "bf16"')


@contextlib.contextmanager
def network_precision(precision: str | None, device: torch.device) -> Iterator[None]:
    """For forward and backward: TF32 as asked, no autocast; None leaves torch as it is set."""
    with contextlib.ExitStack() as stack:
        if precision is not None:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if precision in ("fp32", "tf32") and device.type == "cuda":
            stack.enter_context(_tf32(precision == "tf32"))
        yield


def network_autocast(
    precision: str | None, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """For the forward alone, as autocast wants it: the backward runs in its ops' own dtypes."""
    if precision not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Buffers:
    """The buffers of an energy's modules in train mode, as they were found.

    BatchNorm's statistics and spectral norm's vectors change with every forward. Put back after
    each step, they leave no trace and make the energy the same function at every step.
    """

    def __init__(self, energy: Callable[..., Tensor]) -> None:
        self._found = [
            (module, name, buffer, buffer.detach().clone())
            for root in modules_of(energy)
            for module in root.modules()
            if getattr(module, "training", False)  # torch.jit.freeze leaves no mode
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def put_back(self) -> None:
        for module, name, buffer, value in self._found:
            # .data: autograd must not count this as a change of a tensor that it saved.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextlib.contextmanager
def left_as_found(
    energy: Callable[..., Tensor], device: torch.device, freeze: bool = True
) -> Iterator[Buffers]:
    """Run an energy without a trace, also when it raises.

    With ``freeze`` its parameters do not require grad meanwhile. Torch's generators and the
    :class:`Buffers` that it yields are put back.
    """
    modules = modules_of(energy)
    # torch.func.functional_call may have put tensors in their place that are no leaves: those stay.
    found = [p for m in modules for p in m.parameters() if _freezes(p)]
    frozen = found if freeze else []
    buffers = Buffers(energy)
    with kept_generators(device):
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield buffers
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            buffers.put_back()


def _freezes(p: Tensor) -> bool:
    return p.requires_grad and p.is_leaf and not p.is_inference()


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put torch's generators of the CPU and of a device back as they were."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seed_generators(device: torch.device, seed: int, step: int) -> None:
    """Seed torch's generators for one step, so that dropout, too, is a function of the seed."""
    for generator in _generators(device):
        generator.manual_seed(_noise.fold_in(seed, step))


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[indexed(device).index]]


def modules_of(energy: Callable[..., Tensor]) -> tuple[nn.Module, ...]:
    """The module behind an energy: a module, its bound method, a partial or packing of either."""
    while isinstance(energy, functools.partial | PackedEnergy):
        energy = energy.func
    owner = getattr(energy, "__self__", energy)
    return (owner,) if isinstance(owner, nn.Module) else ()


def device_of(energy: Callable[..., Tensor]) -> torch.device | None:
    """The device of the energy's first parameter or buffer, None where it has neither."""
    for module in modules_of(energy):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return None
