"""The convolutions in Gluon: their index arithmetic in Python, and their machine code."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

import fastlangevin as fl
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import triton_backend
from tests.benchmarks.shared import ROOT

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="Triton without Gluon")

N = 5  # chains: not a multiple of those of any tile of small images


@pytest.fixture
def kernels(load) -> ModuleType:
    return load("patch_kernels")


@pytest.fixture
def patches(load) -> ModuleType:
    return load("patches")


def copied(descriptor: Any, at: list[int]) -> Tensor:
    """A box as TMA copies it: zeros where it leaves the tensor."""
    tensor = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides)
    box = torch.zeros(descriptor.block_shape, dtype=tensor.dtype)
    ranges = [
        (max(0, first), max(0, min(first + length, size)))
        for first, length, size in zip(at, box.shape, tensor.shape, strict=True)
    ]
    inside = tuple(slice(*r) for r in ranges)
    to = tuple(slice(a - first, b - first) for (a, b), first in zip(ranges, at, strict=True))
    if all(a < b for a, b in ranges):
        box[to] = tensor[inside]
    return box.double()


class Emulation:
    """Stands in for a kernel in Gluon: the same coordinates and windows, in float64."""

    def __init__(self, kernels: ModuleType, kind: str) -> None:
        self.kernels, self.kind = kernels, kind
        self.forward, self.taps = kind == "forward", 3 if kind == "image" else 2

    def __getitem__(self, grid: tuple[int, int]) -> "Emulation":
        self.grid = grid
        return self

    def tile(self, a: dict[str, Any], tile: int, column: int, kind: int) -> Tensor:
        """The sums [BM, BN] of a program, as ``_copy`` and ``_products`` form them."""
        box, bk = a["box_desc"].block_shape, a["box_desc"].block_shape[-1]
        y, chain, x = self.kernels.corner.fn(tile, a["H"], a["W"], box)
        acc = torch.zeros(a["BM"], max(a["BN"], 8), dtype=torch.float64)
        for step in range(a["C"] // bk * (8 if self.forward else self.taps)):
            source, dy, dx, channel, weight = self.kernels.offsets.fn(
                step, kind // 2, kind % 2, self.forward, self.taps, a["C"], bk
            )
            at = [source, y + dy, chain, x + dx, channel]
            pixels = copied(a["box_desc"], at).reshape(-1, bk)
            at[1] += box[1]
            pixels = torch.cat((pixels, copied(a["row_desc"], at).reshape(-1, bk)))
            weights = copied(a["weight_desc"], [0, kind * a["COLUMNS"] + column, weight])
            for tap in range(self.taps):
                window = pixels[tap * box[2] * box[3] :][: a["BM"]]
                acc += window @ weights[tap if self.forward else self.taps - 1 - tap].T
        return acc

    def sums(self, a: dict[str, Any]) -> Tensor:
        """[n, pixels, COLUMNS] of all programs; an element that none computes stays NaN."""
        pixels = a["H"] * a["W"] * (4 if self.kind == "backward" else 1)
        out = torch.full((a["n"], pixels, a["COLUMNS"]), math.nan, dtype=torch.float64)
        tiles = math.ceil(a["COLUMNS"] / a["BN"])
        box = a["box_desc"].block_shape
        for program, kind in itertools.product(*map(range, self.grid)):
            column = program % tiles * a["BN"]
            acc = self.tile(a, program // tiles, column, kind)
            start = self.kernels.corner.fn(program // tiles, a["H"], a["W"], box)
            for row in range(a["BM"]):
                chain, pixel = self.kernels.place.fn(
                    row, *start, kind // 2, kind % 2, self.kind != "backward", a["H"], a["W"], box
                )
                if chain < a["n"]:
                    assert out[chain, pixel, column].isnan()  # no other program computes it
                    columns = out[chain, pixel, column : column + a["BN"]]
                    columns.copy_(acc[row, : len(columns)])
        return out

    def __call__(self, **a: Any) -> None:
        value = self.sums(a)
        if self.kind == "image":
            strides = a["x_chain"], a["PIXEL_STRIDE"], a["CHANNEL_STRIDE"]
            a["grad"].as_strided(value.shape, strides).copy_(value * a["unscale"])
            return
        if self.kind == "backward":
            words = a["saved"].reshape(a["n"], -1, a["COLUMNS"] // 32, 1)
            signs = ((words >> torch.arange(32)) & 1).reshape(value.shape).bool()
            a["out"][: value.numel()] = torch.where(signs, value, value * a["slope"]).flatten()
            return
        value += a["bias"]
        factor = torch.where(value > 0, 1.0, a["slope"])
        if a["head"] is None:
            a["out"][: value.numel()] = (value * factor).flatten()
            bits = (value > 0).reshape(-1, a["COLUMNS"] // 32, 32) << torch.arange(32)
            a["saved"].copy_(bits.sum(2).to(torch.int32))
            return
        v = a["head"].reshape(1, *value.shape[1:])
        a["out"][: value.numel()] = (v * factor).expand_as(value).flatten()
        if a["energies"] is not None:
            tiled = (value * factor * v).unflatten(2, (-1, a["BN"]))
            a["energies"].copy_(tiled.sum(3))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


PLANS = {
    "forward": (conv_plan.forward_plan, conv_plan.pack_forward),
    "backward": (conv_plan.backward_plan, conv_plan.pack_backward),
    "image": (conv_plan.image_plan, conv_plan.pack_backward),
}


def check(
    kernels: ModuleType, patches: ModuleType, kind: str, conv: nn.Conv2d, size: tuple[int, int]
) -> None:
    """Compare a convolution, or its input gradient, with one in float64; size is its result's."""
    results, channels = conv.weight.shape[:2]
    (h, w), stride = size, conv.stride[0]
    conv.weight.data = random(*conv.weight.shape).float()
    make, pack = PLANS[kind]
    plan = make(conv, (channels, stride * h, stride * w), (results, h, w), N, "fp16")
    pack(plan, conv)
    forward = kind == "forward"
    source = random(N, channels, stride * h, stride * w) if forward else random(N, results, h, w)
    values = dict.fromkeys(patches._ARGUMENTS[kind].split()) | patches.values_of(plan, kind)
    values |= {"source": source.movedim(1, -1).flatten(), "p": 0.2}
    assert patches.is_supported(values)
    sums = Emulation(kernels, kind)[patches.grid_of(values)].sums(patches.arguments_of(values))
    apply = conv2d if forward else conv_transpose2d
    want = apply(source.double(), conv.weight.double(), stride=stride, padding=1)
    torch.testing.assert_close(sums.mT.unflatten(2, want.shape[2:]), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "size"),
    [
        ("forward", 128, 128, (8, 8)),
        ("backward", 64, 128, (4, 4)),
        ("backward", 64, 64, (4, 16)),
        ("forward", 128, 64, (16, 8)),
        ("forward", 64, 32, (8, 32)),
        ("backward", 128, 32, (32, 4)),
    ],
    ids=str,
)
def test_the_index_arithmetic_is_that_of_the_convolution_in_float64(
    kernels, patches, monkeypatch, kind, rows, columns, size
) -> None:
    """Sizes of the smaller image. Padding, partial batches and several tiles are all met."""
    tile = conv_plan.Tile(rows, columns, 4, 3)
    monkeypatch.setattr(conv_plan, "_tile", lambda *_: tile)
    channels, results = (32, columns) if kind == "forward" else (columns, 128)
    conv = nn.Conv2d(channels, results, 4, 2, 1, bias=False)
    check(kernels, patches, kind, conv, size)


@pytest.mark.parametrize(
    ("channels", "width", "size"),
    [(1, 32, (8, 8)), (3, 128, (4, 4)), (8, 32, (4, 64)), (2, 64, (32, 8))],
    ids=str,
)
def test_the_gradient_of_an_image_is_that_of_the_convolution_in_float64(
    kernels, patches, channels, width, size
) -> None:
    check(kernels, patches, "image", nn.Conv2d(channels, width, 3, 1, 1, bias=False), size)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (4, 4), (4, 64), (32, 8)], ids=str)
def test_four_rows_of_a_tile_are_neighbours_that_share_their_noise(kernels, patches, size) -> None:
    (h, w), values = size, {"OUT_H": size[0], "OUT_W": size[1], "H": size[0], "W": size[1]}
    box = [1, *patches.box_of(values | {"BM": 128}), 64]
    start = kernels.corner.fn(1, h, w, box)
    for row in range(0, 128, 4):
        places = [kernels.place.fn(row + i, *start, 0, 0, True, h, w, box) for i in range(4)]
        chain, pixel = places[0]
        assert pixel % 4 == 0
        assert places == [(chain, pixel + i) for i in range(4)]


@pytest.mark.skipif(
    triton_backend.available(torch.device("cpu")) is not None, reason="Triton is not interpreted"
)
def test_the_engine_takes_the_same_step_with_the_kernels_in_gluon(
    kernels, patches, monkeypatch
) -> None:
    """All arguments reach them: rounded in other places alone, a gradient differs by that much."""
    monkeypatch.setattr(conv_plan, "_MULTIPROCESSORS", 1)  # large tiles: few programs to interpret
    torch.manual_seed(0)
    energy = fl.ConvEnergy(size=16, width=32)
    stack = conv_stack(recognise(energy, torch.zeros(1, 3, 16, 16)))
    score = FusedGradient(stack, 2, torch.device("cpu"), "fp16")
    x = random(2, 3, 16, 16).float()
    want_energies, want = score(x, want_energies=True)
    used = []

    class Counted(Emulation):
        def __call__(self, **a: Any) -> None:
            used.append(self.kind)
            assert a.pop("num_warps") == a["WARPS"]
            assert a.pop("enable_fp_fusion") is False  # the step's bits are those of other backends
            assert set(a) == set(names[self.kind])
            super().__call__(**a)

    names = {kind: getattr(kernels, f"patch_{kind}_kernel").arg_names for kind in PLANS}
    for kind in PLANS:
        monkeypatch.setattr(kernels, f"patch_{kind}_kernel", Counted(kernels, kind))
    with patches.patched():
        energies, grad = score(x, want_energies=True)
    assert used == ["forward", "forward", "backward", "backward", "image"]
    assert float((grad - want).norm() / want.norm()) < 0.02
    torch.testing.assert_close(energies, want_energies, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_machine_code_has_tma_and_matrix_instructions_no_spills_and_the_predicted_bytes(
    patches, tmp_path: Path
) -> None:
    if patches.gluon_refusal() is not None:
        pytest.skip(patches.gluon_refusal())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compile_patches"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 3 * 7
    for result in results:
        where = f"width {result['width']}, {result['launch']}"
        assert result["local"] == 0, where
        assert result["registers"] <= 255, where
        assert result["fused"] == 0, where
        assert result["copies"] == ["UTMALDG"], where
        assert result["order"][:3] == ["PREEXIT", "ACQBULK", "UTMALDG"], where
        assert result["shared_order"][0] == "BAR", where
        (found,) = result["matrix"]
        assert found.startswith("HGMMA"), where
        (awaited,) = result["awaited"]
        assert math.prod(result["programs"]) * result["passes"] * awaited == result["bytes"], where
