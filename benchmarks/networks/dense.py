"""Energies of vectors: MLPs, norms, branches, latent states."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ToyMLP(nn.Module):
    """2 - width - width - 1 with Swish, the energy of two-dimensional toy densities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LayerNormMLP(nn.Module):
    """An MLP with LayerNorm before each activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class QuadraticMLP(nn.Module):
    """Features f(x); the energy is the sum of their squares. Used inside a lambda."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class TwoBranches(nn.Module):
    """A branch of the whole image and one of its details, concatenated before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)
        )
        self.fine = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.joint = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.coarse(x), self.fine(x)], dim=1)
        h = F.leaky_relu(self.joint(both), 0.2)
        return self.head(h.mean(dim=[2, 3]))


class LatentEnergy(nn.Module):
    """The energy of a latent vector, with a standard normal prior: f(z) + |z|^2 / 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.leaky_relu(self.fc1(z), 0.2)
        h = F.leaky_relu(self.fc2(h), 0.2)
        return self.fc3(h).squeeze(1) + 0.5 * z.pow(2).sum(dim=1)
