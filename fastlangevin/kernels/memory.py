"""Which tensors compiled code may read and write, given only an address and strides.

Many tensors have no elements at their address, or none at all: fake and meta tensors, the tensors
of functional transforms (vmap, grad, functionalize), subclasses with their own operators, sparse,
nested, quantised and oneDNN tensors, and the zeros that forward-mode differentiation never
allocates. The dispatch keys of a tensor, which list the handlers of its operators, distinguish all
of these from an ordinary tensor.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _ordinary_dispatch_keys() -> int:
    """The dispatch keys of ordinary tensors, as bits. This probes no device."""
    bits = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr()
    for device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "PrivateUse1"):
        for name in (device, f"Autograd{device}", f"Autocast{device}"):
            key = getattr(torch._C.DispatchKey, name, None)
            if key is not None:
                bits |= torch._C.DispatchKeySet(key).raw_repr()
    return bits


_OTHER_KEYS = ~_ordinary_dispatch_keys()
_dispatch_keys = torch._C._dispatch_keys


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous or channels_last, the usual memory formats."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value and in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def in_memory(tensor: Tensor) -> bool:
    """Whether the address and strides of a tensor locate all its elements, if it has any.

    False also for a tensor with a deferred negation, which ``resolve_neg()`` applies. Raises
    RuntimeError for a tensor whose storage was freed: torch's own operators crash on it.
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
    """Whether all the tensors among the arguments are :func:`in_memory`."""
    return all(in_memory(value) for value in tensors if isinstance(value, Tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values; fake and meta tensors have only a shape."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(version counter, address) of each tensor; inference tensors have no counter, and 0 here."""
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]


def check_injective(op: str, name: str, x: Tensor) -> None:
    """ValueError if several elements of a tensor have the same address."""
    dims = [(s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]
    if any(s == 0 for s, _ in dims):
        raise ValueError(f"{op}: {name} is an expanded view (stride 0); use {name}.clone()")
    if torch.compiler.is_compiling():
        return  # sorting symbolic strides would make them constants
    # How far the dimensions with smaller strides reach; nearly always, the next stride is larger.
    reach = 0
    for s, n in sorted(dims):
        if s <= reach and not _is_injective(x):
            raise ValueError(f"{op}: elements of {name} share memory; use {name}.clone()")
        reach += (n - 1) * s


def check_overlap(op: str, name: str, value: Tensor, x: Tensor) -> None:
    """ValueError if writing to x could overwrite elements of ``value`` that are not read yet."""
    if value.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return
    if (value.data_ptr(), value.stride(), value.dtype) == (x.data_ptr(), x.stride(), x.dtype):
        return
    (first, last), (start, end) = _extent(value), _extent(x)
    if first < end and start < last and (value.dtype != x.dtype or _intersect(value, x)):
        raise ValueError(f"{op}: {name} shares memory with x in another layout; use {name}.clone()")


def _is_injective(x: Tensor) -> bool:
    if x.numel() == 0 or not in_memory(x):
        return True
    start, end = _extent(x)
    covered = torch.zeros((end - start) // x.element_size(), dtype=torch.bool, device="cpu")
    covered.as_strided(x.shape, x.stride()).fill_(True)
    return int(covered.sum()) == x.numel()


def _intersect(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage, with the same dtype, share an element."""
    first = min(a.storage_offset(), b.storage_offset())
    last = max(_extent(a)[1], _extent(b)[1]) - a.untyped_storage().data_ptr()
    covered = torch.zeros(last // a.element_size() - first, dtype=torch.bool, device="cpu")
    covered.as_strided(a.shape, a.stride(), a.storage_offset() - first).fill_(True)
    return bool(covered.as_strided(b.shape, b.stride(), b.storage_offset() - first).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte and the one after its last byte."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * stride for size, stride in steps) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
