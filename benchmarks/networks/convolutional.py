"""Energies of plain convolutional code: Swish written out, poolings, 1-D and 3-D, layouts."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Swish(nn.Module):
    """x sigmoid(x), written out as tutorials do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class LearnableSwish(nn.Module):
    """x sigmoid(beta x) with a parameter beta."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class ScaledSwish(nn.Module):
    """x sigmoid(x) / 1.1, whose Lipschitz constant is below one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.sigmoid(x)) / 1.1


class TutorialCNN(nn.Module):
    """Strided convolutions for 28x28 digits, a flattening, and two linear layers."""

    def __init__(self, width: int, activation: type[nn.Module] = Swish) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=4),
            activation(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            activation(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            activation(),
            nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1),
            activation(),
            nn.Flatten(),
            nn.Linear(16 * width, 4 * width),
            activation(),
            nn.Linear(4 * width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(dim=-1)


class MaxPoolCNN(nn.Module):
    """Pairs of 3x3 convolutions with ReLU, separated by max pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for after in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)]
            before = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x), 1))


class LargeImageCNN(nn.Module):
    """4x4 convolutions of stride 2 for 64x64 images, ending in an adaptive average pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1)
            for before, after in itertools.pairwise(widths)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Linear(8 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.out(self.pool(x).flatten(1)).view(-1)


class SignalCNN(nn.Module):
    """1-D convolutions of signals [n, channels, time]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, width, 7, padding=3),
            nn.LeakyReLU(0.2),
            nn.Conv1d(width, 2 * width, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(2 * width, 2 * width, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.AvgPool1d(4),
            nn.Conv1d(2 * width, 4 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.fc = nn.Linear(4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).mean(dim=2))


class VoxelCNN(nn.Module):
    """3-D convolutions of volumes [n, 1, 16, 16, 16]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv3d(width, 2 * width, 4, stride=2, padding=1)
        self.conv3 = nn.Conv3d(2 * width, 4 * width, 4)
        self.fc = nn.Linear(4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv1(x))
        x = F.elu(self.conv2(x))
        x = F.elu(self.conv3(x))
        return self.fc(x.view(x.shape[0], -1))


class HeightWidthChannels(nn.Module):
    """Images stored as [n, height, width, channels], permuted for the convolutions and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.mix = nn.Linear(2 * width, 4 * width)
        self.out = nn.Linear(4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = F.gelu(self.stem(x))
        x = F.gelu(self.down(x))
        x = x.permute(0, 2, 3, 1)
        x = F.gelu(self.mix(x))
        return self.out(x).sum(dim=(1, 2, 3))
