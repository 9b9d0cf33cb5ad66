"""The fused engine on a GPU: a conv net's input gradient and the Langevin step along it.

A step is one Triton launch per convolution forward and one per convolution backward. The first
launch reads the float32 state in its own layout, the last forward launch writes the gradient of
<h, v> instead of h, and the last launch moves the state, so neither a copy of the network's input
nor the gradient of x is stored. The backward pass needs one saved bit per value of a piecewise
linear activation, or else its derivative.

The table shows a step at batch 64 and width 64 on 3x32x32 states: the products that are needed,
and the bytes that each launch reads and writes once in fp16. The bytes include the weights;
repeated reads are assumed to come from cache.

    convolution        forward                   input gradient
    3 ->  64, 3x3/1    0.23 GFLOP    9.7 MB      0.23 GFLOP   10.0 MB (and the step)
    64 -> 128, 4x4/2   4.29 GFLOP   13.1 MB      4.29 GFLOP   13.4 MB
    128 -> 256, 4x4/2  4.29 GFLOP    7.5 MB      4.29 GFLOP    7.6 MB
    256 -> 512, 4x4/2  4.29 GFLOP    7.4 MB      4.29 GFLOP    7.5 MB

An H200 needs 33 us for the 26.2 GFLOP at 790 TFLOP/s, the rate of a good fp16 matrix product, and
16 us for the 76 MB at 4.8 TB/s, although most of them stay in the 50 MB of cache. At batch 64 the
deeper layers have fewer tiles of 128 x 128 than there are multiprocessors. They get smaller tiles,
which read more per product. On an H200 a step took 114 us in a CUDA graph, and the tensor cores
were busy for 5 to 43 % of each launch.
"""

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlangevin.arguments import Coefficient, GradClip
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.kernels import reference, triton_backend
from fastlangevin.kernels.devices import indexed
from fastlangevin.kernels.memory import is_dense
from fastlangevin.locks import new_rlock
from fastlangevin.step import apply_step_

if TYPE_CHECKING:
    from fastlangevin.gradients.graph.conv_stack import ConvStack, StackedConv

_PIECEWISE_LINEAR = ("leaky_relu", "relu")  # piecewise linear: their derivatives are saved as bits
_ACTIVATIONS = (*_PIECEWISE_LINEAR, "silu", "softplus", "elu")
# The last launch holds all channels of a tile of pixels, with their noise, in registers.
_MAX_CHANNELS = 16
# The kernels index the pixels of a batch in 32 bits.
_MAX_PIXELS = 2**31 - 2**16


def refusal(stack: "ConvStack", device: torch.device, precision: str | None) -> str | None:
    """Return why a stack cannot run fused on a device in a precision, or None if it can."""
    missing = triton_backend.available(device)
    if missing is not None:
        return missing
    if precision not in conv_plan.DTYPES:
        return f"its precisions are {', '.join(conv_plan.DTYPES)}, got {precision!r}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are for GPUs of compute capability 8.0 and later"
    if stack.shape[0] > _MAX_CHANNELS:
        return f"the states have {stack.shape[0]} channels; it takes up to {_MAX_CHANNELS}"
    for i, conv in enumerate(stack.convs):
        reason = _refused(conv, device)
        if reason is not None:
            return f"convolution {i}: {reason}"
    return None


def _refused(conv: "StackedConv", device: torch.device) -> str | None:
    if conv.groups != 1:
        return f"it has {conv.groups} groups; the kernels need one"
    if max(conv.dilation) > 1 and max(conv.stride) > 1:
        return "it has both a stride and a dilation"
    if conv.activation.kind not in _ACTIVATIONS:
        return (
            f"its activation is {conv.activation.kind}; the kernels have {', '.join(_ACTIVATIONS)}"
        )
    if conv.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {conv.weight.dtype}"
    if indexed(conv.weight.device) != indexed(device):
        return f"its weights are on {conv.weight.device}, the states on {device}"
    return None


class FusedGradient:
    """Energies and d energy / d x of n chains, for a stack that :func:`refusal` accepts.

    ``precision`` is that of the operands: "fp32" (strict, without matrix instructions), "tf32",
    "fp16" or "bf16". Sums are float32. All buffers are allocated once, by the constructor.
    :meth:`pack` copies the weights and must be called before a chain. It writes to the same memory
    every time, so captured graphs see the new weights.

    ``overflow`` is an int32 tensor [1] on the device for fp16, and None otherwise. It becomes 1
    when a value or the gradient leaves float16's range or is NaN, and stays 1 until it is zeroed.
    Small gradients do not underflow: the backward pass starts from v times the power of two that
    brings its largest element into [1, 2), and the last launch divides by that power.

    Raises ValueError if :func:`refusal` returns a reason.
    """

    def __init__(self, stack: "ConvStack", n: int, device: torch.device, precision: str) -> None:
        reason = refusal(stack, device, precision)
        if reason is not None:
            raise ValueError(f"FusedGradient: {reason}")
        sizes = _sizes(stack)
        if n * max(h * w for _, h, w in sizes) > _MAX_PIXELS:
            raise ValueError(
                f"FusedGradient: {n} chains have more than {_MAX_PIXELS} pixels; split the batch"
            )
        self.stack, self.n, self.precision = stack, n, precision
        layers = list(zip(stack.convs, sizes, sizes[1:], strict=False))
        self._forward = [conv_plan.forward_plan(*a, n, precision) for a in layers]
        self._backward = [conv_plan.backward_plan(*a, n, precision) for a in layers[1:]]
        self._image = conv_plan.image_plan(*layers[0], n, precision)

        def empty(*shape: int, dtype: torch.dtype = conv_plan.DTYPES[precision]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        # Layers alternate between the two; a layer's gradient overwrites its values.
        images = [n * math.prod(size) for size in sizes[1:]]
        self._arenas = [empty(max(images[i::2], default=0)) for i in (0, 1)]
        self._saved = [
            empty(n * h * w, -(-c // 32), dtype=torch.int32)
            if conv.activation.kind in _PIECEWISE_LINEAR
            else empty(n * h * w, c)
            for conv, (c, h, w) in zip(stack.convs[:-1], sizes[1:], strict=False)
        ]
        self._biases = [empty(c, dtype=torch.float32).zero_() for c, _, _ in sizes[1:]]
        c, h, w = stack.features
        self._head = empty(h, w, c, dtype=torch.float32)
        self._partial = empty(n, h * w, self._forward[-1].tiles, dtype=torch.float32)
        self._offset, self._unscale = empty(2, 1, dtype=torch.float32).zero_()
        self.overflow = None
        if precision == "fp16":
            self.overflow = torch.zeros(1, dtype=torch.int32, device=device)
        # Threads may share a sampler, but there is one set of buffers.
        self.lock = new_rlock()
        self.pack()

    def begin(self) -> None:
        """Read the weights."""
        with self.lock:
            if self.overflow is not None:
                self.overflow.zero_()
            self.pack()

    def held_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.packed())

    def buffers(self) -> list[Tensor]:
        """Return the tensors that a chain's launches use and that outlive a call."""
        return [*self._arenas, *self._saved, self._partial, *self.packed()]

    def packed(self) -> list[Tensor]:
        """Return the tensors that :meth:`begin` writes."""
        weights = [plan.weight for plan in (*self._forward, *self._backward, self._image)]
        small = [*self._biases, self._head, self._unscale, self._offset]
        flag = [] if self.overflow is None else [self.overflow]
        return [*weights, *small, *flag]

    def pack(self) -> None:
        """Copy the current weights."""
        v, offset = (part.detach().float() for part in self.stack.head())
        v = v.permute(1, 2, 0)
        peak = v.abs().amax()
        exponent = torch.where(peak > 0, -torch.floor(torch.log2(peak)), 0.0).clamp(-126, 126)
        self._head.copy_(torch.ldexp(v, exponent))
        self._unscale.copy_(torch.ldexp(torch.ones_like(exponent), -exponent))
        self._offset.copy_(offset)
        first, *rest = self.stack.convs
        for conv, plan, bias in zip(self.stack.convs, self._forward, self._biases, strict=True):
            conv_plan.pack_forward(plan, conv)
            if conv.bias is not None:
                bias.copy_(conv.bias.detach())
        conv_plan.pack_backward(self._image, first)
        for conv, plan in zip(rest, self._backward, strict=True):
            conv_plan.pack_backward(plan, conv)

    def __call__(self, x: Tensor, want_energies: bool = False) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x in x's layout) for x [n, C, H, W].

        Both are float32.
        """
        self._check(x)
        if not is_dense(x):
            x = x.contiguous()
        grad = torch.empty_like(x)
        with self.lock, torch.no_grad(), torch.cuda.device_of(x):
            energies = self._passes(x, want_energies)
            self._finish(x, grad=grad)
        return energies, grad

    def step_(
        self,
        x: Tensor,
        z: Tensor | None = None,
        *,
        step_size: Coefficient,
        noise_std: Coefficient,
        grad_clip: GradClip | None = None,
        want_energies: bool = False,
        **options: Any,
    ) -> Tensor | None:
        """Take a Langevin step in place on x, along the gradient at x.

        It is that of :func:`triton_backend.step_`.

        Returns the energies of x before the step, or None unless they are wanted. The other
        arguments are those of :func:`triton_backend.step_`, and ``grad_clip`` may also be a norm.

        The step is part of the last launch, with three exceptions that take a launch of its own: a
        norm clip, which needs the whole gradient first; a layout of x or z that the kernel lacks;
        and noise for images whose pixels cannot be drawn in fours. The result is the same bit for
        bit.
        """
        self._check(x)
        draws = z is None and not reference.is_zero(noise_std)
        separate = (
            isinstance(grad_clip, tuple)
            or not is_dense(x)
            or (z is not None and z.stride() != x.stride())
            or (draws and not self._draws_in_fours())
        )
        options |= {"step_size": step_size, "noise_std": noise_std, "grad_clip": grad_clip}
        if separate:
            energies, grad = self(x, want_energies)
            apply_step_(triton_backend.step_, x, grad, z, **options)
            return energies
        with self.lock, torch.no_grad(), torch.cuda.device_of(x):
            energies = self._passes(x, want_energies)
            self._finish(x, z=z, DRAW=draws, **options)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
        return energies

    def plan(self) -> str:
        """Describe what a step runs, in one line of text."""
        # In each pass every pixel of a convolution's output meets every weight once.
        pixels = [plan.constants["OUT_H"] * plan.constants["OUT_W"] for plan in self._forward]
        weights = [conv.weight.numel() for conv in self.stack.convs]
        work = 4e-9 * self.n * sum(map(operator.mul, pixels, weights))
        buffers = (*self._arenas, *self._saved, self._partial)
        size = sum(b.numel() * b.element_size() for b in buffers) / 2**20
        return (
            f"fused: {len(self._forward) + len(self._backward) + 1} launches a step, operands "
            f"{self.precision}, {work:.1f} GFLOP, {size:.1f} MiB of buffers"
        )

    def _check(self, x: Tensor) -> None:
        shape = (self.n, *self.stack.shape)
        if x.shape != shape or x.dtype != torch.float32:
            raise ValueError(
                f"FusedGradient: x must be float32 {list(shape)}, got {x.dtype} {list(x.shape)}"
            )

    def _draws_in_fours(self) -> bool:
        c = self._image.constants
        return c["STRIDE_Y"] == c["STRIDE_X"] == 1 and c["OUT_H"] * c["OUT_W"] % 4 == 0

    def _passes(self, x: Tensor, want_energies: bool) -> Tensor | None:
        """Run all launches but the last, down to the gradient of the first layer's output."""
        if self.n == 0:
            return x.new_zeros(0) if want_energies else None
        from fastlangevin.kernels.triton_conv import forward_kernel
        from fastlangevin.kernels.triton_conv_grad import backward_kernel

        last = len(self._forward) - 1
        source, strides = x, _strides(x)
        for i, plan in enumerate(self._forward):
            c, activation = plan.constants, self.stack.convs[i].activation
            p, q = (*activation.settings, 0.0, 0.0)[:2]
            forward_kernel[plan.grid](
                source, plan.weight, self._biases[i], self._arenas[i % 2],
                self._saved[i] if i < last else None, self._head if i == last else None,
                self._partial if i == last and want_energies else None, self.overflow,
                plan.rows, plan.source_chain if i else x.stride(0), p, q,
                **strides, ACTIVATION=activation.kind, STATE=i == 0, **c, **plan.options,
            )  # fmt: skip
            source = self._arenas[i % 2]
            strides = _dense_strides(c["COLUMNS"], c["OUT_W"])
        for i in range(last, 0, -1):
            plan, activation = self._backward[i - 1], self.stack.convs[i - 1].activation
            backward_kernel[plan.grid](
                self._arenas[i % 2], plan.weight, self._saved[i - 1], self._arenas[(i - 1) % 2],
                plan.rows, plan.source_chain, (*activation.settings, 0.0)[0],
                SIGNS=activation.kind in _PIECEWISE_LINEAR, **plan.constants, **plan.options,
            )  # fmt: skip
        if not want_energies:
            return None
        return self._partial.flatten(1).sum(1) * self._unscale + self._offset

    def _finish(
        self,
        x: Tensor,
        *,
        grad: Tensor | None = None,
        z: Tensor | None = None,
        DRAW: bool = False,
        step_size: Coefficient = 0.0,
        noise_std: Coefficient = 0.0,
        seed: int = 0,
        step: int = 0,
        first_chain: int = 0,
        clamp: tuple[float, float] | None = None,
        grad_clip: float | None = None,
        maximize: bool = False,
        noise_last: bool = False,
        rng_state: Tensor | None = None,
    ) -> None:
        """Run the last launch: write the gradient with respect to x to ``grad``, or move x."""
        if self.n == 0:
            return
        from fastlangevin.kernels.triton_conv_grad import image_kernel

        plan, strides = self._image, _strides(x)
        a, step_sizes = triton_backend.coefficient(step_size, x)
        b, noise_stds = triton_backend.coefficient(noise_std, x)
        lo, hi = clamp or (-math.inf, math.inf)
        low, high, number, chain = map(triton_backend.signed, (seed, seed >> 32, step, first_chain))
        image_kernel[plan.grid](
            self._arenas[0], plan.weight, self._unscale, self.overflow, x, grad,
            None if reference.is_zero(noise_std) else z,
            plan.rows, plan.source_chain, x.stride(0),
            a if maximize else -a, b, step_sizes, noise_stds, grad_clip, lo, hi,
            low, high, number, chain, rng_state,
            PIXEL_STRIDE=strides["X_STRIDE"], CHANNEL_STRIDE=strides["C_STRIDE"],
            DRAW=DRAW, NOISE_LAST=noise_last,
            **plan.constants, **plan.options,
        )  # fmt: skip


def _sizes(stack: "ConvStack") -> list[tuple[int, int, int]]:
    """Return the shapes of the state and of every layer's output."""
    sizes = [stack.shape]
    for conv in stack.convs:
        sizes.append((conv.weight.shape[0], *conv.output_size(sizes[-1][1:])))
    return sizes


def _strides(x: Tensor) -> dict[str, int]:
    _, c, h, w = x.shape
    if x.is_contiguous():
        return {"Y_STRIDE": w, "X_STRIDE": 1, "C_STRIDE": h * w}
    return _dense_strides(c, w)


def _dense_strides(channels: int, width: int) -> dict[str, int]:
    """Return the strides of a layout [chain, y, x, channel]."""
    return {"Y_STRIDE": width * channels, "X_STRIDE": channels, "C_STRIDE": 1}
