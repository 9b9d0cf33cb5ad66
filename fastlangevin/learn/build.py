"""Build what a config describes: data, energy, sampler, learner and samples."""

import hashlib
from typing import Any

import torch
from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.distributed import Group
from fastlangevin.energies import ConvEnergy
from fastlangevin.gradients.precision import check_precision
from fastlangevin.kernels.devices import indexed
from fastlangevin.learn.config import TrainConfig, config_names, resolve
from fastlangevin.learn.custom_energy import import_energy, open_energy
from fastlangevin.learn.data.datasets import Images
from fastlangevin.learn.data.load import ImageData, load_images
from fastlangevin.learn.learner import LEARN_PRECISIONS, ShortRunLearner
from fastlangevin.learn.model import load
from fastlangevin.learn.seeds import BUFFER, GRID, WEIGHTS
from fastlangevin.names import did_you_mean
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import LangevinSampler
from fastlangevin.step import choose_backend
from fastlangevin.train_config import NETWORK

DATA_OPTIONS = ("size", "channels", "limit", "on_corrupt")
_SAMPLER_SETTINGS = ("steps", "step_size", "noise_std", "clamp", "grad_clip", "noise_order",
                     "precision", "backend")  # fmt: skip
_SIZES = (8, 16, 32, 64, 128, 256)  # of the images of a ConvEnergy


def load_data(config: TrainConfig) -> ImageData:
    """Load the training images of a config."""
    if config.data is None:
        raise ValueError("data is not set: give a name or a path, for example data=digits")
    return load_images(config.data, **{name: getattr(config, name) for name in DATA_OPTIONS})


def build_learner(
    config: TrainConfig,
    data: ImageData | None = None,
    group: Group | None = None,
    start: LangevinSampler | None = None,
) -> ShortRunLearner:
    """Build the learner of a config, at iteration 0.

    ``data``, its images, and ``start``, the model that chains start from, may be loaded already.
    Raises ValueError if the settings do not fit each other, the data or this machine.
    """
    data = load_data(config) if data is None else data
    energy = build_energy(config, data)
    device = choose_device(config.device)
    check_precision(config.precision, device)
    choose_backend(config.backend, device)
    buffer = None
    if config.buffer_size:
        if config.start is not None:
            raise ValueError(
                "start cannot be used with persistent chains, which continue from one iteration to "
                f"the next: leave out start, or set buffer_size to 0, not {config.buffer_size}"
            )
        if config.buffer_size < config.batch_size:
            raise ValueError(
                f"buffer_size must be 0 or at least batch_size = {config.batch_size}, "
                f"got {config.buffer_size}"
            )
        buffer = ReplayBuffer(
            config.buffer_size,
            data.shape,
            seed=_noise.fold_in(config.seed, BUFFER),
            kind=config.buffer_kind,
            reinit=config.reinit,
            # The processes of a group copy their shares of it to their devices.
            device=device if group is None or group.world_size == 1 else "cpu",
        )
    if start is None and config.start is not None:
        start = load(config.start, device=device)
    return ShortRunLearner(
        build_sampler(config, energy, start),
        data,
        batch_size=config.batch_size,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        data_noise=config.data_noise,
        flip=config.flip,
        ema=config.ema,
        buffer=buffer,
        seed=config.seed,
        precision=_learn_precision(config),
        parts=config.parts,
        group=group,
    )


def _learn_precision(config: TrainConfig) -> str | None:
    """Return the learner's precision. On any machine, it is a function of the settings alone."""
    wanted = config.learn_precision
    if wanted == "auto":
        return "bf16" if config.precision == "bf16" else None
    if wanted not in LEARN_PRECISIONS:
        hint = did_you_mean(wanted, ("auto", *filter(None, LEARN_PRECISIONS)))
        if wanted == "fp16":
            hint = ": the gradients of the weights would need a loss scale in float16"
        raise ValueError(
            f"learn_precision must be auto, none, fp32, tf32 or bf16, got {wanted!r}{hint}"
        )
    return wanted


def build_energy(config: TrainConfig, data: Images) -> torch.nn.Module:
    """Build the energy of a config for the shape of the data; its weights depend on the seed."""
    seed = _noise.fold_in(config.seed, WEIGHTS) >> 1
    if config.energy is not None:
        return open_energy(config.energy, data.shape, seed).to(choose_device(config.device))
    channels, height, width = data.shape
    if config.size is not None and config.size not in _SIZES:
        raise ValueError(f"size must be a power of two from 8 to 256, got {config.size}")
    if height != width or height not in _SIZES:
        raise ValueError(
            f"data {config.data!r} has images of {height} x {width}; the energy needs squares of a "
            "power of two from 8 to 256: set size, for example size=32"
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        settings: Any = {name: getattr(config, name) for name in NETWORK}
        energy = ConvEnergy(channels, height, **settings).float()
        # The weights are drawn in float32, independent of torch's default dtype.
        torch.manual_seed(seed)
        for layer in energy.layers:
            if isinstance(layer, torch.nn.Conv2d):
                layer.reset_parameters()
    return energy.to(choose_device(config.device))


def find_energy(target: str) -> torch.nn.Module:
    """Return the energy of a config, or of module:attribute as :func:`import_energy` does."""
    if ":" in target:
        return import_energy(target)
    if target not in (names := config_names()):
        raise ValueError(
            f"give a config ({', '.join(names)}) or module:attribute, got {target!r}"
            f"{did_you_mean(target, names)}"
        )
    config = resolve(target)
    return build_energy(config, load_data(config))


def build_sampler(
    config: TrainConfig, energy: torch.nn.Module, start: LangevinSampler | None = None
) -> LangevinSampler:
    """Build the sampler of a config, with the model that its chains start from."""
    settings = {name: getattr(config, name) for name in _SAMPLER_SETTINGS}
    return LangevinSampler(energy, **settings, start=start)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA if torch has it, else the CPU.

    CUDA without an index is the current GPU. Raises ValueError for CUDA if torch has none.
    """
    if name == "auto":
        return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:  # torch's message lists twenty kinds of devices, and not "auto"
        hint = did_you_mean(name, ("auto", "cpu", "cuda"))
        if name.lower().startswith("gpu"):  # whose nearest name is cpu
            hint = "; did you mean cuda?"
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}{hint}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    return indexed(device)


def fingerprint(data: Images) -> dict[str, Any]:
    """Identify a data set by its size, its shape, and a digest of 64 of its images."""
    some = torch.arange(64, dtype=torch.int64, device="cpu") * len(data) // 64
    digest = hashlib.sha256(data.batch(some.unique()).numpy().tobytes()).hexdigest()
    return {"images": len(data), "shape": list(data.shape), "sha256": digest}


def draw_samples(learner: ShortRunLearner, config: TrainConfig) -> Tensor:
    """Run ``config.samples`` new chains from p0, with the same starts and noise at every call."""
    sampler = build_sampler(config, learner.model, learner.sampler.start)
    seed = _noise.fold_in(config.seed, GRID)
    return sampler(n=config.samples, shape=learner.data.shape, seed=seed)
