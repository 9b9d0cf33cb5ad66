"""The tensors of a learner by name, as checkpoints hold them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fastlangevin.learn.checkpoint import CheckpointError, checksum, load_weights
from fastlangevin.learn.shared_buffer import SharedBuffer
from fastlangevin.replay import ReplayBuffer

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# What the tensors of a checkpoint are, by the first word of their names.
_KINDS = {
    "model": "the weights",
    "ema": "the averages",
    "adam": "the optimiser",
    "buffer": "the count of persistent chains",
}


class LearnerState(NamedTuple):
    """Everything that changes from one iteration to the next, except the iteration's number."""

    energy: torch.nn.Module
    averaged: AveragedModel | None
    optimizer: torch.optim.Adam
    buffer: ReplayBuffer | SharedBuffer | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their average, Adam's moments and the buffer."""
        tensors = self._replicated()
        if self.buffer is not None:
            tensors["buffer"] = self.buffer.gather()
        return tensors

    def checksums(self) -> dict[str, str]:
        """Return a checksum for each kind of tensors that are equal on all processes."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, value in self._replicated().items():
            kind = _KINDS[re.split(r"[._]", name)[0]]
            kinds.setdefault(kind, {})[name] = value
        return {kind: checksum("", tensors) for kind, tensors in kinds.items()}

    def load(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        """Restore what :meth:`tensors` returned.

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
            states = take("buffer", (self.buffer.capacity, *self.buffer.states.shape[1:]))
            if states.dtype != self.buffer.states.dtype:
                raise CheckpointError(
                    f"{path} has a buffer of {states.dtype}, this run's is of "
                    f"{self.buffer.states.dtype}"
                )
            added = int(take("buffer_added", ())) if self.buffer.kind != "index" else 0
            self.buffer.load(states, added)
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

    def _replicated(self) -> dict[str, Tensor]:
        """Return the tensors that are equal on all processes."""
        tensors = {f"model.{name}": value for name, value in self.energy.state_dict().items()}
        if self.averaged is not None:
            averages = self.averaged.module.state_dict()
            tensors |= {f"ema.{name}": value for name, value in averages.items()}
            tensors["ema_updates"] = self.averaged.n_averaged
        for name, parameter in self.energy.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        if self.buffer is not None and self.buffer.kind != "index":
            added = torch.tensor(self.buffer.added, dtype=torch.int64, device="cpu")
            tensors["buffer_added"] = added
        return tensors
