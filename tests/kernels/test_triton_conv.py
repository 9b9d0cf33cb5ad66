"""The fused score and its kernels: on a GPU where there is one, else interpreted, and compiled."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.gradients import fused_gpu
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.fused_gpu import FusedGradient
from fastlangevin.gradients.graph.conv_stack import ConvStack, conv_stack
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import triton_backend as triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        triton.available(DEVICE) is not None, reason=f"triton: {triton.available(DEVICE)}"
    ),
    # NumPy's, of the infinities that are asked for.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

ADDRESS = {"seed": 2**64 - 3, "step": 2**32 - 1, "first_chain": 2**31 - 2}
OPTIONS: dict[str, Any] = {"step_size": 0.3, "noise_std": 0.05, "clamp": (-0.9, 0.8), **ADDRESS}
# Of the gradient's norm. Half precision moves values across the kinks, hence smooth activations.
TOLERANCES = {"fp32": 1e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one by one, and cost the same whatever their tile."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(conv_plan, "_MULTIPROCESSORS", 1)
        for tiles in ("_TILES", "_NARROW_TILES", "_FLAT_TILES", "_IEEE_TILES"):
            monkeypatch.setattr(conv_plan, tiles, (conv_plan.Tile(512, 32, 4, 3),))


def stack_of(energy: nn.Module, shape: tuple[int, ...]) -> ConvStack:
    stack = conv_stack(recognise(energy, torch.zeros(1, *shape, device=DEVICE)))
    assert isinstance(stack, ConvStack), stack
    return stack


def paper(activation: str = "leaky_relu", **settings: Any) -> fl.ConvEnergy:
    torch.manual_seed(0)
    return fl.ConvEnergy(**{"size": 8, "width": 4} | settings, activation=activation).to(DEVICE)


def odd() -> nn.Sequential:
    """Nothing a multiple of anything: strides and paddings per axis, a dilation, unread pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 20, 3, (1, 2), (0, 1)),
        nn.LeakyReLU(0.1),
        nn.Conv2d(20, 33, (3, 2), (2, 1), (1, 0), bias=False),
        nn.Softplus(2.0, 1.0),
        nn.Conv2d(33, 16, 2, 1, 2, dilation=(1, 2)),
        nn.ELU(0.7),
        nn.Conv2d(16, 7, 1, (2, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 4 * 2, 1),
    ).to(DEVICE)


CASES = {
    "leaky_relu": (paper(), (3, 8, 8)),
    "silu": (paper("silu"), (3, 8, 8)),
    "one channel": (paper("relu", channels=1), (1, 8, 8)),
    "whole blocks": (paper("silu", width=32), (3, 8, 8)),
    "odd": (odd(), (2, 9, 7)),
}


def state(case: str, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand((n, *CASES[case][1]), generator=generator) - 1
    return x.to(DEVICE)


def exact(case: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and gradient in float64, by autograd."""
    leaf = x.double().requires_grad_()
    energies = copy.deepcopy(CASES[case][0]).double()(leaf).flatten()
    (grad,) = torch.autograd.grad(energies.sum(), leaf)
    return energies.detach(), grad


@functools.cache
def fused(case: str, n: int = 5, precision: str = "fp32") -> FusedGradient:
    energy, shape = CASES[case]
    return FusedGradient(stack_of(energy, shape), n, DEVICE, precision)


@functools.cache
def scored_silu(layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    return fused("silu")(state("silu").clone(memory_format=layout), want_energies=True)


# The score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["one channel", "odd"])
def test_fused_energies_and_gradients_match_float64(case: str) -> None:
    x = state(case)
    energies, grad = fused(case)(x, want_energies=True)
    want_energies, want = exact(case, x)
    assert float((grad - want).norm() / want.norm()) <= TOLERANCES["fp32"]
    torch.testing.assert_close(energies.double(), want_energies, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "precision"), [("silu", "tf32"), ("whole blocks", "fp16"), ("silu", "bf16")]
)
def test_fused_gradients_of_each_precision_are_within_its_tolerance(
    case: str, precision: str
) -> None:
    x = state(case)
    score = fused(case, precision=precision)
    energies, grad = score(x, want_energies=True)
    want_energies, want = exact(case, x)
    assert grad.dtype == energies.dtype == torch.float32
    tolerance = TOLERANCES[precision]
    error = float((grad - want).norm() / want.norm())
    assert TOLERANCES["fp32"] < error <= tolerance
    torch.testing.assert_close(energies.double(), want_energies, rtol=tolerance, atol=tolerance)
    if precision == "tf32":  # rounded, for the matrix instructions cut
        for operand in (*score._arenas, score._forward[0].weight, score._image.weight):
            assert not (operand.view(torch.int32) & 0x1FFF).any()
    if score.overflow is not None:
        assert not score.overflow.any()


def test_channels_last_and_other_layouts() -> None:
    _, want = scored_silu(torch.contiguous_format)
    _, grad = scored_silu(torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(grad, want)
    _, grad = fused("silu")(state("silu").mT.contiguous().mT)
    assert torch.equal(grad, want)


def test_saved_sign_bits_are_those_of_the_activations_inputs() -> None:
    """Bit c % 32 of word c // 32 is set where channel c is positive before its activation."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 40, 3, 1, 1), nn.Conv2d(40, 8, 4, 2, 1), nn.Conv2d(8, 4, 4, 2, 1)]
    stack = [layer for conv in layers for layer in (conv, nn.LeakyReLU(0.2))]
    energy, shape = nn.Sequential(*stack, nn.Flatten(), nn.Linear(16, 1)).to(DEVICE), (3, 8, 8)
    score = FusedGradient(stack_of(energy, shape), 2, DEVICE, "fp32")
    assert [words.shape[-1] for words in score._saved] == [2, 1]
    h = torch.rand((2, *shape), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    score(h)
    energy, h = energy.double(), h.double()  # float32 may mean TF32, which is off by more
    for i, words in enumerate(score._saved):
        h = energy[2 * i](h)
        bits = (words[:, :, None] >> torch.arange(32, device=DEVICE)) & 1
        signs = bits.flatten(1)[:, : h.shape[1]].bool()
        want = h.movedim(1, -1).reshape(signs.shape)
        sure = want.abs() > 1e-5
        assert sure.float().mean() > 0.999
        assert torch.equal(signs[sure], want[sure] > 0)
        h = energy[2 * i + 1](h)


def test_fused_gradients_are_right_with_a_gpus_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of rows and of columns, the last of them partly filled."""
    x, energy = state("leaky_relu", 3), paper(width=24)
    monkeypatch.undo()
    score = FusedGradient(stack_of(energy, (3, 8, 8)), 3, DEVICE, "fp32")
    assert [plan.tiles for plan in score._forward] == [1, 2]
    assert score._forward[0].grid[0] > 1
    _, grad = score(x)
    want = energy_and_grad(energy.double(), x.double(), {})[1]
    assert float((grad - want).norm() / want.norm()) <= TOLERANCES["fp32"]


@pytest.mark.parametrize(("case", "precision"), [("leaky_relu", "fp32"), ("silu", "tf32")])
def test_nan_spreads_as_autograds_does(case: str, precision: str) -> None:
    x = state(case)
    x[1, 2, 3, 4] = math.nan
    energies, grad = fused(case, precision=precision)(x, want_energies=True)
    want_energies, want = exact(case, x)
    assert torch.equal(energies.isnan(), want_energies.isnan())
    assert torch.equal(grad.isnan(), want.isnan())


def test_changed_weights_are_packed_again() -> None:
    energy, x = paper(), state("leaky_relu")
    score = FusedGradient(stack_of(energy, (3, 8, 8)), 5, DEVICE, "fp32")
    addresses = [plan.weight.data_ptr() for plan in (*score._forward, *score._backward)]
    for layer in (0, 2, 4):
        energy.layers[layer].weight.data.mul_(2)
        score.pack()
        fresh = FusedGradient(stack_of(energy, (3, 8, 8)), 5, DEVICE, "fp32")
        for name in ("_forward", "_backward"):
            for got, want in zip(getattr(score, name), getattr(fresh, name), strict=True):
                assert torch.equal(got.weight, want.weight)
        assert torch.equal(score._head * score._unscale, fresh._head * fresh._unscale)
    assert torch.equal(score(x)[1], fresh(x)[1])
    assert [plan.weight.data_ptr() for plan in (*score._forward, *score._backward)] == addresses


def test_overflow_is_flagged() -> None:
    """On the way forward, where the signs alone would not tell, and on the way back."""
    x = state("leaky_relu")
    score = fused("leaky_relu", precision="fp16")
    score(1e4 * x)
    assert score.overflow.tolist() == [0]
    score(1e6 * x)
    assert score.overflow.tolist() == [1]
    score.overflow.zero_()
    score._image.weight.fill_(60000.0)
    score._arenas[0].fill_(60000.0)
    score._finish(x, grad=torch.empty_like(x))
    assert score.overflow.tolist() == [0]  # sums are float32
    score._arenas[0].fill_(math.inf)
    score._finish(x, grad=torch.empty_like(x))
    assert score.overflow.tolist() == [1]


def test_gradients_too_small_for_float16() -> None:
    energy, x = paper("silu"), state("silu")
    stack = stack_of(energy, (3, 8, 8))
    _, large = FusedGradient(stack, 5, DEVICE, "fp16")(x)
    with torch.no_grad():
        energy.layers[-1].weight.mul_(2.0**-30)
    _, small = FusedGradient(stack, 5, DEVICE, "fp16")(x)
    assert torch.equal(small * 2.0**30, large)


def test_empty_batch() -> None:
    energies, grad = fused("silu", n=0)(state("silu", 0), want_energies=True)
    assert energies.shape == (0,)
    assert grad.shape == (0, 3, 8, 8)


# The step ----------------------------------------------------------------------------------------

STEPS: dict[str, dict[str, Any]] = {
    "all": {"maximize": True, "grad_clip": 0.002, "noise_last": True},
    "per chain": {"step_size": torch.arange(5.0), "noise_std": torch.arange(5.0) / 9},
    "norms": {"grad_clip": ("chain_norm", 0.1)},
    "no noise": {"noise_std": 0.0},
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("all", torch.channels_last),
        ("per chain", torch.contiguous_format),
        ("norms", torch.channels_last),
        ("no noise", torch.contiguous_format),
    ],
    ids=str,
)
def test_a_fused_step_equals_the_step_along_the_gradient(
    name: str, layout: torch.memory_format
) -> None:
    """Bit for bit, and near a step in float64 along the exact gradient."""
    x, score = state("silu").clone(memory_format=layout), fused("silu")
    options = OPTIONS | STEPS[name]
    energies, grad = scored_silu(layout)
    want, got = x.clone(), x.clone()
    if "norms" in name:
        clip = options["grad_clip"][1] / grad.flatten(1).norm(dim=1).clamp(min=0.1)
        scaled = options | {"grad_clip": None, "step_size": 0.3 * clip}
        triton.step_(want, grad, None, **scaled)
    else:
        triton.step_(want, grad, None, **options)
    version = got._version
    assert torch.equal(score.step_(got, want_energies=True, **options), energies)
    assert torch.equal(got, want)
    assert got._version > version
    if "norms" not in name:
        exactly = x.double()
        fl.kernels.reference.step_(exactly, exact("silu", x)[1], None, **options)
        torch.testing.assert_close(got.double(), exactly, rtol=0, atol=1e-5)


def test_given_noise_and_device_state() -> None:
    x, score = state("silu"), fused("silu")
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    _, grad = scored_silu(torch.contiguous_format)
    want = triton.step_(x.clone(), grad, z, **OPTIONS)
    for noise in (z, z.to(memory_format=torch.channels_last)):
        got = x.clone()
        score.step_(got, noise, **OPTIONS)
        assert torch.equal(got, want)
    want, got = x.clone(), x.clone()
    triton.step_(want, grad, None, **OPTIONS | {"seed": 2**63 + 7, "step": 12})
    memory = torch.tensor([2**63 + 7 - 2**64, 2], device=DEVICE)
    score.step_(got, **OPTIONS | {"seed": 1, "step": 10}, rng_state=memory)
    assert torch.equal(got, want)


def test_noise_for_pixels_that_do_not_come_in_fours_is_the_contracts() -> None:
    """From x = 0 without a move, by their number and by the stride of the first layer."""
    conv = nn.Conv2d(1, 4, 3, padding=1)
    small = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(60, 1)).to(DEVICE)
    for energy, shape in ((small, (1, 3, 5)), CASES["odd"]):
        x = torch.zeros(2, *shape, device=DEVICE)
        score = FusedGradient(stack_of(energy, shape), 2, DEVICE, "fp32")
        score.step_(x, step_size=0.0, noise_std=1.0, **ADDRESS)
        want = fl.noise.normal(x.shape, dtype=torch.float64, **ADDRESS)
        torch.testing.assert_close(x.double().cpu(), want, rtol=0, atol=2e-6)


def test_chains_do_not_depend_on_their_batch() -> None:
    x = state("leaky_relu")
    whole, part = x.clone(), x[2:].clone()
    fused("leaky_relu").step_(whole, **OPTIONS | {"first_chain": 3})
    fused("leaky_relu", n=3).step_(part, **OPTIONS | {"first_chain": 5})
    # NumPy's products, when interpreted, round by where a row stands.
    atol = 1e-6 if DEVICE.type == "cpu" else 0
    torch.testing.assert_close(part, whole[2:], rtol=0, atol=atol)


def test_launches_that_begin_early_compute_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit. Only the wait for the launch before differs."""
    monkeypatch.setattr(conv_plan, "EARLY", True)
    score = FusedGradient(stack_of(*CASES["silu"]), 5, DEVICE, "fp32")
    early = DEVICE.type == "cpu" or conv_plan._can_begin_early(DEVICE)
    plans = [*score._forward, *score._backward, score._image]
    assert {plan.options.get("launch_pdl", False) for plan in plans} == {early}
    energies, grad = score(state("silu"), want_energies=True)
    want_energies, want = scored_silu(torch.contiguous_format)
    assert torch.equal(energies, want_energies)
    assert torch.equal(grad, want)


@pytest.mark.parametrize(
    ("capability", "hip", "early"),
    [
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((8, 9), None, False),
        ((9, 4), "7.0", False),
    ],
)
def test_only_cuda_devices_from_hopper_on_begin_early(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, early: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert conv_plan._can_begin_early(torch.device("cuda")) == early


# Refusals ----------------------------------------------------------------------------------------


def test_networks_that_cannot_be_fused_say_why() -> None:
    def reason(*layers: nn.Module, channels: int = 3, precision: str | None = "fp32") -> str | None:
        energy = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(1)).to(DEVICE)
        energy(torch.zeros(1, channels, 8, 8, device=DEVICE))
        return fused_gpu.refusal(stack_of(energy, (channels, 8, 8)), DEVICE, precision)

    conv = nn.Conv2d(3, 6, 3)
    assert reason(conv, nn.ReLU()) is None
    assert "its precisions are fp32" in str(reason(conv, nn.ReLU(), precision=None))
    assert "convolution 0: its activation is gelu" in str(reason(conv, nn.GELU()))
    grouped = nn.Conv2d(6, 6, 3, groups=2)
    assert "convolution 1: it has 2 groups" in str(reason(conv, nn.ReLU(), grouped, nn.ReLU()))
    assert "dilation" in str(reason(nn.Conv2d(3, 6, 3, 2, dilation=2), nn.ReLU()))
    assert "17 channels" in str(reason(nn.Conv2d(17, 6, 3), nn.ReLU(), channels=17))
    energy = nn.Sequential(conv, nn.GELU(), nn.Flatten(), nn.Linear(216, 1)).to(DEVICE)
    stack = stack_of(energy, (3, 8, 8))
    with pytest.raises(ValueError, match="gelu"):
        FusedGradient(stack, 1, DEVICE, "fp32")


def test_other_shapes_are_refused_and_the_plan_is_printed() -> None:
    score = fused("silu")
    with pytest.raises(ValueError, match=r"float32 \[5, 3, 8, 8\], got torch.float64"):
        score(state("silu").double())
    with pytest.raises(ValueError, match=r"got torch.float32 \[4, 3, 8, 8\]"):
        score(state("silu", 4))
    assert "4 launches" in score.plan()


# Machine code ------------------------------------------------------------------------------------


def compiled_for(arch: str, cache: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What compile_triton_conv.py says of every launch on an architecture."""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tests.kernels.compile_triton_conv", *options, arch]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {launch: results[arch] for launch, results in json.loads(done.stdout).items()}


def test_the_image_has_columns_enough_to_copy_4_bytes_of_weights_a_thread() -> None:
    def columns(channels: int, width: int, precision: str) -> int:
        conv = nn.Conv2d(channels, width, 3, padding=1)
        sizes = (channels, 8, 8), (width, 8, 8)
        return conv_plan.image_plan(conv, *sizes, 4, precision).constants["BN"]

    assert columns(3, 32, "fp16") == columns(1, 32, "bf16") == 8
    assert columns(3, 64, "fp16") == columns(1, 64, "fp16") == 4
    assert columns(3, 16, "fp16") == 4  # 16 would be needed, and draw four times as much noise
    assert columns(16, 32, "fp16") == 16
    for precision in ("tf32", "fp32"):  # any element has 4 bytes
        assert columns(3, 32, precision) == 4


@pytest.mark.slow
def test_compiled_kernels_use_matrix_instructions_spill_nothing_and_fuse_nothing(
    tmp_path: Path,
) -> None:
    """Of every launch for sm_90.

    The image's has four columns, too few for that architecture's instructions, or eight, for which
    Triton 3.6 does not take them and 3.9 does. Its weights, whose tile is small, are copied
    asynchronously too: it loads no single half. Nothing is fused, so a step is the same, bit for
    bit, in whichever launch it is.
    """
    kinds = {"fp16": "F32", "tf32": "F32.TF32"}
    for launch, result in compiled_for("90", tmp_path, "--all").items():
        assert result["local"] == 0, launch
        assert result["registers"] <= 255, launch
        assert result["fused"] == 0, launch
        instructions = {"HGMMA"}
        if launch.endswith("backward 0"):
            instructions = {"HMMA", "HGMMA"} if "narrow" in launch else {"HMMA"}
            assert not any(load.endswith("16") for load in result["loads"]), launch
        (found,) = result["matrix"]
        assert found.split(".")[0] in instructions, launch
        assert found.endswith(kinds[launch.split()[0]]), launch
        assert not {"PREEXIT", "ACQBULK"} & set(result["order"]), launch


@pytest.mark.slow
def test_compiled_kernels_that_begin_early_wait_before_they_read(tmp_path: Path) -> None:
    results = compiled_for("90", tmp_path, "--early")
    assert len(results) == 9
    for launch, result in results.items():
        assert result["order"][:2] == ["PREEXIT", "ACQBULK"], launch
        assert result["local"] == 0, launch
