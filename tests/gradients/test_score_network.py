"""Score networks in place of energies, and what energies and networks are given step by step."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K, D = 4, 8, 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """A score [n, D] -> [n, D] that may be told a noise level, [] or [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.4 * numbers(*parameter.shape, seed=50 + i))

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        score = self.layers(x)
        if sigma is None:
            return score
        return score / (sigma[:, None] if isinstance(sigma, Tensor) and sigma.ndim else sigma)


def quartic(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    return (scale * x**4).sum(1) / 4


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x0() -> Tensor:
    return numbers(N, D, seed=1)


def plain(net: Callable, x: Tensor, z: Tensor, a: Any, b: Any, kwargs: Any = None) -> Tensor:
    """x <- x + a score(x) + b z, step after step, with a graph."""
    for k in range(len(z)):
        ak, bk = (v[k] if isinstance(v, list) else v for v in (a, b))
        x = x + ak * net(x, **({} if kwargs is None else kwargs[k])) + bk * z[k]
    return x


def test_the_equation(net: Net, x0: Tensor) -> None:
    z = numbers(K, N, D, seed=2)
    x = fl.LangevinSampler.from_score(net, steps=K, step_size=0.1, noise_std=0.3)(x0, noise=z)
    torch.testing.assert_close(x, plain(net, x0, z, 0.1, 0.3), atol=1e-12, rtol=0)
    assert not x.requires_grad


@pytest.mark.parametrize("noise_order", ["after", "before", "last"])
def test_the_score_of_an_energy_gives_the_energys_chain(x0: Tensor, noise_order: str) -> None:
    settings: dict[str, Any] = dict(
        steps=K, step_size=0.05, noise_std=0.2, clamp=(-1.0, 0.9), noise_order=noise_order,
        grad_clip=("chain_norm", 0.7),
    )  # fmt: skip
    ours = fl.LangevinSampler.from_score(lambda x: -(x**3), **settings)
    energy = fl.LangevinSampler(quartic, **settings)
    torch.testing.assert_close(ours(x0, seed=3), energy(x0, seed=3), atol=1e-12, rtol=0)
    trajectories = ours.trajectory(x0, seed=3, every=3), energy.trajectory(x0, seed=3, every=3)
    torch.testing.assert_close(*trajectories, atol=1e-12, rtol=0)


def test_per_chain_step_sizes_and_no_noise(net: Net, x0: Tensor) -> None:
    rates = torch.linspace(0.01, 0.2, N, dtype=torch.float64)
    run = fl.LangevinSampler.from_score(net, steps=K, step_size=rates, noise_std=0)
    want = plain(net, x0, torch.zeros(K, N, D), rates[:, None], 0.0)
    torch.testing.assert_close(run(x0, seed=0), want, atol=1e-12, rtol=0)
    assert torch.equal(run(x0, seed=0), run(x0, seed=1))


def test_diagnose_has_no_energies(net: Net, x0: Tensor) -> None:
    run = fl.LangevinSampler.from_score(net, steps=3, step_size=0.1)
    found = run.diagnose(x0, seed=0)
    assert found.energy.isnan().all()
    torch.testing.assert_close(found.grad_norm[0], net(x0).norm(dim=1).detach())
    torch.testing.assert_close(found.x, run(x0, seed=0))


def test_no_trace_and_no_graph(x0: Tensor) -> None:
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D).double()
            self.frozen = nn.Parameter(torch.ones(D, dtype=torch.float64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return self.norm(x) * self.frozen

    net = Watched()
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="BatchNorm"):
        fl.LangevinSampler.from_score(net, steps=3)(x0, seed=0)
    assert seen == [False] * 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not net.frozen.requires_grad
    assert net.norm.weight.requires_grad


def test_a_half_precision_net_leaves_the_state_in_float32(net: Net, x0: Tensor) -> None:
    half, z = copy.deepcopy(net).bfloat16(), numbers(K, N, D, seed=2).float()
    x = fl.LangevinSampler.from_score(half, steps=K, step_size=0.1, noise_std=0.3)(
        x0.float(), noise=z
    )
    want = plain(lambda x: half(x.bfloat16()).float(), x0.float(), z, 0.1, 0.3)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, want, atol=1e-5, rtol=0)
    assert not torch.equal(x, x.bfloat16().float())


@pytest.mark.parametrize("net", [lambda x: x, lambda x: x.view_as(x)], ids=["x", "a view"])
def test_a_net_may_return_its_input(net: Callable, x0: Tensor) -> None:
    z = numbers(K, N, D, seed=2)
    x = fl.LangevinSampler.from_score(net, steps=K, step_size=0.01, noise_std=0.3)(x0, noise=z)
    torch.testing.assert_close(x, plain(net, x0, z, 0.01, 0.3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("checkpoint", ["none", "step", 3])
@pytest.mark.parametrize("straight", [False, True])
def test_gradients_of_a_plain_unroll(net: Net, x0: Tensor, checkpoint: Any, straight: bool) -> None:
    z, weight = numbers(6, N, D, seed=2), numbers(N, D, seed=3)
    x0, sigma = x0.requires_grad_(), (1 + 0.1 * numbers(6)).requires_grad_()
    leaves = [x0, sigma, *net.parameters()]
    run = fl.LangevinSampler.from_score(net, steps=6, step_size=0.1, noise_std=0.3)
    out = run(
        x0, noise=z, differentiable=True, checkpoint=checkpoint, step_kwargs={"sigma": sigma},
        grad_through="straight" if straight else "exact",
    )  # fmt: skip

    def cut(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x.detach() if straight else x, sigma)

    want = plain(cut, x0, z, 0.1, 0.3, [{"sigma": sigma[k]} for k in range(6)])
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    wanted = torch.autograd.grad((want * weight).sum(), leaves)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_straight_gradients_of_x0_alone(x0: Tensor) -> None:
    run = fl.LangevinSampler.from_score(lambda x: -x, steps=3, step_size=0.5, clamp=(-0.5, 0.5))
    leaf = (0.1 * x0).index_fill(0, torch.tensor(0), 9.0).requires_grad_()
    out = run(leaf, seed=0, differentiable=True, grad_through="straight")
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(grad[0], torch.zeros(D))
    assert torch.equal(grad[1:], torch.ones(N - 1, D))


def test_a_net_that_differentiates_once_is_enough(x0: Tensor) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return -(x**3)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return -3 * ctx.saved_tensors[0] ** 2 * grad

    def gradient(net: Callable) -> Tensor:
        leaf = x0.detach().requires_grad_()
        run = fl.LangevinSampler.from_score(net, steps=4, step_size=0.05)
        (grad,) = torch.autograd.grad(run(leaf, seed=0, differentiable=True).sum(), leaf)
        return grad

    torch.testing.assert_close(gradient(Cube.apply), gradient(lambda x: -(x**3)))


def test_copies_and_settings_know_what_they_are(net: Net, x0: Tensor) -> None:
    run = fl.LangevinSampler.from_score(net, steps=3, step_size=0.1)
    want = run(x0, seed=0)
    for other in (
        copy.copy(run),
        copy.deepcopy(run),
        pickle.loads(pickle.dumps(run)),
        fl.LangevinSampler(net, **run.settings()),
    ):
        assert torch.equal(other(x0, seed=0), want)
    assert "gradient='network'" in repr(run)
    assert "along the score" in run.explain(x0)
    assert "the output of the network itself" in run.explain()


@pytest.mark.parametrize("setting", ["maximize", "gradient"])
def test_a_score_has_one_direction(net: Net, setting: str) -> None:
    with pytest.raises(TypeError, match=f"takes no {setting}"):
        fl.LangevinSampler.from_score(net, **{setting: True})


GRADIENTS = [
    (
        lambda x: x.sum(1),
        ValueError,
        r"one value per chain is an energy: LangevinSampler\(energy\)",
    ),
    (lambda x: x.sum(1, keepdim=True), ValueError, "one value per chain is an energy"),
    (lambda x: x[:, :-1], ValueError, r"must return x's shape \[4, 6\], got \[4, 5\]$"),
    (lambda x: (x, x), TypeError, "must return a tensor, got tuple"),
    (lambda x: x.long(), TypeError, "must return a floating dtype, got torch.int64"),
    (lambda x: x.to("meta"), ValueError, "must stay on x's device cpu, got meta"),
    (lambda x: x.neg_(), RuntimeError, "changed x in place"),
]


@pytest.mark.parametrize(("net", "error", "match"), GRADIENTS, ids=[s[2] for s in GRADIENTS])
def test_what_is_no_score(net: Callable, error: type[Exception], match: str, x0: Tensor) -> None:
    with pytest.raises(error, match=match):
        fl.LangevinSampler.from_score(net, steps=2)(x0, seed=0)


@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose", "differentiable"])
def test_a_score_is_no_energy(net: Net, x0: Tensor, method: str) -> None:
    run, options = fl.LangevinSampler(net, steps=2), {}
    if method == "differentiable":
        method, options = "__call__", {"differentiable": True}
    with pytest.raises(ValueError, match=r"a score: LangevinSampler\.from_score"):
        getattr(run, method)(x0, seed=0, **options)


# Step by step ------------------------------------------------------------------------------------

SIGMAS = 1 + 0.05 * torch.arange(K, dtype=torch.float64)
ENTRIES = {
    "tensor [K]": SIGMAS,
    "tensor [K, n]": SIGMAS[:, None].expand(K, N),
    "list of floats": SIGMAS.tolist(),
    "list of tensors": list(SIGMAS),
    "array": SIGMAS.numpy(),
}


@pytest.mark.parametrize("form", ENTRIES)
def test_step_k_gets_entry_k(net: Net, x0: Tensor, form: str) -> None:
    z = numbers(K, N, D, seed=2)
    run = fl.LangevinSampler.from_score(net, steps=K, step_size=0.1, noise_std=0.3)
    want = plain(net, x0, z, 0.1, 0.3, [{"sigma": float(s)} for s in SIGMAS])
    options: dict[str, Any] = {"noise": z, "step_kwargs": {"sigma": ENTRIES[form]}}
    for x in (run(x0, **options), run.trajectory(x0, **options)[-1], run.diagnose(x0, **options).x):
        torch.testing.assert_close(x, want, atol=1e-12, rtol=0)


def test_energies_too_beside_the_kwargs_of_all_steps(x0: Tensor) -> None:
    def energy(x: Tensor, scale: float, shift: float) -> Tensor:
        return quartic(x - shift, scale)

    z, scales = numbers(K, N, D, seed=2), SIGMAS.tolist()
    x = fl.LangevinSampler(energy, steps=K, step_size=0.02, noise_std=0.3)(
        x0, noise=z, step_kwargs={"scale": scales}, shift=0.5
    )
    want = plain(
        lambda x, scale: -scale * (x - 0.5) ** 3, x0, z, 0.02, 0.3, [{"scale": s} for s in scales]
    )
    torch.testing.assert_close(x, want, atol=1e-12, rtol=0)


def test_recognised_energies_are_given_them_as_well() -> None:
    """The energy below would be recognised, and run by its weights alone, without its scale."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x)

    energy = Scaled(D, 1)
    run = fl.LangevinSampler(energy, steps=2, step_size=1.0, noise_std=0.0)
    x = run(torch.zeros(1, D), seed=0, step_kwargs={"scale": [2.0, 3.0]})
    torch.testing.assert_close(x, -5 * energy.weight.detach())
    with pytest.raises(RuntimeError, match="the energy is given scale"):
        fl.LangevinSampler(energy, steps=2, gradient="explicit")(
            torch.zeros(1, D), seed=0, step_kwargs={"scale": [2.0, 3.0]}
        )


WRONG = [
    ([1.0], TypeError, "step_kwargs must be a dict, got list"),
    (
        {"sigma": 1.0},
        TypeError,
        r"step_kwargs\['sigma'\] must be a tensor \[3, ...\] or a sequence",
    ),
    ({"sigma": [1.0, 2.0]}, ValueError, r"an entry for each of steps=3, got 2"),
    ({"sigma": torch.ones(4, 3)}, ValueError, r"an entry for each of steps=3, got 4"),
    ({"sigma": torch.tensor(1.0)}, ValueError, r"an entry for each of steps=3, got 0"),
    ({"y": torch.ones(3)}, ValueError, "y is given twice"),
]


@pytest.mark.parametrize(("given", "error", "match"), WRONG, ids=[w[2] for w in WRONG])
def test_step_kwargs_that_do_not_fit(
    net: Net, x0: Tensor, given: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fl.LangevinSampler.from_score(net, steps=3)(x0, seed=0, step_kwargs=given, y=1)
