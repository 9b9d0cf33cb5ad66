"""Makes the steps of a draft faster without changing what they compute, up to rounding.

Images are kept in channels_last, convolutions read weights that are packed once per chain, their
input gradients no longer read their inputs, and operators work in place where nothing else reads
the memory.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastlangevin.gradients import onednn
from fastlangevin.gradients.trace.convolution import Convolution, faster
from fastlangevin.gradients.trace.instructions import Instruction, Slot, Value, renamed
from fastlangevin.gradients.trace.split import Draft

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
# Their arguments hold strides of the recorded layout.
_STRIDED = (aten.as_strided.default, aten.empty_strided.default, aten.new_empty_strided.default)
# CUDA kernels that read their arguments as contiguous memory.
_CONTIGUOUS_ON_CUDA = (aten.native_group_norm.default, aten.native_group_norm_backward.default)
_BACKWARD_IN_PLACE = (
    "silu", "leaky_relu", "threshold", "gelu", "elu", "sigmoid", "tanh", "softplus", "hardtanh",
)  # fmt: skip


def rewrite(draft: Draft) -> None:
    """Rewrite the instructions of a draft on a CPU or a CUDA device."""
    if draft.values[0].device.type not in ("cpu", "cuda"):
        return
    on_cpu = _is_on_cpu(draft)
    if _prefers_channels_last(draft, () if on_cpu else _CONTIGUOUS_ON_CUDA):
        _keep_channels_last(draft, with_weights=not on_cpu)
        if on_cpu:
            constants = set(draft.constants())
            draft.each = [_convolution(draft, constants, i) for i in draft.each]
            _fuse_leaky_relu(draft)
        draft.prune()
    _work_in_place(draft)


def _is_on_cpu(draft: Draft) -> bool:
    """Return whether oneDNN and the compiled extension may run a draft's convolutions."""
    return draft.values[0].device.type == "cpu"


def _prefers_channels_last(draft: Draft, unless: Iterable[Any]) -> bool:
    """Return whether convolutions gain more from channels_last than views lose by copies.

    Operators in ``unless`` do not take it.
    """
    excluded = {*_STRIDED, *unless}
    if any(i.op in excluded for i in draft.each) or _writes_through_views(draft):
        return False
    convolutions = copies = 0
    for instruction in draft.each:
        if instruction.op in _CONVOLUTIONS:
            convolutions += any(len(draft.values[n].shape) == 4 for n in instruction.written)
        if instruction.op in _VIEWS:
            source, shape = (
                draft.values[n].shape for n in (*instruction.reads, *instruction.written)
            )
            copies += 4 in (len(source), len(shape)) and source[:2] != shape[:2]
    return convolutions > copies


def _writes_through_views(draft: Draft) -> bool:
    """Return whether memory that is changed in place is viewed in another shape.

    In channels_last such views are copies, through which nothing could be written.
    """
    changed = {draft.values[n].storage for i in draft.each for n in i.writes}
    viewed = {draft.values[n].storage for i in draft.each if i.op in _VIEWS for n in i.written}
    return not changed.isdisjoint(viewed)


def _keep_channels_last(draft: Draft, with_weights: bool) -> None:
    """Bring the states and the constants of 4 dimensions into channels_last.

    ``with_weights`` is whether those of convolutions are brought there too, once per chain.
    """
    moved: dict[int, int] = {}
    before: list[Instruction] = []
    weights: set[int] = set()
    if not with_weights:
        weights = {n for i in draft.each if i.op in _CONVOLUTIONS for n in _weights(i)}
    for number in (0, *draft.constants()):
        value = draft.values[number]
        if len(value.shape) != 4 or number in weights or value.shape[1] == 1:
            continue
        moved[number] = draft.new_slot(value)
        draft.values[moved[number]] = value  # it may be the same memory
        (before if number == 0 else draft.added).append(_laid_out(number, moved[number]))
    each = []
    for instruction in draft.each:
        read = renamed(instruction, moved)
        if instruction.op not in _VIEWS:
            each.append(read)
            continue
        (source, shape), (number,) = read.args[:2], read.written
        if len(draft.values[number].shape) != 4:
            each.append(replace(read, op=aten.reshape.default, args=(source, shape)))
            continue
        viewed = draft.new_slot(draft.values[number])
        draft.values[viewed] = draft.values[number]
        each.append(replace(read, op=aten.reshape.default, args=(source, shape), outputs=(viewed,)))
        each.append(_laid_out(viewed, number))
    draft.each = before + each
    draft.results = tuple(moved.get(n, n) for n in draft.results)


def _laid_out(number: int, to: int) -> Instruction:
    return Instruction(
        aten.contiguous.default,
        (Slot(number),),
        {"memory_format": torch.channels_last},
        (to,),
        True,
    )


_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def _weights(instruction: Instruction) -> list[int]:
    forward = instruction.op is aten.convolution.default
    return [a.number for a in instruction.args[1 if forward else 2 : 3] if isinstance(a, Slot)]


class _Convolution(NamedTuple):
    """A convolution, or the input gradient of one: the slots it uses, and its settings."""

    read: Slot
    weight: Slot
    bias: Any
    written: int
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    groups: int
    is_gradient: bool
    is_spread: bool  # whether it is computed as a transposed convolution


def _read_convolution(instruction: Instruction) -> _Convolution | None:
    args = instruction.args
    is_gradient = instruction.op is not aten.convolution.default
    if is_gradient and args[10] != [True, False, False]:
        return None
    read, weight, bias = (args[0], args[2], None) if is_gradient else args[:3]
    *sizes, transposed, output_padding, groups = args[4:10] if is_gradient else args[3:9]
    stride, padding, dilation = (list(v) * 2 if len(v) == 1 else v for v in sizes)
    written = instruction.outputs[0]
    assert written is not None
    return _Convolution(
        read, weight, bias, written, stride, padding, dilation, output_padding, groups,
        is_gradient, transposed != is_gradient,
    )  # fmt: skip


def _convolution(draft: Draft, constants: set[int], instruction: Instruction) -> Instruction:
    """Return a convolution, or the input gradient of one, with packed weights if possible."""
    conv = _read_convolution(instruction) if instruction.op in _CONVOLUTIONS else None
    if conv is None:
        return instruction
    value, source = draft.values[conv.written], draft.values[conv.read.number]
    kernel = draft.values[conv.weight.number]
    if (
        len(value.shape) != 4
        or conv.weight.number not in constants
        or (isinstance(conv.bias, Slot) and conv.bias.number not in constants)
        or value.dtype not in (torch.float32, torch.bfloat16)
        or any(p >= s for p, s in zip(conv.output_padding, conv.stride, strict=False))
    ):
        return instruction
    tiled = None
    if value.dtype == torch.float32:
        settings = conv.stride, conv.padding, conv.dilation, conv.groups
        tiled = faster(source.shape, value.shape, kernel.shape, settings, conv.is_spread)
    if tiled is not None:
        packed = draft.new_slot(kernel._replace(shape=(tiled.packed_numbers,)))
        draft.added.append(Instruction(tiled.pack, (conv.weight,), {}, (packed,), True))
        return Instruction(tiled, (conv.read, Slot(packed), conv.bias), {}, (conv.written,), True)
    if not onednn.packs(value.dtype) or onednn.skips(kernel.shape[2:], conv.stride, conv.padding):
        return instruction
    return _packed_by_onednn(draft, conv)


def _packed_by_onednn(draft: Draft, conv: _Convolution) -> Instruction:
    """Return a convolution whose weights are in oneDNN's order, and add their packing."""
    value, source = draft.values[conv.written], draft.values[conv.read.number]
    kernel, mkldnn = draft.values[conv.weight.number], torch.ops.mkldnn
    paddings = [conv.padding]
    pack, run = mkldnn._reorder_convolution_weight, mkldnn._convolution_pointwise
    if conv.is_spread:
        output_padding = conv.output_padding
        if conv.is_gradient:  # what no window of the forward convolution reads
            output_padding = onednn.unread(
                value.shape[2:], source.shape[2:], kernel.shape[2:],
                conv.stride, conv.padding, conv.dilation,
            )  # fmt: skip
        paddings.append(output_padding)
        pack = mkldnn._reorder_convolution_transpose_weight
        run = mkldnn._convolution_transpose_pointwise
    plain, packed = draft.new_slot(kernel), draft.new_slot(kernel)
    settings = conv.stride, conv.dilation, conv.groups
    draft.added += [
        Instruction(aten.contiguous.default, (conv.weight,), {}, (plain,), True),
        Instruction(
            pack.default, (Slot(plain), *paddings, *settings, list(source.shape)), {}, (packed,),
            True,
        ),
    ]  # fmt: skip
    return Instruction(
        run.default,
        (conv.read, Slot(packed), conv.bias, *paddings, *settings, "none", [], ""),
        {}, (conv.written,), True,
    )  # fmt: skip


def _fuse_leaky_relu(draft: Draft) -> None:
    """Let a convolution apply the leaky relu that alone reads its output."""
    mkldnn = torch.ops.mkldnn
    fused: set[int] = set()  # indices of the leaky relus that convolutions apply
    indices = draft.readers()
    for k, instruction in enumerate(draft.each):
        tiled = isinstance(instruction.op, Convolution)
        if not tiled and instruction.op is not mkldnn._convolution_pointwise.default:
            continue
        (number,) = instruction.written
        readers = [(j, draft.each[j]) for j in indices.get(number, ())]
        forward = [(j, i) for j, i in readers if i.op is aten.leaky_relu.default]
        backward = [(j, i) for j, i in readers if i.op is aten.leaky_relu_backward.default]
        if len(forward) != 1 or len(readers) != 1 + len(backward) or number in draft.results:
            continue
        (j, activation), slope = forward[0], (*forward[0][1].args, 0.01)[1]
        if slope <= 0 or any(i.args[0] == Slot(number) for _, i in backward):
            continue
        (out,) = activation.written
        args = (slope,) if tiled else ("leaky_relu", [slope], "")
        args = *instruction.args[: 3 if tiled else 7], *args
        draft.each[k] = replace(instruction, args=args, outputs=(out,))
        fused.add(j)
        for b, i in backward:
            draft.each[b] = replace(i, args=(i.args[0], Slot(out), slope, True))
    draft.each = [i for k, i in enumerate(draft.each) if k not in fused]


def _work_in_place(draft: Draft) -> None:
    """Let operators write to an argument that nothing reads any more."""
    fixed = {draft.values[n].storage for n in (0, *draft.constants(), *draft.results)}
    last: dict[int, int] = {}  # by memory: the last instruction that touches it
    for k, instruction in enumerate(draft.each):
        for n in (*instruction.written, *instruction.reads):
            last[draft.values[n].storage] = k

    def free(argument: Any, k: int, out: Value) -> bool:
        if not isinstance(argument, Slot):
            return False
        value = draft.values[argument.number]
        if value.storage != argument.number:
            return False  # a view may repeat elements
        fits = (value.shape, value.dtype) == (out.shape, out.dtype)
        return fits and value.storage not in fixed and last[value.storage] == k

    for k, instruction in enumerate(draft.each):
        if len(instruction.outputs) != 1 or instruction.writes or not instruction.args:
            continue
        out = draft.values[instruction.written[0]]
        op, args = _in_place(instruction), instruction.args
        if op is None:
            continue
        symmetric = instruction.op in _SYMMETRIC and not instruction.kwargs
        if len(args) > 1 and not free(args[0], k, out) and symmetric:
            args = (args[1], args[0], *args[2:])
        if not free(args[0], k, out):
            continue
        target = draft.values[args[0].number].storage
        if sum(draft.values[n].storage == target for n in instruction.reads) > 1:
            continue  # another argument is the same tensor, or a view of it
        kwargs = instruction.kwargs
        if op._overloadname == "grad_input":
            kwargs = kwargs | {"grad_input": args[0]}
        draft.each[k] = replace(instruction, op=op, args=args, kwargs=kwargs)
        # The result is in the argument's memory, which lives on in its place.
        number = instruction.written[0]
        storage = draft.values[args[0].number].storage
        draft.values[number] = out._replace(storage=number)
        if storage != number:
            last[number] = last.get(out.storage, k)


_SYMMETRIC = (aten.mul.Tensor, aten.add.Tensor)
_POINTWISE = frozenset((
    "abs", "add", "div", "elu", "exp", "gelu", "hardtanh", "leaky_relu", "mul", "neg", "relu",
    "rsqrt", "sigmoid", "silu", "softplus", "sqrt", "square", "sub", "tanh",
))  # fmt: skip


def _in_place(instruction: Instruction) -> Any:
    """Return the operator that writes its result to its first argument, or None."""
    schema = getattr(instruction.op, "_schema", None)
    if schema is None:
        return None
    space, _, name = schema.name.partition("::")
    if space != "aten":
        return None
    if name.endswith("_backward") and name.removesuffix("_backward") in _BACKWARD_IN_PLACE:
        return getattr(getattr(aten, name), "grad_input", None)
    if name not in _POINTWISE or not hasattr(aten, name + "_"):
        return None
    return getattr(getattr(aten, name + "_"), schema.overload_name or "default", None)
