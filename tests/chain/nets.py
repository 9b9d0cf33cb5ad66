"""Networks whose traces are replayed, since they are given to the sampler as functions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Wrap = Callable[[nn.Module], nn.Module]


class Residual(nn.Module):
    """A residual block between convolutions; ``wrap`` is applied to all of them."""

    def __init__(self, norm: bool = False, wrap: Wrap = lambda conv: conv) -> None:
        super().__init__()
        self.stem = wrap(nn.Conv2d(3, 8, 3, padding=1))
        self.one, self.two = (wrap(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))
        self.norm = nn.GroupNorm(2, 8) if norm else nn.Identity()
        self.head = nn.Linear(8, 1)

    def features(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.2)
        h = h + self.two(F.silu(self.norm(self.one(h))))
        return F.leaky_relu(F.avg_pool2d(h, 2), 0.2).sum((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).squeeze(1)


class Labelled(Residual):
    """The energy of images and labels: scale and shift by class, and one-hot planes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.planes = nn.Conv2d(3 + 4, 3, 1)

    def forward(self, x: Tensor, y: Tensor, shift: Tensor | None = None) -> Tensor:
        planes = F.one_hot(y, 4).to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        h = self.features(self.planes(torch.cat((x, planes), 1)))
        h = F.silu(h if shift is None else h + shift)
        return self.head(h * self.embed(y)).squeeze(1) + self.embed(y).sum(1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def opaque(module: nn.Module) -> Callable[..., Tensor]:
    """An energy that is not a module: it has no graph of layers."""
    return lambda x, **arguments: module(x, **arguments)


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "residual with GroupNorm": lambda: Residual(norm=True),
    "spectral norm": lambda: Residual(wrap=parametrizations.spectral_norm),
    "weight norm": lambda: Residual(wrap=parametrizations.weight_norm),
    "MLP": MLP,
}
