"""Score networks, whose output is used as the gradient: there is no energy behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.modules import call_network
from fastlangevin.gradients.precision import network_autocast, network_precision
from fastlangevin.kernels.memory import all_in_memory


def network_score(
    net: Callable[..., Tensor],
    x: Tensor,
    model_kwargs: dict[str, Any],
    precision: str | None = None,
    create_graph: bool = False,
) -> tuple[None, Tensor]:
    """Return (None, net(x) in x's dtype) for a batch x [n, ...]; a score has no energies.

    The network runs under torch.no_grad unless ``create_graph`` makes the score differentiable.
    Raises TypeError or ValueError for an output that cannot be a score of x, and RuntimeError for a
    network that changes x in place.
    """
    version = x._version
    with torch.set_grad_enabled(create_graph), network_precision(precision, x.device):
        with network_autocast(precision, x.device):
            out = call_network(net, x, model_kwargs)
        if x._version != version:
            raise RuntimeError("score: the network changed x in place; it must use x.clone()")
        score = _check(out, x).to(x.dtype)
    # The step writes to x while it reads the score, so they must not share memory.
    separate = all_in_memory(x, score) and (
        score.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )
    return None, score if separate else score.clone()


def _check(out: Any, x: Tensor) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"score: the network must return a tensor, got {type(out).__name__}")
    if not out.is_floating_point():
        raise TypeError(f"score: the network must return a floating dtype, got {out.dtype}")
    if out.shape != x.shape:
        per_chain = out.numel() == x.shape[0] and (out.ndim == 0 or out.shape[0] == x.shape[0])
        raise ValueError(
            f"score: the network must return x's shape {list(x.shape)}, got {list(out.shape)}"
            + ("; one value per chain is an energy: LangevinSampler(energy)" if per_chain else "")
        )
    if out.device != x.device:
        raise ValueError(f"score: the network must stay on x's device {x.device}, got {out.device}")
    return out
