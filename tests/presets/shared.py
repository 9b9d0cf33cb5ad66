"""The originals' equations in plain torch and float64, and the networks that they run on."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K = 4, 8
SHAPE = (2, 6, 6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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
