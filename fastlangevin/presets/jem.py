"""JEM and JEM++: classifiers as energy-based models, with persistent chains in blocks by class."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlangevin import noise as _noise
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.network import device_of
from fastlangevin.presets.common import (
    Samplers,
    Summed,
    Wrapper,
    draw_coins,
    draw_slots,
    in_eval_mode,
    take_seed,
)
from fastlangevin.replay import check_numbers, write_last


def jem(
    args: Any, device: Any = None, *, shape: Sequence[int] = (3, 32, 32)
) -> Callable[..., Tensor]:
    """JEM's ``get_sample_q(args, device)``: ``sample_q(f, replay_buffer, y=None, n_steps)``.

        x <- x + (sgld_lr df/dx + sgld_std z)

    args: an object with ``n_steps``, ``sgld_lr``, ``sgld_std``, ``reinit_freq``, ``batch_size`` and
    ``n_classes``. f: the negative energy, called f(x), or f(x, y=y) where y [n] is given, of any
    output shape: its sum is what is differentiated. It is in eval mode meanwhile. replay_buffer [N,
    ...]: floating, on any device; n = len(y) or batch_size slots are drawn with repetition, for a
    label y among those of its block y N / n_classes ..., and written back in place (of a slot drawn
    twice, the later chain's). Each chain starts from U(-1, 1) instead with probability reinit_freq.
    ``[]`` is no buffer: chains of ``shape`` from U(-1, 1). ``sample_q`` takes ``seed``,
    ``generator`` and ``noise`` [n_steps, n, ...] besides, and returns x [n, ...], detached.

    Differs: modes are put back as they were found, where the original always ends in train mode;
    random numbers come from the noise contract; f's parameters collect no ``.grad``. Raises
    TypeError or ValueError for labels that are not [n] integers in the classes, for labels under
    ``args.uncond``, for rates outside [0, 1] and for buffers smaller than the batch.
    Source: wgrathwohl/JEM, train_wrn_ebm.py; Grathwohl et al., ICLR 2020.
    """
    samplers = Samplers()

    def sample_q(
        f: Callable[..., Tensor],
        replay_buffer: Any,
        y: Tensor | None = None,
        n_steps: int = args.n_steps,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        seed = take_seed(seed, generator)
        x, slots = _start(
            "jem", args, replay_buffer, y, seed, device or device_of(f), shape, first_chain
        )
        sampler = samplers(
            f, steps=n_steps, step_size=args.sgld_lr, noise_std=args.sgld_std, maximize=True
        )
        with in_eval_mode(f):
            x = sampler(x, seed=seed, noise=noise, first_chain=first_chain, **_given(y))
        if slots is not None:
            write_last(replay_buffer, slots, x.to(replay_buffer))
        return x

    return sample_q


def jempp(args: Any = None, *, shape: Sequence[int] = (3, 32, 32)) -> Callable[..., Tensor]:
    """JEM++'s ``sample_q(f, replay_buffer, y=None, n_steps=10, in_steps=10, args, save=True)``.

        x <- clamp(x + sgld_lr clip(df/dx)),    in_steps times x <- clamp(x + pyld_lr clip(dH/dx)),
        x <- x + sgld_std z

    with clip to +-eps and clamp to (-1, 1); H = p . layer_one(x), p = df / d layer_one at the first
    x. args: as for :func:`jem`, with ``eps`` and ``pyld_lr`` (in_steps count where it is above 0)
    and without ``n_steps``; given here or at the call.

    The original's first layer is a convolution, affine in x, and all of x goes through it: dH/dx is
    df/dx, the same in all in_steps. Steps of one sign from within the bounds are one step of their
    sum, which is what runs; with noise, which may leave the bounds, the first of them clamps apart,
    and the gradient is autograd's. For in_steps f must have that layer, ``f.f.layer_one``, a Conv2d
    or Linear (else ValueError), and without noise the buffer lies in [-1, 1], as the original's.

    Differs: BatchNorm stays in train mode, as there, but its statistics are left alone; the extra
    backward pass that adds to layer_one's ``.grad`` is left out; fresh chains start from U(-1, 1),
    not from the classes' Gaussians, which the original keeps in a global; see :func:`jem` for the
    rest. Source: sndnyang/JEMPP, train_jempp.py; Yang and Ji, ICCV 2021.
    """
    samplers, defaults = Samplers(), args

    def sample_q(
        f: Callable[..., Tensor],
        replay_buffer: Any,
        y: Tensor | None = None,
        n_steps: int = 10,
        in_steps: int = 10,
        args: Any = None,
        save: bool = True,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        args = defaults if args is None else args
        if args is None:
            raise TypeError("jempp: give args, to the preset or to the call")
        inner = [args.pyld_lr] * in_steps if args.pyld_lr > 0 else []
        if inner:
            _check_layer_one(f)
        first, *rest = [args.sgld_lr] * (args.sgld_lr > 0) + inner or [0.0]
        seed = take_seed(seed, generator)
        x, slots = _start("jempp", args, replay_buffer, y, seed, device_of(f), shape, first_chain)
        std = max(args.sgld_std, 0.0)
        settings = {"steps": n_steps, "noise_std": std, "maximize": True, "clamp": (-1.0, 1.0)}
        settings["noise_order"] = "last"
        if rest and std > 0:
            wrap = (_Proximal, first, sum(rest), args.eps)
            sampler = samplers(f, wrap, step_size=1.0, gradient="network", **settings)
        else:
            step_size = first + sum(rest)
            sampler = samplers(f, step_size=step_size, grad_clip=args.eps, **settings)
        x = sampler(x, seed=seed, noise=noise, first_chain=first_chain, **_given(y))
        if slots is not None and save:
            write_last(replay_buffer, slots, x.to(replay_buffer))
        return x

    return sample_q


class _Proximal(Wrapper):
    """Where clamped steps ``first`` and ``rest`` along one clipped gradient lead, as a move."""

    def __init__(self, f: Callable[..., Tensor], first: float, rest: float, eps: float) -> None:
        super().__init__(Summed(f))
        self.first, self.rest, self.eps = first, rest, eps

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        _, grad = energy_and_grad(self.model, x, given)
        move = grad.clamp(-self.eps, self.eps)
        there = (x + self.first * move).clamp(-1, 1)
        return (there + self.rest * move).clamp(-1, 1) - x


def _start(
    op: str,
    args: Any,
    replay_buffer: Any,
    y: Tensor | None,
    seed: int,
    device: Any,
    shape: Sequence[int],
    first_chain: int,
) -> tuple[Tensor, Tensor | None]:
    """(x0 on the device, the buffer's slots or None)."""
    if y is not None:
        if getattr(args, "uncond", False):
            raise ValueError(f"{op}: y must be None where args.uncond is set")
        y = check_numbers(op, "y", y, None, args.n_classes)
    if isinstance(args.reinit_freq, str) or not 0 <= args.reinit_freq <= 1:
        raise ValueError(f"{op}: reinit_freq must be in [0, 1], got {args.reinit_freq!r}")
    n = args.batch_size if y is None else len(y)
    if len(replay_buffer) == 0:
        return _noise.initial((n, *shape), seed=seed, first_chain=first_chain, device=device), None
    if not isinstance(replay_buffer, Tensor):
        raise TypeError(
            f"{op}: replay_buffer must be a tensor or [], got {type(replay_buffer).__name__}"
        )
    if not replay_buffer.is_floating_point():
        raise TypeError(f"{op}: replay_buffer must be of floating dtype, got {replay_buffer.dtype}")
    size, block = len(replay_buffer), len(replay_buffer)
    if size < n:
        raise ValueError(f"{op}: replay_buffer holds {size} states for a batch of {n}")
    first: Tensor | int = 0
    if y is not None:
        if size % args.n_classes:
            raise ValueError(
                f"{op}: replay_buffer must have as many states for each of the "
                f"{args.n_classes} classes, got {size}"
            )
        block = size // args.n_classes
        first = y.cpu() * block
    slots = (draw_slots(n, block, seed, first_chain) + first).to(replay_buffer.device)
    x = replay_buffer[slots].to(device or replay_buffer.device)
    fresh = _noise.initial(x.shape, seed=seed, first_chain=first_chain, device=x.device)
    fresh = fresh.to(x.dtype)
    coins = draw_coins(n, args.reinit_freq, seed, x.device, first_chain)
    return torch.where(coins.view(n, *[1] * (x.ndim - 1)), fresh, x), slots


def _given(y: Tensor | None) -> dict[str, Any]:
    """The label as an argument, where there is one: without, f may be recognised."""
    return {} if y is None else {"y": y}


def _check_layer_one(f: Any) -> None:
    layer = getattr(getattr(f, "f", None), "layer_one", None)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(
            "jempp: in_steps > 0 needs f.f.layer_one to be a Conv2d or Linear layer, through which "
            f"all of x passes, got {type(layer).__name__}; in_steps=0 is the chain without"
        )
