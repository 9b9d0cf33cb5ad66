"""The fused engine on the CPU: the compiled extension runs a network a few chains at a time.

Each thread takes some chains forward and backward through the whole network before it takes the
next ones. A layer's output is still in the cache when the next layer reads it, no thread waits for
another, and the memory does not grow with the batch. A chain's results are the same bit for bit in
every batch and for any number of threads. csrc/cpu/convnet.h describes how.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.image_graph import ImageGraph, ImageLayer
from fastlangevin.gradients.image_lowering import image_graph
from fastlangevin.gradients.threads import ThreadTrial
from fastlangevin.kernels import extension, native
from fastlangevin.kernels.memory import in_memory
from fastlangevin.locks import new_lock

# The chains that a thread takes at a time, by the kind of network: the most of (chains, bytes of
# their values) with which the values still fit. Several chains share each read of the weights,
# which dominate the reads in deep layers, and their values must stay in a cache.
_NO_LIMIT = 2**60
_CHUNKS = {
    # In the second-level cache or, if no chain fits there, a few in the third: 4 chains of 2.8 MB
    # each take 0.94 of the time of single ones (AMD EPYC, a residual net of width 64).
    "images": ((8, 2**21), (4, 2**24)),
    # In float32, small weights stay in the cache from one chunk to the next, so that fewer chains
    # need to share a read. With 512 KB of second-level cache (AMD EPYC), 1 chain of 0.6 MB takes
    # 0.96 of the time of 4, and 4 chains of 60 KB take 0.97 of that of 8; 2 take 1.07. In bfloat16
    # some networks take longer.
    "images, small weights": ((4, 2**19),),
    # Chains of a network on vectors are the pixels of its products, which fill several tiles.
    "vectors": ((24, _NO_LIMIT),),
    # More of them share each read of weights that no cache holds: with two layers of width 1024, 48
    # chains take 0.85 of the time of 24 (AVX2); with widths up to 512 they take the same time.
    "vectors, large weights": ((48, _NO_LIMIT),),
    # Chains are the rows of AMX's tiles, which have 16. Values of 16 chains that are in the
    # third-level cache cost less than rows that are empty.
    "images, by tiles": ((16, 2**24),),
    "vectors, by tiles": ((48, _NO_LIMIT),),  # three tiles are filled
}
_SMALL_BYTES, _LARGE_BYTES = 2**20, 2**22  # of weights
_MAX_POSITIONS = 256  # of a window: bfloat16 holds them exactly
_MAX_ELEMENTS = 2**31 - 2**16
_BLOCK_SECONDS = 0.05  # of a call that takes many steps; interrupts wait for its end


def refusal(graph: Graph, x: Tensor, precision: str | None) -> str | None:
    """Return why this engine cannot run a graph on states like x, or None if it can."""
    reason = extension.available(x.device)
    if reason is not None:
        return reason
    if x.dtype != torch.float32:
        return f"the state is in {x.dtype}, not float32"
    if graph.dtype != torch.float32:
        return f"the network is in {graph.dtype}, not float32"
    if precision == "fp16" or (precision == "tf32" and not extension.has_matrix_unit()):
        return f"it computes in float32 or bfloat16 here, not in {precision}"
    network = image_graph(graph)
    if isinstance(network, str):
        return network
    for layer in network.layers:
        if layer.kind in ("conv", "transposed") and layer.groups != 1:
            return f"a convolution has {layer.groups} groups"
        positions = max((link.factor for link in layer.links), default=0.0)
        if layer.kind == "max_pool" and positions > _MAX_POSITIONS:
            return "max_pool has too many positions in a window"
        if layer.activation_name not in extension.library.ACTIVATIONS:
            return f"no kernel has the activation {layer.activation_name}"
    return _waste(network)


def _waste(network: ImageGraph) -> str | None:
    """Return a reason if the backward pass would compute too many products that are not needed.

    It multiplies each pixel that a convolution reads by all weights of its residue modulo the
    stride, including those that fall outside the output.
    """
    useful = planned = 0
    for layer in network.layers:
        # A transposed convolution does in its forward pass what others do in the backward pass.
        wide, narrow = layer.read, layer.shape
        if layer.kind == "transposed":
            wide, narrow = narrow, wide
        (channels, height, width), out = wide, narrow[0]
        written = math.prod(narrow[1:])
        pixels = (height + 2 * layer.kernel[0]) * (width + 2 * layer.kernel[1])
        if max(out, channels) * pixels > _MAX_ELEMENTS:
            return "a chain is too large: its elements are indexed in 31 bits"
        if layer.kind in ("conv", "transposed"):
            weights = out * channels * math.prod(layer.kernel)
            useful += 2 * written * weights
            planned += written * weights
            # A single output is multiplied by each weight once.
            read = math.prod(layer.stride) if written == 1 else height * width
            planned += read * weights // math.prod(layer.stride)
    if planned > 2 * useful:
        ratio = planned / useful
        return f"its backward pass would take {ratio:.1f} times the products needed (wide kernels)"
    return None


class ConvNetGradient:
    """Energies and d energy / d x of batches x [n, ...] in float32.

    With precision "bf16" the weights, activations and gradients between layers are bfloat16,
    products are summed in float32, and the gradient of x is not rounded if a convolution alone
    reads x. With "tf32" everything is float32, but a matrix unit multiplies numbers as sums of two
    bfloat16 numbers, which have 16 bits together, and leaves out the product of the small ones.
    With "fp32" it multiplies sums of three, which have all bits, where that is estimated to be
    faster than products of float32 by vectors. Precision "bf16x6" does so always.

    The weights are read by :meth:`begin`, and again by a call if a version counter or an address
    shows that one has changed.
    """

    def __init__(self, graph: Graph, chains: int, precision: str | None = None) -> None:
        self.graph, self.chains, self.precision = graph, chains, precision
        network = self._network()
        self.state = network.state
        has_tiles = extension.has_matrix_unit()  # the answer may change the instruction set
        plan_of = functools.partial(
            _plan,
            tuple(_layer(layer) for layer in network.layers),
            network.state.image,
            tuple(place.number for place, _ in network.heads),
            extension.library.instruction_set(),
        )
        # In float32 where there is a matrix unit: the estimated time of products by it over the
        # time of products by vectors.
        self.tiles_estimate: float | None = None
        operands = precision or "fp32"
        if operands == "fp32" and has_tiles:
            self.tiles_estimate = _tiles_estimate(plan_of, network)
            if self.tiles_estimate is not None and self.tiles_estimate < 1:
                operands = "bf16x6"
        plan = functools.partial(plan_of, operands)
        self.net = plan(1)
        self.threads = max(1, min(torch.get_num_threads(), chains))
        self._trial = ThreadTrial(self.threads)
        share = -(-chains // self.threads)
        self.chunk = max(1, min(_most(self.net, network, operands), share))
        if self.net.by_matrix_unit and self.chunk > 1:
            # Chunks of one size, so that no rows are empty in the last one.
            self.chunk = -(-share // -(-share // self.chunk))
            self.net = plan(self.chunk)
        size = self.threads * (self.chunk * self.net.workspace + self.net.scratch)
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.packed = torch.empty(self.net.packed, dtype=torch.float32, device="cpu")
        if self.net.by_matrix_unit:  # whose loads of tiles read many pages; before the first write
            for memory in (self.workspace, self.packed):
                extension.library.ask_for_huge_pages(memory.data_ptr(), memory.nbytes)
        # Zeros, because the borders around the values are read but never written.
        self.workspace.zero_()
        self.head = torch.zeros(self.net.head_values, dtype=torch.float32, device="cpu")
        # [chains, net.constant_values] if there are any, or one row if all chains have the same.
        self.constants: Tensor | None = None
        self._constant_rows = chains if network.constants_differ else 1
        self._model_kwargs: dict[str, Any] = {}
        self._seen: list[tuple[int, int]] | None = None
        # Threads may share a sampler, but there is only one workspace.
        self._lock = new_lock()

    def of_call(self, model_kwargs: dict[str, Any]) -> "ConvNetGradient":
        """Return the engine for a call with these arguments. It shares all but their constants."""
        if not self.net.constant_values:
            return self
        engine = copy.copy(self)
        engine.constants = engine._seen = None
        engine._model_kwargs = model_kwargs
        return engine

    def begin(self) -> None:
        """Read the weights."""
        with self._lock:
            self._read()

    @torch.autocast("cpu", enabled=False)
    def _read(self) -> None:
        """Read what the graph computes and holds, in its own precision."""
        self._seen = self.graph.versions()
        self.graph.refresh()
        network = self._network()
        parameters = [layer.parameters() for layer in network.layers]
        tensors = [[None if t is None else t.contiguous() for t in p[:2]] for p in parameters]
        self.net.pack(
            [
                (*(0 if tensor is None else tensor.data_ptr() for tensor in pair), p[2])
                for pair, p in zip(tensors, parameters, strict=True)
            ],
            self.packed.data_ptr(),
            self.threads,
        )
        heads, offset = network.linear_tail(self.graph)
        for head, place in zip(heads, self.net.heads, strict=True):
            _place(self.head, head, place)
        self.offset = float(offset)
        if self.constants is None and self.net.constant_values:
            shape = self._constant_rows, self.net.constant_values
            self.constants = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for k, chains, images in network.constants(self.graph, self._model_kwargs):
            assert self.constants is not None
            _place(self.constants[chains], images, self.net.constants[k])

    def _network(self) -> ImageGraph:
        network = image_graph(self.graph)
        assert isinstance(network, ImageGraph), network
        return network

    def __call__(self, x: Tensor, want_energies: bool) -> tuple[Tensor | None, Tensor]:
        """Return (energies [n] or None, d energy / d x).

        The gradient has x's layout, or is contiguous if it could not be written as images there.
        """
        images = self.state.images(x)  # perhaps a copy, which must stay alive
        grad, grad_images = self._gradient_like(x)
        energies = x.new_empty(x.shape[0]) if want_energies else None
        with self._lock:
            operands = self._operands(images, grad_images, energies)
            workspace = self.workspace.data_ptr()
            self._trial.run(lambda threads: self.net.score(operands, workspace, threads))
        return energies, grad

    def takes_steps(self, x: Tensor) -> bool:
        """Return whether :meth:`advance_` can run on x, which it reads and writes in place."""
        return in_memory(x) and self.state.images(x).data_ptr() == x.data_ptr()

    def block_steps(self) -> int:
        """Return how many steps :meth:`advance_` takes in a time that an interrupt may wait."""
        return self._trial.units_within(_BLOCK_SECONDS)

    def advance_(
        self, x: Tensor, updates: Sequence[native.Update], want_energies: bool, **options: Any
    ) -> Tensor | None:
        """Take steps in place on x, all in one call of the extension.

        The result is that of the gradient and of :func:`native.step_` in turn, bit for bit.
        ``options`` are those of :func:`native.chain_`. Returns the energies [n] at the last
        gradient if they are wanted.
        """
        chunks = x[: self.threads * self.chunk]  # each thread has the gradient of one chunk
        grad, grad_images = self._gradient_like(chunks)
        energies = x.new_empty(x.shape[0]) if want_energies else None
        with self._lock:
            operands = self._operands(self.state.images(x), grad_images, energies)
            self._trial.run(
                lambda threads: native.chain_(
                    self.net, operands, x, grad, updates, workspace=self.workspace.data_ptr(),
                    threads=threads, **options,
                ),
                sum(update.along_gradient for update in updates),
            )  # fmt: skip
        return energies

    def _gradient_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory for a gradient, in x's layout if possible, and its view as images."""
        grad = torch.empty_like(x)
        images = self.state.images(grad)
        if images.data_ptr() != grad.data_ptr():
            grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            images = self.state.images(grad)
        return grad, images

    def _operands(self, x: Tensor, grad: Tensor, energies: Tensor | None) -> tuple[Any, ...]:
        """Return what the extension reads and writes, after a look at the weights."""
        if self._seen != self.graph.versions():
            self._read()
        return (
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
            0 if self.constants is None else self.constants.data_ptr(),
            0 if self._constant_rows == 1 else self.net.constant_values,
        )

    def held_bytes(self) -> int:
        constants = self._constant_rows * self.net.constant_values
        return self.workspace.numel() + 4 * (self.head.numel() + constants) + self.weight_bytes()

    def weight_bytes(self) -> int:
        return 4 * self.packed.numel()


def _most(net: Any, network: ImageGraph, operands: str) -> int:
    """Return the most chains for which a chunk is fast."""
    vectors = all(math.prod(layer.read[1:]) == 1 for layer in network.layers)
    case = "vectors" if vectors else "images"
    if net.by_matrix_unit:
        case += ", by tiles"
    elif vectors and 4 * net.packed > _LARGE_BYTES:
        case += ", large weights"
    elif not vectors and operands == "fp32" and 4 * net.packed <= _SMALL_BYTES:
        case += ", small weights"
    return max(1, *(min(chains, size // net.workspace) for chains, size in _CHUNKS[case]))


def _tiles_estimate(plan: Callable[[str, int], Any], network: ImageGraph) -> float | None:
    """Return the estimated time of products by tiles over that of products by vectors, in float32.

    None if there are no products. The estimate follows from the network alone: if it depended on
    the batch or on a measurement, a chain would have other bits in another batch, or in a run that
    is resumed.
    """
    vectors = plan("fp32", 1).cycles
    tiles = plan("bf16x6", _most(plan("bf16x6", 1), network, "bf16x6")).cycles
    return float(tiles / vectors) if vectors else None


def why_float32() -> str | None:
    """Return why the engine computes a network in float32 that was to run in half precision.

    None if it does not. The processor alone decides. If a measurement did, a run that is resumed,
    or another process of one job, could take another engine, and a chain would have other bits.
    """
    if extension.bfloat16_is_faster():
        return None
    return (
        "this processor does not multiply bfloat16 numbers faster than float32 numbers, which are "
        "more precise"
    )


def _place(numbers: Tensor, image: Tensor, place: tuple[int, int, int, int]) -> None:
    """Write an image [..., C, H, W] to its place in the numbers [..., D] of a plan."""
    begin, height, width, pixel = place
    part = numbers[..., begin : begin + height * width * pixel]
    pixels = part.unflatten(-1, (height, width, pixel))
    pixels[..., : image.shape[-3]] = image.movedim(-3, -1)


def _layer(layer: ImageLayer) -> tuple[Any, ...]:
    library = extension.library
    return (
        library.LAYERS[layer.kind],
        (*layer.inputs, -1, -1)[:2],
        layer.read[0],
        layer.shape[0],
        layer.shape[1:],
        library.ACTIVATIONS[layer.activation_name],
        layer.kernel,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.factors,
        layer.groups,
        layer.links,
    )


@functools.lru_cache(32)
def _plan(
    layers: tuple[tuple[Any, ...], ...],
    image: tuple[int, int, int],
    heads: tuple[int, ...],
    _instruction_set: str,  # the kernels of the plan depend on it
    operands: str,
    chunk: int,
) -> Any:
    number = extension.library.OPERANDS[operands]
    return extension.library.ConvNet(layers, *image, heads, number, chunk)
