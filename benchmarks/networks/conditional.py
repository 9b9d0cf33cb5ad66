"""Energies that are given labels or observations with the state."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


class ScaleShiftBlock(nn.Module):
    """A residual block whose channels are scaled and shifted by embeddings of the label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.embed = nn.Embedding(CLASSES, 4 * width)
        with torch.no_grad():
            self.embed.weight.mul_(0.1)[:, : 2 * width].add_(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gammas_betas = self.embed(y).view(x.shape[0], -1, 1, 1)
        gamma1, gamma2, beta1, beta2 = gammas_betas.chunk(4, 1)
        out = F.leaky_relu(gamma1 * self.conv1(x) + beta1, 0.2)
        out = gamma2 * self.conv2(out) + beta2
        return F.leaky_relu(out + x, 0.2)


class ScaleShiftEnergy(nn.Module):
    """A residual energy of images and labels: energy(x, y=labels)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.block1 = ScaleShiftBlock(width)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.block2 = ScaleShiftBlock(2 * width)
        self.linear = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.block1(F.leaky_relu(self.stem(x), 0.2), y)
        out = self.block2(F.leaky_relu(self.down(out), 0.2), y)
        return self.linear(out.sum(dim=(2, 3)))


class ProjectionEnergy(nn.Module):
    """Features h(x); the energy is w h(x) + <embedding of y, h(x)>."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)
        self.linear = nn.Linear(4 * width, 1)
        self.embed = nn.Embedding(CLASSES, 4 * width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = F.silu(self.conv2(h))
        h = F.silu(self.conv3(h)).mean(dim=(2, 3))
        return self.linear(h).squeeze(1) + (self.embed(y) * h).sum(1)


class LabelPlanes(nn.Module):
    """The one-hot label as further input planes of a convolutional network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1 + CLASSES, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, 1),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        planes = F.one_hot(y, CLASSES).to(x.dtype)[:, :, None, None]
        planes = planes.expand(-1, -1, x.shape[2], x.shape[3])
        return self.net(torch.cat([x, planes], dim=1))


class ActionGivenImage(nn.Module):
    """The energy of an action [n, 7] given an image: the chain moves the action alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * width + 7, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 1),
        )  # fmt: skip

    def forward(self, action: Tensor, image: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.encoder(image), action], dim=-1))


class ActionGivenVector(nn.Module):
    """The energy of an action [n, 4] given a vector of observations: an MLP of both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(20 + 4, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, action: Tensor, observation: Tensor) -> Tensor:
        h = F.relu(self.first(torch.cat((observation, action), dim=1)))
        h = F.relu(self.second(h)) + h
        return self.last(h)[:, 0]


def labels(chains: int) -> dict[str, Tensor]:
    return {"y": torch.randint(CLASSES, (chains,))}


def image(chains: int) -> dict[str, Tensor]:
    return {"image": torch.rand(chains, 3, 1, 1) + torch.rand(chains, 3, 96, 96)}


def observation(chains: int) -> dict[str, Tensor]:
    return {"observation": torch.randn(chains, 20)}
