"""JEM and JEM++: classifiers as energy-based models, with a block of persistent chains a class."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastlangevin.noise as _noise
from fastlangevin.arguments import check_floating, check_tensor
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.modules import device_of
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import (
    Randomness,
    Samplers,
    Summed,
    Wrapper,
    draw_slots,
    in_eval_mode,
    random_keywords,
)
from fastlangevin.replay import check_numbers, write_last


@keywords_checked
def jem(
    args: Any, device: Any = None, *, shape: Sequence[int] = (3, 32, 32)
) -> Callable[..., Tensor]:
    """JEM's ``get_sample_q(args, device)``: ``sample_q(f, replay_buffer, y=None, n_steps)``.

        x <- x + (sgld_lr df/dx + sgld_std z)

    args: an object with ``n_steps``, ``sgld_lr``, ``sgld_std``, ``reinit_freq``, ``batch_size`` and
    ``n_classes``. f: the negative energy, called f(x), or f(x, y=y) with labels y [n], of any
    output shape: its sum is differentiated. It is in eval mode during a call. replay_buffer
    [N, ...]: floating, on any device. n = len(y) or batch_size slots are drawn with repetition, for
    a chain of label c from the N / n_classes slots of block c, and the chains are written back in
    place; if a slot was drawn twice, it receives the later chain. With probability reinit_freq a
    chain starts from U(-1, 1) instead. ``[]`` means no buffer: chains of ``shape`` start from
    U(-1, 1). ``sample_q`` also takes the presets' keywords (``noise`` is [n_steps, n, ...]), and
    returns x [n, ...], detached.

    Differs: modes are restored, while the original always leaves f in train mode; random numbers
    come from the noise contract; f's parameters collect no ``.grad``. Raises TypeError or
    ValueError for labels that are not [n] integers below n_classes, for labels with
    ``args.uncond``, for rates outside [0, 1] and for buffers smaller than the batch.
    Source: wgrathwohl/JEM, train_wrn_ebm.py; Grathwohl et al., ICLR 2020.
    """
    samplers = Samplers()

    @random_keywords
    def sample_q(
        f: Callable[..., Tensor],
        replay_buffer: Any,
        y: Tensor | None = None,
        n_steps: int = args.n_steps,
        *,
        random: Randomness,
    ) -> Tensor:
        x, slots = _start("jem", args, replay_buffer, y, device or device_of(f), shape, random)
        sampler = samplers(
            f, steps=n_steps, step_size=args.sgld_lr, noise_std=args.sgld_std, maximize=True
        )
        with in_eval_mode(f):
            x = sampler(x, **random._asdict(), **_label_kwargs(y))
        if slots is not None:
            write_last(replay_buffer, slots, x.to(replay_buffer))
        return x

    return sample_q


@keywords_checked
def jempp(args: Any = None, *, shape: Sequence[int] = (3, 32, 32)) -> Callable[..., Tensor]:
    """JEM++'s ``sample_q(f, replay_buffer, y=None, n_steps=10, in_steps=10, args, save=True)``.

        x <- clamp(x + sgld_lr clip(df/dx)),    in_steps times x <- clamp(x + pyld_lr clip(dH/dx)),
        x <- x + sgld_std z

    where clip bounds elements by eps and clamp is to (-1, 1). H = p . layer_one(x) with
    p = df / d layer_one at the first x. args: as for :func:`jem`, with ``eps`` and ``pyld_lr``
    (in_steps count only if it is above 0) and without ``n_steps``. They are passed to the preset or
    to the call.

    The original's first layer is a convolution, affine in x, through which all of x passes. So
    dH/dx is df/dx, and the same in all in_steps. Steps of one sign that start within the bounds
    equal one step of their sum, and this one step is taken. With noise, which may leave the bounds,
    the first of them clamps separately and the gradient is autograd's. For in_steps f must have
    that layer, ``f.f.layer_one``, a Conv2d or Linear (else ValueError), and without noise the
    buffer must lie in [-1, 1], as the original's does.

    Differs: BatchNorm stays in train mode, as in the original, but its statistics are left
    unchanged; the extra backward pass that adds to layer_one's ``.grad`` is left out; new chains
    start from U(-1, 1) and not from the classes' Gaussians, which the original keeps in a global.
    :func:`jem` lists the other differences.
    Source: sndnyang/JEMPP, train_jempp.py; Yang and Ji, ICCV 2021.
    """
    samplers, defaults = Samplers(), args

    @random_keywords
    def sample_q(
        f: Callable[..., Tensor],
        replay_buffer: Any,
        y: Tensor | None = None,
        n_steps: int = 10,
        in_steps: int = 10,
        args: Any = None,
        save: bool = True,
        *,
        random: Randomness,
    ) -> Tensor:
        args = defaults if args is None else args
        if args is None:
            raise TypeError("jempp: give args, to the preset or to the call")
        inner = [args.pyld_lr] * in_steps if args.pyld_lr > 0 else []
        if inner:
            _check_layer_one(f)
        first_size, *other_sizes = [args.sgld_lr] * (args.sgld_lr > 0) + inner or [0.0]
        x, slots = _start("jempp", args, replay_buffer, y, device_of(f), shape, random)
        std = max(args.sgld_std, 0.0)
        settings = {"steps": n_steps, "noise_std": std, "maximize": True, "clamp": (-1.0, 1.0)}
        settings["noise_order"] = "last"
        if other_sizes and std > 0:
            wrap = (_Proximal, first_size, sum(other_sizes), args.eps)
            sampler = samplers(f, wrap, step_size=1.0, gradient="network", **settings)
        else:
            step_size = first_size + sum(other_sizes)
            sampler = samplers(f, step_size=step_size, grad_clip=args.eps, **settings)
        x = sampler(x, **random._asdict(), **_label_kwargs(y))
        if slots is not None and save:
            write_last(replay_buffer, slots, x.to(replay_buffer))
        return x

    return sample_q


class _Proximal(Wrapper):
    """The move made by clamped steps of ``first`` and ``rest`` along one clipped gradient."""

    def __init__(self, f: Callable[..., Tensor], first: float, rest: float, eps: float) -> None:
        super().__init__(Summed(f))
        self.first, self.rest, self.eps = first, rest, eps

    def forward(self, x: Tensor, **model_kwargs: Tensor) -> Tensor:
        _, grad = energy_and_grad(self.model, x, model_kwargs)
        move = grad.clamp(-self.eps, self.eps)
        after_first = (x + self.first * move).clamp(-1, 1)
        return (after_first + self.rest * move).clamp(-1, 1) - x


def _start(
    op: str,
    args: Any,
    replay_buffer: Any,
    y: Tensor | None,
    device: Any,
    shape: Sequence[int],
    random: Randomness,
) -> tuple[Tensor, Tensor | None]:
    """(x0 on the device, its slots in the buffer or None)."""
    seed, _, first_chain = random
    if y is not None:
        if getattr(args, "uncond", False):
            raise ValueError(f"{op}: y must be None if args.uncond is set")
        y = check_numbers(op, "y", y, None, args.n_classes)
    if isinstance(args.reinit_freq, str) or not 0 <= args.reinit_freq <= 1:
        raise ValueError(f"{op}: reinit_freq must be in [0, 1], got {args.reinit_freq!r}")
    n = args.batch_size if y is None else len(y)
    if len(replay_buffer) == 0:
        return _noise.initial((n, *shape), seed=seed, first_chain=first_chain, device=device), None
    check_tensor(op, "replay_buffer", replay_buffer, "; [] stands for no states")
    check_floating(op, "replay_buffer", replay_buffer)
    size, block_size = len(replay_buffer), len(replay_buffer)
    if size < n:
        raise ValueError(f"{op}: replay_buffer holds {size} states for a batch of {n}")
    first_slots: Tensor | int = 0
    if y is not None:
        if size % args.n_classes:
            raise ValueError(
                f"{op}: replay_buffer must hold equally many states for each of the "
                f"{args.n_classes} classes, got {size}"
            )
        block_size = size // args.n_classes
        first_slots = y.cpu() * block_size
    slots = (draw_slots(n, block_size, seed, first_chain) + first_slots).to(replay_buffer.device)
    x = replay_buffer[slots].to(device or replay_buffer.device)
    new_states = _noise.initial(x.shape, seed=seed, first_chain=first_chain, device=x.device)
    u = _noise.uniform(
        (n, *[1] * (x.ndim - 1)), seed=seed, step=0, stream=_noise.USER, device=x.device,
        first_chain=first_chain,
    )  # fmt: skip
    return torch.where(u < args.reinit_freq, new_states.to(x.dtype), x), slots


def _label_kwargs(y: Tensor | None) -> dict[str, Any]:
    """The label as a keyword argument, if there is one. Without it f may be recognised."""
    return {} if y is None else {"y": y}


def _check_layer_one(f: Any) -> None:
    layer = getattr(getattr(f, "f", None), "layer_one", None)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(
            "jempp: in_steps > 0 needs f.f.layer_one to be a Conv2d or Linear layer, through which "
            f"all of x passes, got {type(layer).__name__}; in_steps=0 leaves these steps out"
        )
