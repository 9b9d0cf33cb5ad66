"""Energies: the ConvNets of the short-run paper, and a Gaussian whose chains have a known law."""

import itertools
import math

from torch import Tensor, nn

from fastlangevin.names import check_name, keywords_checked

ACTIVATIONS = ("leaky_relu", "relu", "silu", "softplus", "elu")


class ConvEnergy(nn.Module):
    """The short-run paper's ConvNet as an energy: images [n, channels, size, size] -> [n].

        Conv 3x3 s1 -> w,  then Conv 4x4 s2 -> 2w, 4w, 8w, 8w, ... down to 4 x 4 pixels,
        then Conv 4x4 s1 without padding -> 1

    There is an activation between the layers, with biases and without normalisation. A low energy
    means a likely image: the paper's f is -energy. Source: arXiv 1904.09770, app. 7.3.

    Args:
        channels: The number of channels of an image.
        size: Height and width, a power of two from 8 to 256. The paper has 32 and 64; the other
            sizes continue the pattern.
        width: w, the paper's n_f.
        leak: The negative slope of leaky_relu: 0.2 in the paper's code, 0.05 and 0.01 in other work
            of its authors.
        activation: "leaky_relu", "relu", "silu", "softplus" or "elu".

    Raises:
        ValueError: An argument does not fit or, in ``forward``, the shape of the images.
    """

    @keywords_checked
    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        width: int = 64,
        leak: float = 0.2,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__()
        if not isinstance(size, int) or size not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"ConvEnergy: size must be a power of two in 8..256, got {size!r}")
        for name, value in (("channels", channels), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ConvEnergy: {name} must be an integer >= 1, got {value!r}")
        check_name("ConvEnergy: activation", activation, ACTIVATIONS)
        if not (math.isfinite(leak) and leak >= 0):
            raise ValueError(f"ConvEnergy: leak must be finite and >= 0, got {leak!r}")
        self.channels, self.size, self.width = channels, size, width
        self.leak, self.activation = float(leak), activation

        halvings = size.bit_length() - 3
        widths = [width * min(2**i, 8) for i in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), self._activation()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), self._activation()]
        layers += [nn.Conv2d(widths[-1], 1, 4, 1, 0)]
        self.layers = nn.Sequential(*layers)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (channels, size, size) of one chain's state."""
        return self.channels, self.size, self.size

    def settings(self) -> dict[str, int | float | str]:
        """The constructor's arguments, in a form that JSON can hold."""
        return {
            "channels": self.channels,
            "size": self.size,
            "width": self.width,
            "leak": self.leak,
            "activation": self.activation,
        }

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"ConvEnergy: x must have shape [n, {', '.join(map(str, self.shape))}], "
                f"got {list(x.shape)}"
            )
        return self.layers(x).flatten()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def _activation(self) -> nn.Module:
        if self.activation == "leaky_relu":
            return nn.LeakyReLU(self.leak)
        return {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus, "elu": nn.ELU}[
            self.activation
        ]()


class GaussianEnergy(nn.Module):
    """U(x) = |x|^2 / (2 variance), summed over a chain's elements: [n, ...] -> [n].

    The unadjusted chain x <- x - h dU/dx + sqrt(2 h T) z, which is the sampler's for a = h and
    b = sqrt(2 h T), has exactly the stationary variance T variance / (1 - h / (2 variance)).
    """

    def __init__(self, variance: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"GaussianEnergy: variance must be finite and > 0, got {variance!r}")
        self.variance = float(variance)

    def forward(self, x: Tensor) -> Tensor:
        return x.square().reshape(x.shape[0], math.prod(x.shape[1:])).sum(1) / (2 * self.variance)

    def stationary_variance(self, step_size: float, noise_std: float) -> float:
        """The variance of the chain after many steps, b^2 / (1 - (1 - a / variance)^2)."""
        contraction = 1 - step_size / self.variance
        if not abs(contraction) < 1:
            raise ValueError(
                f"GaussianEnergy: step_size must be below 2 variance = {2 * self.variance}, "
                f"got {step_size}"
            )
        return noise_std**2 / (1 - contraction**2)
