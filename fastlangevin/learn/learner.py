"""The learner: one step of Algorithm 1, short-run MCMC learning of an energy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_count
from fastlangevin.distributed import Group, Shard
from fastlangevin.gradients.draws import Draws
from fastlangevin.gradients.modules import call_network
from fastlangevin.gradients.precision import (
    HALVES,
    PRECISIONS,
    check_precision,
    network_autocast,
    network_precision,
)
from fastlangevin.learn.checkpoint import (
    CheckpointError,
    iteration_of,
    read_checkpoint,
    save_checkpoint,
)
from fastlangevin.learn.data.datasets import Data, DatasetImages, Images, as_images, warn_of_range
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.learner_state import LearnerState
from fastlangevin.learn.model import check_state, describe, digest_of_start
from fastlangevin.learn.seeds import ITEMS, PART
from fastlangevin.learn.shared_buffer import SharedBuffer
from fastlangevin.learn.split_batch import SplitBatch
from fastlangevin.names import keywords_checked
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import LangevinSampler

_OP = "ShortRunLearner"
LEARN_PRECISIONS = tuple(name for name in PRECISIONS if name != "fp16")


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
    """Learn an energy from short, non-convergent Langevin chains from the sampler's starts.

    Each iteration computes, with the samples held constant,

        samples = K steps of the sampler from p0, which is U(-1, 1) if the sampler has no start
        loss    = mean E(data + sigma e) - mean E(samples),   e ~ N(0, I)
        weights <- Adam(d loss / d weights)

    Args:
        sampler: A LangevinSampler on an nn.Module. With ``maximize``, the module is f = -E.
        data: Images in [-1, 1], as one of

            - a floating tensor or numpy array [N, ...];
            - what :func:`load_images` returns, or another object with ``shape``, ``len`` and
              ``batch(indices, flip)``;
            - a map-style dataset of torch, or another object with ``len`` and items by index. An
              item is a floating tensor, always of the same shape, or a tuple that begins with one,
              such as (image, label). Items are read one by one, in this process. What their
              transforms draw from torch's random numbers is a function of (seed, iteration, place
              in the batch). Other generators, such as Python's, are not seeded;
            - a DataLoader. Only its dataset is used, with a warning. One with a sampler or a
              collate_fn of its own is an error.

        batch_size: Number of images, and of chains, per iteration.
        lr, betas: Adam's learning rate and decay rates.
        data_noise: The standard deviation sigma of the noise on the data.
        flip: Whether to mirror half of the images.
        ema: Decay of a moving average of the weights, kept in ``averaged``; None keeps no average.
        buffer: Persistent chains to continue; None starts every chain from p0. In a group,
            its slots are divided among the processes.
        seed: Seed of the data order, the data noise and the chains.
        precision: The network's precision in the forward and backward pass of the loss; that of the
            chain is the sampler's.

            - None leaves torch as it is set, as in a plain loop.
            - "bf16" runs the forward pass under torch.autocast, and the backward pass in the dtypes
              of the forward pass. Weights, their gradients and Adam's moments keep the weights'
              dtype, float32, and the mean energies are float32 sums. Autocast leaves networks of
              float64 as they are.
            - "fp32" and "tf32" compute float32 products strictly, or in TF32.
            - "fp16" is refused. The gradients of the weights would need a loss scale to stay within
              float16's range; bfloat16 has the range of float32.

        parts: Parts of the batch whose gradients are computed one after another and added in a
            fixed order. With an engine whose chains do not depend on the batch, up to ``parts``
            processes learn the same weights, bit for bit. Each part is a forward and a backward
            pass of its own.
        group: The processes that share the batch. All of them create their learner with the same
            arguments and call the same methods. Each runs its part of the chains, and all apply
            the same sum of gradients. Methods raise DistributedError if another process fails.

    ``lr`` and ``data_noise`` may be set between steps. Data order, data noise and chains are
    functions of (seed, iteration), so :meth:`tensors` and the iteration are the whole state.

    The first step warns of images that are not in [-1, 1]. Raises TypeError or ValueError naming
    the argument. Source: arXiv 1904.09770, algorithm 1.
    """

    @keywords_checked
    def __init__(
        self,
        sampler: LangevinSampler,
        data: Data,
        *,
        batch_size: int = 64,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        data_noise: float = 0.03,
        flip: bool = False,
        ema: float | None = None,
        buffer: ReplayBuffer | None = None,
        seed: int = 0,
        precision: str | None = None,
        parts: int = 1,
        group: Group | None = None,
    ) -> None:
        self.data = as_images(_OP, data)
        self.energy = _check_energy(sampler.energy, self.data)
        if not data_noise >= 0:
            raise ValueError(f"{_OP}: data_noise must be >= 0, got {data_noise}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"{_OP}: ema must be in (0, 1) or None, got {ema}")
        if sampler.start is not None:
            if buffer is not None:
                raise ValueError(
                    f"{_OP}: the sampler has a start, but the chains of a buffer continue from one "
                    "iteration to the next; leave out the buffer or the start"
                )
            describe(sampler)  # otherwise the first checkpoint would fail
        self.precision = _checked_precision(precision, next(self.energy.parameters()).device)
        self.sampler = sampler
        self.batch_size = check_count(_OP, "batch_size", batch_size)
        self.data_noise = data_noise
        self.flip = flip
        self.group = group or Group()
        self.signal = 0  # the largest signal of any process at the last step
        self._batch = SplitBatch(
            self.energy, self.batch_size, check_count(_OP, "parts", parts), self.group
        )
        self.buffer: ReplayBuffer | SharedBuffer | None = buffer
        if self.group.world_size > 1:
            if isinstance(sampler.grad_clip, tuple) and sampler.grad_clip[0] == "batch_norm":
                raise ValueError(
                    f"{_OP}: grad_clip=('batch_norm', ...) is not supported with several "
                    "processes, because no process has the whole batch"
                )
            if buffer is not None:
                self.buffer = SharedBuffer(buffer, self.group, self._batch.chains, self._device)
        self.seed = _noise.check_seed(seed)
        self.iteration = 0
        # The values of load_images are in range, even if all of them are positive.
        self._range_is_known = isinstance(self.data, ImageData) or self.group.rank > 0
        self.optimizer = torch.optim.Adam(self.energy.parameters(), lr=lr, betas=betas)
        self.averaged: AveragedModel | None = None
        if ema is not None:
            with torch.device("cpu"):  # for the average's count of updates
                average = get_ema_multi_avg_fn(ema)
                self.averaged = AveragedModel(self.energy, multi_avg_fn=average)

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

    @property
    def _device(self) -> torch.device:
        return next(self.energy.parameters()).device

    def step(self, measure: bool = False, signal: Callable[[], int] = int) -> Metrics:
        """Run one iteration and return its metrics, which are those of the whole batch.

        With ``measure``, the metrics also include the gradient norm and the displacement of the
        chain's steps. ``signal`` returns a number for the other processes of the group: afterwards,
        ``self.signal`` is the largest of them, on every process. Raises FloatingPointError, before
        the weights change, if a chain or an energy of any process is not finite.
        """
        data = self._noisy_batch().float()
        slots, x0, seed = self._chain_starts()
        samples, measured, failure = self._run_chains(x0, seed, measure)
        lo, hi = self.sampler.clamp or (-1.0, 1.0)
        saturation = ((samples <= lo) | (samples >= hi)).flatten(1).float().mean(1)
        reach = torch.linalg.vector_norm((samples - x0).flatten(1), dim=1)
        unknown = torch.full_like(reach, math.nan)  # the energies
        figures = torch.stack([unknown, unknown, saturation, reach, *measured], 1).float()

        def loss(part: Shard) -> Tensor:
            first_row = part.first_chain - self._batch.own.first_chain
            rows = slice(first_row, first_row + part.n)
            energy_data, energy_samples = self._energies(data[rows], samples[rows], part)
            figures[rows, :2] = torch.stack([energy_data, energy_samples], 1).detach().float()
            gap = (energy_data.sum() - energy_samples.sum()) / self.batch_size
            return -gap if self.sampler.maximize else gap

        self.optimizer.zero_grad(set_to_none=True)
        what = f"the gradients of iteration {self.iteration + 1}"
        with network_precision(self.precision, data.device):
            figures, self.signal = self._batch.backward(loss, figures, signal, what)
        values = torch.stack([column.mean() for column in figures.T.contiguous()]).tolist()
        data_energy, samples_energy, *other_figures = values
        gap = data_energy - samples_energy
        metrics = Metrics(self.iteration + 1, data_energy, samples_energy, gap, *other_figures)
        if not all(math.isfinite(value) for value in values):
            self.optimizer.zero_grad(set_to_none=True)
            raise failure or FloatingPointError(f"{_OP}: energies are not finite: {metrics}")

        if self.buffer is not None and slots is not None:
            self.buffer.put(slots, samples)
        with torch.device("cpu"):  # Adam creates its step counts on torch's default device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # As in DistributedDataParallel: a forward pass may have changed them differently.
        self.group.broadcast_(list(self.energy.buffers()), "the buffers of the energy")
        if self.averaged is not None:
            self.averaged.update_parameters(self.energy)
        self.iteration += 1
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their average, Adam's moments and the buffer, by name.

        In a group, all processes must call this method, and the states of the buffer are complete
        on rank 0 alone.
        """
        return self._state().tensors()

    def load_tensors(
        self, tensors: dict[str, Tensor], iteration: int, path: str | Path = "the checkpoint"
    ) -> None:
        """Restore the state that :meth:`tensors` returned at ``iteration``.

        Raises CheckpointError if the tensors do not fit; the error names ``path`` as their file.
        """
        self._state().load(tensors, path)
        self.iteration = iteration

    def _state(self) -> LearnerState:
        return LearnerState(self.energy, self.averaged, self.optimizer, self.buffer)

    def save(self, path: str | Path, **info: Any) -> None:
        """Write a checkpoint, with ``info`` in its header, atomically.

        ``fl.load`` makes a sampler from it. In a group, all processes must call this method. Rank 0
        writes, and the others return when the file is there. Raises DistributedError if the
        processes differ in their weights, averages or optimiser.
        """
        what = f"checkpoint {path}"
        self.check_replicas(what)
        tensors = self.tensors()

        def write() -> None:
            settings, header = describe(self.sampler)
            header = {**info, "iteration": self.iteration, **header}
            save_checkpoint(path, tensors | settings, header)

        self.group.first(write, what)

    def check_replicas(self, what: str) -> None:
        """Raise DistributedError unless all processes have equal weights, averages and moments."""
        if self.group.world_size > 1:
            self.group.compare(self._state().checksums(), what)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore the state that :meth:`save` wrote and return the header.

        This learner must have been created with the same arguments as the one that was saved.
        Raises FileNotFoundError, or CheckpointError for a file that does not fit.
        """
        tensors, info = read_checkpoint(path)
        self._check_start(tensors, info, path)
        self.load_tensors(tensors, iteration_of(info, path), path)
        return info

    def _check_start(self, tensors: dict[str, Tensor], info: dict[str, Any], path: Any) -> None:
        """Raise CheckpointError unless the checkpoint's chains start from the same samples."""
        if digest_of_start(*describe(self.sampler)) != digest_of_start(tensors, info):
            raise CheckpointError(
                f"{path} was learned with chains from another start than this learner's: give the "
                "model that the run began with"
            )

    def _noisy_batch(self) -> Tensor:
        """Return the batch of this iteration, with its noise: a function of (seed, iteration)."""
        first_chain, n = self._batch.own
        address: Any = {"seed": self.seed, "step": self.iteration, "first_chain": first_chain}
        words = _noise.words((n, 2), stream=_noise.ORDER, **address)
        indices = words[:, 0] * len(self.data) >> 32
        flip = words[:, 1] >= 2**31 if self.flip else None
        if isinstance(self.data, DatasetImages):
            seed = _noise.fold_in(self.seed, ITEMS + self.iteration)
            images = self.data.batch(indices, flip, seed, first_chain)
        else:
            images = self.data.batch(indices, flip)
        images = images.to(self._device)
        if not self._range_is_known:
            warn_of_range(_OP, images)
            self._range_is_known = True
        if self.data_noise > 0:
            normals = _noise.normal(
                images.shape, stream=_noise.DATA, device=self._device, **address
            )
            images = images + self.data_noise * normals
        return images

    def _chain_starts(self) -> tuple[Tensor | None, Tensor, int]:
        """Return the slots of persistent chains (else None), the starts, and the chains' seed."""
        seed = _noise.fold_in(self.seed, self.iteration)
        if self.buffer is not None:
            return *self.buffer.draw(self.batch_size, self.iteration), seed
        first_chain, n = self._batch.own
        x0 = self.sampler.starts(n, shape=self.data.shape, seed=seed, first_chain=first_chain)
        return None, x0, seed

    def _run_chains(
        self, x0: Tensor, seed: int, measure: bool
    ) -> tuple[Tensor, list[Tensor], FloatingPointError | None]:
        """Run the chains from x0; return their last states and, with ``measure``, two figures each.

        In a group, if the chains fail, returns NaN samples and the error, because the other
        processes must learn of it before this one raises it.
        """
        first_chain = self._batch.own.first_chain
        if measure:
            chain = self.sampler.diagnose(x0, seed=seed, first_chain=first_chain)
            return chain.x, [chain.grad_norm.mean(0), chain.displacement.mean(0)], None
        try:
            return self.sampler(x0, seed=seed, first_chain=first_chain), [], None
        except FloatingPointError as error:
            if self.group.world_size == 1:
                raise
            return torch.full_like(x0, math.nan), [], error

    def _energies(self, data: Tensor, samples: Tensor, part: Shard) -> tuple[Tensor, Tensor]:
        """Return the energies of a part's data and samples, with their graph."""
        # Draws makes dropout, too, a function of (seed, iteration, part).
        first_chain = part.first_chain
        seed = self.seed if first_chain == 0 else _noise.fold_in(self.seed, PART + first_chain)
        with Draws(seed, data.device).step(self.iteration):
            return self._energy_of(data), self._energy_of(samples)

    def _energy_of(self, x: Tensor) -> Tensor:
        # Data and samples give gradients of opposite signs to a weight. With autocast's cache of
        # weights, they would be added in bfloat16.
        with network_autocast(self.precision, x.device, cache=False):
            energies = call_network(self.energy, x, {}).flatten()
        is_half = self.precision in HALVES and energies.dtype in HALVES.values()
        return energies.float() if is_half else energies


def _check_energy(energy: Any, data: Images) -> torch.nn.Module:
    """Return the energy; TypeError or ValueError if it cannot be saved or cannot learn the data."""
    if not isinstance(energy, torch.nn.Module):
        raise TypeError(f"{_OP}: sampler.energy must be an nn.Module, got {type(energy).__name__}")
    if not any(p.requires_grad for p in energy.parameters()):
        raise ValueError(f"{_OP}: sampler.energy has no parameter that requires grad")
    check_state(_OP, energy)  # otherwise the first checkpoint would fail
    if len(data) == 0:
        raise ValueError(f"{_OP}: data is empty")
    expected = getattr(energy, "shape", None)
    if expected is not None and tuple(expected) != tuple(data.shape):
        raise ValueError(
            f"{_OP}: data must have the energy's shape {list(expected)}, got {list(data.shape)}"
        )
    return energy


def _checked_precision(precision: str | None, device: torch.device) -> str | None:
    if precision == "fp16":
        raise ValueError(
            f'{_OP}: precision "fp16" is not supported, because the gradients of the weights would '
            'need a loss scale; use "bf16"'
        )
    check_precision(precision, device)
    return precision
