"""The learner: one step of Algorithm 1, short-run MCMC learning of an energy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count
from fastlangevin.energies import ConvEnergy
from fastlangevin.gradients.draws import Draws
from fastlangevin.gradients.network import call_network
from fastlangevin.learn.checkpoint import (
    CheckpointError,
    iteration_of,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from fastlangevin.names import keywords_checked
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import LangevinSampler

_OP = "ShortRunLearner"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Images(Protocol):
    """A data set: its length, the shape (C, H, W) of an image, and batches of images by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Return images [n, C, H, W], float32 in [-1, 1], mirrored if their ``flip`` is True."""
        ...


class Metrics(NamedTuple):
    """The figures of one iteration. Energies are the model's output, which is f with maximize."""

    iteration: int  #: 1 after the first iteration
    energy_data: float  #: mean over the batch of data, with their noise
    energy_samples: float  #: mean over the last states of the chains
    gap: float  #: energy_data - energy_samples, which is the loss, or its negative with maximize
    saturation: float  #: fraction of sample elements at or beyond the clamp, by default (-1, 1)
    reach: float  #: mean over chains of |x_K - x_0|
    grad_norm: float | None = None  #: mean over steps and chains of |d energy / d x|
    displacement: float | None = None  #: mean over steps and chains of |x after - x before|


class ShortRunLearner:
    """Learn an energy from short, non-convergent Langevin chains that start at p0 = U(-1, 1).

    Each iteration computes, with the samples held constant,

        samples = K steps of the sampler from p0
        loss    = mean E(data + sigma e) - mean E(samples),   e ~ N(0, I)
        weights <- Adam(d loss / d weights)

    Args:
        sampler: A LangevinSampler on an nn.Module. With ``maximize``, the module is f = -E.
        data: A tensor [N, ...] in [-1, 1], or an object with ``shape``, ``len`` and
            ``batch(indices, flip)``, such as the result of :func:`load_images`.
        batch_size: Number of images, and of chains, per iteration.
        lr, betas: Adam's learning rate and decay rates.
        data_noise: The standard deviation sigma of the noise on the data.
        flip: Whether to mirror half of the images.
        ema: Decay of a moving average of the weights, kept in ``averaged``; None keeps no average.
        buffer: Persistent chains to continue; None starts every chain from p0.
        seed: Seed of the data order, the data noise and the chains.

    ``lr`` and ``data_noise`` may be set between steps. Data order, data noise and chains are
    functions of (seed, iteration), so :meth:`tensors` and the iteration are the whole state.

    Raises TypeError or ValueError naming the argument. Source: arXiv 1904.09770, algorithm 1.
    """

    @keywords_checked
    def __init__(
        self,
        sampler: LangevinSampler,
        data: Images | Tensor,
        *,
        batch_size: int = 64,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        data_noise: float = 0.03,
        flip: bool = False,
        ema: float | None = None,
        buffer: ReplayBuffer | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(sampler.energy, torch.nn.Module):
            raise TypeError(
                f"{_OP}: sampler.energy must be an nn.Module, got {type(sampler.energy).__name__}"
            )
        if not any(p.requires_grad for p in sampler.energy.parameters()):
            raise ValueError(f"{_OP}: sampler.energy has no parameter that requires grad")
        for name, value in sampler.energy.state_dict().items():
            if not isinstance(value, Tensor):  # otherwise the first checkpoint would fail
                raise TypeError(
                    f"{_OP}: sampler.energy's state_dict holds {name} of type "
                    f"{type(value).__name__}, and checkpoints can hold only tensors; make its "
                    "module's get_extra_state return a tensor, for example of uint8"
                )
            if torch.nn.parameter.is_lazy(value):
                raise ValueError(
                    f"{_OP}: sampler.energy's {name} has no shape yet, because its module is lazy; "
                    "call energy(x0) once first"
                )
        if not data_noise >= 0:
            raise ValueError(f"{_OP}: data_noise must be >= 0, got {data_noise}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"{_OP}: ema must be in (0, 1) or None, got {ema}")
        self.data = _TensorImages(data) if isinstance(data, Tensor) else data
        if not (hasattr(self.data, "batch") and hasattr(self.data, "shape")):
            raise TypeError(
                f"{_OP}: data must be a tensor [N, ...], what load_images returns, or an object "
                f"with shape, len and batch(indices, flip), got {type(data).__name__}"
            )
        if len(self.data) == 0:
            raise ValueError(f"{_OP}: data is empty")
        expected = getattr(sampler.energy, "shape", None)
        if expected is not None and tuple(expected) != tuple(self.data.shape):
            raise ValueError(
                f"{_OP}: data must have the energy's shape {list(expected)}, "
                f"got {list(self.data.shape)}"
            )
        self.sampler = sampler
        self.energy = sampler.energy
        self.batch_size = check_count(_OP, "batch_size", batch_size)
        self.data_noise = data_noise
        self.flip = flip
        self.buffer = buffer
        self.seed = _noise.check_seed(seed)
        self.iteration = 0
        self.optimizer = torch.optim.Adam(self.energy.parameters(), lr=lr, betas=betas)
        with torch.device("cpu"):  # for the average's count of updates
            self.averaged = (
                None
                if ema is None
                else AveragedModel(self.energy, multi_avg_fn=get_ema_multi_avg_fn(ema))
            )

    def __repr__(self) -> str:
        data = f"<{len(self.data)} images {list(self.data.shape)}>"
        return (
            f"{_OP}({self.sampler!r}, iteration={self.iteration}, data={data}, "
            f"batch_size={self.batch_size})"
        )

    @property
    def lr(self) -> float:
        """Adam's learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    @property
    def model(self) -> torch.nn.Module:
        """The module to sample from, with the averaged weights if an average is kept."""
        return self.energy if self.averaged is None else self.averaged.module

    def step(self, measure: bool = False) -> Metrics:
        """Run one iteration and return its metrics.

        With ``measure``, the metrics also include the gradient norm and the displacement of the
        chain's steps. Raises FloatingPointError, before the weights change, if a chain or an
        energy is not finite.
        """
        data = self._data().float()
        slots, x0, seed = self._start()
        grad_norm = displacement = None
        if measure:
            chain = self.sampler.diagnose(x0, seed=seed)
            samples = chain.x
            grad_norm, displacement = (
                chain.grad_norm.mean().item(),
                chain.displacement.mean().item(),
            )
        else:
            samples = self.sampler(x0, seed=seed)
        # Makes dropout a function of (seed, iteration), too.
        with Draws(self.seed, data.device).step(self.iteration):
            energy_data = call_network(self.energy, data, {}).mean()
            energy_samples = call_network(self.energy, samples, {}).mean()
        gap = energy_data - energy_samples
        lo, hi = self.sampler.clamp or (-1.0, 1.0)
        saturation = ((samples <= lo) | (samples >= hi)).float().mean()
        reach = torch.linalg.vector_norm((samples - x0).flatten(1), dim=1).mean()
        values = torch.stack([energy_data, energy_samples, gap, saturation, reach]).tolist()
        metrics = Metrics(self.iteration + 1, *values)._replace(
            grad_norm=grad_norm, displacement=displacement
        )
        if not all(math.isfinite(value) for value in values):
            raise FloatingPointError(f"{_OP}: energies are not finite: {metrics}")

        if self.buffer is not None and slots is not None:
            self.buffer.put(slots, samples)
        self.optimizer.zero_grad(set_to_none=True)
        (-gap if self.sampler.maximize else gap).backward()
        with torch.device("cpu"):  # Adam creates its step counts on torch's default device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self.energy)
        self.iteration += 1
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their average, Adam's moments and the buffer, by name."""
        tensors = {f"model.{name}": value for name, value in self.energy.state_dict().items()}
        if self.averaged is not None:
            for name, value in self.averaged.module.state_dict().items():
                tensors[f"ema.{name}"] = value
            tensors["ema_updates"] = self.averaged.n_averaged
        for name, parameter in self.energy.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        if self.buffer is not None:
            tensors["buffer"] = self.buffer.states
            if self.buffer.kind != "index":
                added = torch.tensor(self.buffer.added, dtype=torch.int64, device="cpu")
                tensors["buffer_added"] = added
        return tensors

    def load_tensors(
        self, tensors: dict[str, Tensor], iteration: int, path: str | Path = "the checkpoint"
    ) -> None:
        """Restore the state that :meth:`tensors` returned at ``iteration``.

        Raises CheckpointError if the tensors do not fit; the error names ``path`` as their file.
        """

        def take(name: str, shape: Sequence[int]) -> Tensor:
            if name not in tensors:
                raise CheckpointError(f"{path} has no {name}")
            if tensors[name].shape != torch.Size(shape):
                raise CheckpointError(
                    f"{path} has {name} of shape {list(tensors[name].shape)}, "
                    f"this run's has {list(shape)}"
                )
            return tensors[name]

        load_weights(self.energy, tensors, "model.", path)
        if self.averaged is not None:
            load_weights(self.averaged.module, tensors, "ema.", path)
            self.averaged.n_averaged.copy_(take("ema_updates", ()))
        if self.buffer is not None:
            states = take("buffer", self.buffer.states.shape)
            if states.dtype != self.buffer.dtype:
                raise CheckpointError(
                    f"{path} has a buffer of {states.dtype}, this run's is of {self.buffer.dtype}"
                )
            if self.buffer.kind != "index":
                self.buffer.added = int(take("buffer_added", ()))
            self.buffer.states.copy_(states)
        self.optimizer.state.clear()
        for name, parameter in self.energy.named_parameters():
            # Adam has no moments for a parameter that has never had a gradient.
            if any(f"adam.{key}.{name}" in tensors for key in _MOMENTS):
                self.optimizer.state[parameter] = {
                    key: take(f"adam.{key}.{name}", () if key == "step" else parameter.shape).to(
                        "cpu" if key == "step" else parameter.device, copy=True
                    )
                    for key in _MOMENTS
                }
        self.iteration = iteration

    def save(self, path: str | Path, **info: Any) -> None:
        """Write a checkpoint, with ``info`` in its header, atomically.

        ``fl.load`` makes a sampler from it.
        """
        tensors, settings = self.tensors(), self.sampler.settings()
        for name, value in settings.items():
            if isinstance(value, Tensor):
                tensors[f"sampler.{name}"], settings[name] = value, None
        header = {
            "iteration": self.iteration,
            "energy": self.energy.settings() if isinstance(self.energy, ConvEnergy) else None,
            "sampler": settings,
        }
        save_checkpoint(path, tensors, {**info, **header})

    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore the state that :meth:`save` wrote and return the header.

        This learner must have been created with the same arguments as the one that was saved.
        Raises FileNotFoundError, or CheckpointError for a file that does not fit.
        """
        tensors, info = read_checkpoint(path)
        self.load_tensors(tensors, iteration_of(info, path), path)
        return info

    def _data(self) -> Tensor:
        """Return the batch of this iteration, with its noise: a function of (seed, iteration)."""
        words = _noise.words(
            (self.batch_size, 2), seed=self.seed, step=self.iteration, stream=_noise.ORDER
        )
        indices = words[:, 0] * len(self.data) >> 32
        flip = words[:, 1] >= 2**31 if self.flip else None
        device = next(self.energy.parameters()).device
        images = self.data.batch(indices, flip).to(device)
        if self.data_noise > 0:
            images = images + self.data_noise * _noise.normal(
                images.shape,
                seed=self.seed,
                step=self.iteration,
                stream=_noise.DATA,
                device=device,
            )
        return images

    def _start(self) -> tuple[Tensor | None, Tensor, int]:
        """Return the slots of persistent chains (else None), the starts, and the chains' seed."""
        seed = _noise.fold_in(self.seed, self.iteration)
        if self.buffer is not None:
            return *self.buffer.draw(self.batch_size, self.iteration), seed
        device = next(self.energy.parameters()).device
        shape = (self.batch_size, *self.data.shape)
        return None, _noise.initial(shape, seed=seed, device=device), seed


class _TensorImages:
    """A tensor [N, ...] as a data set."""

    def __init__(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"{_OP}: data must be of floating dtype, got {images.dtype}")
        if not bool(images.isfinite().all()):
            raise ValueError(f"{_OP}: data must be finite, it holds NaN or infinity")
        self.images = images
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        images = self.images[indices.to(self.images.device)]
        if flip is None:
            return images
        where = flip.to(images.device).view(-1, *[1] * (images.ndim - 1))
        return torch.where(where, images.flip(-1), images)
