"""The sampler of tutorial 8 of the UvA deep learning course, and its buffer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.gradients.modules import device_of
from fastlangevin.inputs import choose_seed
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import (
    Randomness,
    Samplers,
    Summed,
    in_eval_mode,
    random_keywords,
)
from fastlangevin.replay import ReplayBuffer
from fastlangevin.sampler import LangevinSampler


class uva:  # lower case, like all presets
    """``Sampler(model, img_shape, sample_size, max_len=8192)`` of the UvA tutorial on deep EBMs.

        x <- clamp(x + 0.005 z),    x <- clamp(x + step_size clip(d model/dx))

    with clip +-0.03 and clamp (-1, 1), twice a step. model: the negative energy of [n, *img_shape],
    of any output shape: its sum is differentiated. It is in eval mode during a call. ``buffer`` is
    a first-in first-out :class:`ReplayBuffer` of at most max_len states on the model's device; it
    follows a model that moves. It begins with sample_size states from U(-1, 1). With probability
    0.05 a chain starts from U(-1, 1) instead. ``seed`` determines all random numbers; by default it
    is drawn from torch's generator. To resume, save it with ``buffer.state_dict()`` and ``drawn``,
    the number of batches drawn so far. ``examples`` lists the buffer's states as the tutorial's
    callbacks read them. ``first_chain``: rank * sample_size if several processes share one seed.

    Differs: results are new tensors without requires_grad, while the original changes and returns
    its input; frozen parameters stay frozen; the buffer does not pass through the CPU.
    Source: phlippe/uvadlc_notebooks, tutorial 8, cell 5.
    """

    @keywords_checked
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
        self.seed, device = choose_seed("presets", seed, None), device_of(model)
        if max_len < sample_size:
            raise ValueError(
                f"uva: max_len must be at least sample_size={sample_size}, got {max_len}"
            )
        # Each rank draws its own slots and new chains.
        buffer_seed = _noise.fold_in(self.seed, first_chain) if first_chain else self.seed
        self.buffer = ReplayBuffer(
            max_len, tuple(img_shape), seed=buffer_seed, kind="fifo", reinit=0.05, device=device
        )
        start = _noise.initial(
            (sample_size, *img_shape), seed=self.seed, first_chain=first_chain, device=device
        )
        self.buffer.put(None, start)
        self._samplers = Samplers()

    def sample_new_exmps(
        self, steps: int = 60, step_size: float = 10, *, noise: Tensor | None = None
    ) -> Tensor:
        """Return sample_size new samples [n, *img_shape], and add them to the buffer."""
        device = device_of(self.model)
        if device is not None:  # a trainer may have moved the model
            self.buffer.to(device)
        _, x = self.buffer.draw(self.sample_size, self.drawn)
        # A seed for this call alone, different from the buffer's.
        seed = _noise.fold_in(self.seed, self.drawn)
        sampler = self._samplers(self.model, **_settings(steps, step_size))
        with in_eval_mode(self.model):
            x = sampler(x, seed=seed, noise=noise, first_chain=self.first_chain)
        self.buffer.put(None, x)
        self.drawn += 1
        return x

    @property
    def examples(self) -> list[Tensor]:
        """Copies of the buffer's states on the CPU, each [1, *img_shape], the newest first."""
        count, states = self.buffer.added, self.buffer.states
        numbers = range(count - 1, max(count - len(states), 0) - 1, -1)
        return list(states[[k % len(states) for k in numbers]].cpu().split(1))

    @staticmethod
    @random_keywords
    def generate_samples(
        model: Callable[..., Tensor],
        inp_imgs: Tensor,
        steps: int = 60,
        step_size: float = 10,
        return_img_per_step: bool = False,
        *,
        random: Randomness,
    ) -> Tensor:
        """Return the states after ``steps`` steps from inp_imgs [n, ...], or all of them.

        With return_img_per_step: the states after each step, [steps, n, ...].
        """
        sampler = LangevinSampler(Summed(model), **_settings(steps, step_size))
        with in_eval_mode(model):
            if return_img_per_step:
                return sampler.trajectory(inp_imgs, **random._asdict())[1:]
            return sampler(inp_imgs, **random._asdict())


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
