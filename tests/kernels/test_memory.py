"""Tensors without memory of their own: they never reach compiled code, and shapes come out right.

Each kind either runs as torch's own operators run it or is refused by name.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import fastlangevin as fl
from fastlangevin.kernels import extension
from fastlangevin.kernels.memory import in_memory
from fastlangevin.kernels.signs import apply_signs_, pack_signs
from fastlangevin.step import bind_step, resolve_backend

SHAPE = (2, 3)
VALUES = torch.linspace(-1.0, 1.0, 6).view(SHAPE)
CPU = torch.device("cpu")
STEP: dict[str, Any] = {"step_size": 0.1, "noise_std": 0.1, "seed": 0, "step": 0}


class Named(Tensor):
    """A subclass that changes no operator: its memory is that of any tensor."""


class Wrapper(Tensor):
    """A subclass that holds a tensor, and has no memory of its own."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapper":
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda w: w.held, (args, kwargs or {}))
        return func(*args, **kwargs)


def freed() -> Tensor:
    tensor = VALUES.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


# Of these the values are VALUES, or 0.
VALUED: dict[str, Callable[[], Tensor]] = {
    "negated": lambda: torch._neg_view(-VALUES),
    "zeros that are not written": lambda: torch._efficientzerotensor(SHAPE),
    "subclass with operators": lambda: Wrapper(VALUES.clone()),
}
REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "COO": (lambda: VALUES.to_sparse(), "strided tensor, got layout torch.sparse_coo"),
    "CSR": (lambda: VALUES.to_sparse_csr(), "strided tensor, got layout torch.sparse_csr"),
    "oneDNN": (lambda: VALUES.to_mkldnn(), "strided tensor, got layout torch._mkldnn"),
    "nested": (lambda: torch.nested.nested_tensor(list(VALUES)), "got a nested tensor"),
    "quantised": (
        lambda: torch.quantize_per_tensor(VALUES, 0.1, 0, torch.qint8),
        "floating dtype|must be of dtype",
    ),
}
OTHERS: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: VALUES.to("meta"),
    "fake": lambda: fake(),
}


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(shape or SHAPE)


def test_no_memory() -> None:
    refused = {name: make for name, (make, _) in REFUSED.items()}
    for name, make in (VALUED | refused | OTHERS).items():
        assert not in_memory(make()), name


def test_memory() -> None:
    for tensor in (
        VALUES,
        VALUES.t(),
        VALUES.bfloat16(),
        VALUES.to(torch.uint8),
        torch.nn.Parameter(VALUES.clone()),
        VALUES.as_subclass(Named),
        VALUES[:0],
        torch.zeros(0),
        torch.zeros(2, 3, dtype=torch.complex64),
    ):
        assert in_memory(tensor), tensor
        with torch.inference_mode():
            assert in_memory(tensor.clone())


def test_tensors_of_transforms_have_no_memory() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.extend((in_memory(x), in_memory(torch.empty_like(x))))
        return x.sum()

    vmap(look)(VALUES)
    torch.func.grad(look)(VALUES)
    jvp(look, (VALUES,), (VALUES,))
    functionalize(look)(VALUES)
    assert seen == [False] * 8


def test_freed_memory_is_an_error_by_name() -> None:
    with pytest.raises(RuntimeError, match="storage was freed"):
        in_memory(freed())
    with pytest.raises(RuntimeError, match="storage was freed"):
        fl.langevin_step_(freed(), None, **STEP)


@pytest.mark.parametrize("name", ["grad", "noise", "step_size", "noise_std"])
@pytest.mark.parametrize("make", VALUED.values(), ids=VALUED)
def test_a_step_reads_values_wherever_they_are(make: Callable[[], Tensor], name: str) -> None:
    coefficient = name in ("step_size", "noise_std")
    odd = make()[:, 0].abs() if coefficient else make()
    plain = torch.zeros(odd.shape) + odd
    z = VALUES.flip(0)  # given: the native normals are not the reference's bit for bit

    def step(operand: Tensor, backend: str) -> Tensor:
        options = {"noise": z} | STEP | {name: operand}
        grad = options.pop("grad", VALUES)
        return fl.langevin_step_(torch.ones(SHAPE), grad, backend=backend, **options)

    for backend in ("auto", "native", "reference"):
        assert torch.equal(step(odd, backend), step(plain, "reference"))


@pytest.mark.parametrize("make", VALUED.values(), ids=VALUED)
def test_a_bound_step_reads_gradients_wherever_they_are(make: Callable[[], Tensor]) -> None:
    options: dict[str, Any] = dict.fromkeys(("clamp", "grad_clip"))
    options |= {"seed": 0, "first_chain": 0, "maximize": False, "noise_last": False}
    results = []
    for backend in ("native", "reference"):
        x = torch.ones(SHAPE)
        bind_step(resolve_backend(backend, CPU), x, **options)(make(), 0.1, 0.0, 0)
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_are_not_strided_are_refused(make: Callable[[], Tensor], message: str) -> None:
    for backend in ("auto", "native", "reference"):
        for grad, noise in ((None, None), (make(), None), (None, make())):
            x = make() if grad is None and noise is None else VALUES.clone()
            with pytest.raises(TypeError, match=message):
                fl.langevin_step_(x, grad, noise=noise, backend=backend, **STEP)
    sampler = fl.LangevinSampler(lambda x: x.square().sum(1), 1)
    with pytest.raises(TypeError, match=r"x0 must be .*got .*x0\.(to_dense|unbind|float)\("):
        sampler(make(), seed=0)
    with pytest.raises(TypeError, match=f"noise must be .*({message})"):
        sampler(VALUES, noise=make(), seed=0)


def test_steps_under_transforms_are_those_of_each_batch() -> None:
    x = torch.stack([VALUES, VALUES.flip(0)]).view(2, 1, 2, 3, 1)
    want = torch.stack([fl.langevin_step_(v.clone(), v, backend="reference", **STEP) for v in x])

    def step(v: Tensor) -> Tensor:
        return fl.langevin_step_(v.clone(), v, **STEP)

    assert torch.allclose(vmap(step)(x), want, rtol=0, atol=1e-6)
    assert torch.allclose(functionalize(step)(x[0]), want[0], rtol=0, atol=1e-6)
    assert torch.allclose(make_fx(step)(x[0])(x[0]), want[0], rtol=0, atol=1e-6)
    value, tangent = jvp(lambda v: fl.langevin_step_(v * 1, v, **STEP), (x[0],), (x[0],))
    assert torch.allclose(value, want[0], rtol=0, atol=1e-6)
    assert torch.allclose(tangent, 0.9 * x[0])


def test_noise_under_transforms_is_the_noise() -> None:
    want = fl.noise.normal(SHAPE, seed=0, step=0)

    def shifted(x: Tensor) -> Tensor:
        return x + fl.noise.normal(SHAPE, seed=0, step=0)

    zeros = torch.zeros(2, *SHAPE)
    recorded = make_fx(shifted, tracing_mode="fake")(zeros[0])
    assert torch.allclose(recorded(zeros[0]), want, rtol=0, atol=2e-6)
    assert torch.allclose(functionalize(shifted)(zeros[0]), want, rtol=0, atol=2e-6)
    assert torch.allclose(vmap(shifted)(zeros), want.expand(2, *SHAPE), rtol=0, atol=2e-6)


NOISE: dict[str, Callable[..., Tensor]] = {
    "normal": fl.noise.normal,
    "uniform": fl.noise.uniform,
    "words": lambda shape, **address: fl.noise.words(shape, stream=0, **address),
}


@pytest.mark.parametrize("draw", NOISE.values(), ids=NOISE)
def test_noise_has_a_shape_where_it_has_no_values(draw: Callable[..., Tensor]) -> None:
    real = draw((2, 3, 5), seed=0, step=0)
    with FakeTensorMode():
        got = draw((2, 3, 5), seed=0, step=0)
        on_gpu = draw((2, 3, 5), seed=0, step=0, device="meta")
    on_meta = draw((2, 3, 5), seed=0, step=0, device="meta")
    for tensor in (got, on_gpu, on_meta):
        assert (tensor.shape, tensor.dtype) == (real.shape, real.dtype)
    assert on_meta.is_meta


METHODS: dict[str, Callable[[fl.LangevinSampler, Tensor], Any]] = {
    "call": lambda s, x: s(x, seed=0),
    "without a seed": lambda s, x: s(x),
    "from the prior": lambda s, x: s(n=2, seed=0),
    "trajectory": lambda s, x: s.trajectory(x, seed=0),
    "diagnose": lambda s, x: s.diagnose(x, seed=0).grad_norm,
    "explain": lambda s, x: torch.zeros(len(s.explain(x)) * 0),
    "unrolled": lambda s, x: s(x, seed=0, differentiable=True, checkpoint="none"),
    "gradient": lambda s, x: torch.autograd.grad(
        s(x, seed=0, differentiable=True, checkpoint=2).sum(), next(s.energy.parameters())
    )[0],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient": "autograd"},
    {"noise_order": "before", "grad_clip": ("chain_norm", 1.0), "clamp": (-1, 1)},
]


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        (("fake", "meta")[j % 2], method, SETTINGS[j % len(SETTINGS)])
        for j, method in enumerate(METHODS.values())
    ],
)
def test_a_chain_of_shapes(
    kind: str, method: Callable[[fl.LangevinSampler, Tensor], Any], settings: dict[str, Any]
) -> None:
    """A sampler gives the shapes and dtypes that it gives of real tensors."""

    def run(device: str) -> Tensor:
        with torch.device(device):
            energy, x0 = fl.ConvEnergy(1, 8, 4), torch.zeros(2, 1, 8, 8)
        return method(fl.LangevinSampler(energy, 2, **settings), x0)

    want = run("cpu")
    if kind == "fake":
        with FakeTensorMode():
            got = run("cpu")
    else:
        got = run("meta")
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("gradient", ["explicit", "fused"])
def test_an_engine_asked_for_by_name_says_what_it_needs(gradient: str) -> None:
    with FakeTensorMode():
        sampler = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), 2, gradient=gradient)
        with pytest.raises(RuntimeError, match="the state is not in memory"):
            sampler(torch.zeros(2, 1, 8, 8), seed=0)


def test_adjusted_chains_and_score_networks_of_shapes() -> None:
    with FakeTensorMode():
        x0 = torch.zeros(2, 1, 8, 8)
        adjusted = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), 2, metropolis=True, clamp=(-1, 1))
        network = fl.LangevinSampler.from_score(torch.nn.Conv2d(1, 1, 3, padding=1), 2)
        per_chain = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), 2, step_size=torch.ones(2))
        for sampler in (adjusted, network, per_chain):
            assert sampler(x0, seed=0).shape == x0.shape


def test_weights_whose_memory_was_freed_are_an_error_by_name() -> None:
    """As FSDP leaves parameters between its calls; a graph that is known would read them."""
    sampler = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4), 2)
    x0 = torch.zeros(2, 1, 8, 8)
    sampler(x0, seed=0)
    next(sampler.energy.parameters()).data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        sampler(x0, seed=0)


def test_signs_of_tensors_without_memory() -> None:
    bits = pack_signs(VALUES)
    assert torch.equal(pack_signs(torch._efficientzerotensor(SHAPE)), torch.zeros_like(bits))
    with FakeTensorMode():
        values = torch.zeros(SHAPE)
        found = pack_signs(values)
        assert (found.shape, found.dtype) == (bits.shape, bits.dtype)
        assert apply_signs_(values, found, 0.2).shape == values.shape


class Watched:
    """The extension, with a check of the addresses that its functions receive."""

    def __init__(self, library: Any) -> None:
        self.library, self.calls = library, 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        if name not in ("langevin_step", "fill_noise", "pack_signs", "apply_signs"):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if name == "langevin_step":
                written = kwargs["x"][0] if kwargs else args[1][0]
            else:
                written = args[0]
            assert written != 0, name
            return function(*args, **kwargs)

        return call


@pytest.mark.skipif(extension.library is None, reason="the extension is not built")
def test_compiled_code_is_given_no_null(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(extension.library)
    monkeypatch.setattr(extension, "library", watched)

    def run(values: Tensor) -> None:
        fl.langevin_step_(values.clone(), values, **STEP)
        fl.noise.normal(SHAPE, seed=0, step=0)
        apply_signs_(values.clone(), pack_signs(values), 0.2)

    run(VALUES)
    assert watched.calls == 4
    with FakeTensorMode():
        run(torch.zeros(SHAPE))
    assert watched.calls == 4
    functionalize(lambda v: fl.langevin_step_(v.clone(), v, **STEP))(VALUES)
    vmap(lambda v: fl.langevin_step_(v.clone(), v, **STEP))(VALUES[None])
