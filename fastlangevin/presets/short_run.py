"""The sampler of short-run MCMC: Nijkamp, Hill, Zhu and Wu."""

from collections.abc import Callable, Sequence

from torch import Tensor

import fastlangevin.noise as _noise
from fastlangevin.gradients.modules import device_of
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import Randomness, Samplers, random_keywords


@keywords_checked
def short_run(
    f: Callable[..., Tensor], shape: Sequence[int] = (3, 32, 32), m: int = 64
) -> Callable[..., Tensor]:
    """``sample_q(K=100, s=1e-2)`` of short-run MCMC: m new chains from U(-1, 1) at every call.

        x <- x + (df/dx + s z)

    f: the negative energy of [m, *shape], of any output shape: the chain ascends its sum. Returns
    ``sample_q(K=100, s=1e-2, *, x0=None)`` with the presets' keywords (``noise`` is
    [K, m, *shape]). It returns x [m, *shape], detached. ``x0`` replaces the initial states.

    Differs: x0 and noise come from the noise contract; f's parameters collect no ``.grad``.
    Source: enijkamp/short_run, train_cifar10_minimal.py (where s = 0.01 is fixed), and
    enijkamp/short_run_mcmc_apex, whose half precision is ``precision="fp16"`` of a
    :class:`LangevinSampler` with the same settings.
    """
    samplers = Samplers()
    if not isinstance(shape, Sequence):
        raise TypeError(f"short_run: shape must be a sequence of integers, got {shape!r}")

    @random_keywords
    def sample_q(
        K: int = 100, s: float = 1e-2, *, x0: Tensor | None = None, random: Randomness
    ) -> Tensor:
        seed, _, first_chain = random
        x = x0
        if x is None:
            x = _noise.initial((m, *shape), seed=seed, first_chain=first_chain, device=device_of(f))
        sampler = samplers(f, steps=K, step_size=1.0, noise_std=s, maximize=True)
        return sampler(x, **random._asdict())

    return sample_q
