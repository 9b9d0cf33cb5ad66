"""The fused Langevin step: argument checks and the choice of who runs it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from fastlangevin import noise as _noise
from fastlangevin.arguments import (
    Coefficient,
    GradClip,
    check_clamp,
    check_coefficient,
    check_grad_clip,
    check_strided,
    check_values,
)
from fastlangevin.kernels import native, reference, triton
from fastlangevin.kernels.memory import in_memory

BACKENDS = ("auto", "native", "triton", "reference")
_OP = "langevin_step_"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def langevin_step_(
    x: Tensor,
    grad: Tensor | None,
    *,
    step_size: Coefficient,
    noise_std: Coefficient,
    seed: int,
    step: int,
    first_chain: int = 0,
    clamp: tuple[float, float] | None = None,
    grad_clip: GradClip | None = None,
    maximize: bool = False,
    backend: str = "auto",
    noise: Tensor | None = None,
    noise_last: bool = False,
) -> Tensor:
    """One Langevin step on a batch of chains, in place.

        x <- clamp(x + (s a clip(g) + b z)),      s = -1 (descend) or +1 (maximize)

    x [n, ...]: float32, float64, bfloat16 or float16, of any memory format; computed in float32
    (float64 for a float64 x). grad: d energy / d x in x's shape and any of those dtypes, or None
    for a step of noise alone. a = step_size and b = noise_std: floats, or tensors [n] with one
    value per chain, independent of each other; the noise is b times a standard normal.
    ``noise_std=0`` skips the generator and is gradient descent exactly. z is ``noise`` where
    given, else the contract's normals at (seed, chain = first_chain + row, step). ``grad_clip``:
    a bound on each element, ("chain_norm", c) on each chain's L2 norm, or ("batch_norm", c) on
    that of the whole batch. ``noise_last`` adds the noise after the clamp. NaN stays NaN.

    Works under torch.compile(fullgraph=True). There seed and step may change from call to call;
    a float among the coefficients is a constant, so one that changes is best a 0-d tensor.

    Returns x. Raises TypeError or ValueError naming the argument, before x is touched;
    RuntimeError where the backend cannot run here.
    """
    _check_state(x)
    if grad is not None:
        _check_like("grad", grad, x)
    if noise is not None:
        _check_like("noise", noise, x)
    seed = _noise.check_seed(seed)
    first_chain, step = _noise.check_address(first_chain, x.shape[0], step, 1)
    check_backend(backend)
    # Schemas hold no unions and only signed 64-bit integers.
    a, step_sizes = _split(check_coefficient(_OP, "step_size", step_size, x.shape[0]))
    b, noise_stds = _split(check_coefficient(_OP, "noise_std", noise_std, x.shape[0]))
    clip = check_grad_clip(_OP, grad_clip)
    clip_by, bound = clip if isinstance(clip, tuple) else ("element", clip)
    run = torch.ops.fastlangevin.langevin_step_.default if _is_traced(x) else _langevin_step_
    with torch.no_grad():
        run(
            x, grad, noise, a, step_sizes, b, noise_stds,
            seed if seed < 2**63 else seed - 2**64, step, first_chain,
            check_clamp(_OP, clamp), bound, clip_by, bool(maximize), bool(noise_last), backend,
        )  # fmt: skip
    return x


def _langevin_step_(
    x: Tensor,
    grad: Tensor | None,
    noise: Tensor | None,
    step_size: float,
    step_sizes: Tensor | None,
    noise_std: float,
    noise_stds: Tensor | None,
    seed: int,
    step: int,
    first_chain: int,
    clamp: Sequence[float] | None,
    grad_clip: float | None,
    clip_by: str,
    maximize: bool,
    noise_last: bool,
    backend: str,
) -> None:
    """The op behind :func:`langevin_step_`: what torch.compile sees as one call."""
    read = {"grad": grad, "noise": noise, "step_size": step_sizes, "noise_std": noise_stds}
    # What is not in memory goes through the reference, which writes only once it has read.
    if in_memory(x):
        for name, operand in read.items():
            if operand is not None and in_memory(operand):
                _check_overlap(name, operand, x)
    apply_step_(
        resolve_backend(backend, x.device),
        x,
        grad,
        noise,
        step_size=step_size if step_sizes is None else check_values(_OP, "step_size", step_sizes),
        noise_std=noise_std if noise_stds is None else check_values(_OP, "noise_std", noise_stds),
        seed=seed % 2**64,
        step=step,
        first_chain=first_chain,
        clamp=None if clamp is None else (clamp[0], clamp[1]),
        grad_clip=grad_clip if grad_clip is None or clip_by == "element" else (clip_by, grad_clip),
        maximize=maximize,
        noise_last=noise_last,
    )


# The op reads any strides, hence the tag. Without it Inductor (torch 2.13) hands over a copy of a
# lazily computed grad, and computes it again for its later users once x has changed.
torch.library.define(
    "fastlangevin::langevin_step_",
    "(Tensor(a!) x, Tensor? grad, Tensor? noise, float step_size, Tensor? step_sizes, "
    "float noise_std, Tensor? noise_stds, SymInt seed, SymInt step, SymInt first_chain, "
    "float[]? clamp, float? grad_clip, str clip_by, bool maximize, bool noise_last, str backend) "
    "-> ()",
    tags=(torch.Tag.flexible_layout,),
)
# define and impl take 4 us a call where torch.library.custom_op takes 60 (torch 2.13, one core).
torch.library.impl("fastlangevin::langevin_step_", "CompositeExplicitAutograd", _langevin_step_)
torch.library.register_fake("fastlangevin::langevin_step_", lambda *_: None)


def apply_step_(
    run: Callable[..., Tensor],
    x: Tensor,
    grad: Tensor | None,
    z: Tensor | None,
    *,
    step_size: Coefficient,
    noise_std: Coefficient,
    grad_clip: GradClip | None,
    **options: Any,
) -> Tensor:
    """Run a backend (or the reference function) on checked arguments."""
    if reference.is_zero(noise_std):
        z = None
    # The kernels read memory as it is; torch may have noted there that its sign is to be changed.
    grad = None if grad is None else grad.resolve_neg()
    z = None if z is None else z.resolve_neg()
    step_size, grad_clip = fold_norm_clip(grad, step_size, grad_clip)
    return run(x, grad, z, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, **options)


def bind_step(
    run: Callable[..., Tensor],
    x: Tensor,
    *,
    seed: int,
    first_chain: int,
    clamp: tuple[float, float] | None,
    grad_clip: GradClip | None,
    maximize: bool,
    noise_last: bool,
) -> Callable[[Tensor | None, Coefficient, Coefficient, int], Tensor]:
    """:func:`apply_step_` for a loop: one x, always changed in place, and constant options.

    Returns a function of (grad, step_size, noise_std, step). With the native kernels, numbers as
    coefficients and no norm clip, a call on 64 elements takes 2.6 us where :func:`apply_step_`
    takes 7.0, 0.9 of it in the extension (AVX2, one core); else it is that function.
    """
    options: dict[str, Any] = {
        "seed": seed,
        "first_chain": first_chain,
        "clamp": clamp,
        "grad_clip": grad_clip,
        "maximize": maximize,
        "noise_last": noise_last,
    }
    direct = None
    if run is native.step_ and not isinstance(grad_clip, tuple):
        direct = native.bind(x, **options)

    def bound(
        grad: Tensor | None, step_size: Coefficient, noise_std: Coefficient, step: int
    ) -> Tensor:
        if (
            direct is None
            or isinstance(step_size, Tensor)
            or isinstance(noise_std, Tensor)
            or not (grad is None or in_memory(grad))
        ):
            return apply_step_(
                run, x, grad, None, step_size=step_size, noise_std=noise_std, step=step, **options
            )
        return direct(grad, step_size, noise_std, step)

    return bound


def fold_norm_clip(
    grad: Tensor | None, step_size: Coefficient, grad_clip: GradClip | None
) -> tuple[Coefficient, float | None]:
    """Turn a norm clip into per-chain step sizes, so that kernels know elementwise clips only.

    a clip(g) = (a min(1, c / |g|)) g, with |g| over a chain or over the batch, in fp32 or wider.
    """
    if not isinstance(grad_clip, tuple):
        return step_size, grad_clip
    kind, bound = grad_clip
    if grad is None or math.isinf(bound):
        return step_size, None
    compute = torch.promote_types(grad.dtype, torch.float32)
    rows = grad if grad.ndim > 1 else grad[:, None]
    norms = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim)), dtype=compute)
    if kind == "batch_norm":
        norms = torch.linalg.vector_norm(norms).expand_as(norms)
    # Not min(1, c / |g|): its derivative is NaN at g = 0.
    if isinstance(step_size, Tensor):
        step_size = step_size.to(norms.device)
    return bound / norms.clamp(min=bound) * step_size, None


def resolve_backend(backend: str, device: torch.device) -> Callable[..., Tensor]:
    """The step function of a backend; "auto" is the best that serves the device."""
    return _STEPS[choose_backend(backend, device)]


def choose_backend(backend: str, device: torch.device) -> str:
    """The name that ``backend`` stands for on a device; RuntimeError where it cannot run."""
    check_backend(backend)
    if backend == "auto":
        for name in _STEPS:
            # On a CPU Triton is interpreted, thousands of times slower: for tests, which name it.
            interpreted = name == "triton" and device.type == "cpu"
            if not interpreted and _why_not(name, device) is None:
                return name
    reason = _why_not(backend, device)
    if reason is not None:
        raise RuntimeError(f'backend "{backend}" cannot run on {device}: {reason}')
    return backend


def check_backend(backend: str) -> None:
    """ValueError unless the name is a backend's, or "auto"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def backend_status(device: torch.device) -> dict[str, str | None]:
    """Per backend, fastest first: None where it serves the device, else why not."""
    return {name: _why_not(name, device) for name in _STEPS}


_STEPS = {"native": native.step_, "triton": triton.step_, "reference": reference.step_}


def _why_not(backend: str, device: torch.device) -> str | None:
    if backend == "native":
        return native.available(device)
    return triton.available(device) if backend == "triton" else None


def _is_traced(x: Tensor) -> bool:
    """Whether someone watches the operators, and must be shown one; it costs 4 us a call."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_neg()  # the dispatcher resolves it
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _split(coefficient: Coefficient) -> tuple[float, Tensor | None]:
    """As a number and, in its place where given, a tensor."""
    return (0.0, coefficient) if isinstance(coefficient, Tensor) else (coefficient, None)


def _check_state(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x must be a tensor, got {type(x).__name__}")
    _check_kind("x", x)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x must have a leading chain dimension, got shape []")
    if x.numel() > 2**34 and x.numel() // x.shape[0] > 2**34:
        raise ValueError(
            f"{_OP}: x must have at most 2**34 elements per chain, got {list(x.shape)}"
        )
    if x.requires_grad:
        raise ValueError(f"{_OP}: x requires grad and cannot be changed in place; use x.detach()")
    if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
        return  # its strides are those of no memory
    # The usual memory formats need no look at the strides, which takes some 4 us.
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not last and not x.is_contiguous():
        _check_places(x)


def _check_kind(name: str, value: Tensor) -> None:
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{_OP}: {name} must be of dtype float32, float64, bfloat16 or float16, "
            f"got {value.dtype}"
        )
    check_strided(_OP, name, value)


def _check_places(x: Tensor) -> None:
    """ValueError if several elements of x have one place in memory."""
    dims = [(s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]
    if any(s == 0 for s, _ in dims):
        raise ValueError(f"{_OP}: x is an expanded view (stride 0); use x.clone()")
    if torch.compiler.is_compiling():
        return  # to sort symbolic strides would make constants of them
    reach = 0  # of the dimensions before: nearly always the next one steps over all of it
    for s, n in sorted(dims):
        if s <= reach and not _is_injective(x):
            raise ValueError(f"{_OP}: elements of x share memory; use x.clone()")
        reach += (n - 1) * s


def _is_injective(x: Tensor) -> bool:
    if x.numel() == 0 or not in_memory(x):
        return True
    reach = (_extent(x)[1] - _extent(x)[0]) // x.element_size()
    taken = torch.zeros(reach, dtype=torch.bool, device="cpu")
    taken.as_strided(x.shape, x.stride()).fill_(True)
    return int(taken.sum()) == x.numel()


def _check_overlap(name: str, value: Tensor, x: Tensor) -> None:
    """ValueError if x is written where ``value`` is still to be read."""
    if value.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return
    if (value.data_ptr(), value.stride(), value.dtype) == (x.data_ptr(), x.stride(), x.dtype):
        return
    (first, last), (start, end) = _extent(value), _extent(x)
    if first < end and start < last and (value.dtype != x.dtype or _meet(value, x)):
        raise ValueError(
            f"{_OP}: {name} shares memory with x in another layout; use {name}.clone()"
        )


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage, of one dtype, have an element in common."""
    first = min(a.storage_offset(), b.storage_offset())
    last = max(_extent(a)[1], _extent(b)[1]) - a.untyped_storage().data_ptr()
    taken = torch.zeros(last // a.element_size() - first, dtype=torch.bool, device="cpu")
    taken.as_strided(a.shape, a.stride(), a.storage_offset() - first).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset() - first).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and after its last."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * stride for size, stride in steps) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _check_like(name: str, value: Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(value).__name__}")
    _check_kind(name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{_OP}: {name} must have x's shape {list(x.shape)}, got {list(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{_OP}: {name} must be on x's device {x.device}, got {value.device}")
