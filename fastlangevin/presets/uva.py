"""The sampler of tutorial 8 of the UvA deep learning course, with its buffer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.gradients.network import device_of
from fastlangevin.presets.common import Samplers, Summed, in_eval_mode, take_seed
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import LangevinSampler


class uva:  # lower case, as all presets are called
    """``Sampler(model, img_shape, sample_size, max_len=8192)`` of the UvA tutorial on deep EBMs.

        x <- clamp(x + 0.005 z),    x <- clamp(x + step_size clip(d model/dx))

    with clip +-0.03 and clamp (-1, 1), twice a step. model: the negative energy of [n, *img_shape],
    of any output shape: its sum is what is differentiated; in eval mode meanwhile. ``buffer`` is a
    first-in first-out :class:`ReplayBuffer` on the model's device (it follows a model that moves)
    of at most max_len states, which sample_size ones from U(-1, 1) begin; each chain starts anew
    with probability 0.05. ``seed``: of all its numbers, by default drawn from torch's generator;
    with ``buffer.state_dict()`` and ``drawn``, the batches drawn so far, it is all there is to
    save. ``examples``: those states, as the tutorial's callbacks read them. ``first_chain``: rank *
    sample_size, where several processes have one seed.

    Differs: results are new tensors without requires_grad, where the original changes its input in
    place and returns that; frozen parameters stay frozen; the buffer does not go through the CPU.
    Source: phlippe/uvadlc_notebooks, tutorial 8, cell 5.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        img_shape: tuple[int, ...],
        sample_size: int,
        max_len: int = 8192,
        *,
        seed: int | None = None,
        first_chain: int = 0,
    ) -> None:
        self.first_chain = first_chain
        self.model, self.sample_size, self.drawn = model, sample_size, 0
        self.seed, device = take_seed(seed, None), device_of(model)
        if max_len < sample_size:
            raise ValueError(
                f"uva: max_len must be at least sample_size={sample_size}, got {max_len}"
            )
        # One rank's slots and fresh chains are not another's.
        own = _noise.fold_in(self.seed, first_chain) if first_chain else self.seed
        self.buffer = ReplayBuffer(
            max_len, tuple(img_shape), seed=own, kind="fifo", reinit=0.05, device=device
        )
        start = _noise.initial(
            (sample_size, *img_shape), seed=self.seed, first_chain=first_chain, device=device
        )
        self.buffer.put(None, start)
        self._samplers = Samplers()

    def sample_new_exmps(
        self, steps: int = 60, step_size: float = 10, *, noise: Tensor | None = None
    ) -> Tensor:
        """sample_size new samples [n, *img_shape], which the buffer takes in too."""
        device = device_of(self.model)
        if device is not None:  # a trainer has moved the model since
            self.buffer.to(device)
        _, x = self.buffer.draw(self.sample_size, self.drawn)
        # Other numbers than the buffer's, and others at every call.
        seed = _noise.fold_in(self.seed, self.drawn)
        sampler = self._samplers(self.model, **_settings(steps, step_size))
        with in_eval_mode(self.model):
            x = sampler(x, seed=seed, noise=noise, first_chain=self.first_chain)
        self.buffer.put(None, x)
        self.drawn += 1
        return x

    @property
    def examples(self) -> list[Tensor]:
        """The buffer's states as copies on the CPU, each [1, *img_shape], the newest first."""
        count, states = self.buffer.added, self.buffer.states
        numbers = range(count - 1, max(count - len(states), 0) - 1, -1)
        return list(states[[k % len(states) for k in numbers]].cpu().split(1))

    @staticmethod
    def generate_samples(
        model: Callable[..., Tensor],
        inp_imgs: Tensor,
        steps: int = 60,
        step_size: float = 10,
        return_img_per_step: bool = False,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        """The states after ``steps`` steps from inp_imgs [n, ...], or each [steps, n, ...]."""
        sampler = LangevinSampler(Summed(model), **_settings(steps, step_size))
        options: dict[str, Any] = {"seed": take_seed(seed, generator), "noise": noise}
        options["first_chain"] = first_chain
        with in_eval_mode(model):
            if return_img_per_step:
                return sampler.trajectory(inp_imgs, **options)[1:]
            return sampler(inp_imgs, **options)


def _settings(steps: int, step_size: float) -> dict[str, Any]:
    return {
        "steps": steps,
        "step_size": step_size,
        "noise_std": 0.005,
        "maximize": True,
        "clamp": (-1.0, 1.0),
        "grad_clip": 0.03,
        "noise_order": "before",
    }
