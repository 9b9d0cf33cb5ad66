"""The fused engine on the CPU: the compiled extension runs a conv net a few chains at a time.

Each thread takes some chains forward and backward through the whole network before it takes the
next ones. A layer's output is still in the cache when the next layer reads it, no thread waits for
another, and the memory does not grow with the batch. A chain's results are the same bit for bit in
every batch and for any number of threads. csrc/cpu/convnet.h describes how.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.graph.conv_stack import ConvStack, StackedConv, conv_stack
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.kernels import extension
from fastlangevin.locks import new_lock

# The chains that a thread takes at a time. Several chains share each read of the weights, which
# dominate the reads in deep layers; their values must still fit in the cache.
_CHUNK, _CHUNK_BYTES = 8, 2**21
_MAX_ELEMENTS = 2**31 - 2**16


def _activations() -> dict[str, int]:
    """Return the numbers of the activations that the kernels have."""
    numbers: dict[str, int] = extension.library.ACTIVATIONS
    return numbers | {"relu": numbers["leaky_relu"]}  # with slope 0


def refusal(stack: ConvStack, x: Tensor, precision: str | None) -> str | None:
    """Return why this engine cannot run a stack on states like x, or None if it can."""
    reason = extension.available(x.device)
    if reason is not None:
        return reason
    if x.dtype != torch.float32:
        return f"the state is in {x.dtype}, not float32"
    if precision not in (None, "fp32", "bf16"):
        return f"it computes in float32 or bfloat16, not in {precision}"
    for conv in stack.convs:
        if conv.weight.dtype != torch.float32:
            return f"the network is in {conv.weight.dtype}, not float32"
        if conv.groups != 1:
            return f"a convolution has {conv.groups} groups"
        if conv.activation.kind not in _activations():
            return f"no kernel has the activation {conv.activation.kind}"
    return _waste(stack)


def _waste(stack: ConvStack) -> str | None:
    """Return a reason if the backward pass would multiply too much in vain.

    In it, each pixel that a convolution reads meets all weights of its residue modulo the stride,
    including those that fall outside the output.
    """
    useful = planned = 0
    height, width = stack.shape[1:]
    for conv in stack.convs:
        out, channels, *kernel = conv.weight.shape
        written = conv.output_size((height, width))
        weights = out * channels * math.prod(kernel)
        useful += 2 * math.prod(written) * weights
        planned += math.prod(written) * weights
        planned += height * width * weights // math.prod(conv.stride)
        if max(out, channels) * (height + 2 * kernel[0]) * (width + 2 * kernel[1]) > _MAX_ELEMENTS:
            return "a chain is too large: its elements are indexed in 31 bits"
        height, width = written
    if planned > 2 * useful:
        ratio = planned / useful
        return f"its backward pass would take {ratio:.1f} times the products needed (wide kernels)"
    return None


class ConvNetGradient:
    """Energies and d energy / d x of batches x [n, C, H, W] in float32, in x's layout.

    With precision "bf16" the weights, activations and gradients between layers are bfloat16,
    products are summed in float32, and the gradient of x is not rounded.

    The weights are read by :meth:`begin`, and again by a call if a version counter or an address
    shows that one has changed.
    """

    def __init__(self, graph: Graph, chains: int, precision: str | None = None) -> None:
        self.graph = graph
        self.net = _plan(
            tuple(_layer(conv) for conv in self._stack().convs),
            *graph.shape[1:],
            precision == "bf16",
            extension.library.instruction_set(),
        )
        self.threads = max(1, min(torch.get_num_threads(), chains))
        share = -(-chains // self.threads)
        self.chunk = max(1, min(_CHUNK, _CHUNK_BYTES // self.net.workspace, share))
        # Zeros, because the borders around the values are read but never written.
        self.workspace = torch.zeros(
            self.threads * (self.chunk * self.net.workspace + self.net.scratch),
            dtype=torch.uint8,
            device="cpu",
        )
        self.packed = torch.empty(self.net.packed, dtype=torch.float32, device="cpu")
        self.head = torch.zeros(self.net.head, dtype=torch.float32, device="cpu")
        self._seen: list[tuple[int, int]] = []
        # Threads may share a sampler, but there is only one workspace.
        self._lock = new_lock()

    def begin(self) -> None:
        """Read the weights.

        This is needed before every chain: a write through ``.data`` leaves no other trace.
        """
        with self._lock:
            self._read()

    def _read(self) -> None:
        self._seen = self.graph.versions()
        self.graph.refresh()
        stack = self._stack()
        weights = [conv.weight.contiguous() for conv in stack.convs]
        biases = [None if conv.bias is None else conv.bias.contiguous() for conv in stack.convs]
        self.net.pack(
            [weight.data_ptr() for weight in weights],
            [0 if bias is None else bias.data_ptr() for bias in biases],
            self.packed.data_ptr(),
            self.threads,
        )
        v, offset = stack.head()
        self.head[..., : v.shape[0]] = v.permute(1, 2, 0)
        self.offset = float(offset)

    def _stack(self) -> ConvStack:
        stack = conv_stack(self.graph)
        assert isinstance(stack, ConvStack), stack
        return stack

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x in x's layout)."""
        grad = torch.empty_like(x)
        energies = x.new_empty(x.shape[0]) if want_energies else None
        with self._lock:
            if self._seen != self.graph.versions():
                self._read()
            self.net.score(
                x.shape[0],
                self.chunk,
                x.data_ptr(),
                x.stride(),
                grad.data_ptr(),
                grad.stride(),
                self.head.data_ptr(),
                self.offset,
                0 if energies is None else energies.data_ptr(),
                self.packed.data_ptr(),
                self.workspace.data_ptr(),
                self.threads,
            )
        return energies, grad

    def held_bytes(self) -> int:
        return self.workspace.numel() + 4 * (self.packed.numel() + self.head.numel())


def _layer(conv: StackedConv) -> tuple[Any, ...]:
    out, channels, *kernel = conv.weight.shape
    settings = tuple(conv.activation.settings)[:2]
    return (
        channels,
        out,
        tuple(kernel),
        conv.stride,
        conv.padding,
        conv.dilation,
        _activations()[conv.activation.kind],
        settings + (0.0,) * (2 - len(settings)),
    )


@functools.lru_cache(16)
def _plan(
    layers: tuple[tuple[Any, ...], ...], height: int, width: int, bfloat16: bool, _: str
) -> Any:
    return extension.library.ConvNet(layers, height, width, bfloat16)
