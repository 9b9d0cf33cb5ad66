"""Presets: each original's equation, written anew in plain torch and float64, and its contract."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K = 4, 20
SHAPE = (2, 6, 6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2 * fl.noise.uniform(shape, seed=seed, step=0) - 1


class Net(nn.Module):
    """[n, 2, 6, 6] -> [n, 1], smooth; a label scales the output, so that it enters the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Module()
        self.f.layer_one = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 1)
        self.double()
        for i, p in enumerate(self.parameters()):
            p.data.copy_(0.5 * numbers(*p.shape, seed=100 + i))
        self.eval()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.head(torch.tanh(self.norm(self.f.layer_one(x))).flatten(1))
        return out if y is None else out * (1 + y[:, None])


@pytest.fixture
def net() -> Net:
    return Net()


def grad(net: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(x, *labels).sum(), x)[0]


def args(**options: Any) -> SimpleNamespace:
    """JEM's and JEM++'s arguments; reinit_freq=0 and a state a class make starts known."""
    return SimpleNamespace(
        **{
            "n_steps": K, "sgld_lr": 0.1, "sgld_std": 0.02, "reinit_freq": 0.0, "batch_size": N,
            "n_classes": N, "eps": 0.3, "pyld_lr": 0.0,
        }
        | options
    )  # fmt: skip


LABELS = torch.arange(N)
X0 = (0.6 * numbers(N, *SHAPE, seed=1)).clamp(-1, 1)
UNIT = (X0 + 1) / 2
SAME = X0[:1].expand(N, *SHAPE).clone()  # whichever slots are drawn, the states are these
VECTORS = numbers(N, 5, seed=2)
SIGMAS = [1.0, 0.5, 0.1, 0.05]


def well(x: Tensor) -> Tensor:
    return (x * x - 1).square().flatten(1).sum(1)


def score_net(x: Tensor, labels: Tensor) -> Tensor:
    return -x.tanh() / (1 + labels.view(-1, 1))


# Each step: (net, x, z, k, steps) -> x. The starting state, then what runs the preset.


def short_run_step(net, x, z, k, steps):
    return x + (grad(net, x) + 0.01 * z)


def apex_step(net, x, z, k, steps):
    return x + (grad(net, x) + 0.3 * z)


def anatomy_step(net, x, z, k, steps):
    return x - grad(net, x) + 0.02 * z


def anatomy_eval_step(net, x, z, k, steps):
    temperature = 0.4 * 0.3**2 / 2
    return x - 0.02**2 / 2 * grad(net, x) / temperature + 0.02 * z


def anatomy_descent_step(net, x, z, k, steps):
    return x - grad(net, x) / 0.4


def jem_step(net, x, z, k, steps):
    return x + (0.1 * grad(net, x) + 0.02 * z)


def jem_labelled_step(net, x, z, k, steps):
    return x + (0.1 * grad(net, x, LABELS) + 0.02 * z)


def jempp_step(net, x, z, k, steps):
    x = (x + 0.1 * grad(net, x).clamp(-0.3, 0.3)).clamp(-1, 1)
    return x + 0.02 * z


def jempp_inner_step(net, x, z, k, steps):
    """With the inner loop as it is: p is the gradient at the first layer's output."""
    layer = net.f.layer_one
    hidden = layer(x).detach().requires_grad_()
    rest = net.head(torch.tanh(net.norm(hidden)).flatten(1)).sum()
    (p,) = torch.autograd.grad(rest, hidden)
    x = (x + 0.1 * grad(net, x).clamp(-0.3, 0.3)).clamp(-1, 1)
    for _ in range(3):
        inner = grad(lambda v: (layer(v) * p).flatten(1).sum(1), x)
        x = (x + 0.05 * inner.clamp(-0.3, 0.3)).clamp(-1, 1)
    return x + 0.02 * z


def jempp_cold_step(net, x, z, k, steps):
    return jempp_inner_step(net, x, 0 * z, k, steps)


def igebm_step(net, x, z, k, steps):
    x = x + 0.005 * z
    return (x - 10 * grad(net, x).clamp(-0.01, 0.01)).clamp(0, 1)


def igebm_labelled_step(net, x, z, k, steps):
    x = x + 0.005 * z
    return (x - 10 * grad(net, x, LABELS).clamp(-0.01, 0.01)).clamp(0, 1)


def openai_step(net, x, z, k, steps):
    x = x + 0.005 * z
    return (x - 0.2 * grad(net, x)).clamp(0, 1)


def openai_element_step(net, x, z, k, steps):
    x = x + 0.005 * 2 * 3 * z
    return (x - 0.2 * (0.7 * grad(net, x)).clamp(-0.3, 0.3)).clamp(0, 2)


def openai_norm_step(net, x, z, k, steps):
    x = x + 0.005 * z
    g = 0.7 * grad(net, x)
    return (x - 0.2 * g * min(1, 0.3 / g.norm())).clamp(0, 1)


def improved_step(net, x, z, k, steps):
    x = x + 0.001 * z
    return (x - 0.2 * grad(net, x, LABELS)).clamp(0, 1)


def improved_annealed_step(net, x, z, k, steps):
    x = x + 0.001 * (steps - k - 1) / steps * z
    return (x - 0.2 * grad(net, x)).clamp(0, 1)


def uva_step(net, x, z, k, steps):
    x = (x + 0.005 * z).clamp(-1, 1)
    return (x - 3 * grad(lambda v: -net(v), x).clamp(-0.03, 0.03)).clamp(-1, 1)


def nae_step(net, x, z, k, steps):
    return x + (-0.05 * grad(well, x) + math.sqrt(0.1) * z)


def nae_clamped_step(net, x, z, k, steps):
    scale = 0.3 if k == 0 else 0.3 / k
    return (x + (-0.045 * grad(well, x) + scale * z)).clamp(-1, 1)


def nae_clipped_step(net, x, z, k, steps):
    g = grad(well if x.ndim == 2 else net, x)
    norm = g.norm(dim=-1, keepdim=True)
    g = g * ((norm < 0.5).double() + (norm > 0.5).double() * 0.5 / norm + 1e-6)
    return x + (-0.05 * g + 0.1 * z)


def torchebm_step(net, x, z, k, steps):
    return (x - 0.1 * grad(net, x) + 0.2 * math.sqrt(2 * 0.1) * z).clamp(-0.9, 0.9)


def ebmkit_step(net, x, z, k, steps):
    x = x - 0.1 * grad(net, x).clamp(-0.3, 0.3) + math.sqrt(2 * 0.1) * z
    return x.clamp(-0.9, 0.9)


def ebmkit_cold_step(net, x, z, k, steps):
    return x - 0.1 * grad(net, x)


def ula_step(net, x, z, k, steps):
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64).view(-1, 1, 1, 1)
    return x - 0.1 * grad(net, x) + (2 * 0.1 * temperature).sqrt() * z


def ncsn_step(net, x, z, k, steps):
    level = k // (steps // len(SIGMAS)) if steps > 1 else 0
    sigmas = SIGMAS if steps > 1 else [SIGMAS[-1]]
    size = 1e-3 * (sigmas[level] / sigmas[-1]) ** 2
    labels = torch.full((N,), level)
    return x + size * score_net(x, labels) + math.sqrt(2 * size) * z


EVAL = {"num_mcmc_steps": K, "temp_factor": 0.4}
ANATOMY = {"epsilon": 0.02, "batch_size": N, "im_ch": 2, "im_sz": 6, "lr_init": 1e-4}


def flags(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"step_lr": 0.2, "anneal": False, "dataset": "mnist"} | options)


def anneal(x: Tensor, z: Tensor) -> Tensor:
    sigmas = SIGMAS if len(z) > 1 else SIGMAS[-1:]
    sample = fl.presets.ncsn()
    return sample(x, score_net, sigmas, len(z) // len(sigmas), 1e-3, denoise=False, noise=z)[-1]


CASES: dict[str, tuple[Callable[..., Tensor], Tensor, Callable[..., Tensor]]] = {
    "short_run": (
        short_run_step,
        X0,
        lambda net, x, z: fl.presets.short_run(net)(len(z), x0=x, noise=z),
    ),
    "short_run, apex": (
        apex_step,
        X0,
        lambda net, x, z: fl.presets.short_run(net)(len(z), s=0.3, x0=x, noise=z),
    ),
    "anatomy": (
        anatomy_step,
        SAME,
        lambda net, x, z: fl.presets.anatomy(net, ANATOMY, s_t_0=x.clone())(
            len(z), "persistent", noise=z
        )[0],
    ),
    "anatomy_eval": (
        anatomy_eval_step,
        X0,
        lambda net, x, z: fl.presets.anatomy_eval(
            net, EVAL | {"epsilon": 0.02, "train_epsilon": 0.3, "num_mcmc_steps": len(z)}, x
        )(noise=z)[0],
    ),
    "anatomy_eval, epsilon 0": (
        anatomy_descent_step,
        X0,
        lambda net, x, z: fl.presets.anatomy_eval(
            net, EVAL | {"epsilon": 0, "train_epsilon": 0, "num_mcmc_steps": len(z)}, x
        )(noise=z)[0],
    ),
    "jem": (
        jem_step,
        SAME,
        lambda net, x, z: fl.presets.jem(args())(net, x.clone(), n_steps=len(z), noise=z),
    ),
    "jem, labels": (
        jem_labelled_step,
        X0,
        lambda net, x, z: fl.presets.jem(args())(net, x.clone(), LABELS, len(z), noise=z),
    ),
    "jempp": (
        jempp_step,
        SAME,
        lambda net, x, z: fl.presets.jempp()(
            net, x.clone(), None, len(z), 0, args=args(), noise=z
        ),
    ),
    "jempp, inner steps": (
        jempp_inner_step,
        SAME,
        lambda net, x, z: fl.presets.jempp(args(pyld_lr=0.05))(
            net, x.clone(), n_steps=len(z), in_steps=3, noise=z
        ),
    ),
    "jempp, inner steps without noise": (
        jempp_cold_step,
        SAME,
        lambda net, x, z: fl.presets.jempp(args(pyld_lr=0.05, sgld_std=0.0))(
            net, x.clone(), n_steps=len(z), in_steps=3, noise=z
        ),
    ),
    "igebm": (
        igebm_step,
        UNIT,
        lambda net, x, z: fl.presets.igebm(net, sample_step=len(z))(x, noise=z),
    ),
    "igebm, labels": (
        igebm_labelled_step,
        UNIT,
        lambda net, x, z: fl.presets.igebm(net, 10, len(z))(x, LABELS, noise=z),
    ),
    "openai_igebm": (
        openai_step,
        UNIT,
        lambda net, x, z: fl.presets.openai_igebm(net, num_steps=len(z), step_lr=0.2)(x, noise=z),
    ),
    "openai_igebm, clipped by element": (
        openai_element_step,
        UNIT,
        lambda net, x, z: fl.presets.openai_igebm(
            net, num_steps=len(z), step_lr=0.2, noise_scale=3.0, rescale=2.0, proj_norm=0.3,
            temperature=0.7,
        )(x, noise=z),
    ),
    "openai_igebm, clipped by norm": (
        openai_norm_step,
        UNIT,
        lambda net, x, z: fl.presets.openai_igebm(
            net, num_steps=len(z), step_lr=0.2, proj_norm=0.3, proj_norm_type="l2",
            temperature=0.7,
        )(x, noise=z),
    ),
    "improved_cd": (
        improved_step,
        UNIT,
        lambda net, x, z: fl.presets.improved_cd()(LABELS, flags(), net, x, len(z), noise=z)[0],
    ),
    "improved_cd, annealed": (
        improved_annealed_step,
        UNIT,
        lambda net, x, z: fl.presets.improved_cd()(
            None, flags(anneal=True), net, x, len(z), noise=z
        )[0],
    ),
    "uva": (
        uva_step,
        X0,
        lambda net, x, z: fl.presets.uva.generate_samples(net, x, len(z), 3, noise=z),
    ),
    "nae": (
        nae_step,
        VECTORS,
        lambda net, x, z: fl.presets.nae()(x, well, 0.05, len(z), noise=z),
    ),
    "nae, clamped, annealed": (
        nae_clamped_step,
        VECTORS,
        lambda net, x, z: fl.presets.nae()(
            x, well, None, len(z), noise_scale=0.3, clip_x=(-1, 1), noise_anneal=1.0, noise=z
        ),
    ),
    "nae, clipped": (
        nae_clipped_step,
        VECTORS,
        lambda net, x, z: fl.presets.nae()(x, well, 0.05, len(z), 0.1, clip_grad=0.5, noise=z),
    ),
    "nae, clipped images": (
        nae_clipped_step,
        X0,
        lambda net, x, z: fl.presets.nae()(x, net, 0.05, len(z), 0.1, clip_grad=0.5, noise=z),
    ),
    "torchebm": (
        torchebm_step,
        X0,
        lambda net, x, z: fl.presets.torchebm(
            net, step_size=0.1, noise_scale=0.2, clamp=(-0.9, 0.9), dtype=torch.float64
        ).sample(x, n_steps=len(z), noise=z),
    ),
    "ebmkit": (
        ebmkit_step,
        X0,
        lambda net, x, z: fl.presets.ebmkit(
            step_size=0.1, steps=len(z), grad_clip=0.3, clamp=(-0.9, 0.9)
        ).sample(net, x, noise=z),
    ),
    "ebmkit, no noise": (
        ebmkit_cold_step,
        X0,
        lambda net, x, z: fl.presets.ebmkit(step_size=0.1, noise_scale=0).sample(
            net, x, steps=len(z), noise=z
        ),
    ),
    "ula": (
        ula_step,
        X0,
        lambda net, x, z: fl.presets.ula(
            net, torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64), steps=len(z),
            step_size=0.1,
        )(x, noise=z),
    ),
    "ncsn": (ncsn_step, VECTORS, lambda net, x, z: anneal(x, z)),
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, K])
@pytest.mark.parametrize("case", CASES)
def test_is_the_originals_equation(case: str, steps: int, net: Net) -> None:
    """One step to rounding, K = 20 to 1e-9, in float64."""
    step, x0, preset = CASES[case]
    z, start = numbers(steps, *x0.shape, seed=3), x0.clone()
    x = x0.detach()
    for k in range(steps):
        x = step(net, x, z[k], k, steps).detach()
    got = preset(net, x0, z)
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert (got - x).abs().max() <= (1e-13 if steps == 1 else 1e-9)
    assert (got - x0).abs().max() > 1e-3  # the chain has moved
    assert torch.equal(x0, start)


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("igebm", "openai", "improved", "uva"))]
)
def test_the_cases_reach_their_clamps(case: str, net: Net) -> None:
    """Else the order of noise, gradient and clamp would not be seen."""
    _, x0, preset = CASES[case]
    got = preset(net, x0, numbers(K, *x0.shape, seed=3))
    lo, hi = (-1, 1) if case == "uva" else (0, 2 if "element" in case else 1)
    assert ((got == lo) | (got == hi)).sum() >= 5


@contextlib.contextmanager
def left_as_found(net: Net) -> Iterator[None]:
    """Flags, modes, BatchNorm's statistics and .grads; half in train mode and half frozen."""
    net.train()
    net.head.eval()
    net.head.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    yield
    assert flags == [p.requires_grad for p in net.parameters()]
    assert modes == [m.training for m in net.modules()]
    for before, after in zip(buffers, net.buffers(), strict=True):
        assert torch.equal(before, after)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:LangevinSampler. in train mode")
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(("nae", "ncsn"))])
def test_leaves_no_trace(case: str, net: Net) -> None:
    _, x0, preset = CASES[case]
    with left_as_found(net):
        preset(net, x0, numbers(2, *x0.shape))


@pytest.mark.parametrize("case", ["jem", "igebm", "uva"])
def test_runs_in_eval_mode_as_the_original(case: str, net: Net) -> None:
    """Chains of a net in train mode are those of the net in eval mode, also after an error."""
    _, x0, preset = CASES[case]
    z = numbers(3, *x0.shape)
    want = preset(net, x0, z)
    net.train()
    assert torch.equal(preset(net, x0, z), want)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    net.head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        preset(net, x0, z)
    assert all(m.training for m in net.modules())


# Signatures -------------------------------------------------------------------------------------

SIGNATURES: dict[str, tuple[Callable[[], Any], str]] = {
    "short_run": (lambda: fl.presets.short_run(well), "K=100, s=0.01"),
    "anatomy": (lambda: fl.presets.anatomy(well, ANATOMY), "L, init_type, update_s_t_0=True"),
    "anatomy_eval": (
        lambda: fl.presets.anatomy_eval(well, EVAL | {"epsilon": 1, "train_epsilon": 1}, X0),
        "",
    ),
    "jem": (lambda: fl.presets.jem(args()), f"f, replay_buffer, y=None, n_steps={K}"),
    "jempp": (
        lambda: fl.presets.jempp(),
        "f, replay_buffer, y=None, n_steps=10, in_steps=10, args=None, save=True",
    ),
    "improved_cd": (
        lambda: fl.presets.improved_cd(),
        "label, FLAGS, model, im_neg, num_steps, sample=False",
    ),
    "uva": (
        lambda: fl.presets.uva.generate_samples,
        "model, inp_imgs, steps=60, step_size=10, return_img_per_step=False",
    ),
    "uva, buffer": (
        lambda: fl.presets.uva(well, (2,), 3).sample_new_exmps,
        "steps=60, step_size=10",
    ),
    "nae": (
        lambda: fl.presets.nae(),
        "x, model, stepsize, n_steps, noise_scale=None, intermediate_samples=False, clip_x=None, "
        "clip_grad=None, reject_boundary=False, noise_anneal=None, spherical=False, mh=False",
    ),
    "nae_v2": (
        lambda: fl.presets.nae_v2(),
        "x, model, stepsize, n_steps, noise_scale=None, intermediate_samples=False, clip_x=None, "
        "clip_grad=None, reject_boundary=False, noise_anneal=None, spherical=False, mh=False, "
        "temperature=None",
    ),
    "nae_mcmc": (
        lambda: fl.presets.nae_mcmc(),
        "x, model, stepsize, n_step, noise_scale=None, bound=None, clip_grad=None, "
        "reject_boundary=False, noise_anneal=None, noise_anneal_v2=None, mh=False, "
        "temperature=None",
    ),
    "ncsn": (
        lambda: fl.presets.ncsn(),
        "x_mod, scorenet, sigmas, n_steps_each=200, step_lr=8e-06, final_only=False, "
        "verbose=False, denoise=True",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_has_the_originals_signature(name: str) -> None:
    """Its positional parameters, in order, with their defaults; the rest by keyword alone."""
    make, want = SIGNATURES[name]
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(make()).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(found) == want
    with pytest.raises(TypeError, match="friction"):
        make()(friction=1.0)


@pytest.mark.parametrize("name", ["igebm", "openai_igebm", "short_run", "torchebm", "uva"])
def test_an_option_that_the_original_did_not_have(name: str) -> None:
    with pytest.raises(TypeError, match="friction"):
        getattr(fl.presets, name)(well, friction=1.0)


# Buffers and returns ----------------------------------------------------------------------------


def test_short_run_starts_from_uniform_noise_of_its_seed(net: Net) -> None:
    sample_q = fl.presets.short_run(net.float(), SHAPE, m=3)
    x = sample_q(2, seed=5)
    sampler = fl.LangevinSampler(net, steps=2, step_size=1.0, noise_std=0.01, maximize=True)
    assert x.shape == (3, *SHAPE)
    assert x.dtype == torch.float32
    assert torch.equal(x, sampler(uniform((3, *SHAPE), 5), seed=5))
    torch.manual_seed(1)
    first = sample_q(2)
    assert not torch.equal(first, sample_q(2))
    torch.manual_seed(1)
    assert torch.equal(first, sample_q(2))
    assert torch.equal(
        sample_q(2, generator=torch.Generator().manual_seed(1)),
        sample_q(2, generator=torch.Generator().manual_seed(1)),
    )
    with pytest.raises(ValueError, match="seed or generator"):
        sample_q(2, seed=1, generator=torch.Generator())


def test_anatomy_returns_the_mean_gradient_and_keeps_its_bank(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    bank = torch.stack([X0[i % N] + i for i in range(9)]) / 9
    before = bank.clone()
    sample_s_t = fl.presets.anatomy(net, ANATOMY, s_t_0=bank)
    x, r = sample_s_t(3, "persistent", seed=0, noise=z)
    # Which states were drawn is seen in the bank, in which order in x.
    slots = [i for i in range(9) if not torch.equal(bank[i], before[i])]
    order = [next(i for i in slots if torch.equal(bank[i], row)) for row in x]
    state, norms = before[order], []
    for k in range(3):
        norms.append(grad(net, state).flatten(1).norm(dim=1).mean())
        state = anatomy_step(net, state, z[k], k, 3)
    assert (x - state).abs().max() < 1e-12
    assert r.shape == ()
    assert abs(r - sum(norms) / 3) < 1e-12
    kept = bank.clone()
    sample_s_t(3, "persistent", False, noise=z)
    assert torch.equal(bank, kept)


def test_anatomy_from_data_and_from_noise(net: Net) -> None:
    net.float()
    data = torch.full((7, *SHAPE), 0.5)
    config = ANATOMY | {"data_epsilon": 0.1, "epsilon": 0.0}
    flat = fl.presets.anatomy(lambda x: 0 * x.flatten(1).sum(1), config, data)
    want = 0.5 + 0.1 * fl.noise.normal((N, *SHAPE), seed=2, step=0, stream=2)
    assert torch.equal(flat(1, "data", seed=2)[0], want)
    assert torch.equal(flat(1, "uniform", seed=2)[0], uniform((N, *SHAPE), 2))
    gaussian = flat(1, "gaussian", seed=2)[0]
    assert abs(gaussian.mean()) < 5 / math.sqrt(gaussian.numel())
    assert gaussian.abs().max() > 1
    for init, expected in (("persistent", "s_t_0"), ("noise", "init_type")):
        with pytest.raises(ValueError, match=expected):
            flat(1, init)
    with pytest.raises(ValueError, match="q holds 3 states for a batch of 4"):
        fl.presets.anatomy(net, config, data[:3])(1, "data")
    with pytest.raises(FloatingPointError, match="not finite"):
        fl.presets.anatomy(lambda x: (1e30 * x).pow(3).flatten(1).sum(1), config)(5, "uniform")


def test_anatomy_eval_records_every_step(net: Net) -> None:
    z, temperature = numbers(3, N, *SHAPE), 0.4 * 0.3**2 / 2
    config = EVAL | {"epsilon": 0.02, "train_epsilon": 0.3, "num_mcmc_steps": 3}
    x, ens, grads = fl.presets.anatomy_eval(net, config, X0)(noise=z)
    state = X0
    for k in range(3):
        assert (ens[k] - net(state).flatten() / temperature).abs().max() < 1e-10
        norm = (0.02**2 / 2 * grad(net, state) / temperature).flatten(1).norm(dim=1)
        assert (grads[k] - norm).abs().max() < 1e-12
        state = anatomy_eval_step(net, state, z[k], k, 3)
    assert (x - state).abs().max() < 1e-12


def test_anatomy_eval_adjusted(net: Net) -> None:
    """The original's joint energies decide, with the contract's uniforms."""
    z, temperature, epsilon = numbers(8, N, *SHAPE), 0.4 * 0.3**2 / 2, 0.15
    config = EVAL | {"epsilon": epsilon, "train_epsilon": 0.3, "num_mcmc_steps": 8}
    sample = fl.presets.anatomy_eval(net, config | {"use_mh_langevin": True}, X0)
    x, ens, _, accepts = sample(seed=4, noise=z)

    def energy(x: Tensor) -> Tensor:
        return net(x).flatten() / temperature

    state = X0
    for k in range(8):
        g = grad(energy, state)
        proposal = state - epsilon**2 / 2 * g + epsilon * z[k]
        p = z[k] - epsilon / 2 * (g + grad(energy, proposal))
        before = energy(state) + 0.5 * z[k].square().flatten(1).sum(1)
        after = energy(proposal) + 0.5 * p.square().flatten(1).sum(1)
        u = fl.noise.uniform((N, 1), seed=4, step=k, stream=3, dtype=torch.float64)[:, 0]
        taken = u < (before - after).exp()
        assert (ens[k] - energy(state)).abs().max() < 1e-9
        assert accepts[k] == taken.double().mean()
        state = torch.where(taken.view(-1, 1, 1, 1), proposal, state)
    assert (x - state).abs().max() < 1e-9
    assert 0 < accepts.mean() < 1


def test_jem_writes_its_slots_back_block_by_block(net: Net) -> None:
    """12 states of 4 classes: labels 2 and 0 change one state each, of blocks 6..8 and 0..2."""
    buffer = numbers(12, *SHAPE)
    before, y = buffer.clone(), torch.tensor([2, 0])
    x = fl.presets.jem(args())(net, buffer, y=y, n_steps=2, seed=0)
    changed = [i for i in range(12) if not torch.equal(buffer[i], before[i])]
    assert [i // 3 for i in changed] == [0, 2]
    assert torch.equal(buffer[changed], x[[1, 0]])
    for seed in range(30):
        found = fl.presets.jem(args(sgld_lr=0, sgld_std=0))(net, before, y, 1, seed=seed)
        assert all((before[3 * c : 3 * c + 3] == row).all(-1).all(-1).all(-1).any()
                   for c, row in zip(y.tolist(), found, strict=True))  # fmt: skip


def test_jem_starts_anew_at_the_rate(net: Net) -> None:
    """N = 400 x 4 chains at rate 0.3: the number of those off the buffer's 9 has |z| <= 5."""
    still = fl.presets.jem(args(sgld_lr=0.0, sgld_std=0.0, reinit_freq=0.3))
    buffer = torch.full((N, *SHAPE), 9.0)
    fresh = 0
    for seed in range(400):
        x = still(net.float(), buffer.clone(), n_steps=1, seed=seed)
        new = (x != 9).flatten(1)
        assert torch.equal(new.all(1), new.any(1))
        assert x[new.all(1)].abs().le(1).all()
        fresh += int(new.all(1).sum())
    assert abs(fresh - 480) / math.sqrt(1600 * 0.3 * 0.7) <= 5


def test_jem_without_a_buffer(net: Net) -> None:
    net.float()
    sample_q = fl.presets.jem(args(sgld_lr=0.0, sgld_std=0.0), shape=SHAPE)
    assert torch.equal(sample_q(net, [], n_steps=1, seed=3), uniform((N, *SHAPE), 3))
    assert sample_q(net, [], torch.zeros(7, dtype=torch.int64), 1).shape == (7, *SHAPE)


def test_jempp_saves_when_asked(net: Net) -> None:
    buffer = X0.clone()
    fl.presets.jempp(args())(net, buffer, LABELS, 2, 0, save=False)
    assert torch.equal(buffer, X0)
    x = fl.presets.jempp(args())(net, buffer, LABELS, 2, 0)
    assert torch.equal(buffer, x)
    assert (x.abs() > 1).any()  # the noise comes after the clamp


def jem(f: Net, y: Any = None, **options: Any) -> Tensor:
    return fl.presets.jem(args(**options))(f, X0.clone(), y, 1)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "y must be in 0..3", lambda f: fl.presets.jem(args())(f, X0, LABELS + 1)),
        (ValueError, "3 states for a batch of 4", lambda f: fl.presets.jem(args())(f, X0[:3])),
        (
            ValueError,
            "each of the 3 classes",
            lambda f: fl.presets.jem(args(n_classes=3))(f, X0, LABELS % 3),
        ),
        (TypeError, "floating dtype", lambda f: fl.presets.jem(args())(f, X0.byte())),
        (TypeError, "tensor or", lambda f: fl.presets.jem(args())(f, [X0])),
        (TypeError, "give args", lambda f: fl.presets.jempp()(f, X0)),
        (
            ValueError,
            "layer_one",
            lambda f: fl.presets.jempp(args(pyld_lr=0.1))(well, X0),
        ),
        (ValueError, "proj_norm_type", lambda f: fl.presets.openai_igebm(f, proj_norm_type="l1")),
        (TypeError, "y must be a tensor of integers", lambda f: jem(f, LABELS.double())),
        (ValueError, r"y must have shape \[n\], got \[4, 1\]", lambda f: jem(f, LABELS[:, None])),
        (TypeError, "y must be a tensor of integers, got list", lambda f: jem(f, [0, 1, 2, 3])),
        (ValueError, r"reinit_freq must be in \[0, 1\], got 2", lambda f: jem(f, reinit_freq=2)),
        (ValueError, "args.uncond", lambda f: jem(f, LABELS, uncond=True)),
        (
            ValueError,
            "num_steps must be at least 1",
            lambda f: fl.presets.improved_cd()(None, flags(), f, X0, 0),
        ),
        (ValueError, "temperature must be", lambda f: fl.presets.openai_igebm(f, temperature=0)),
        (TypeError, "temperature must be a number", lambda f: fl.presets.ula(f, "hot")),
        (ValueError, "step_size must be", lambda f: fl.presets.ebmkit(-0.1)),
        (TypeError, "shape must be a sequence", lambda f: fl.presets.short_run(f, shape=8)),
        (TypeError, "sigmas must be a sequence", lambda f: fl.anneal.levels(1.0, 2, 1e-3)),
        (TypeError, "sigmas must be a number", lambda f: fl.anneal.levels(["a"], 2, 1e-3)),
        (ValueError, "max_len", lambda f: fl.presets.uva(f, SHAPE, 9, 8)),
        (ValueError, "mh is not", lambda f: fl.presets.nae()(VECTORS, well, 0.1, 2, mh=True)),
        (ValueError, "stepsize or", lambda f: fl.presets.nae()(VECTORS, well, None, 2)),
        (
            ValueError,
            "verbose",
            lambda f: fl.presets.ncsn()(VECTORS, score_net, SIGMAS, verbose=True),
        ),
        (ValueError, "decay", lambda f: fl.presets.torchebm(f, decay=0.1)),
        (ValueError, "integrator", lambda f: fl.presets.torchebm(f, integrator="heun")),
        (ValueError, "thin", lambda f: fl.presets.torchebm(f).sample(X0, thin=0)),
        (ValueError, "x or dim", lambda f: fl.presets.torchebm(f).sample()),
        (TypeError, "noise_std", lambda f: fl.presets.ula(f, noise_std=0.1)),
        (ValueError, "temperature", lambda f: fl.presets.ula(f, -1.0)),
    ],
)
def test_bad_input(net: Net, error: type, match: str, call: Callable[[Net], Any]) -> None:
    with pytest.raises(error, match=match):
        call(net)


def test_improved_cd_differentiates_through_the_last_step_alone(net: Net) -> None:
    z = numbers(3, 40, *SHAPE)
    x0 = numbers(40, *SHAPE, seed=5).clamp(0, 1)
    labels = torch.arange(40) % N
    im_neg, im_neg_kl, im_grad = fl.presets.improved_cd()(labels, flags(), net, x0, 3, noise=z)
    x = x0
    for k in range(3):
        x = (x + 0.001 * z[k]).detach()
        noisy, x = x, (x + 0 - 0.2 * grad(net, x + 0, labels)).clamp(0, 1)
    few = noisy[:32].requires_grad_()
    (g,) = torch.autograd.grad(net(few, labels[:32]).sum(), few, create_graph=True)
    want = (few.detach() - 0.2 * g).clamp(0, 1)
    assert im_neg.shape == x0.shape
    assert not im_neg.requires_grad
    assert (im_neg_kl - want).abs().max() < 1e-12
    assert (im_grad - g).abs().max() < 1e-12
    weights = numbers(32, *SHAPE, seed=6)
    expected = torch.autograd.grad((want * weights).sum(), [*net.parameters()], allow_unused=True)
    found = torch.autograd.grad((im_neg_kl * weights).sum(), [*net.parameters()], allow_unused=True)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10
    cifar = fl.presets.improved_cd()(labels, flags(dataset="cifar10"), net, x0, 1)
    assert cifar[1].shape == x0.shape


def test_openai_igebm_differentiates_through_all_steps(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    sample = fl.presets.openai_igebm(net, num_steps=3, step_lr=0.2)
    x = UNIT
    for k in range(3):
        x = x + 0.005 * z[k]
        x = x if x.requires_grad else x.requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        x = (x - 0.2 * g).clamp(0, 1)
    weight = net.head.weight
    (want,) = torch.autograd.grad(x.square().sum(), weight)
    got = sample(UNIT, noise=z, differentiable=True)
    assert (torch.autograd.grad(got.square().sum(), weight)[0] - want).abs().max() < 1e-10


def test_uva_keeps_the_newest_states(net: Net) -> None:
    net.float()
    chains = fl.presets.uva(net, SHAPE, sample_size=4, max_len=10, seed=1)
    batches = [uniform((4, *SHAPE), 1)]
    for _ in range(4):
        batches.append(chains.sample_new_exmps(steps=2, step_size=3))
        newest = torch.cat(batches)[-10:]
        assert chains.buffer.added == 4 * len(batches)
        held = chains.buffer.states[: min(10, chains.buffer.added)]
        assert {tuple(x.flatten().tolist()) for x in held} == {
            tuple(x.flatten().tolist()) for x in newest
        }
    assert batches[-1].shape == (4, *SHAPE)
    again = fl.presets.uva(net, SHAPE, 4, 10, seed=1)
    assert torch.equal(again.sample_new_exmps(2, 3), batches[1])
    # Killed after two batches and resumed.
    resumed = fl.presets.uva(net, SHAPE, 4, 10, seed=1)
    again.sample_new_exmps(2, 3)
    resumed.buffer.load_state_dict(again.buffer.state_dict())
    resumed.drawn = again.drawn
    assert torch.equal(resumed.sample_new_exmps(2, 3), batches[3])


def test_uva_returns_every_step(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    images = fl.presets.uva.generate_samples(net, X0, 3, 3, True, noise=z)
    x = X0
    for k in range(3):
        x = uva_step(net, x, z[k], k, 3)
        assert (images[k] - x).abs().max() < 1e-12


def test_ncsn_returns_a_list_on_the_cpu() -> None:
    z, sample = numbers(8, N, 5), fl.presets.ncsn()
    images = sample(VECTORS, score_net, torch.tensor(SIGMAS), 2, 1e-3, noise=z)
    assert [image.shape for image in images] == [(N, 5)] * 9
    last = torch.full((N,), 3)
    want = images[7] + SIGMAS[-1] ** 2 * score_net(images[7], last)
    assert (images[8] - want).abs().max() < 1e-7
    (final,) = sample(VECTORS, score_net, torch.tensor(SIGMAS), 2, 1e-3, True, noise=z)
    assert torch.equal(final, images[8])
    assert len(sample(VECTORS, score_net, SIGMAS, 2, denoise=False)) == 8


@pytest.mark.parametrize("step_size", [0.1, [0.1, 0.2, 0.3], torch.tensor([[0.1], [0.2], [0.3]])])
@pytest.mark.parametrize("temperature", [0.5, torch.tensor([0.5, 1.0, 2.0, 0.0])])
def test_ula_ties_noise_to_step_and_temperature(step_size: Any, temperature: Any) -> None:
    z = numbers(3, N, 5).float()
    sampler = fl.presets.ula(well, temperature, steps=3, step_size=step_size)
    x = VECTORS.float()
    for k in range(3):
        a = step_size if isinstance(step_size, float) else float(step_size[k])
        heat = torch.as_tensor(temperature).view(-1, 1)
        x = x - a * grad(well, x) + (2 * a * heat).sqrt() * z[k]
    assert (sampler(VECTORS.float(), noise=z) - x).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_half_network_leaves_the_state_in_full(case: str, net: Net) -> None:
    _, x0, preset = CASES[case]
    x0 = x0.float()
    got = preset(net.bfloat16(), x0, numbers(4, *x0.shape).float())
    moved = got[(got.abs() < 0.9) & (got != 0)].float()
    assert got.dtype in (torch.float32, torch.float64)  # torchebm's case asks for float64
    assert (moved != moved.bfloat16().float()).double().mean() > 0.5


def test_torchebms_diagnostics_of_a_half_network(net: Net) -> None:
    ours = fl.presets.torchebm(net.bfloat16(), step_size=0.1)
    _, found = ours.sample(X0.float(), n_steps=2, return_diagnostics=True)
    assert found["energy"].dtype == torch.float32
    assert found["energy"].shape == (2,)


@pytest.mark.parametrize("preset", ["jem", "jempp"])
def test_slots_drawn_twice_keep_the_later_chain(
    preset: str, threads: Callable[[int], None]
) -> None:
    """300 chains on 512 slots: whatever the threads, the last of a slot's chains is in it."""
    threads(2)
    settings = args(batch_size=300, sgld_std=0.1)
    sample = getattr(fl.presets, preset)(settings)
    for seed in range(5):
        buffer = torch.zeros(512, 64, 8, 8)
        x = sample(lambda v: 0 * v.flatten(1).sum(1), buffer, None, 1, seed=seed)
        slots = fl.presets.common.draw_slots(300, 512, seed).tolist()
        last = {slot: row for row, slot in enumerate(slots)}
        assert len(last) < 300
        assert torch.equal(buffer[list(last)], x[list(last.values())])


def test_uvas_buffer_follows_a_model_and_lists_its_examples(net: Net) -> None:
    chains = fl.presets.uva(net.float(), SHAPE, sample_size=2, max_len=5, seed=1)
    moves = []
    to, chains.buffer.to = chains.buffer.to, lambda device: moves.append(device) or to(device)
    first, second = (chains.sample_new_exmps(1, 3) for _ in range(2))
    assert moves == [torch.device("cpu")] * 2
    assert [image.shape for image in chains.examples] == [(1, *SHAPE)] * 5
    newest = torch.cat(chains.examples)[:4]
    assert torch.equal(newest, torch.cat([first, second]).flip(0))


def test_improved_cd_returns_its_samples(net: Net) -> None:
    z, labels = numbers(3, 40, *SHAPE), torch.arange(40) % N
    x0 = numbers(40, *SHAPE, seed=5).clamp(0, 1)
    gen_image = fl.presets.improved_cd()
    im_neg, im_neg_kl, samples, im_grad = gen_image(
        labels, flags(anneal=True), net, x0, 3, sample=True, noise=z
    )
    x = x0
    for k in range(3):
        noisy = x + 0.001 * (3 - k - 1) / 3 * z[k]
        g = grad(net, noisy, labels)
        assert (samples[k] - (noisy - 0.2 * g)).abs().max() < 1e-12
        x = (noisy - 0.2 * g).clamp(0, 1)
    assert (samples[2] != im_neg).any()
    assert (im_neg - x).abs().max() < 1e-12
    assert (im_grad - g).abs().max() < 1e-12
    assert torch.equal(im_neg_kl, im_neg[:32])
    assert torch.equal(gen_image(labels, flags(anneal=True), net, x0, 3, noise=z)[0], im_neg)


def test_settings_that_are_tensors_may_come_again(net: Net) -> None:
    s = torch.full((N,), 0.1)
    sample_q = fl.presets.short_run(net.float(), SHAPE, m=N)
    assert torch.equal(sample_q(2, s, seed=1), sample_q(2, s, seed=1))
    assert not torch.equal(sample_q(2, s, seed=1), sample_q(2, 2 * s, seed=1))
    a = torch.tensor([0.1, 0.2, 0.3, 0.4])
    ours = fl.presets.ebmkit(step_size=a, steps=2)
    got = ours.sample(well, VECTORS.float(), seed=1)
    ours.step_size = 0.1
    other = ours.sample(well, VECTORS.float(), seed=1)
    assert torch.allclose(got[0], other[0], atol=1e-6)
    assert (got[1:] - other[1:]).abs().max() > 0.1


def test_ncsns_images_are_their_own(net: Net) -> None:
    images = fl.presets.ncsn()(VECTORS, score_net, SIGMAS, 2, 1e-3, seed=1)
    assert all(i.untyped_storage().nbytes() == i.numel() * i.element_size() for i in images)
    sigmas = [sigma for sigma in SIGMAS for _ in range(2)]
    sampler = fl.LangevinSampler.from_score(
        score_net, steps=8, step_size=[1e-3 * (s / SIGMAS[-1]) ** 2 for s in sigmas],
        noise_std=[(2e-3) ** 0.5 * s / SIGMAS[-1] for s in sigmas],
    )  # fmt: skip
    labels = [torch.full((N,), k // 2) for k in range(8)]
    want = sampler(VECTORS, seed=1, step_kwargs={"labels": labels})
    assert (images[7] - want).abs().max() < 1e-12


RANKS: dict[str, Callable[[Net, int], Tensor]] = {
    "short_run": lambda f, c: fl.presets.short_run(f, SHAPE, m=3)(1, seed=1, first_chain=c),
    "anatomy": lambda f, c: fl.presets.anatomy(f, ANATOMY)(1, "uniform", seed=1, first_chain=c)[0],
    "jem": lambda f, c: fl.presets.jem(args(), shape=SHAPE)(f, [], None, 1, seed=1, first_chain=c),
    "jempp": lambda f, c: fl.presets.jempp(args(), shape=SHAPE)(
        f, [], None, 1, 0, seed=1, first_chain=c
    ),
    "igebm": lambda f, c: fl.presets.igebm(f, 10, 2)(UNIT, seed=1, first_chain=c),
    "openai_igebm": lambda f, c: fl.presets.openai_igebm(f)(UNIT, seed=1, first_chain=c),
    "improved_cd": lambda f, c: fl.presets.improved_cd()(
        None, flags(), f, UNIT, 2, seed=1, first_chain=c
    )[0],
    "uva": lambda f, c: fl.presets.uva(f, SHAPE, 3, seed=1, first_chain=c).sample_new_exmps(2),
    "nae": lambda f, c: fl.presets.nae()(VECTORS, well, 0.05, 2, seed=1, first_chain=c),
    "ncsn": lambda f, c: fl.presets.ncsn()(
        VECTORS, score_net, SIGMAS, 1, 1e-3, seed=1, first_chain=c
    )[-1],
    "torchebm": lambda f, c: fl.presets.torchebm(well).sample(dim=5, seed=1, first_chain=c),
    "ebmkit": lambda f, c: fl.presets.ebmkit().sample(well, VECTORS, seed=1, first_chain=c),
}  # fmt: skip


@pytest.mark.parametrize("preset", RANKS)
def test_ranks_draw_other_numbers(preset: str, net: Net) -> None:
    run = RANKS[preset]
    if preset in ("short_run", "anatomy", "jem", "jempp", "uva"):
        net.float()
    assert torch.equal(run(net, 0), run(net, 0))
    assert not torch.equal(run(net, 0), run(net, 7))


def test_jempps_clamped_steps_of_a_half_network_are_taken_in_full(net: Net) -> None:
    """The gradient alone is the network's, in bfloat16: also where the inner steps clamp."""
    net.bfloat16()
    x0, z = SAME.float(), numbers(1, N, *SHAPE).float()
    sample = fl.presets.jempp(args(pyld_lr=0.05))
    got = sample(net, x0.clone(), n_steps=1, in_steps=3, noise=z)
    g = grad(lambda v: net(v.bfloat16()).float(), x0).clamp(-0.3, 0.3)
    want = (x0 + 0.1 * g).clamp(-1, 1)
    want = (want + 0.15 * g).clamp(-1, 1) + 0.02 * z[0]
    assert (got - want).abs().max() < 1e-6
