"""The settings of a training run. Each is also an option of ``train`` and ``sweep``.

The module imports no torch, so that ``fastlangevin train --help`` does not wait for it.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any


def _option(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. A config states every field; files and options change some."""

    # data
    data: str | None = _option(
        "images: digits, mnist5k, fashion-mnist, hub:NAME, or a folder, .npy, .npz or parquet"
    )
    size: int | None = _option(
        "crop and resize the images to this power of two; unset keeps their size"
    )
    channels: int | None = _option("convert the images to 1 (grey) or 3 (colour) channels")
    limit: int | None = _option(
        "train on the first LIMIT images, in the order of paths, and hold the others out"
    )
    flip: bool = _option("mirror half of the images")
    on_corrupt: str = _option("what to do with images that cannot be decoded: error or skip")
    # energy
    energy: str | None = _option(
        "energy of your own as module:attribute: an nn.Module, its class, or a function that "
        "returns one, called without arguments; unset builds a ConvEnergy"
    )
    width: int | None = _option("channels of the first convolution of ConvEnergy, the paper's n_f")
    activation: str | None = _option(
        "activation of ConvEnergy: leaky_relu, relu, silu, softplus or elu"
    )
    leak: float | None = _option("negative slope of leaky_relu")
    # chain
    steps: int = _option("Langevin steps K")
    step_size: float = _option("step size a, which multiplies the gradient")
    noise_std: float = _option("standard deviation b of the noise added per step")
    clamp: tuple[float, float] | None = _option("lower and upper bound of the state, two numbers")
    grad_clip: float | None = _option("elementwise bound on the gradient")
    noise_order: str = _option(
        "when noise is added, relative to the gradient step: after, before or last"
    )
    precision: str | None = _option(
        "precision of the network in the chain: fp32, tf32, fp16 or bf16"
    )
    backend: str = _option("backend of the update: auto, native, triton or reference")
    start: str | None = _option(
        "coarse to fine: a model of smaller images (a run, a checkpoint, a name or hf:owner/name) "
        "whose samples, enlarged, chains start from; unset starts them from noise"
    )
    # learning
    learn_precision: str | None = _option(
        "precision of the network in the update of its weights, which stay float32: fp32, tf32, "
        "bf16, none for torch's own, or auto for bf16 if the chain's precision is bf16, else none"
    )
    iterations: int = _option("number of updates of the weights")
    batch_size: int = _option("images, and chains, per iteration")
    parts: int = _option(
        "parts of the batch whose gradients are added in a fixed order, so that up to PARTS "
        "processes learn the same weights bit for bit"
    )
    data_noise: float = _option("standard deviation sigma of the noise on the data")
    lr: float = _option("Adam's learning rate")
    beta1: float = _option("Adam's first decay rate")
    beta2: float = _option("Adam's second decay rate")
    anneal_start: float = _option(
        "fraction of the run after which lr and data noise change linearly"
    )
    lr_final: float = _option("learning rate at the end")
    data_noise_final: float = _option("data noise at the end")
    ema: float | None = _option("decay of a moving average of the weights")
    buffer_size: int = _option("number of persistent chains; 0 starts every chain from noise")
    buffer_kind: str = _option(
        "where chains are stored: where they came from (index), or in place of the oldest (fifo) "
        "or of random ones (reservoir)"
    )
    reinit: float = _option("fraction of persistent chains that restart from noise")
    max_energy: float = _option("stop the run as diverged if |energy| exceeds this")
    max_saturation: float = _option(
        "stop the run as diverged if more than this fraction of the sample elements stays at the "
        "bounds"
    )
    # run
    seed: int = _option("seed of the weights, the data order and all noise")
    device: str = _option("where to compute: auto, cpu, cuda or cuda:N")
    log_every: int = _option("iterations between records")
    sample_every: int = _option("iterations between sample grids")
    save_every: int = _option("iterations between checkpoints")
    samples: int = _option("images in a grid")

    def __post_init__(self) -> None:
        from fastlangevin.arguments import check_count  # it imports torch

        for name in ("iterations", "parts", "log_every", "sample_every", "save_every", "samples"):
            check_count("train", name, getattr(self, name))
        for name in ("data_noise", "data_noise_final", "lr", "lr_final", "max_energy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train: {name} must be >= 0, got {getattr(self, name)}")
        for name in ("anneal_start", "reinit", "max_saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train: {name} must be in [0, 1], got {getattr(self, name)}")


NETWORK = ("width", "activation", "leak")  # of a ConvEnergy; None for any other energy
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)
