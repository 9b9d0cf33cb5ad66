"""The fused Langevin step: the checks of its arguments and the choice of its backend."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling

import fastlangevin.noise as _noise
from fastlangevin.arguments import (
    Coefficient,
    GradClip,
    check_chain_dimension,
    check_clamp,
    check_coefficient,
    check_device,
    check_grad_clip,
    check_shape,
    check_strided,
    check_tensor,
    check_values,
)
from fastlangevin.kernels import native, reference, triton_backend
from fastlangevin.kernels.memory import check_injective, check_overlap, in_memory, is_dense
from fastlangevin.names import check_name, keywords_checked

BACKENDS = ("auto", "native", "triton", "reference")
_OP = "langevin_step_"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@keywords_checked
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
    """Takes one Langevin step on a batch of chains, in place.

        x <- clamp(x + (s a clip(g) + b z)),      s = -1, or +1 with maximize

    Every random number is a function of (seed, chain, step, element) alone, so that the result
    does not depend on the device, the batch, the memory format or the number of threads. A NaN in
    x stays NaN.

    The function works under torch.compile(fullgraph=True). There seed and step may change from
    call to call without a new compilation. A float step_size or noise_std is compiled in as a
    constant, so give one that changes as a 0-d tensor.

    Args:
        x: The states [n, ...], in float32, float64, bfloat16 or float16 and any memory format. The
            step is computed in float32, or in float64 for a float64 x.
        grad: g = dE/dx, with x's shape and any of those dtypes, or None for a step of noise alone.
        step_size: a >= 0, a number or a tensor [n] with one value per chain.
        noise_std: b >= 0, the standard deviation of the noise, in the same forms. The number 0
            skips the generator, and the step is plain gradient descent.
        seed: An integer in [0, 2**64).
        step: The step's number, an integer in [0, 2**32).
        first_chain: The number of the first row's chain; row i is chain first_chain + i.
        clamp: Bounds (lo, hi) of x after the step, or None.
        grad_clip: A bound on each element of g, ("chain_norm", c) for a bound on the L2 norm of
            each chain, ("batch_norm", c) for a bound on that of the whole batch, or None.
        maximize: Whether to ascend.
        backend: "auto" (the fastest that can run), "native", "triton" or "reference".
        noise: Standard normals z in x's shape, to use instead of those of the seed.
        noise_last: Whether to add the noise after the clamp instead of before it.

    Returns:
        x.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it, and x is unchanged.
        RuntimeError: The backend cannot run on x's device.
    """
    # Ordinary tensors need fewer checks.
    ordinary = not is_compiling() and _is_ordinary(x) and (grad is None or _is_ordinary(grad))
    _check_state(x, ordinary)
    if grad is not None:
        _check_like("grad", grad, x, ordinary)
    if noise is not None:
        _check_like("noise", noise, x)
    seed = _noise.check_seed(seed)
    first_chain, step = _noise.check_address(first_chain, x.shape[0], step, 1)
    check_backend(backend)
    step_size = check_coefficient(_OP, "step_size", step_size, x.shape[0])
    noise_std = check_coefficient(_OP, "noise_std", noise_std, x.shape[0])
    clip = check_grad_clip(_OP, grad_clip)
    clamp = check_clamp(_OP, clamp)
    if (
        ordinary
        and noise is None
        and torch._C._len_torch_dispatch_stack() == 0
        and resolve_backend(backend, x.device) is native.step_
        and isinstance(step_size, float)
        and isinstance(noise_std, float)
        and _reads_directly(x, grad, clip)
    ):
        if grad is not None:
            check_overlap(_OP, "grad", grad, x)
        native.launch(
            x, grad, None, step_size, noise_std, step,
            reference.StepOptions(
                seed, first_chain, clamp, clip, bool(maximize), bool(noise_last)
            ),
        )  # fmt: skip
        return x
    # The op's schema has no unions, and its integers are signed with 64 bits.
    a, step_sizes = _split(step_size)
    b, noise_stds = _split(noise_std)
    clip_by, bound = clip if isinstance(clip, tuple) else ("element", clip)
    run = torch.ops.fastlangevin.langevin_step_.default if _is_traced(x) else _langevin_step_
    with torch.no_grad():
        run(
            x, grad, noise, a, step_sizes, b, noise_stds,
            seed if seed < 2**63 else seed - 2**64, step, first_chain, clamp, bound, clip_by,
            bool(maximize), bool(noise_last), backend,
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
    """The op behind :func:`langevin_step_`, which torch.compile sees as one call."""
    operands = {"grad": grad, "noise": noise, "step_size": step_sizes, "noise_std": noise_stds}
    # Operands that are not in memory go through the reference, which reads all before it writes.
    if in_memory(x):
        for name, operand in operands.items():
            if operand is not None and in_memory(operand):
                check_overlap(_OP, name, operand, x)
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


# The tag says that the op reads any strides. Without it Inductor (torch 2.13) passes a copy of a
# lazily computed grad and recomputes grad for later users, from an x that has changed by then.
torch.library.define(
    "fastlangevin::langevin_step_",
    "(Tensor(a!) x, Tensor? grad, Tensor? noise, float step_size, Tensor? step_sizes, "
    "float noise_std, Tensor? noise_stds, SymInt seed, SymInt step, SymInt first_chain, "
    "float[]? clamp, float? grad_clip, str clip_by, bool maximize, bool noise_last, str backend) "
    "-> ()",
    tags=(torch.Tag.flexible_layout,),
)
# define and impl cost 4 us per call; torch.library.custom_op costs 60 (torch 2.13, one core).
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
    """Calls a backend's step function on checked arguments, with a norm clip folded in."""
    if reference.is_zero(noise_std):
        z = None
    # The kernels read raw memory, where a negation that torch has deferred is not applied yet.
    grad = None if grad is None else grad.resolve_neg()
    z = None if z is None else z.resolve_neg()
    step_size, grad_clip = fold_norm_clip(grad, step_size, grad_clip)
    return run(x, grad, z, step_size=step_size, noise_std=noise_std, grad_clip=grad_clip, **options)


def bind_step(
    run: Callable[..., Tensor], x: Tensor, **options: Any
) -> Callable[[Tensor | None, Coefficient, Coefficient, int], Tensor]:
    """:func:`apply_step_` for a loop that always changes the same x with the same options.

    Returns a function of (grad, step_size, noise_std, step). With the native kernels, numbers as
    coefficients and no norm clip, a call on 64 elements takes half the time of :func:`apply_step_`,
    which the function calls in all other cases.
    """
    fixed = reference.StepOptions(**options)
    is_native = run is native.step_ and in_memory(x)

    def bound(
        grad: Tensor | None, step_size: Coefficient, noise_std: Coefficient, step: int
    ) -> Tensor:
        if (
            is_native
            and (grad is None or in_memory(grad))
            and isinstance(step_size, float)
            and isinstance(noise_std, float)
            and _reads_directly(x, grad, fixed.grad_clip)
        ):
            native.launch(x, grad, None, step_size, noise_std, step, fixed)
            return x
        return apply_step_(
            run, x, grad, None, step_size=step_size, noise_std=noise_std, step=step, **options
        )

    return bound


def _reads_directly(x: Tensor, grad: Tensor | None, clip: GradClip | None) -> bool:
    """Whether ``native.launch`` takes tensors in memory, and a clip, without a conversion."""
    return native.reads(x) and (grad is None or native.reads(grad)) and not isinstance(clip, tuple)


def fold_norm_clip(
    grad: Tensor | None, step_size: Coefficient, grad_clip: GradClip | None
) -> tuple[Coefficient, float | None]:
    """(step_size, elementwise grad_clip), with a norm clip turned into step sizes per chain.

        a clip(g) = (a min(1, c / |g|)) g

    where |g| is the norm of a chain or of the batch, computed in float32 or wider. Kernels
    therefore need to know elementwise clips only.
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
    # c / max(|g|, c) equals min(1, c / |g|), but its derivative at g = 0 is not NaN.
    if isinstance(step_size, Tensor):
        step_size = step_size.to(norms.device)
    return bound / norms.clamp(min=bound) * step_size, None


def resolve_backend(backend: str, device: torch.device) -> Callable[..., Tensor]:
    """The step function of a backend; "auto" is the fastest that can run on the device."""
    return _STEPS[choose_backend(backend, device)]


def choose_backend(backend: str, device: torch.device) -> str:
    """The name of the backend that runs on a device; RuntimeError if the named one cannot."""
    check_backend(backend)
    if backend == "auto":
        for name in _STEPS:
            # On a CPU Triton is interpreted and thousands of times slower; only tests use it.
            interpreted = name == "triton" and device.type == "cpu"
            if not interpreted and _why_not(name, device) is None:
                return name
    reason = _why_not(backend, device)
    if reason is not None:
        raise RuntimeError(f'backend "{backend}" cannot run on {device}: {reason}')
    return backend


def check_backend(backend: str) -> None:
    """ValueError unless ``backend`` is "auto" or the name of a backend."""
    check_name("backend", backend, BACKENDS)


def backend_status(device: torch.device) -> dict[str, str | None]:
    """For each backend, fastest first: None if it can run on the device, else the reason."""
    return {name: _why_not(name, device) for name in _STEPS}


_STEPS = {"native": native.step_, "triton": triton_backend.step_, "reference": reference.step_}


def _why_not(backend: str, device: torch.device) -> str | None:
    if backend == "native":
        return native.available(device)
    return triton_backend.available(device) if backend == "triton" else None


def _is_traced(x: Tensor) -> bool:
    """Whether something observes operators, so that the step must be one; that costs 4 us."""
    return (
        is_compiling()
        or type(x) is not Tensor
        or x.is_neg()  # the dispatcher resolves the negation
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _split(coefficient: Coefficient) -> tuple[float, Tensor | None]:
    """(number, None) or, for a tensor, (0.0, tensor)."""
    return (0.0, coefficient) if isinstance(coefficient, Tensor) else (coefficient, None)


def _is_ordinary(x: Any) -> bool:
    """Whether x is exactly a Tensor, and in memory; it is then also strided and not wrapped."""
    return type(x) is Tensor and in_memory(x)


def _check_state(x: Tensor, ordinary: bool) -> None:
    _check_operand("x", x, ordinary)
    check_chain_dimension(_OP, "x", x)
    if x.numel() > 2**34 and x.numel() // x.shape[0] > 2**34:
        raise ValueError(
            f"{_OP}: x must have at most 2**34 elements per chain, got {list(x.shape)}"
        )
    if x.requires_grad:
        raise ValueError(f"{_OP}: x requires grad and cannot be changed in place; use x.detach()")
    if not ordinary and not is_compiling() and is_functorch_wrapped_tensor(x):
        return  # its strides do not describe memory
    # The usual memory formats pass without the check of the strides, which takes about 4 us.
    if not is_dense(x):
        check_injective(_OP, "x", x)


def _check_like(name: str, value: Tensor, x: Tensor, ordinary: bool = False) -> None:
    _check_operand(name, value, ordinary)
    check_shape(_OP, name, value, x.shape, "x's shape")
    check_device(_OP, name, value, x.device, "x")


def _check_operand(name: str, value: Tensor, ordinary: bool) -> None:
    if not ordinary:
        check_tensor(_OP, name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{_OP}: {name} must be of dtype float32, float64, bfloat16 or float16, "
            f"got {value.dtype}"
        )
    if not ordinary:
        check_strided(_OP, name, value)
