"""Residual energies for 32x32 images, and the ways in which public code normalises them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.networks.convolutional import ScaledSwish

Wrap = Callable[[nn.Module], nn.Module]
Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, then an average pool if the block halves the image."""

    def __init__(
        self, before: int, after: int, halve: bool, wrap: Wrap, activation: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.conv1 = wrap(nn.Conv2d(before, after, 3, padding=1))
        self.conv2 = wrap(nn.Conv2d(after, after, 3, padding=1))
        self.skip = wrap(nn.Conv2d(before, after, 1, bias=False)) if before != after else None
        self.halve, self.activation = halve, activation

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.conv1(x))
        out = self.conv2(out)
        out = out + (x if self.skip is None else self.skip(x))
        if self.halve:
            out = F.avg_pool2d(out, 2)
        return self.activation(out)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, negative_slope=0.2)


class ResidualEnergy(nn.Module):
    """A stack of blocks, summed over the pixels, and a linear layer.

    ``wrap`` is applied to every convolution: it adds a spectral norm or a weight norm, for example.
    """

    def __init__(
        self, width: int, wrap: Wrap = lambda conv: conv, activation: Callable[..., Tensor] = leaky
    ) -> None:
        super().__init__()
        self.activation = activation
        self.stem = wrap(nn.Conv2d(3, width, 3, padding=1))
        self.blocks = nn.ModuleList([
            Block(width, width, True, wrap, activation),
            Block(width, 2 * width, True, wrap, activation),
            Block(2 * width, 2 * width, False, wrap, activation),
        ])  # fmt: skip
        self.linear = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.stem(x))
        for block in self.blocks:
            out = block(out)
        out = F.relu(out)
        out = out.view(out.shape[0], out.shape[1], -1).sum(2)
        return self.linear(out)


class PreactivationBlock(nn.Module):
    """The block of wide residual networks: norm, activation, convolution, twice."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = norm(before), norm(after), act
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.act(self.norm1(x)))
        out = self.conv2(self.act(self.norm2(out)))
        out += self.shortcut(x)
        return out


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


class WideResNet(nn.Module):
    """A wide residual network of 6 blocks + 4 layers, from ``width`` channels, with ten logits.

    The energy is -logsumexp of the logits or, with labels y [n], minus the logit of the label.
    """

    def __init__(
        self,
        width: int,
        blocks: int = 1,
        norm: Norm = no_norm,
        act: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        layers, before = [], 16
        for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for i in range(blocks):
                step = stride if i == 0 else 1
                layers.append(PreactivationBlock(before, after, step, norm, act()))
                before = after
        self.layers = nn.Sequential(*layers)
        self.norm, self.act = norm(before), act()
        self.linear = nn.Linear(before, 10)

    def logits(self, x: Tensor) -> Tensor:
        out = self.act(self.norm(self.layers(self.conv1(x))))
        out = F.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.logits(x)
        if y is None:
            return -logits.logsumexp(1)
        return -torch.gather(logits, 1, y[:, None])


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, momentum=0.9)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


class BufferedSpectralNorm(nn.Module):
    """A convolution divided by its largest singular value, estimated with a buffer.

    The power iteration runs in train mode only. In eval mode the weight depends on nothing that
    changes from step to step.
    """

    u: Tensor

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        self.stride, self.padding = conv.stride, conv.padding
        self.weight, self.bias = conv.weight, conv.bias
        u = torch.randn(conv.out_channels)
        self.register_buffer("u", u / u.norm())

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.u, dim=0)
            if self.training:
                self.u = F.normalize(matrix @ v, dim=0)
        sigma = self.u @ matrix @ v
        return F.conv2d(x, self.weight / sigma, self.bias, self.stride, self.padding)


class StandardisedConv(nn.Module):
    """A convolution whose filters are shifted and scaled to mean zero and variance one."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        scale = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / (scale * weight[0].numel() ** 0.5)
        return F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)


def swish_residual(width: int) -> nn.Module:
    return ResidualEnergy(width, activation=ScaledSwish())


def spectral_parametrization(width: int) -> nn.Module:
    return ResidualEnergy(width, parametrizations.spectral_norm)


def spectral_hook(width: int) -> nn.Module:
    return ResidualEnergy(width, nn.utils.spectral_norm)


def spectral_buffers(width: int) -> nn.Module:
    return ResidualEnergy(width, BufferedSpectralNorm)


def weight_norm(width: int) -> nn.Module:
    return ResidualEnergy(width, parametrizations.weight_norm)


def weight_standardisation(width: int) -> nn.Module:
    return ResidualEnergy(width, StandardisedConv)


def wide_batch_norm(width: int) -> nn.Module:
    return WideResNet(width, norm=batch_norm)


def wide_group_norm(width: int) -> nn.Module:
    return WideResNet(width, norm=group_norm, act=nn.SiLU)


def wide_instance_norm(width: int) -> nn.Module:
    return WideResNet(width, norm=instance_norm)


def wide_28(width: int) -> nn.Module:
    return WideResNet(width, blocks=4)
