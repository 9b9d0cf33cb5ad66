"""The list of the benchmark's energies, with their states, arguments and sizes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks.networks import conditional, convolutional, decoders, dense, residual

Energy = Callable[..., Tensor]
DIGIT, IMAGE = (1, 28, 28), (3, 32, 32)
_NORMS = nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm


class Built(NamedTuple):
    """An energy, the module in it, starting states and keyword arguments of the energy."""

    energy: Energy
    module: nn.Module
    x: Tensor
    kwargs: dict[str, Any]


class Case(NamedTuple):
    """An energy of the benchmark.

    ``module`` makes the network from a width, ``energy`` the callable that the sampler is given
    from the network, and ``kwargs`` the energy's keyword arguments from the number of chains.
    """

    name: str
    module: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    width: int
    batch: int = 32
    steps: int = 5
    kwargs: Callable[[int], Mapping[str, Tensor]] = lambda chains: {}
    energy: Callable[[Any], Energy] = lambda module: module
    narrow: int = 4  # the width in tests
    step_size: float = 0.1
    noise_std: float = 0.01
    device: torch.device = torch.device("cpu")

    def build(self, dtype: torch.dtype = torch.float32) -> Built:
        """Make the case in eval mode. It is the same for every dtype, up to rounding to it."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            module = self.module(self.width)
            _trained(module)
            x = 2 * torch.rand(self.batch, *self.shape) - 1
            kwargs = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in self.kwargs(self.batch).items()
            }
        module = module.eval().to(self.device, dtype)
        kwargs = {name: value.to(self.device) for name, value in kwargs.items()}
        return Built(self.energy(module), module, x.to(self.device, dtype), kwargs)

    def small(self) -> "Case":
        """The case in the size of tests."""
        return self._replace(width=self.narrow, batch=3, steps=2)


def _trained(module: nn.Module) -> None:
    """Move norms from their initial ones and zeros, with which a wrong one can go unnoticed."""
    for layer in module.modules():
        if not isinstance(layer, _NORMS):
            continue
        tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        for name, value in tensors:
            with torch.no_grad():
                if name in ("weight", "running_var"):
                    value.uniform_(0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    value.normal_(0, 0.2)


def _sum_of_squares(module: dense.QuadraticMLP) -> Energy:
    return lambda x: module(x).square().sum(1)


def _minus(module: nn.Module) -> Energy:
    return lambda x: -module(x).squeeze(1)


def cases() -> list[Case]:
    """All cases, in the order of the table."""
    tutorial = convolutional.TutorialCNN
    learnable = functools.partial(tutorial, activation=convolutional.LearnableSwish)
    scale_shift = conditional.ScaleShiftEnergy
    wide = functools.partial(Case, shape=IMAGE, width=32, batch=16, steps=4)
    return [
        Case("Swish tutorial", tutorial, DIGIT, 16, 64, 20),
        Case("learnable Swish", learnable, DIGIT, 16, 64, 20),
        Case("Swish / 1.1, residual", residual.swish_residual, IMAGE, 16),
        Case("residual", residual.ResidualEnergy, IMAGE, 16),
        Case("residual, spectral norm", residual.spectral_parametrization, IMAGE, 16),
        Case("residual, spectral norm by hook", residual.spectral_hook, IMAGE, 16),
        Case("residual, spectral norm by hand", residual.spectral_buffers, IMAGE, 16),
        Case("residual, weight norm", residual.weight_norm, IMAGE, 16),
        Case("residual, weight standardisation", residual.weight_standardisation, IMAGE, 16),
        wide("wide residual, logsumexp", residual.WideResNet),
        wide("wide residual, label", residual.WideResNet, kwargs=conditional.labels),
        wide("wide residual, BatchNorm", residual.wide_batch_norm),
        wide("wide residual, GroupNorm, SiLU", residual.wide_group_norm),
        wide("wide residual, InstanceNorm", residual.wide_instance_norm),
        wide("wide residual 28-10", residual.wide_28, width=160, batch=2),
        Case("max pooling", convolutional.MaxPoolCNN, IMAGE, 16),
        Case("scale and shift by class", scale_shift, IMAGE, 32, kwargs=conditional.labels),
        Case(
            "projection on class", conditional.ProjectionEnergy, DIGIT, 16,
            kwargs=conditional.labels,
        ),
        Case("class planes", conditional.LabelPlanes, DIGIT, 32, kwargs=conditional.labels),
        Case(
            "action given image", conditional.ActionGivenImage, (7,), 16, 16, 100,
            kwargs=conditional.image,
        ),
        Case(
            "action given vector", conditional.ActionGivenVector, (4,), 128, 256, 50,
            kwargs=conditional.observation, narrow=16,
        ),
        Case("autoencoder", decoders.Autoencoder, DIGIT, 16),
        Case("autoencoder, nearest upsampling", decoders.nearest, IMAGE, 16),
        Case("autoencoder, bilinear upsampling", decoders.bilinear, IMAGE, 16),
        Case("latent of a generator", decoders.GeneratorEnergy, (32,), 16, steps=10),
        Case("latent MLP", dense.LatentEnergy, (64,), 256, 128, 50),
        Case("MLP 2-128-128-1", dense.ToyMLP, (2,), 128, 256, 50),
        Case("MLP, LayerNorm", dense.LayerNormMLP, (32,), 128, 128, 50),
        Case("lambda, squared features", dense.QuadraticMLP, (16,), 128, 128, 50,
             energy=_sum_of_squares),
        Case("lambda, minus an MLP", dense.ToyMLP, (2,), 64, 32, 50, energy=_minus),
        Case("two branches", dense.TwoBranches, IMAGE, 16),
        Case("1-D convolutions", convolutional.SignalCNN, (2, 256), 32),
        Case("3-D convolutions", convolutional.VoxelCNN, (1, 16, 16, 16), 16),
        Case("64x64 images", convolutional.LargeImageCNN, (3, 64, 64), 16),
        Case("channels last", convolutional.HeightWidthChannels, (32, 32, 3), 16),
        Case("paper", functools.partial(fl.ConvEnergy, 3, 32), IMAGE, 32),
    ]  # fmt: skip
