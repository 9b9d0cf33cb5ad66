"""Which tensors compiled code may read: it is given an address and strides, and trusts both.

Many of torch's tensors have no elements at their address, or none at all: fake and meta tensors,
those of functional transforms (vmap, grad, functionalize), subclasses with operators of their own,
sparse, nested, quantised and oneDNN's tensors, and the zeros that forward-mode differentiation
never writes down. A tensor's dispatch keys, the list of those who handle its operators, tell all of
these from an ordinary tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _ordinary() -> int:
    """The dispatch keys of ordinary tensors, as bits. No device is probed."""
    bits = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr()
    for device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "PrivateUse1"):
        for name in (device, f"Autograd{device}", f"Autocast{device}"):
            key = getattr(torch._C.DispatchKey, name, None)
            if key is not None:
                bits |= torch._C.DispatchKeySet(key).raw_repr()
    return bits


_OTHER_KEYS = ~_ordinary()
_dispatch_keys = torch._C._dispatch_keys


def in_memory(tensor: Tensor) -> bool:
    """Whether every element of a tensor lies at its address plus strides; so for an empty one.

    False also for a tensor whose sign is still to be changed: ``resolve_neg()`` does that. Raises
    RuntimeError for one whose storage was freed, on which torch's own operators crash. A call takes
    some 0.2 us.
    """
    if _dispatch_keys(tensor).raw_repr() & _OTHER_KEYS:
        return False
    if not tensor.data_ptr() and tensor.numel():
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} has no memory: its storage was freed, as "
            "FSDP does with parameters that are not gathered, or resized to 0"
        )
    return True


def all_in_memory(*tensors: Any) -> bool:
    """Whether those of the arguments that are tensors are :func:`in_memory`."""
    return all(in_memory(value) for value in tensors if isinstance(value, Tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers behind a tensor: fake and meta tensors have a shape alone."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)
