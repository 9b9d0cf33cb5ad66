"""Energies that draw an image: autoencoders and generators with upsampling."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Autoencoder(nn.Module):
    """The reconstruction error |x - dec(enc(x))|^2 of 28x28 images, by transposed convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(2 * width, 2 * width, 3),
            nn.ReLU(),
            nn.Conv2d(2 * width, 16, 10),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 2 * width, 7),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.decoder(self.encoder(x))) ** 2).view(x.shape[0], -1).mean(dim=1)


class UpsamplingAutoencoder(nn.Module):
    """A reconstruction error with upsampling by the given mode instead."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        options = {"align_corners": False} if mode == "bilinear" else {}
        self.down1 = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode=mode, **options)
        self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.down2(F.silu(self.down1(x))))
        h = F.silu(self.conv1(self.up(h)))
        reconstruction = torch.tanh(self.conv2(self.up(h)))
        return (x - reconstruction).square().sum(dim=(1, 2, 3))


class GeneratorEnergy(nn.Module):
    """A latent vector's prior plus the energy of the image that a generator makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(32, 4 * width * 4 * 4)
        self.generator = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 3, 4, 2, 1),
            nn.Tanh(),
        )
        self.energy = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4),
        )

    def forward(self, z: Tensor) -> Tensor:
        image = self.generator(self.project(z).reshape(-1, 4 * self.width, 4, 4))
        return self.energy(image).flatten() + z.square().sum(1) / 2


def nearest(width: int) -> nn.Module:
    return UpsamplingAutoencoder(width, "nearest")


def bilinear(width: int) -> nn.Module:
    return UpsamplingAutoencoder(width, "bilinear")
