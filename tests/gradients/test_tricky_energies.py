"""Energies whose recording could differ from what they do: chains are those of their own code.

Every energy is made twice: one for a plain loop through autograd, one for the sampler. The ends
must agree, and so must what the runs leave in attributes, logs and globals.
"""

import copy
import functools
import itertools
import pickle
import random
import time
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlangevin as fl

K, STEP = 4, 0.4
SHAPE = (2, 4, 4)
GLOBAL: dict[str, Any] = {}
COUNT = 0
SETTINGS = types.SimpleNamespace(count=0)


class Net(nn.Module):
    """Curved in x, so that gradients differ from step to step; the body is the test's."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(48, 1)
        self.register_buffer("scale", torch.ones(()))
        self.calls, self.log, self.body = 0, [], body
        self.table = {"calls": 0}
        self.inner = types.SimpleNamespace(calls=0)
        self.array = np.zeros(2)
        self.eval()

    def e(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv(x)).flatten(1)).flatten()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.body(self, x, **kwargs)


def sized(size: int) -> Callable[[Net, Tensor], Tensor]:
    return lambda m, x: (2.0 if len(x) >= size else 1.0) * m.e(x)


def of_sizes(m: Net, x: Tensor) -> Tensor:
    return m.e(x) * {1: 1.0, 2: 0.5, 3: 3.0}.get(x.shape[0], 2.0)


def branch(read: Callable[[Tensor], Any]) -> Callable[[Net, Tensor], Tensor]:
    """A factor that depends on the values of x, read as the test says."""
    return lambda m, x: (1.0 + float(read(x.detach()) > 0)) * m.e(x)


def through_raw_memory(x: Tensor) -> float:
    import ctypes

    return ctypes.c_float.from_address(x.data_ptr()).value


def through_copy(x: Tensor) -> float:
    copied = copy.deepcopy(x)
    return copied.flatten()[0].item()


def attribute_counter(m: Net, x: Tensor) -> Tensor:
    m.calls += 1
    return m.e(x) * (1 + m.calls)


def table_counter(m: Net, x: Tensor) -> Tensor:
    m.table["calls"] += 1
    return m.e(x) * (1 + m.table["calls"])


def inner_counter(m: Net, x: Tensor) -> Tensor:
    m.inner.calls += 1
    return m.e(x) * (1 + m.inner.calls)


def array_counter(m: Net, x: Tensor) -> Tensor:
    m.array[0] += 1
    return m.e(x) * (1 + int(m.array[0]))


def list_log(m: Net, x: Tensor) -> Tensor:
    m.log.append(len(x))
    return m.e(x)


def growing_log(m: Net, x: Tensor) -> Tensor:
    m.log.append(len(x))
    return m.e(x) * len(m.log)


def kept_features(m: Net, x: Tensor) -> Tensor:
    m.last_shape = tuple(x.shape)
    return m.e(x)


def buffer_in_place(m: Net, x: Tensor) -> Tensor:
    m.scale.add_(1)
    return m.e(x) * float(m.scale)


def buffer_replaced(m: Net, x: Tensor) -> Tensor:
    m.scale = m.scale + 1
    return m.e(x)


def global_counter(m: Net, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return m.e(x) * (1 + COUNT)


def global_table(m: Net, x: Tensor) -> Tensor:
    GLOBAL["count"] = GLOBAL.get("count", 0) + 1
    return m.e(x) * GLOBAL["count"]


def global_object(m: Net, x: Tensor) -> Tensor:
    SETTINGS.count += 1
    return m.e(x) * SETTINGS.count


def class_counter(m: Net, x: Tensor) -> Tensor:
    type(m).total = getattr(type(m), "total", 0) + 1
    return m.e(x) * type(m).total


def function_counter(m: Net, x: Tensor) -> Tensor:
    function_counter.calls = getattr(function_counter, "calls", 0) + 1
    return m.e(x) * function_counter.calls


def with_closure() -> Callable[[Net, Tensor], Tensor]:
    count = 0

    def body(m: Net, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return m.e(x) * count

    return body


def with_closed_list() -> Callable[[Net, Tensor], Tensor]:
    seen: list[int] = []

    def body(m: Net, x: Tensor) -> Tensor:
        seen.append(1)
        return m.e(x) * len(seen)

    return body


def with_default(m: Net, x: Tensor, seen: list[int] | None = None) -> Tensor:
    assert seen is not None
    seen.append(1)
    return m.e(x) * len(seen)


def with_iterator() -> Callable[[Net, Tensor], Tensor]:
    numbers = itertools.count(1)
    return lambda m, x: m.e(x) * next(numbers)


def with_generator(make: Callable[[], Any]) -> Callable[[], Callable[[Net, Tensor], Tensor]]:
    def build() -> Callable[[Net, Tensor], Tensor]:
        draws = make()
        return lambda m, x: m.e(x) * float(draws.normal())

    return build


def by_clock(m: Net, x: Tensor) -> Tensor:
    GLOBAL["now"] = GLOBAL.get("now", time.perf_counter())
    return m.e(x) * (1 + (time.perf_counter() > GLOBAL["now"]))


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def hooked(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    h.register_hook(lambda grad: 2 * grad)
    return m.head(F.silu(h).flatten(1)).flatten()


def node_hooked(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    h.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    return m.head(F.silu(h).flatten(1)).flatten()


def swallowed(m: Net, x: Tensor) -> Tensor:
    try:
        factor = 1.0 + float(x.detach().mean() > 0)
    except Exception:
        factor = 5.0
    return factor * m.e(x)


def in_place(m: Net, x: Tensor) -> Tensor:
    h = x * 1.0
    h.mul_(2.0)
    return m.e(h)


def by_detached(m: Net, x: Tensor) -> Tensor:
    return m.e(x) * x.detach().flatten(1).mean(1)


def by_data(m: Net, x: Tensor) -> Tensor:
    return m.e(x + x.data)


def square(m: Net, x: Tensor) -> Tensor:
    """Chains meet where there are as many of them as features."""
    h = m.conv(x).flatten(1)[:, :4]
    return m.e(x) + (h @ h if len(h) == 4 else h).sum(1)


def gram(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x).mean((2, 3))
    return m.e(x) + (h @ h.T).sum(1)


def reshaped(m: Net, x: Tensor) -> Tensor:
    """Four rows, whatever the number of chains: each is one chain's own where there are four."""
    h = torch.tanh(x.reshape(4, -1).mean(1))
    return m.e(x) + (h.reshape(len(x), -1).sum(1) if 4 % len(x) == 0 else h.sum() / len(x))


def swapped(m: Net, x: Tensor) -> Tensor:
    return m.e(x.transpose(0, 1) if x.shape[0] == x.shape[1] else x)


def drawn(m: Net, x: Tensor) -> Tensor:
    m.eval()
    return m.e(x) * (1 + (random.random() < 2))


TRICKY: dict[str, Callable[[], Callable[..., Tensor]]] = {
    **{f"twice from {n} chains on": (lambda n=n: sized(n)) for n in (2, 8)},
    "a factor per size": lambda: of_sizes,
    "mean over sizes": lambda: lambda m, x: m.e(x) / x.shape[0],
    "item": lambda: branch(lambda x: x.mean().item()),
    "bool": lambda: lambda m, x: 2 * m.e(x) if x.mean() > 0 else m.e(x),
    "tolist": lambda: branch(lambda x: x.flatten().tolist()[0]),
    "numpy": lambda: branch(lambda x: x.numpy().mean()),
    "asarray": lambda: branch(lambda x: np.asarray(x).mean()),
    "np.from_dlpack": lambda: branch(lambda x: np.from_dlpack(x).mean()),
    "to_dlpack": lambda: branch(
        lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)).mean().item()
    ),
    "data_ptr": lambda: branch(through_raw_memory),
    "storage": lambda: branch(lambda x: x.untyped_storage()[3] - 128),
    "tensor": lambda: branch(lambda x: torch.tensor(x[0, 0, 0, 0].detach()).item()),
    "deepcopy": lambda: branch(through_copy),
    "pickle": lambda: branch(lambda x: pickle.loads(pickle.dumps(x)).mean().item()),
    "text": lambda: branch(lambda x: float(f"{x.mean():.6f}")),
    "attribute": lambda: attribute_counter,
    "table": lambda: table_counter,
    "object": lambda: inner_counter,
    "array": lambda: array_counter,
    "log": lambda: list_log,
    "growing log": lambda: growing_log,
    "kept features": lambda: kept_features,
    "buffer in place": lambda: buffer_in_place,
    "buffer replaced": lambda: buffer_replaced,
    "global": lambda: global_counter,
    "global table": lambda: global_table,
    "global object": lambda: global_object,
    "class": lambda: class_counter,
    "function": lambda: function_counter,
    "closure": with_closure,
    "closed list": with_closed_list,
    "default": lambda: functools.partial(with_default, seen=[]),
    "iterator": with_iterator,
    "numpy generator": with_generator(lambda: np.random.default_rng(0)),
    "old numpy generator": with_generator(lambda: np.random.RandomState(0)),
    "clock": lambda: by_clock,
    "random": lambda: drawn,
    "Function": lambda: lambda m, x: Half.apply(m.e(x)),
    "hook": lambda: hooked,
    "hook of a node": lambda: node_hooked,
    "swallowed": lambda: swallowed,
    "in place": lambda: in_place,
    "detached": lambda: by_detached,
    "data": lambda: by_data,
    "mean over chains": lambda: lambda m, x: m.e(x - x.mean(0)),
    "softmax over chains": lambda: lambda m, x: m.e(x) + m.e(x).softmax(0),
    "square": lambda: square,
    "gram": lambda: gram,
    "reshaped": lambda: reshaped,
    "swapped": lambda: swapped,
    "rolled": lambda: lambda m, x: m.e(x.roll(1, 0)),
}
PLAIN: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda m, x: m.e(x),
    "constants": lambda m, x: 0.5 * m.e(2 * x) / (1.0 + len(m.table)),
    "squeezed": lambda m, x: m.head(F.silu(m.conv(x)).flatten(1)).squeeze(),
    "local list": lambda m, x: [h := [], h.append(m.e(x)), h[0] + h[0]][2],
    "per size": lambda m, x: m.e(x) / x.shape[0],
    "twice from four": sized(4),
}


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    _reset()
    yield
    _reset()


def _reset() -> None:
    global COUNT
    COUNT = SETTINGS.count = 0
    GLOBAL.clear()
    vars(function_counter).clear()
    if "total" in vars(Net):
        del Net.total


def left(m: Net) -> tuple[Any, ...]:
    """What runs may have left in attributes and globals."""
    attributes = {k: v for k, v in vars(m).items() if k in ("calls", "log", "table", "last_shape")}
    total = vars(Net).get("total"), vars(function_counter).get("calls")
    return (
        attributes, vars(m.inner), m.array.tolist(), m.scale.item(), COUNT, SETTINGS.count,
        dict.fromkeys(GLOBAL), GLOBAL.get("count"), total,
    )  # fmt: skip


def plain_loop(energy: Callable[..., Tensor], x0: Tensor, **kwargs: Any) -> Tensor:
    x = x0.clone()
    for _ in range(K):
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf, **kwargs).sum(), leaf)
        x = x - STEP * grad
    return x


def states(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n))


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, steps=K, step_size=STEP, noise_std=0.0, **options)


def run_both(make: Callable[[], Any], n: int) -> str:
    """Compare a sampler with the plain loop; the name of the score that served."""
    x0, one = states(n), Net(make())
    untouched = copy.deepcopy(left(one))
    want = plain_loop(one, x0)
    marks = copy.deepcopy(left(one))
    assert n == 1 or (want - x0).norm() > 1e-3
    _reset()
    two = Net(make())
    run = sampler(two)
    got = run(x0, seed=0)
    found = copy.deepcopy(left(two))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    name = run.choose_engine(x0, {}).name
    assert found == (marks if name == "autograd" else untouched)
    return name


# All sizes where these matter; one chain, as many as channels and as many as `reshaped` has rows
# where chains meet. What an energy keeps or reads does not depend on their number.
ALL_SIZES, SIZES = (1, 2, 8), (1, 2, 4)
MEETING = list(TRICKY)[list(TRICKY).index("mean over chains") :]


def sizes_of(name: str) -> tuple[int, ...]:
    if "size" in name or "twice" in name:
        return ALL_SIZES
    return SIZES if name in MEETING else (SIZES[list(TRICKY).index(name) % 3],)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRICKY)
def test_chains_and_marks_are_those_of_the_energys_own_code(name: str) -> None:
    for n in sizes_of(name):
        _reset()
        run_both(TRICKY[name], n)


@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN)
def test_engines_serve_code_of_other_people_that_keeps_nothing(body: Callable) -> None:
    for n in ALL_SIZES:
        assert run_both(lambda: body, n) != "autograd"


class Power(nn.Module):
    """A power whose exponent is a buffer, which may change between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.register_buffer("exponent", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.linear(x)).pow(self.exponent).sum(1)


def test_an_exponent_that_is_a_tensor_is_read_again() -> None:
    torch.manual_seed(0)
    energy, x = Power(), torch.randn(4, 3)
    for exponent in (2.0, 3.0):
        energy.exponent.fill_(exponent)
        ours, theirs = (
            fl.LangevinSampler(energy, 3, 0.1, 0.0, gradient=gradient)(x)
            for gradient in ("auto", "autograd")
        )
        torch.testing.assert_close(ours, theirs)
    sampler = fl.LangevinSampler(energy, 3, 0.1, 0.0)
    two = sampler(x)
    energy.exponent.fill_(1.0)
    assert not torch.allclose(sampler(x), two)


def test_torch_may_evaluate_types_during_a_run() -> None:
    """Up to Python 3.12 typing_extensions replaces a function that this calls by one of its own."""
    code = "import typing\ndef evaluate(): return typing.Union[typing.Sequence[int], str]"
    of_torch: dict[str, Any] = {}
    exec(compile(code, torch.__file__, "exec"), of_torch)

    def energy(x: Tensor) -> Tensor:
        for clear_cache in typing._cleanups:
            clear_cache()
        of_torch["evaluate"]()
        return F.silu(x).sum(1)

    assert "gradient   explicit" in fl.LangevinSampler(energy, 2).explain(torch.ones(4, 3))
