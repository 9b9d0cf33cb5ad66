"""Gives an energy that draws random numbers, as dropout does, generators that belong to the call.

The numbers must be a function of (seed, step). Torch's global generators belong to the whole
process: if they were seeded for a step and restored after it, the numbers that other threads draw
in the meantime would repeat. Therefore the operators that draw get a generator of this module. They
are intercepted in torch's dispatcher by kernels under a dispatch key that no tensor has. The key is
enabled during a step, in the thread that takes it. All other operators fall through at no cost, and
other threads are not affected.

Two kinds of energies need the global generators themselves. The first handles them (manual_seed,
fork_rng, or torch.utils.checkpoint, which sets their state to draw the same numbers again). The
second has operators that take no generator, such as the fused dropout of CUDA. For these energies
the global generators are seeded and restored, by one thread at a time. This disturbs only threads
that draw from them outside this package, as such an energy does in any loop.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.kernels.devices import indexed
from fastlangevin.kernels.extension import watch_methods
from fastlangevin.locks import in_forked_child, new_lock, new_rlock

# The lock of a thread that changes what all threads share: torch's global generators, and the
# buffers of a module.
ONE_AT_A_TIME = new_rlock()

# Torch keeps this key for tests of its dispatcher: it registers no kernel under it, gives it to no
# tensor and enables it in no thread. tests/gradients/test_draws.py fails if torch begins to use it.
_KEY_NAME = "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._parse_dispatch_key(_KEY_NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)
_include_key = torch._C._dispatch_tls_set_dispatch_key_included
# Operators that draw but take no generator, with the argument that is 0 if they draw nothing.
_WITHOUT_GENERATOR = {
    "native_dropout": "p",
    "_cudnn_rnn": "dropout",
    "miopen_rnn": "dropout",
    "_flash_attention_forward": "dropout_p",
    "_efficient_attention_forward": "dropout_p",
    "_cudnn_attention_forward": "dropout_p",
    "_triton_scaled_dot_attention": "dropout_p",
    "_scaled_dot_product_flash_attention": "dropout_p",
    "_scaled_dot_product_efficient_attention": "dropout_p",
    "_scaled_dot_product_cudnn_attention": "dropout_p",
    "_scaled_dot_product_fused_attention_overrideable": "dropout_p",
}
_thread = threading.local()  # attribute draws: the Draws whose step this thread takes


class Draws:
    """The source of an energy's random numbers for the steps of one call.

    With a ``seed``, a step's numbers are those of torch's generators seeded with
    fold_in(seed, step). If it is None, they are the numbers that torch's generators would give
    next, and these generators do not advance. ``twice`` is for steps that are differentiated twice:
    attention then uses torch's "math" kernel, since the fused kernels have no second derivative.
    """

    def __init__(self, seed: int | None, device: torch.device, twice: bool = False) -> None:
        _register()
        self.twice = twice
        self._seed, self._device = seed, device
        self._generators: dict[torch.device, torch.Generator] = {}
        self._shares = False  # whether the energy needs the global generators
        self._watched = False
        self._number = 0
        self._before: Draws | None = None  # those of the step around this one
        self._undo: contextlib.ExitStack | None = None  # what a step must restore at its end

    def step(self, number: int) -> "Draws":
        """Return the context for step ``number``, for a single thread and not nested."""
        self._number = number
        return self

    def __enter__(self) -> None:
        self._generators.clear()
        self._before = getattr(_thread, "draws", None)
        _thread.draws = self
        if self._shares:
            self._share()
        elif not self._watched:
            self._watch()
        # Torch's guard for a key does the same in 2 us; a step of a small network takes 100.
        _include_key(_KEY, True)

    def __exit__(self, *_: Any) -> None:
        _include_key(_KEY, self._before is not None)
        _thread.draws = self._before
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a backward pass through steps that have been taken.

        torch.utils.checkpoint sets the state of the global generators in the backward pass too.
        """
        return ONE_AT_A_TIME if self._shares else contextlib.nullcontext()

    def generator(self, device: torch.device) -> torch.Generator:
        """Return this step's generator of a device; all devices have the same seed, as in torch."""
        device = indexed(device)
        if device not in self._generators:
            generator = self._generators[device] = torch.Generator(device=device)
            if self._seed is None:
                generator.set_state(_global_generator(device).get_state())
            else:
                generator.manual_seed(_noise.fold_in(self._seed, self._number))
        return self._generators[device]

    def draw(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes a generator, with this step's unless it was given one."""
        index, keyword = _generator_argument(op)
        passed = kwargs.get("generator") if keyword or len(args) <= index else args[index]
        device = _device(args, kwargs)
        if passed is None and not self._shares and device.type in ("cpu", "cuda"):
            kwargs = kwargs | {"generator": self.generator(device)}
            args = args if keyword else args[:index]
        return op(*args, **kwargs)

    def draw_from_global(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes no generator; if it draws, seed the global one first."""
        name = _WITHOUT_GENERATOR[op._opname]
        index = [argument.name for argument in op._schema.arguments].index(name)
        draws = args[index] if index < len(args) else kwargs.get(name, 0.0)
        if draws and not self._shares:
            self._share()
        return op(*args, **kwargs)

    def _share(self) -> None:
        """Make the global generators give this step's numbers until the step ends."""
        undo = self._undo = self._undo or contextlib.ExitStack()
        undo.enter_context(ONE_AT_A_TIME)
        undo.enter_context(kept_generators(self._device))
        for generator in _global_generators(self._device):
            generator.set_state(self.generator(generator.device).get_state())
        self._shares = True

    def _watch(self) -> None:
        """At a call's first step, notice an energy that uses the global generators itself."""
        self._watched = True
        if sys.getprofile() is not None:  # another profiler uses the only hook
            self._share()
            return
        self._undo = contextlib.ExitStack()
        self._undo.callback(sys.setprofile, None)
        watch_methods(_global_generators(self._device), self._on_generator)

    def _on_generator(self, caller: FrameType) -> None:
        """Notice a call of a method of a global generator, unless this module makes it."""
        if not self._shares and caller.f_globals is not globals():
            self._share()


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """On exit, restore the state of torch's generators of the CPU and of a device."""
    states = [(generator, generator.get_state()) for generator in _global_generators(device)]
    _saved_states[id(states)] = states
    try:
        yield
    finally:
        _saved_states.pop(id(states), None)
        for generator, state in states:
            generator.set_state(state)


_saved_states: dict[int, list[tuple[torch.Generator, Tensor]]] = {}  # of all threads, oldest first


def _restore_in_child() -> None:
    """Restore the generators in a forked child, which lacks the threads that changed them."""
    for states in reversed(list(_saved_states.values())):
        for generator, state in states:
            if generator.device.type == "cpu":  # CUDA cannot be used in a forked child
                generator.set_state(state)


in_forked_child(_restore_in_child)


def _global_generators(device: torch.device) -> list[torch.Generator]:
    cpu = torch.device("cpu")
    return [_global_generator(d) for d in ([cpu] if device.type != "cuda" else [cpu, device])]


def _global_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[indexed(device).index or 0]


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device that an operator draws on."""
    for value in (kwargs.get("out"), *args):
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


@functools.cache
def _generator_argument(op: Any) -> tuple[int, bool]:
    """Return the index of an operator's argument "generator", and whether it is keyword-only."""
    names = [argument.name for argument in op._schema.arguments]
    index = names.index("generator")
    return index, op._schema.arguments[index].kwarg_only


_registering = new_lock()
_libraries: list[torch.library.Library] = []  # torch drops the kernels of a deleted library


def _register() -> None:
    """Register the kernels with torch's dispatcher, once per process; the key enables them."""
    if _libraries:
        return
    with _registering:
        if _libraries:
            return
        rest = torch.library.Library("_", "IMPL", _KEY_NAME)
        rest.fallback(torch.library.fallthrough_kernel)
        library = torch.library.Library("aten", "IMPL", _KEY_NAME)
        for op in drawing_operators():
            library.impl(op, _kernel(op, Draws.draw))
        for name in _WITHOUT_GENERATOR:
            for op in _overloads(name):
                library.impl(op, _kernel(op, Draws.draw_from_global))
        library.impl(_ATTENTION, _attend, with_keyset=True)
        _libraries.extend((rest, library))


def drawing_operators() -> list[Any]:
    """Return all of torch's own operators that take a generator."""
    names = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
        and any(argument.name == "generator" for argument in schema.arguments)
    }
    overloads = [op for name in sorted(names) for op in _overloads(name)]
    return [op for op in overloads if any(a.name == "generator" for a in op._schema.arguments)]


def _overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def _kernel(op: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        # Autograd's threads for other devices inherit the key but not the draws.
        draws = getattr(_thread, "draws", None)
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return op(*args, **kwargs) if draws is None else run(draws, op, args, kwargs)

    return kernel


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _attend(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
    draws = getattr(_thread, "draws", None)
    if draws is not None and draws.twice:
        return torch.ops.aten._scaled_dot_product_attention_math.default(*args, **kwargs)[0]
    return _ATTENTION.redispatch(keys.remove(_KEY), *args, **kwargs)
