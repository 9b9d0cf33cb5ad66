"""The random numbers that an energy draws, from generators of the call's own.

An energy may draw (dropout, for instance). Its numbers are to be a function of (seed, step), and
torch's global generators belong to the whole process: were they seeded for a step and put back
after it, numbers that other threads draw meanwhile would repeat. So the operators that draw are
given a generator of ours. They are intercepted in torch's dispatcher, by kernels registered under a
dispatch key that no tensor has and that is switched on for a step, in the thread that takes it. All
other operators fall through at no cost, and other threads never come here.

Two kinds of energies need the global generators themselves: those that handle them (manual_seed,
fork_rng, torch.utils.checkpoint, which sets their state to draw the same numbers again), and those
with operators that take no generator (the fused dropout of CUDA). For these the global generators
are seeded and put back, by one thread at a time. Only threads that draw from them outside of this
package are then disturbed, as they are by such an energy in any loop.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.kernels.devices import indexed
from fastlangevin.locks import in_forked_child, new_lock, new_rlock

# Held by a thread while it changes what it cannot have for itself: torch's global generators, and
# the buffers of a module.
ONE_AT_A_TIME = new_rlock()

_KEY_NAME = "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._parse_dispatch_key(_KEY_NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)
# Operators that draw and take no generator, with the argument that is 0 where they draw nothing.
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
_thread = threading.local()  # draws: the Draws whose step this thread is taking


class Draws:
    """Where an energy's random numbers come from, for the steps of one call.

    seed: the numbers of a step are those that torch's generators give when seeded with
        fold_in(seed, step). None: those that they would give next, without their noticing.
    twice: the steps are differentiated twice, so attention is computed by torch's "math" kernel:
        the fused ones have no second derivative.
    """

    def __init__(self, seed: int | None, device: torch.device, twice: bool = False) -> None:
        self.twice = twice
        self._seed, self._device = seed, device
        self._own: dict[torch.device, torch.Generator] = {}
        self._shares = False  # whether the energy needs the global generators
        self._watched = False
        self._number = 0
        self._stack = contextlib.ExitStack()  # what a step has to put back at its end

    def step(self, number: int) -> "Draws":
        """A context to evaluate an energy in, at step ``number``: by one thread, not nested."""
        self._number = number
        return self

    def __enter__(self) -> None:
        _register()
        self._own.clear()
        self._before = getattr(_thread, "draws", None)
        _thread.draws = self
        if self._shares:
            self._share()
        elif not self._watched:
            self._watch()
        self._guard = torch._C._IncludeDispatchKeyGuard(_KEY)
        self._guard.__enter__()

    def __exit__(self, *_: Any) -> None:
        self._guard.__exit__(None, None, None)
        _thread.draws = self._before
        self._stack.close()

    def backward(self) -> contextlib.AbstractContextManager[Any]:
        """A context for a backward pass through steps already taken: torch.utils.checkpoint sets
        the state of the global generators there too."""
        return ONE_AT_A_TIME if self._shares else contextlib.nullcontext()

    def generator(self, device: torch.device) -> torch.Generator:
        """This step's generator of a device; two devices' are seeded alike, as torch's are."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._own:
            generator = self._own[device] = torch.Generator(device=device)
            if self._seed is None:
                generator.set_state(_global_generator(device).get_state())
            else:
                generator.manual_seed(_noise.fold_in(self._seed, self._number))
        return self._own[device]

    def draw(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes a generator, with one of ours unless it was given one."""
        place, keyword = _generator_argument(op)
        given = kwargs.get("generator") if keyword or len(args) <= place else args[place]
        device = _device(args, kwargs)
        if given is None and not self._shares and device.type in ("cpu", "cuda"):
            kwargs = kwargs | {"generator": self.generator(device)}
            args = args if keyword else args[:place]
        return op(*args, **kwargs)

    def draw_from_global(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes no generator, with the global one seeded if it draws."""
        name = _WITHOUT_GENERATOR[op._opname]
        place = [argument.name for argument in op._schema.arguments].index(name)
        draws = args[place] if place < len(args) else kwargs.get(name, 0.0)
        if draws and not self._shares:
            self._share()
        return op(*args, **kwargs)

    def _share(self) -> None:
        """Have the global generators give this step's numbers, from here to the step's end."""
        self._stack.enter_context(ONE_AT_A_TIME)
        self._stack.enter_context(kept_generators(self._device))
        for generator in _global_generators(self._device):
            generator.set_state(self.generator(generator.device).get_state())
        self._shares = True

    def _watch(self) -> None:
        """At a call's first step, see whether the energy handles the global generators itself."""
        self._watched = True
        if sys.getprofile() is not None:  # someone else's profiler has the only place there is
            self._share()
            return
        handled = _global_generators(self._device)

        def look(frame: Any, event: str, called: Any) -> None:
            if event == "c_call" and not self._shares and frame.f_globals is not globals():
                owner = getattr(called, "__self__", None)
                if isinstance(owner, torch.Generator) and any(owner is g for g in handled):
                    self._share()

        self._stack.callback(sys.setprofile, None)
        sys.setprofile(look)


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put torch's generators of the CPU and of a device back as they were."""
    kept = [(generator, generator.get_state()) for generator in _global_generators(device)]
    _kept[id(kept)] = kept
    try:
        yield
    finally:
        _kept.pop(id(kept), None)
        for generator, state in kept:
            generator.set_state(state)


_kept: dict[int, list[tuple[torch.Generator, Tensor]]] = {}  # of all threads, oldest first


def _put_back_in_child() -> None:
    """The threads that had changed the generators do not exist in a forked child."""
    for kept in reversed(list(_kept.values())):
        for generator, state in kept:
            if generator.device.type == "cpu":  # CUDA cannot be used in a forked child
                generator.set_state(state)


in_forked_child(_put_back_in_child)


def _global_generators(device: torch.device) -> list[torch.Generator]:
    cpu = torch.device("cpu")
    return [_global_generator(d) for d in ([cpu] if device.type != "cuda" else [cpu, device])]


def _global_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[indexed(device).index or 0]


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device that an operator draws on."""
    for value in (kwargs.get("out"), *args):
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


@functools.cache
def _generator_argument(op: Any) -> tuple[int, bool]:
    """The generator's place among an operator's arguments, and whether it is a keyword only."""
    names = [argument.name for argument in op._schema.arguments]
    place = names.index("generator")
    return place, op._schema.arguments[place].kwarg_only


# Registering ------------------------------------------------------------------------------------

_registering = new_lock()
_libraries: list[torch.library.Library] = []  # torch forgets kernels with the library they are in


def _register() -> None:
    """Register the kernels with torch's dispatcher, once in a process, where they are inert."""
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
    """All operators of torch's own that take a generator."""
    names = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
        and any(argument.name == "generator" for argument in schema.arguments)
    }
    found = [op for name in sorted(names) for op in _overloads(name)]
    return [op for op in found if any(a.name == "generator" for a in op._schema.arguments)]


def _overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def _kernel(op: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        # Autograd's own threads, which serve other devices, inherit the key but not the draws.
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
