"""What a call may be given: it runs and is the plain loop's chain, or says what to do instead."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastlangevin as fl

N, K, SHAPE = 3, 3, (1, 6, 6)
OP = r"^LangevinSampler: "
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Linear(3 * 36, 1)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(0.3 * numbers(*p.shape, seed=i))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1)).flatten()


class Around(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X0, Z = numbers(N, *SHAPE, seed=10), numbers(K, N, *SHAPE, seed=11)


def sampler(energy: Any, **settings: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, steps=K, step_size=0.1, noise_std=0.1, **settings)


def loop(energy: Callable[..., Tensor], x: Tensor) -> Tensor:
    x = x.detach().float()
    for k in range(K):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(x).sum(), x)
        x = x - 0.1 * g + 0.1 * Z[k]
    return x.detach()


# What runs ----------------------------------------------------------------------------------------


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, X0)


ENERGIES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "a module": Net,
    "its forward": lambda: Net().forward,
    "a function": lambda: lambda x, net=Net(): net(x),  # noqa: B008
    "a partial": lambda: functools.partial(Net()),
    "scripted": lambda: torch.jit.script(Net()),
    "traced": lambda: traced(Net()),
    "frozen": lambda: torch.jit.freeze(traced(Net().eval())),
    "scripted and frozen": lambda: torch.jit.freeze(torch.jit.script(Net().eval())),
    "frozen, in a module": lambda: nn.Sequential(torch.jit.freeze(traced(Net().eval()))),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "compiled function": lambda: torch.compile(lambda x, net=Net(): net(x), backend="eager"),  # noqa: B008
    "DataParallel": lambda: nn.DataParallel(Net()),
    "symbolically traced": lambda: torch.fx.symbolic_trace(Net()),
    "exported": lambda: torch.export.export(Net(), (X0,)).module(),
    "without parameters": lambda: lambda x: x.square().flatten(1).sum(1),
    "requires no grad": lambda: Net().requires_grad_(False),
    "lazy, but run": lambda: run_once(nn.Sequential(nn.Flatten(), nn.LazyLinear(1))),
}


def run_once(net: nn.Module) -> nn.Module:
    net(X0)
    return net


@pytest.mark.parametrize(
    "name",
    # torch.export takes a second to import.
    [pytest.param(n, marks=pytest.mark.slow) if n == "exported" else n for n in ENERGIES],
)
def test_an_energy_of_any_make_runs(name: str) -> None:
    energy = ENERGIES[name]()
    want = loop(energy, X0)
    for call in (
        lambda: sampler(energy)(X0, noise=Z),
        lambda: sampler(energy).diagnose(X0, noise=Z).x,
        lambda: fl.presets.ebmkit(0.1, K, 0.1).sample(energy, X0, noise=Z),
    ):
        assert (call() - want).abs().max() < 1e-5
    assert (want - X0).abs().max() > 0.01


def test_explain_takes_a_frozen_module() -> None:
    assert "autograd" in sampler(ENERGIES["frozen"]()).explain(X0)


def test_a_scripted_module_in_train_mode_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 1))
    energy = torch.jit.script(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="in train mode"):
        sampler(net)(X0, seed=0)
    assert torch.equal(sampler(energy)(X0, noise=Z), sampler(net, gradient="autograd")(X0, noise=Z))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["a module", "scripted", "frozen", "a function", "DataParallel"])
def test_an_energy_of_any_make_can_be_differentiated_through(name: str) -> None:
    energy, x0 = ENERGIES[name](), X0.clone().requires_grad_()
    sampler(energy)(x0, noise=Z, differentiable=True).sum().backward()
    assert x0.grad is not None
    assert x0.grad.abs().max() > 0.1


STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf that requires grad": lambda x: x.clone().requires_grad_(),
    "with a graph": lambda x: x.clone().requires_grad_() * 1,
    "a parameter": nn.Parameter,
    "float64": lambda x: x.double().float(),
    "expanded": lambda x: x[:1].expand_as(x),
    "a view of every other": lambda x: x.repeat(2, 1, 1, 1)[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with the negative bit": lambda x: torch.complex(x, -x).conj().imag,
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_of_any_kind_runs_and_is_left_alone(name: str) -> None:
    x0, net = STARTS[name](X0.clone()), Net()
    before, flag = x0.detach().clone(), x0.requires_grad
    got = sampler(net)(x0, noise=Z)
    assert not got.requires_grad
    assert (got - loop(net, x0)).abs().max() < 1e-5
    assert torch.equal(x0.detach(), before)
    assert x0.requires_grad == flag
    assert x0.grad is None if x0.is_leaf else True


# What is refused ----------------------------------------------------------------------------------


def no_arguments() -> nn.Module:
    return Net()


def partly_on_meta() -> nn.Module:
    net = Net()
    net.head.to("meta")
    return net


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
        return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})


# Those that the constructor can tell.
NO_ENERGIES: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "must be callable, got NoneType"),
    "a tensor": (lambda: X0, "must be callable, got Tensor"),
    "a state_dict": (lambda: Net().state_dict(), "got OrderedDict; .* load it into a module"),
    "a path": (lambda: "runs/weights.pt", r"got str; fastlangevin\.load"),
    "a class": (lambda: Net, "must be an instance, got the class Net; call it first"),
    "a partial of a class": (lambda: functools.partial(Net), "got a partial of the class Net"),
    "a factory": (lambda: no_arguments, "no_arguments takes none; .* give what it returns"),
    "a factory of keywords": (
        lambda: lambda *, width=4: Net(),
        "must take the state x as its first argument",
    ),
    "a module whose forward takes nothing": (
        lambda: type("Empty", (nn.Module,), {"forward": lambda self: None})(),
        "Empty takes none",
    ),
    "a ModuleList": (lambda: nn.ModuleList([Net()]), "must have a forward .*nn.Sequential"),
    "a ModuleDict": (lambda: nn.ModuleDict({"a": Net()}), "must have a forward .*nn.Sequential"),
}


@pytest.mark.parametrize("name", NO_ENERGIES)
def test_what_is_no_energy_is_refused_at_once(name: str) -> None:
    make, message = NO_ENERGIES[name]
    with pytest.raises(TypeError, match=OP + ".*energy.*" + message):
        sampler(make())


# Those that the first call tells: (energy, error, message).
BAD_ENERGIES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "lazy": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(1)),
        ValueError, r"the energy's 1\.weight has no shape yet.* call energy\(x0\) once",
    ),
    "lazy statistics": (
        lambda: nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.Flatten()).eval(),
        ValueError, r"the energy's 0\.running_mean has no shape yet",
    ),
    "on meta": (lambda: Net().to("meta"), ValueError, "conv.weight is on the meta device.*load"),
    "partly on meta": (partly_on_meta, ValueError, "head.weight is on the meta device.*to_empty"),
    "quantised": (quantised, ValueError, "does not depend on x.*quantised"),
    "without gradients": (
        lambda: torch.no_grad()(Net()), ValueError, "does not depend on x through autograd",
    ),
    "a dict": (
        lambda: Around(lambda e: {"energy": e}), TypeError, "got dict; .*forward returns only",
    ),
    "a tuple": (lambda: Around(lambda e: (e, e)), TypeError, "got tuple; .*forward returns"),
    "a list": (lambda: Around(lambda e: [e]), TypeError, "got list; .*forward returns"),
    "a module": (lambda: Around(lambda e: Net()), TypeError, "got Net; .*pass what it returns"),
    "None": (lambda: Around(lambda e: None), TypeError, "must return a tensor, got NoneType"),
    "a number": (lambda: Around(lambda e: e.sum().item()), TypeError, "a tensor, got float"),
    "an array": (lambda: Around(lambda e: e.detach().numpy()), TypeError, "got ndarray"),
    "integers": (lambda: Around(lambda e: e.long()), TypeError, "a floating dtype, got .*int64"),
    "a sum": (lambda: Around(lambda e: e.sum()), ValueError, r"one value per chain, \[3\]"),
    "several": (lambda: Around(lambda e: e[:, None].expand(-1, 3)), ValueError, "one value per"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "differentiable"), [(name, i % 2 > 0) for i, name in enumerate(BAD_ENERGIES)]
)
def test_an_energy_that_cannot_run_says_what_to_do(name: str, differentiable: bool) -> None:
    make, error, message = BAD_ENERGIES[name]
    x0 = X0.clone().requires_grad_(differentiable)
    with pytest.raises(error, match=message):
        sampler(make())(x0, seed=0, differentiable=differentiable)


def images() -> list[Tensor]:
    return list(X0)


PICTURES = [Image.new("L", (6, 6), color=k) for k in range(N)]
BAD_STARTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an array": (lambda: X0.numpy(), TypeError, "got ndarray; torch.as_tensor"),
    "a picture": (lambda: PICTURES[0], TypeError, "got Image; torch.as_tensor"),
    "a number of chains": (lambda: 3, TypeError, "got int; n=3 starts"),
    "a string": (lambda: "x0.pt", TypeError, r"x0 must be a tensor, got str"),
    "bytes": (lambda: X0.to(torch.uint8), TypeError, r"got torch.uint8; give x0.float\(\)"),
    "booleans": (lambda: X0 > 0, TypeError, r"got torch.bool; give x0.float\(\)"),
    "complex": (lambda: X0 + 0j, TypeError, "floating dtype, got torch.complex64$"),
    "sparse": (lambda: X0.to_sparse(), TypeError, r"torch.sparse_coo; give x0.to_dense\(\)"),
    "nested": (
        lambda: torch.nested.nested_tensor(images()), TypeError, "nested tensor; .*torch.stack",
    ),
    "one number": (lambda: torch.tensor(1.0), ValueError, "leading chain dimension"),
    "images": (images, TypeError, r"given a list of 3 tensors.*torch.stack\(x0\)"),
    "a tuple of images": (lambda: tuple(images()), TypeError, r"torch.stack\(x0\)"),
    "arrays": (lambda: [x.numpy() for x in X0], TypeError, r"x0\[0\].*ndarray.*torch.stack"),
    "pictures": (lambda: PICTURES, TypeError, r"x0\[0\].* got Image;.*torch.stack"),
    "numbers": (lambda: X0.tolist(), TypeError, r"x0\[0\].* got list;.*torch.stack"),
    "a batch and its labels": (
        lambda: [X0, torch.arange(N)], TypeError, r"x0\[1\].*int64;.*by keyword.*y=labels",
    ),
    "an empty list": (list, ValueError, "x0 is an empty list"),
    "on another device": (lambda: X0.to("meta"), ValueError, "x0 is on meta, the energy on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, ("__call__", "trajectory", "diagnose")[i % 3]) for i, n in enumerate(BAD_STARTS)],
)
def test_an_unsupported_start_is_refused_with_a_remedy(name: str, method: str) -> None:
    make, error, message = BAD_STARTS[name]
    with pytest.raises(error, match=OP + ".*" + message):
        getattr(sampler(Net()), method)(make(), seed=0)


def test_parts_as_the_states_are_a_score() -> None:
    def score(x: list[Tensor]) -> list[Tensor]:
        return [-part for part in x]

    x0 = [X0, X0[:, 0]]
    with pytest.raises(TypeError, match=r"parts like the state's are a score: .*from_score"):
        sampler(score)(x0, seed=0)
    assert len(fl.LangevinSampler.from_score(score, K)(x0, seed=0)) == 2


def test_a_list_whose_energy_fails_by_itself_tells_why() -> None:
    """Parts of several shapes are no images; a dict never is a list of them."""
    for x0 in ([X0, X0[:, 0]], {"a": X0, "b": X0}):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            sampler(lambda x: x.nothing)(x0, seed=0)


def test_x0_may_be_on_any_device_of_an_energy_on_several() -> None:
    """x0 has to be on one of them: on the first or not."""
    from fastlangevin.inputs import check_tensors

    class Place:
        is_meta = False

        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    several, devices = nn.Module(), ("cuda:0", "cuda:1")
    several._parameters = {device: Place(device) for device in devices}  # type: ignore[assignment]
    for device in devices:
        check_tensors("op", several, torch.device(device))
    with pytest.raises(ValueError, match="x0 is on cpu, the energy on cuda:0"):
        check_tensors("op", several, torch.device("cpu"))


# Learning -----------------------------------------------------------------------------------------


class Extra(Net):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"scale": 2.0}, None, "text", [1, 2], np.ones(2)])
def test_what_a_checkpoint_cannot_hold_is_refused_before_learning(extra: Any) -> None:
    with pytest.raises(TypeError, match=r"holds _extra_state of type .*get_extra_state"):
        fl.learn.ShortRunLearner(sampler(Extra(extra)), X0)


def test_an_extra_state_that_is_a_tensor_is_saved(tmp_path: Any) -> None:
    learner = fl.learn.ShortRunLearner(sampler(Extra(torch.arange(5.0))), X0, batch_size=2)
    learner.step()
    learner.save(tmp_path / "a.safetensors")
    other = fl.learn.ShortRunLearner(sampler(Extra(torch.zeros(5))), X0, batch_size=2)
    other.load(tmp_path / "a.safetensors")
    assert torch.equal(other.energy.extra, torch.arange(5.0))  # type: ignore[arg-type]


def test_a_learner_refuses_an_uninitialized_lazy_energy() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet"):
        fl.learn.ShortRunLearner(sampler(lazy), X0)
    learner = fl.learn.ShortRunLearner(sampler(run_once(lazy)), X0, batch_size=2)
    assert learner.step().iteration == 1
    assert copy.deepcopy(learner.energy)(X0).shape == (N, 1)
