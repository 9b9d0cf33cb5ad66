"""Time the fused engine with the convolutions of :mod:`benchmarks.patch_kernels`, on a Hopper GPU.

    python -m benchmarks.patches --out DIR

writes DIR/patches-cuda.json, for the paper's networks in fp16: the microseconds of every launch of
a step, of the whole step in a CUDA graph, and of a step of a sampler's chain with its default
gradient, which replays a graph as well. All of this is timed with the package's kernels and with
those in Gluon, and with each of the two also "early", with programmatic dependent launches: a
launch begins before the one before it has ended, so that only the times of whole steps count.
A gradient is compared with float64 before it is timed: the error of the kernels in Gluon may be
twice that of the package's. Early launches must give the same chain, bit for bit, as others.
:mod:`benchmarks.traffic` writes the predictions.
"""

import contextlib
import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks import tiles, timing
from benchmarks.fused_step import OPTIONS, engine
from benchmarks.result_file import ResultFile, parser_of
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.fused_gpu_plan import Plan

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Values = dict[str, Any]  # the arguments of a launch by name

CHAIN = 100  # steps
NETS = ((64, 64), (32, 64), (64, 1024))  # width, batch
# What the kernels in Gluon take as the package's kernels do.
_ARGUMENTS = {
    "forward": "out saved bias head energies overflow",
    "backward": "out saved",
    "image": "unscale overflow x grad noise x_chain step_size noise_std step_sizes noise_stds clip "
    "lo hi seed_low seed_high step first_chain rng_state PIXEL_STRIDE CHANNEL_STRIDE DRAW "
    "NOISE_LAST",
}
_GEOMETRY = {"TAPS": 4, "STRIDE": 2, "PAD": 1, "DILATION": 1}
_IMAGE_GEOMETRY = {"TAPS": 3, "STRIDE": 1, "PAD": 1, "DILATION": 1}
_OPTIONS = ("num_warps", "enable_fp_fusion", "launch_pdl")
# An H100's or H200's multiprocessors, and the products per second of a good kernel on all of them.
_MULTIPROCESSORS, _PRODUCTS = 132, 395e12
# The bytes of pixels that one of them reads from shared memory in a second: 128 a cycle.
_SHARED = 2.2e11
# The least and the most: seconds of a launch without its loop, seconds of a pass without its
# products, and bytes per second of all multiprocessors. With one program on each, the package's
# kernels took 0.06 to 0.3 us more for a pass than its products take on an H200, and read up to 88
# GB/s in one multiprocessor (fused-tiles-cuda.json).
_FAST, _SLOW = (1.5e-6, 0.0, 11e12), (3.5e-6, 1.6e-7, 8e12)
EARLY = (5e-7, 1.5e-6)  # the least and the most seconds that a launch saves if it begins early


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser_of("patches", device=None).parse_args(arguments)
    reason = refusal() or gluon_refusal()
    if reason is not None:
        print(f"not run: {reason}")
        return
    jobs = list(itertools.product(NETS, VARIANTS))
    with ProcessPoolExecutor(len(jobs), get_context("spawn")) as pool:
        list(pool.map(compile_kernels, *zip(*jobs, strict=True)))
    file = ResultFile(options.out / "patches-cuda.json", "patches", device="cuda")
    for width, batch in NETS:
        errors: dict[str, float] = {}
        chains: dict[str, Tensor] = {}
        for kernels, (context, early) in VARIANTS.items():
            with context(), mock.patch.object(conv_plan, "EARLY", early):
                energy, step, x = make(width, batch)
                _, exact = energy_and_grad(copy.deepcopy(energy).double(), x[:8].double(), {})
                _, grad = step(x)
                errors[kernels] = float((grad[:8] - exact).norm() / exact.norm())
                row = {"width": width, "batch": batch, "precision": "fp16", "kernels": kernels}
                row |= {"error": errors[kernels]}
                sampler = fl.LangevinSampler(energy, CHAIN, precision="fp16")
                for _ in range(3):  # the second call records a graph
                    chains[kernels] = sampler(x, seed=0)
                late = chains[kernels.removesuffix(", early")]
                if errors[kernels] <= 2 * errors["triton"] and torch.equal(chains[kernels], late):
                    row |= tiles.measure(step, x.clone())
                    sample = timing.timed(functools.partial(sampler, x, seed=0), x.device)
                    row["chain"] = 1e6 / CHAIN * statistics.median(sample() for _ in range(5))
                    row["engine"] = sampler.choose_engine(x, {}).name
                else:
                    row["differs"] = True  # its time would mean nothing
            file.add(row)
            figures = "differs" if "step" not in row else f"{row['step']:.1f} us {row['launches']}"
            print(width, batch, kernels, figures, flush=True)


def refusal() -> str | None:
    """Why this machine's GPU cannot run the kernels in Gluon, or None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability[0] == 9:
        return None
    return "the kernels are for compute capability 9.0, the GPU's is {}.{}".format(*capability)


def gluon_refusal() -> str | None:
    """Why this Triton cannot compile them, or None if it can."""
    import triton
    from triton.experimental.gluon import language as gl

    if hasattr(gl.shared_memory_descriptor, "_reinterpret"):
        return None
    return f"they are written in the Gluon of Triton 3.6, this is Triton {triton.__version__}"


def make(width: int, batch: int) -> tuple[nn.Module, FusedGradient, Tensor]:
    torch.manual_seed(0)
    energy = fl.ConvEnergy(width=width).to("cuda")
    x = torch.rand(batch, 3, 32, 32, device="cuda")
    return energy, engine(energy, (3, 32, 32), batch, "fp16"), x


def compile_kernels(net: tuple[int, int], kernels: str) -> None:
    """Leave the kernels of a network's launches in Triton's cache."""
    context, early = VARIANTS[kernels]
    with context(), mock.patch.object(conv_plan, "EARLY", early):
        _, step, x = make(*net)
        step.step_(x, **OPTIONS)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within it, the fused engine launches the kernels in Gluon where they can be."""
    from benchmarks import patch_kernels
    from fastlangevin.kernels import triton_conv, triton_conv_grad

    with contextlib.ExitStack() as patches:
        kernels = {"forward_kernel": triton_conv}
        kernels |= dict.fromkeys(("backward_kernel", "image_kernel"), triton_conv_grad)
        for name, module in kernels.items():
            kernel = getattr(patch_kernels, f"patch_{name}")
            stand_in = PatchKernel(getattr(module, name), kernel)
            patches.enter_context(mock.patch.object(module, name, stand_in))
        yield


VARIANTS: dict[str, tuple[Callable[[], AbstractContextManager[None]], bool]] = {
    "triton": (contextlib.nullcontext, False),
    "gluon": (patched, False),
    "triton, early": (contextlib.nullcontext, True),
    "gluon, early": (patched, True),
}


class PatchKernel:
    """Stands in for a kernel of the package, and launches the one in Gluon where it can."""

    def __init__(self, plain: Any, kernel: Any) -> None:
        self.plain, self.kernel = plain, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        values = dict(zip(self.plain.arg_names, args, strict=False)) | options
        if is_supported(values):
            own = {name: options[name] for name in _OPTIONS if name in options}
            self.kernel[grid_of(values)](**arguments_of(values), **own)
        else:
            self.plain[grid](*args, **options)


def values_of(plan: Plan, kind: str) -> Values:
    """The arguments that decide about a launch."""
    more = {"forward": {"ACTIVATION": "leaky_relu"}, "backward": {"SIGNS": True}, "image": {}}
    own = {"weight": plan.weight, "rows": plan.rows}
    return {**plan.constants, **plan.options, **own, **more[kind]}


def kind_of(values: Values) -> str:
    """The package's kernel that is launched: "forward", "backward" or "image"."""
    return "forward" if "ACTIVATION" in values else "backward" if "SIGNS" in values else "image"


def is_supported(values: Values) -> bool:
    """Whether a launch of the package's kernels can be one in Gluon."""
    is_image = kind_of(values) == "image"
    geometry = _IMAGE_GEOMETRY if is_image else _GEOMETRY
    return (
        all(values[f"{name}_{axis}"] == size for name, size in geometry.items() for axis in "YX")
        and values["weight"].dtype in (torch.float16, torch.bfloat16)
        and values["C"] % 32 == values["C"] % min(values["C"], 64) == 0
        and (is_image or values["COLUMNS"] % values["BN"] == 0)
        and all(size >= 4 and size & (size - 1) == 0 for size in result_size(values))
        and values.get("ACTIVATION", "leaky_relu") == "leaky_relu"
        and values.get("SIGNS", True)
    )


def result_size(values: Values) -> tuple[int, int]:
    """Height and width of the result, or of one class of its pixels."""
    of_source = values["H"], values["W"]
    return (values["OUT_H"], values["OUT_W"]) if kind_of(values) == "forward" else of_source


def box_of(values: Values) -> tuple[int, int, int]:
    """How many (rows, chains, columns) of pixels make a tile."""
    height, width = result_size(values)
    across = min(width, 16)
    down = min(height, values["BM"] // max(across, 8))  # 8 pixels or more in a row of all chains
    return down, values["BM"] // (down * across), across


def grid_of(values: Values) -> tuple[int, int]:
    (height, width), (down, chains, across) = result_size(values), box_of(values)
    n = values["rows"] // (height * width)
    tiles_of_pixels = math.ceil(n / chains) * (height // down) * (width // across)
    return tiles_of_pixels * math.ceil(values["COLUMNS"] / values["BN"]), values["weight"].shape[0]


def taps_of(values: Values) -> int:
    """How many taps share a box."""
    return 3 if kind_of(values) == "image" else 2


def boxes_of(values: Values) -> list[list[int]]:
    """The boxes that a pass copies: of pixels, of one or two more rows of them, of weights.

    The last one has a power of two of taps, and of columns at least the eight of an instruction.
    """
    down, *inside = *box_of(values), min(values["C"], 64)
    taps, columns = taps_of(values), max(values["BN"], 8)
    tiles = 4 if taps == 3 else 2
    return [[1, down, *inside], [1, taps - 1, *inside], [tiles, columns, inside[-1]]]


def passes_of(values: Values) -> int:
    """How often a tile takes a box. A forward pass has one for each parity of its source's rows."""
    boxes = 8 if kind_of(values) == "forward" else taps_of(values)
    return values["C"] // min(values["C"], 64) * boxes


def arguments_of(values: Values) -> Values:
    """The arguments of a launch in Gluon."""
    (height, width), boxes = result_size(values), boxes_of(values)
    n, kind = values["rows"] // (height * width), kind_of(values)
    h, w, c, source, weight = (values[name] for name in ("H", "W", "C", "source", "weight"))
    if kind == "forward":  # the pixels (2 y + p, 2 x + q), with q before their channels
        shape, strides = [2, h // 2, n, w // 2, 2 * c], [w * c, 2 * w * c, h * w * c, 2 * c, 1]
    else:
        shape, strides = [1, h, n, w, c], [w * c, w * c, h * w * c, c, 1]
    taps, k = taps_of(values), weight.shape[2]
    weights = [taps, math.prod(weight.shape[:2]), k // taps], [k // taps, k, 1]
    names = [*_ARGUMENTS[kind].split(), "C", "COLUMNS", "BM", "BN"]
    arguments = {name: values[name] for name in names}
    if kind == "image":  # no more columns, for which noise would be drawn
        arguments["BN"] = 1 << (values["COLUMNS"] - 1).bit_length()
    else:
        arguments["slope"] = values["p"]
    return arguments | {
        "box_desc": _descriptor(source, shape, strides, boxes[0]),
        "row_desc": _descriptor(source, shape, strides, boxes[1]),
        "weight_desc": _descriptor(weight, *weights, boxes[2]),
        "n": n,
        "H": height,
        "W": width,
        "STAGES": values["num_stages"],
        "WARPS": values["num_warps"],
    }


def _descriptor(
    tensor: Tensor, shape: list[int], strides: list[int], box: list[int]
) -> "TensorDescriptor":
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    size = tensor.element_size()
    layout = NVMMASharedLayout(box[-1] * size, 8 * size, rank=len(box))
    return TensorDescriptor(tensor, shape, strides, box, layout)


def predicted(values: Values) -> dict[str, Any]:
    """The bytes that a launch copies, padding included, and the least and the most seconds."""
    programs, passes = math.prod(grid_of(values)), passes_of(values)
    copied = sum(map(math.prod, boxes_of(values))) * values["weight"].element_size()
    size = programs * passes * copied
    turns = passes * math.ceil(programs / _MULTIPROCESSORS)
    read = taps_of(values) * values["BM"] * min(values["C"], 64)  # values, by each column
    at_work = max(read * values["BN"] / (_PRODUCTS / _MULTIPROCESSORS), 2 * read / _SHARED)
    seconds = [
        launch + max(size / rate, turns * (at_work + more)) for launch, more, rate in (_FAST, _SLOW)
    ]
    return {"bytes": size, "seconds": seconds}
