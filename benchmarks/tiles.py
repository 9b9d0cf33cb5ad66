"""Time the launches of a fused step on a GPU with each of several tiles.

    python -m benchmarks.tiles --out DIR

writes DIR/fused-tiles-cuda.json, for the paper's networks: the microseconds of every launch of a
step, and of the whole step in a CUDA graph, with each tile in fp16 and then, for more networks and
precisions, with the tiles that the engine chooses. The kernels are compiled first, in
several processes. :mod:`fastlangevin.gradients.fused_gpu_plan` takes its tiles from these figures.
"""

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastlangevin as fl
from benchmarks import timing
from benchmarks.fused_step import OPTIONS, engine
from benchmarks.result_file import ResultFile, parser_of
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.fused_gpu_plan import Tile

TILES = tuple(
    Tile(*tile)
    for tile in (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 4, 4),
        (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4),
        (64, 32, 4, 3), (128, 32, 4, 3), (128, 256, 8, 3),
    )
)  # fmt: skip
NETS = ((32, 64), (64, 64), (32, 256))  # width, batch
MORE = (
    (64, 64, "tf32"), (32, 64, "tf32"), (64, 64, "bf16"), (64, 1024, "fp16"), (64, 256, "fp16"),
    (128, 64, "fp16"), (64, 64, "fp32"), (32, 64, "fp32"),
)  # fmt: skip
KERNELS = ("forward_kernel", "backward_kernel", "image_kernel")
KERNELS += tuple(f"patch_{kernel}" for kernel in KERNELS)  # those of benchmarks.patches
STEPS = 7


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser_of("tiles", device=None).parse_args(arguments)
    jobs: list[tuple[int, int, str, Tile | None]] = [
        (width, batch, "fp16", tile) for width, batch in NETS for tile in (None, *TILES)
    ]
    jobs += [(*case, None) for case in MORE]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(compile_kernels, jobs))
    file = ResultFile(options.out / "fused-tiles-cuda.json", "fused-tiles", device="cuda")
    for width, batch, precision, tile in jobs:
        step, x = make(width, batch, precision, tile)
        row = {"width": width, "batch": batch, "precision": precision, "tile": tile}
        row |= measure(step, x)
        file.add(row)
        print(width, batch, precision, tile or "as chosen", f"{row['step']:.1f} us", flush=True)


def compile_kernels(job: tuple[int, int, str, Tile | None]) -> None:
    step, x = make(*job)
    step.step_(x, **OPTIONS)


def make(width: int, batch: int, precision: str, tile: Tile | None) -> tuple[FusedGradient, Tensor]:
    """A network's engine with one tile for all its layers, or with the tiles that it chooses."""

    def only(rows: int, channels: int, columns: int, *_: Any) -> Tile:
        assert tile is not None
        widest = max(32, 1 << (columns - 1).bit_length())
        return tile._replace(columns=min(tile.columns, widest))

    torch.manual_seed(0)
    energy = fl.ConvEnergy(width=width).to("cuda")
    x = torch.rand(batch, 3, 32, 32, device="cuda")
    if tile is None:
        return engine(energy, (3, 32, 32), batch, precision), x
    with mock.patch.object(conv_plan, "_tile", only):
        return engine(energy, (3, 32, 32), batch, precision), x


def measure(step: FusedGradient, x: Tensor) -> dict[str, Any]:
    """Medians in microseconds of every launch, and of a step in a graph."""

    def run() -> None:
        step.step_(x, **OPTIONS)

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as events:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    starts = [(e.time_range.start, e) for e in events.events() if e.name in KERNELS]
    times = [event.time_range.elapsed_us() for _, event in sorted(starts, key=lambda s: s[0])]
    count = len(times) // STEPS
    launches = [statistics.median(times[i::count]) for i in range(count)]
    sample = timing.sampler([run], x.device, least=0.01)
    return {"launches": launches, "step": 1e6 * statistics.median(sample() for _ in range(5))}


if __name__ == "__main__":
    main()
