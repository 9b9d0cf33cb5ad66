"""Energies and d energy / d x for a batch of chains by autograd, leaving all else as it is."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin.gradients.draws import ONE_AT_A_TIME, Draws
from fastlangevin.gradients.packing import PackedEnergy
from fastlangevin.gradients.precision import float32_products

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
    gradient is itself differentiable; x is then used as it is, else as a new leaf. Parameters keep
    their requires_grad: autograd computes only what leads to x, so no gradient of a parameter is
    formed. Raises TypeError or ValueError for an energy of wrong shape or dtype or one that ignores
    x, and as :class:`Network` does.
    """
    leaf = x if create_graph and x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad(), network_precision(precision, x.device):
        with network_autocast(precision, x.device):
            out = call_network(energy, leaf, model_kwargs)
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


class Network:
    """An energy or score network as a call's states enter it: in the state's dtype.

    So x enters as in a plain loop. A network that raises for this dtype, and whose floating
    parameters and buffers are all of one other dtype, takes no other: it is called with x in that,
    from then on. RuntimeError for one with several dtypes that raises says what can be done.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.dtype: torch.dtype | None = None  # where it is not the state's

    def __call__(self, x: Tensor, **model_kwargs: Any) -> Any:
        if self.dtype is not None:
            return self.call(x.to(self.dtype), **model_kwargs)
        try:
            return self.call(x, **model_kwargs)
        except RuntimeError as error:
            own = network_dtype(self.call, x.dtype)
            if own == x.dtype:
                raise _hinted(error, dtypes_of(self.call), x.dtype) from error
        out = self.call(x.to(own), **model_kwargs)
        self.dtype = own
        return out


def call_network(network: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """network(x, **model_kwargs) by a :class:`Network`."""
    network = network if isinstance(network, Network) else Network(network)
    return network(x, **model_kwargs)


def _hinted(error: RuntimeError, dtypes: set[torch.dtype], state: torch.dtype) -> RuntimeError:
    """The error; with a way out if it is torch's for tensors whose dtypes differ."""
    if not dtypes - {state} or not re.search(r"dtype|type .*(same|but)", str(error)):
        return error
    names = [str(dtype).removeprefix("torch.") for dtype in (state, *sorted(dtypes, key=str))]
    return RuntimeError(
        f"{error}. The network is given x in the state's dtype, {names[0]}, and has tensors of "
        f'{", ".join(names[1:])}: cast x inside the network, or use precision="bf16"'
    )


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


def network_dtype(network: Callable[..., Any], state: torch.dtype) -> torch.dtype:
    """The dtype of all floating parameters and buffers of a network, the state's if they differ."""
    dtypes = dtypes_of(network)
    return dtypes.pop() if len(dtypes) == 1 else state


def entering_dtype(
    network: Callable[..., Any], x: Tensor, model_kwargs: dict[str, Any]
) -> torch.dtype:
    """The dtype in which x enters a network, which is run to see it where it may not be x's."""
    if network_dtype(network, x.dtype) == x.dtype:
        return x.dtype
    entered = Network(network)
    with left_as_found(network, x.device), torch.no_grad():
        entered(x, **model_kwargs)
    return entered.dtype or x.dtype


def dtypes_of(network: Callable[..., Any]) -> set[torch.dtype]:
    """The floating dtypes of the parameters and buffers of the module behind a network."""
    return {
        tensor.dtype
        for module in modules_of(network)
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
    }


def check_precision(precision: str | None, device: torch.device | None = None) -> None:
    """ValueError unless the precision is one, and serves the device where one is given."""
    if precision not in PRECISIONS:
        raise ValueError(
            f'precision must be None, "fp32", "tf32", "fp16" or "bf16", got {precision!r}'
        )
    if device is not None and device.type == "cpu" and precision in ("tf32", "fp16"):
        raise ValueError(f'precision "{precision}" needs a CUDA device; on a CPU use "bf16"')


def network_precision(
    precision: str | None, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """For forward and backward: torch as it is set where precision is None, else no autocast, and
    float32 products strict ("fp32") or in TF32 ("tf32") on any device."""
    return contextlib.nullcontext() if precision is None else _precision(precision, device)


@contextlib.contextmanager
def _precision(precision: str, device: torch.device) -> Iterator[None]:
    products = {"fp32": "ieee", "tf32": "tf32"}.get(precision)
    with torch.autocast(device.type, enabled=False):
        if products is None:
            yield
            return
        with float32_products(products, device.type):
            yield


def network_autocast(
    precision: str | None, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """For the forward alone, as autocast wants it: the backward runs in its ops' own dtypes."""
    if precision not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


class Isolation:
    """Keeps the evaluations of an energy, in the steps of one call, from changing anything else.

    Random numbers come from generators of the call's own (:class:`Draws`, with its arguments seed
    and twice). Buffers of modules in train mode are put back after each step (:class:`Buffers`); a
    thread that samples with such modules waits for the steps of others. requires_grad flags are
    never touched.
    """

    def __init__(
        self,
        energy: Callable[..., Any],
        device: torch.device,
        seed: int | None = None,
        twice: bool = False,
    ) -> None:
        self.network = Network(energy)
        self._buffers = Buffers(energy)
        self._draws = Draws(seed, device, twice)

    def step(self, number: int = 0) -> contextlib.AbstractContextManager[None]:
        """A context to evaluate the energy in, at step ``number``: by one thread, not nested."""
        draws = self._draws.step(number)
        return self._exclusive(draws) if self._buffers.exist else draws

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """A context for a backward pass through steps that have been taken."""
        return self._draws.backward()

    @contextlib.contextmanager
    def _exclusive(self, draws: Draws) -> Iterator[None]:
        with ONE_AT_A_TIME, self._buffers.put_back(), draws:
            yield


class Buffers:
    """The buffers of an energy's modules in train mode, to be put back.

    BatchNorm's statistics and spectral norm's vectors change with every forward. Put back after
    each step, they leave no trace and make the energy the same function at every step. Another
    thread that trains the same module at that moment loses what it wrote to them: a module in train
    mode has one set of buffers.
    """

    def __init__(self, energy: Callable[..., Any]) -> None:
        self._modules = [
            module
            for root in modules_of(energy)
            for module in root.modules()
            if getattr(module, "training", False) and module._buffers  # frozen: no mode
        ]
        self.exist = bool(self._modules)
        self._values: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Put the buffers back as they are at the start, also when the energy raises."""
        found = [
            (module, name, buffer, self._value(buffer))
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            yield
        finally:
            for module, name, buffer, value in found:
                # .data: autograd must not count this as a change of a tensor that it saved.
                buffer.data.copy_(value)
                module._buffers[name] = buffer
                self._values[id(buffer)] = buffer, _version(buffer), value

    def _value(self, buffer: Tensor) -> Tensor:
        """A copy, which is that of the step before unless someone else has written since."""
        _, version, value = self._values.get(id(buffer), (None, None, None))
        if value is None or version is None or version != _version(buffer):
            return buffer.detach().clone()
        return value


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def left_as_found(
    energy: Callable[..., Any], device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Run an energy without a trace, also when it raises: buffers of modules in train mode are put
    back, and torch's generators do not move though the numbers drawn are those they would give."""
    return Isolation(energy, device).step()


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
