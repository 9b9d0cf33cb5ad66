"""The plain loop that a sampler is compared with, and the energies that its tests walk on."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.pairwise import pairwise

N, K = 4, 5
SHAPE = (N, 2, 5, 3)
A, B = 0.3, 0.2
ORDERS = ["after", "before", "last"]
# With the net below these clips and this clamp act on some elements or chains and spare others:
# test_every_option_of_the_cases_changes_the_chain holds them to it.
CLIPS = [None, 0.4, ("chain_norm", 1.9), ("batch_norm", 2.0)]
CLAMPS = [None, (-0.9, 0.8)]
GRID = [
    {"noise_order": order, "clamp": clamp, "grad_clip": clip}
    for order, clamp, clip in pairwise(ORDERS, CLAMPS, CLIPS)
]


def numbers(shape: tuple, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_net(activation: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small conv net [n, 2, 5, 3] -> [n, 1] with the same weights in every test."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), activation, nn.Flatten(), nn.Linear(60, 1)
    ).to(dtype)
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.5 * numbers(parameter.shape, dtype, 100 + i))
    return net


def double_well(x: Tensor, depth: float | Tensor = 1.0) -> Tensor:
    """(x^2 - 1)^2 in products alone: the same bits wherever an element lies in a batch."""
    return (depth * (x * x - 1).square()).flatten(1).sum(1)


def plain_clip(grad: Tensor, clip: Any) -> Tensor:
    if clip is None:
        return grad
    if not isinstance(clip, tuple):
        return grad.clamp(-clip, clip)
    kind, bound = clip
    if kind == "batch_norm":
        return grad * (bound / grad.square().sum().sqrt()).clamp(max=1)
    norms = grad.square().flatten(1).sum(1).sqrt()
    return grad * (bound / norms).clamp(max=1).view(-1, *[1] * (grad.ndim - 1))


def plain_chain(
    energy: Callable[..., Tensor],
    x: Tensor,
    z: Tensor,
    *,
    step_size: Any = A,
    noise_std: Any = B,
    maximize: bool = False,
    clamp: tuple[float, float] | None = None,
    grad_clip: Any = None,
    noise_order: str = "after",
    detached: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """The loop that people write, z [K, n, ...] given; coefficients broadcast over x or are lists.

    Yields every step's state, energy and gradient. ``detached=False`` keeps the graph of it all.
    """
    lo, hi = clamp or (-math.inf, math.inf)
    for k in range(len(z)):
        a = step_size[k] if isinstance(step_size, list) else step_size
        b = noise_std[k] if isinstance(noise_std, list) else noise_std
        kick = b * z[k]
        if noise_order == "before":
            x = (x + kick).clamp(lo, hi)
        if detached or not x.requires_grad:
            x = x.detach().requires_grad_()
        energies = energy(x).flatten()
        (raw,) = torch.autograd.grad(energies.sum(), x, create_graph=not detached)
        grad = plain_clip(raw, grad_clip)
        moved = x + a * grad if maximize else x - a * grad
        if noise_order == "after":
            x = (moved + kick).clamp(lo, hi)
        elif noise_order == "last":
            x = moved.clamp(lo, hi) + kick
        else:
            x = moved.clamp(lo, hi)
        if detached:
            x = x.detach()
        yield {"x": x, "energy": energies, "grad": raw}


def last(chain: Iterator[dict[str, Tensor]]) -> Tensor:
    *_, step = chain
    return step["x"]


def sampler(energy: Any, **options: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, **{"steps": K, "step_size": A, "noise_std": B} | options)


def contract_noise(shape: tuple, seed: int, steps: int = K, **first: int) -> Tensor:
    """z of every step in float64: test_noise.py holds these to the contract."""
    first_step, first_chain = first.get("first_step", 0), first.get("first_chain", 0)
    address = {"seed": seed, "first_chain": first_chain, "dtype": torch.float64}
    return torch.stack(
        [fl.noise.normal(shape, step=first_step + k, **address) for k in range(steps)]
    )


SCHEDULES = {
    "float": lambda: 0.3,
    "integer": lambda: 1,
    "0-d tensor": lambda: torch.tensor(0.3),
    "list": lambda: [0.1, 0.0, 0.5, 0.2, 0.4],
    "tuple": lambda: (0.1, 0.0, 0.5, 0.2, 0.4),
    "numpy": lambda: np.linspace(0, 0.5, K),
    "[n]": lambda: torch.linspace(0, 0.6, N),
    "[K, n]": lambda: torch.linspace(0, 0.6, K * N, dtype=torch.float64).view(K, N),
    "[K, 1]": lambda: torch.linspace(0, 0.6, K, dtype=torch.float64).view(K, 1),
}


def spelled_out(schedule: Any) -> list[Tensor]:
    """A schedule as K tensors that broadcast over [n, 2, 5, 3]."""
    if isinstance(schedule, Tensor) and schedule.ndim > 0:
        rows = schedule if schedule.ndim == 2 else schedule[None].expand(K, -1)
    else:
        rows = torch.as_tensor(schedule, dtype=torch.float64).expand(K)[:, None]
    return [row.double().view(-1, 1, 1, 1) for row in rows]


class Conditional(nn.Module):
    """E(x, y) with a class embedding; ``tempered`` is the same energy as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net(nn.Tanh())
        self.label = nn.Embedding(10, 30, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor | int = 0, scale: float = 1.0) -> Tensor:
        labels = self.label(torch.as_tensor(y).expand(len(x)))
        return scale * (self.net(x)[:, 0] + (labels * x.flatten(1)).sum(1))

    def tempered(self, x: Tensor, y: Tensor) -> Tensor:
        return self(x, y, scale=0.5)


LABELS = torch.tensor([3, 1, 4, 1])
OPTIONS = [
    {},
    {"noise_order": "before", "clamp": (-0.9, 0.8)},
    {"noise_order": "last", "clamp": (-0.9, 0.8), "grad_clip": 0.4},
    {"grad_clip": ("chain_norm", 5.0), "maximize": True, "clamp": (-1.0, 1.0)},
]


class Reassigning(nn.Module):
    """A running mean that is a new tensor after every forward, as many people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().double().mean()
        return x


def everything(reassigning: bool = False, spectral: bool = True) -> nn.Sequential:
    """Batch and spectral norm and dropout in train mode, batch norm in eval mode; partly frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(2, 4, 3, padding=1)
        energy = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(first) if spectral else first,
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.Dropout(0.3),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            Reassigning() if reassigning else nn.Identity(),
            nn.Flatten(),
            nn.Linear(60, 1),
        ).double()
    if spectral:  # The constructor's 15 power iterations hide what a further one changes.
        for vector in energy[0].parametrizations.weight[0].buffers():
            vector.copy_(nn.functional.normalize(torch.ones_like(vector), dim=0))
    energy.train()[5].eval()
    energy[4].requires_grad_(False)
    energy[8].bias.requires_grad_(False)
    energy[8].weight.grad = torch.ones(1, 60, dtype=torch.float64)
    return energy


def backward(run: fl.LangevinSampler, x0: Tensor, checkpoint: str, **options: Any) -> None:
    x = x0.clone().requires_grad_()
    out = run(x, differentiable=True, checkpoint=checkpoint, **options)
    weights = [p for p in run.energy.parameters() if p.requires_grad]
    torch.autograd.grad(out.sum(), [x, *weights], allow_unused=True)


def make_mlp() -> nn.Sequential:
    """A linear layer's gradient is a product that autocast rounds, unlike a convolution's."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 1))
    for i, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.2 * numbers(parameter.shape, torch.float32, 100 + i))
    return net


X0 = torch.zeros(SHAPE)
