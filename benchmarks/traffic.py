"""How much a step of the GPU's fused engine is predicted to move through L2, and how long it takes.

    python -m benchmarks.traffic --out DIR [--ncu FILE]

writes DIR/fused-predicted.json, for the paper's networks on 3x32x32 states. It needs no GPU: the
bytes are counted from the launches' tiles. Each tap reads its pixels again and the copies bypass
L1, so all operands of all programs come from L2. The time of a step lies between that at a fast L2
with short launches and that at a slow L2 with long ones. ``--ncu`` takes what Nsight Compute wrote
in gpu.sh, for width 64 and batch 64 in fp16, and writes each launch's measured bytes, seconds and
use of the tensor cores beside its predicted bytes, to DIR/fused-profile.json.

The first profile, on an H200, disproved the count of bytes: of 636 MB predicted it found 468. Where
all programs read the same weights, it found about half of them, as if L2 served two multiprocessors
at once. The kernels took 133 us, of 83 to 144 predicted for the step, but at 2.2 to 5.1 TB/s: most
layers are bound by something else than L2. ``benchmarks.tiles`` then timed the deeper layers with
16 to 128 programs, one to a multiprocessor. All programs together read 1 to 9 TB/s, but each read
50 to 90 GB/s, whatever their number, so the bound is in the multiprocessor. More copies in flight
and more warps both make a pass faster, so it waits for the latency of its copies and for the
instructions that compute their addresses. :mod:`benchmarks.patches` is an experiment without these.
Its launches are predicted by :func:`benchmarks.patches.predicted`, under "gluon" in the same file.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlangevin as fl
from benchmarks import patches
from benchmarks.result_file import ResultFile, parser_of, write_json
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.graph.conv_stack import ConvStack, StackedConv, conv_stack
from fastlangevin.gradients.graph.record import recognise

WIDTHS, BATCHES, PRECISIONS = (32, 64, 128), (64, 256, 1024), ("fp16", "tf32")
# Bytes per second from L2 on an H100 or H200, and seconds for a launch in a CUDA graph.
FAST, SLOW = (9e12, 1.5e-6), (5.5e12, 3.5e-6)
# The least and the most seconds that the image's launch saves at width 32 and batch 64 with 8
# columns instead of 4. The bytes are the same, but each of its 9 passes no longer waits 50 to 270
# cycles for its weights. Its warps have 200 instructions more, most of them for noise that is not
# used. With 4 columns it took 8.74 us (fused-tiles-cuda.json).
IMAGE_COLUMNS = -2e-7, 1.3e-6
_TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "%": 1.0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("traffic", device=None)
    parser.add_argument(
        "--ncu", type=Path, metavar="FILE", help="a profile of benchmarks.fused_step"
    )
    options = parser.parse_args(arguments)
    if options.ncu:
        rows = profiled(options.ncu.read_text(), predicted(64, 64, "fp16")["launches"])
        ResultFile(options.out / "fused-profile.json", "fused-profile").add(*rows)
        for row in rows:
            measured, counted = (row[name] / 1e6 for name in ("bytes", "predicted_bytes"))
            print(
                f"{row['launch']}: {measured:.1f} MB of {counted:.1f} predicted, "
                f"{1e6 * row['seconds']:.1f} us, tensor cores {row['tensor_percent']:.0f} %"
            )
        return
    rows = [predicted(*case) for case in itertools.product(WIDTHS, BATCHES, PRECISIONS)]
    gluon = [predicted_in_gluon(*case) for case in itertools.product(WIDTHS, BATCHES)]
    content = {"benchmark": "fused-predicted", "results": rows, "gluon": gluon}
    content["early"] = {"seconds_saved_per_launch": patches.EARLY}
    content["image_columns"] = {"width": 32, "batch": 64, "seconds_saved": IMAGE_COLUMNS}
    write_json(options.out / "fused-predicted.json", content)
    for row in rows:
        low, high = (1e6 * seconds for seconds in row["seconds"])
        print(
            f"width {row['width']}, batch {row['batch']}, {row['precision']}: "
            f"{row['bytes'] / 1e6:.0f} MB, {low:.0f} to {high:.0f} us a step"
        )


def predicted(width: int, batch: int, precision: str) -> dict[str, Any]:
    """The bytes of each launch of a step, their sum, and the least and the most seconds."""
    launches = launches_of(fl.ConvEnergy(width=width), (3, 32, 32), batch, precision)
    total = sum(launches.values())
    return {
        "width": width,
        "batch": batch,
        "precision": precision,
        "launches": launches,
        "bytes": total,
        "seconds": [total / rate + len(launches) * launch for rate, launch in (FAST, SLOW)],
    }


def launches_of(
    energy: nn.Module, shape: conv_plan.Image, batch: int, precision: str
) -> dict[str, int]:
    """The bytes that each launch reads and writes, in the order of the launches.

    The signs that LeakyReLU keeps, a bit per value, are left out.
    """
    layers = layers_of(energy, shape)
    itemsize, state = conv_plan.DTYPES[precision].itemsize, 4  # x is float32 in every precision
    launch_bytes = {}
    for i, layer in layers:
        plan, read = conv_plan.forward_plan(*layer, batch, precision), state if i == 0 else itemsize
        written = batch * math.prod(layer[2]) * itemsize
        launch_bytes[f"forward {i}"] = operands(plan, batch * pairs(*layer), read) + written
    for i, layer in reversed(layers[1:]):
        plan = conv_plan.backward_plan(*layer, batch, precision)
        written = batch * math.prod(layer[1]) * itemsize
        launch_bytes[f"backward {i}"] = operands(plan, batch * pairs(*layer), itemsize) + written
    _, first_layer = layers[0]
    plan = conv_plan.image_plan(*first_layer, batch, precision)
    stepped = 2 * batch * math.prod(shape) * state
    launch_bytes["image"] = operands(plan, batch * pairs(*first_layer), itemsize) + stepped
    return launch_bytes


def layers_of(
    energy: nn.Module, shape: conv_plan.Image
) -> list[tuple[int, tuple[StackedConv, conv_plan.Image, conv_plan.Image]]]:
    """Every convolution with its number and the shapes of its input and its result."""
    stack = conv_stack(recognise(energy, torch.zeros(1, *shape)))
    assert isinstance(stack, ConvStack), stack
    sizes = [shape]
    for conv in stack.convs:
        sizes.append((conv.weight.shape[0], *conv.output_size(sizes[-1][1:])))
    return list(enumerate(zip(stack.convs, sizes, sizes[1:], strict=False)))


def predicted_in_gluon(width: int, batch: int) -> dict[str, Any]:
    """What benchmarks.patches predicts for its launches in fp16."""
    (_, first), *layers = layers_of(fl.ConvEnergy(width=width), (3, 32, 32))
    launches = {}
    plans_of = {"forward": conv_plan.forward_plan, "backward": conv_plan.backward_plan}
    for kind, plan_of in plans_of.items():
        for i, layer in layers:
            values = patches.values_of(plan_of(*layer, batch, "fp16"), kind)
            launches[f"{kind} {i}"] = patches.predicted(values)
    image = conv_plan.image_plan(*first, batch, "fp16")
    launches["image"] = patches.predicted(patches.values_of(image, "image"))
    return {"width": width, "batch": batch, "precision": "fp16", "launches": launches}


def profiled(text: str, launches: dict[str, int]) -> list[dict[str, Any]]:
    """The measurements of the launches, in their order, from a profile in CSV.

    ValueError if it does not have as many launches of the fused engine.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    measurements: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines):
        if line["Kernel Name"] in ("forward_kernel", "backward_kernel", "image_kernel"):
            value = float(line["Metric Value"].replace(",", "")) * _UNITS[line["Metric Unit"]]
            measurements.setdefault(line["ID"], {})[line["Metric Name"]] = value
    if len(measurements) != len(launches):
        raise ValueError(f"the profile has {len(measurements)} launches, expected {len(launches)}")
    return [
        {
            "launch": name,
            "predicted_bytes": launches[name],
            "bytes": measured["lts__t_bytes.sum"],
            "seconds": measured["gpu__time_duration.sum"],
            "tensor_percent": measured[_TENSOR],
        }
        for name, measured in zip(launches, measurements.values(), strict=True)
    ]


def operands(plan: conv_plan.Plan, pixels: int, itemsize: int) -> int:
    """The bytes of a product's operands.

    Every tile of columns reads the pixels again, and every tile of rows the weights.
    """
    gathered = pixels * plan.constants["C"] * plan.tiles * itemsize
    programs = plan.grid[0] // plan.tiles * plan.grid[1]
    row = plan.constants["COLUMNS"] * plan.constants["K"] * plan.weight.element_size()
    return gathered + programs * row


def pairs(conv: StackedConv, source: conv_plan.Image, result: conv_plan.Image) -> int:
    """How often a tap of a convolution's output meets a pixel of its input, and not its padding.

    An input gradient reads as many pixels of the output.
    """
    pairs_of_axis = (
        sum(
            0 <= out * conv.stride[i] - conv.padding[i] + tap * conv.dilation[i] < source[1 + i]
            for out in range(result[1 + i])
            for tap in range(conv.weight.shape[2 + i])
        )
        for i in range(2)
    )
    return math.prod(pairs_of_axis)


if __name__ == "__main__":
    main()
