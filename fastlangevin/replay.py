"""ReplayBuffer: persistent chains that live on the device."""

import torch
from torch import Tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import check_count


class ReplayBuffer:
    """States [capacity, *shape] of persistent chains: drawn by slot, written back by slot.

    Slots start as U(-1, 1). ``draw`` picks distinct slots and starts each drawn chain anew from
    U(-1, 1) with probability ``reinit``; ``put`` writes states back where they came from. Every
    choice is a function of (seed, step) through the noise contract, so that ``states`` is all
    there is to save. Source: JEM (Grathwohl et al. 2020), with slots drawn without repetition.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        *,
        seed: int,
        reinit: float = 0.05,
        device: torch.device | str | None = None,
    ) -> None:
        capacity = check_count("ReplayBuffer", "capacity", capacity)
        if not 0 <= reinit <= 1:
            raise ValueError(f"ReplayBuffer: reinit must be in [0, 1], got {reinit!r}")
        self.seed = _noise.check_seed(seed)
        self.reinit = float(reinit)
        u = _noise.uniform((capacity, *shape), seed=self.seed, step=0, device=device)
        self.states = 2 * u - 1

    def draw(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """(slots [n], states [n, ...]) for one step; ValueError if n exceeds the capacity."""
        capacity, device = self.states.shape[0], self.states.device
        if not 1 <= n <= capacity:
            raise ValueError(f"ReplayBuffer: n must be in 1..capacity={capacity}, got {n}")
        keys = _noise.words(
            (1, capacity), seed=self.seed, step=step, stream=_noise.ORDER, device=device
        )
        slots = keys[0].argsort(stable=True)[:n]
        x = self.states[slots]
        # step + 1: step 0 of this stream made the slots' first states.
        fresh = _noise.uniform(x.shape, seed=self.seed, step=step + 1, device=device)
        coin = _noise.uniform(
            (n, 1), seed=self.seed, step=step, stream=_noise.USER, device=device
        ).view(n, *[1] * (x.ndim - 1))
        return slots, torch.where(coin < self.reinit, 2 * fresh - 1, x)

    def put(self, slots: Tensor, x: Tensor) -> None:
        """Write states x [n, ...] back to their slots [n]."""
        if x.shape[1:] != self.states.shape[1:] or slots.shape != x.shape[:1]:
            raise ValueError(
                f"ReplayBuffer: x must have shape [{slots.numel()}, "
                f"{', '.join(map(str, self.states.shape[1:]))}], got {list(x.shape)}"
            )
        self.states[slots] = x.detach().to(self.states.dtype)
