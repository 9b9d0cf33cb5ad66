"""The Triton kernels: on a GPU where there is one, else interpreted, and compiled ahead of time.

What every backend promises is in test_step.py, which runs this one too where it is interpreted;
here is what only these kernels do: their words, their tiles, their outputs and their machine code.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels import native, reference
from fastlangevin.kernels.philox import Address

compiler = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
from fastlangevin.kernels import triton_backend as triton  # noqa: E402
from fastlangevin.kernels.triton_step import _box_muller  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        triton.available(DEVICE) is not None, reason=f"triton: {triton.available(DEVICE)}"
    ),
    pytest.mark.usefixtures("real_tiles"),
]

ADDRESS = {"seed": 2**64 - 3, "step": 2**32 - 1, "first_chain": 2**31 - 2}
OPTIONS: dict[str, Any] = {"step_size": 0.3, "noise_std": 0.05, "clamp": (-0.9, 0.8), **ADDRESS}
# Around a block of four and a tile of 512; several tiles; many short chains in one tile.
SIZES = [(3, 0), (0, 5), (5, 1), (3, 5), (2, 1023), (1, 1537), (300, 2)]
# By channel: three in a tile of four, more than a tile's 16, pixels of more than one tile. The last
# has channels of 35 elements, which blocks straddle.
IMAGES = [(2, 3, 4, 4), (2, 17, 2, 4), (1, 3, 20, 20), (2, 3, 5, 7)]


def numbers(shape: tuple, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """A copy of x in the named layout."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last, copy=True)
    return x.clone(memory_format=torch.contiguous_format)


def normals(shape: tuple) -> Tensor:
    """Those of the kernel at ADDRESS."""
    z = triton.fill(shape, Address(stream=0, **ADDRESS), DEVICE, uniform=False)
    assert z is not None
    return z


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_triton_uniforms_equal_the_contracts_bit_for_bit(shape: tuple) -> None:
    """Uniforms are the words' upper 24 bits: equal bit for bit, so are the words."""
    got = triton.fill(shape, Address(stream=4, **ADDRESS), DEVICE, uniform=True)
    assert torch.equal(got.cpu(), fl.noise.uniform(shape, stream=4, **ADDRESS))


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_triton_normals_match_float64(shape: tuple) -> None:
    got = normals(shape).cpu()
    exact = fl.noise.normal(shape, dtype=torch.float64, **ADDRESS)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6)


@compiler.jit
def box_muller_kernel(z0, z1, START: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr):
    i = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    w_radius = (START + i * STRIDE).to(tl.uint32) << 8
    a, b = _box_muller(w_radius, w_radius * 0x9E3779B9)
    tl.store(z0 + i, a)
    tl.store(z1 + i, b)


@pytest.mark.parametrize(
    "starts", [(0, 15), pytest.param(range(16), marks=pytest.mark.slow)], ids=["ends", "all"]
)
def test_triton_normals_match_float64_for_every_word(starts: Sequence[int]) -> None:
    """All 2**24 radii, each with another of all 2**24 angles; or an eighth, with both ends."""
    count = 2**20
    words = count if DEVICE.type == "cpu" else 1024
    z0, z1 = torch.empty(2, count, device=DEVICE)
    for start in starts:
        box_muller_kernel[(count // words,)](z0, z1, start, 16, words, enable_fp_fusion=False)
        w = torch.arange(start, 2**24, 16, dtype=torch.float64)
        radius = (-2 * ((w + 1) * 2**-24).log()).sqrt()
        angle = 2 * math.pi * ((w.long() * 0x9E3779B9) % 2**24).double() * 2**-24
        for z, exact in ((z0, radius * angle.cos()), (z1, radius * angle.sin())):
            assert float((z.cpu() - exact).abs().max()) <= 2e-6


def test_triton_normals_equal_the_native_backends() -> None:
    """Bit for bit, on whatever device."""
    extension = pytest.importorskip("fastlangevin.kernels.extension", reason="no native kernels")
    cpu = torch.device("cpu")
    if extension.available(cpu) is not None:
        pytest.skip(f"native: {extension.available(cpu)}")
    got = normals((3, 1027))
    address = Address(stream=0, **ADDRESS)
    want = extension.fill((3, 1027), address, cpu, uniform=False)
    assert torch.equal(got.cpu(), want)


# Steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SIZES),
        ((2, 1023), torch.bfloat16),
        ((300, 2), torch.bfloat16),
        ((1, 1537), torch.float16),
    ],
    ids=str,
)
def test_steps_equal_the_reference_on_the_same_normals(shape: tuple, dtype: torch.dtype) -> None:
    x, grad = numbers(shape, dtype), numbers(shape, torch.float32, 1)
    z = normals(shape)
    want = reference.step_(x.clone(), grad, z, **OPTIONS)
    assert torch.equal(triton.step_(x.clone(), grad, None, **OPTIONS), want)
    assert torch.equal(triton.step_(x.clone(), grad, z, **OPTIONS), want)


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        (IMAGES[0], ("channels_last", "contiguous")),
        (IMAGES[1], ("channels_last", "channels_last")),
        (IMAGES[2], ("contiguous", "channels_last")),
        (IMAGES[3], ("channels_last", "contiguous")),
    ],
    ids=str,
)
def test_triton_steps_are_equal_in_both_memory_formats(
    shape: tuple, layouts: tuple[str, ...]
) -> None:
    """Of x and grad, bit for bit; noise is drawn in logical order in all of them."""
    x, grad = numbers(shape), numbers(shape, torch.bfloat16, 1)
    z = normals(shape)
    want = reference.step_(x.clone(), grad, z, **OPTIONS)
    state = in_layout(x, layouts[0])
    strides = state.stride()
    triton.step_(state, in_layout(grad, layouts[1]), None, **OPTIONS)
    assert torch.equal(state, want)
    assert state.stride() == strides


@compiler.jit
def _store(out, value):
    tl.store(out, value)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.0, 1.0), (-1.0, 0.0), (-1.0, -0.0)], ids=str)
def test_triton_clamps_give_the_native_backends_bits(bounds: tuple[float, float]) -> None:
    """Both zeros at bounds of both signs, and NaN with a payload; the step only clamps."""
    reason = native.available(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"native: {reason}")
    for bound in bounds:
        stored = torch.ones(1, device=DEVICE)
        _store[(1,)](stored, bound)
        if math.copysign(1.0, float(stored)) != math.copysign(1.0, bound):
            pytest.skip("the interpreter of Triton 3.6 drops the sign of an argument -0.0")
    zeros, infinities = [0x00000000, -(2**31)], [0x7F800000, -0x00800000]
    words = [*zeros, *infinities, 0x7FC00123, -0x00400000, 0x3F800000]
    x = torch.tensor([words], dtype=torch.int32).view(torch.float32)
    options = OPTIONS | {"noise_std": 0.0, "clamp": bounds}
    want = native.step_(x.clone(), None, None, **options)
    got = triton.step_(x.clone().to(DEVICE), None, None, **options)
    assert got.cpu().view(torch.int32).tolist() == want.view(torch.int32).tolist()


def test_seed_and_step_from_device_memory() -> None:
    """What a captured graph reads when it is replayed replaces the seed and adds to the step."""
    x = numbers((2, 1023))
    want = triton.step_(x.clone(), None, None, **OPTIONS | {"seed": 2**63 + 7, "step": 12})
    state = torch.tensor([2**63 + 7 - 2**64, 2], device=DEVICE)
    got = triton.step_(x.clone(), None, None, **OPTIONS | {"seed": 1, "step": 10}, rng_state=state)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "state", "error", "match"),
    [
        (numbers((2, 3)).double(), [0, 0], ValueError, "cannot be used: a float64 x falls back"),
        (numbers((2, 3)), [0.0, 0.0], TypeError, "must be an int64 tensor, got torch.float32"),
        (numbers((2, 3)), [0], ValueError, r"must be contiguous and of shape \[2\], got \[1\]"),
    ],
)
def test_an_rng_state_that_would_not_be_read_is_refused(
    x: Tensor, state: list, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"langevin_step_: rng_state {match}"):
        triton.step_(x, None, None, **OPTIONS, rng_state=torch.tensor(state, device=DEVICE))


def test_triton_steps_are_equal_in_every_batch_split() -> None:
    x, grad = numbers((300, 6)), numbers((300, 6), seed=1)
    options = OPTIONS | {"first_chain": 5, "step_size": numbers((300,)).abs()}
    whole = triton.step_(x.clone(), grad, None, **options)
    for i, j in ((0, 1), (1, 129), (129, 300)):
        part = options | {"first_chain": 5 + i, "step_size": options["step_size"][i:j]}
        assert torch.equal(triton.step_(x[i:j].clone(), grad[i:j], None, **part), whole[i:j])


def test_triton_grids_use_a_third_axis_for_long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of more tiles than a grid's second axis has places for."""
    x, grad = numbers((2, 1537)), numbers((2, 1537), seed=1)
    want = triton.step_(x.clone(), grad, None, **OPTIONS)
    monkeypatch.setattr(triton, "_MAX_GRID", 2)
    assert torch.equal(triton.step_(x, grad, None, **OPTIONS), want)


def test_rows_more_than_two_to_the_31_apart() -> None:
    """Offsets are 64-bit: 4 GiB of addresses, of which two rows are touched."""
    apart = 2**31 + 8
    x = torch.empty(apart + 8, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 5), (apart, 1))
    x.copy_(numbers((2, 5)))
    want = triton.step_(x.contiguous(), None, None, **OPTIONS)
    assert torch.equal(triton.step_(x, None, None, **OPTIONS), want)


# Machine code ------------------------------------------------------------------------------------

ARCHITECTURES = ["80", "90", "100"]
VECTORS = {  # contiguous float32 and bfloat16 tensors: 16 bytes a load; bfloat16 beside float32: 8
    "fp32": {"v4.b32"},
    "bf16": {"v4.b32"},
    "fp32, bf16 grad": {"v2.b32", "v4.b32"},
    "no noise": {"v4.b32"},
    "noise alone": {"v4.b32"},
}


def compiled(cache: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What compile_triton.py says of every launch on every architecture."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(script), *ARCHITECTURES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_compiled_kernels_spill_nothing_fuse_nothing_and_access_16_bytes(
    tmp_path: Path,
) -> None:
    """At most 64 registers: 1,024 threads of 2,048 still fit. Fused roundings would differ."""
    launches = compiled(tmp_path)
    for launch, results in launches.items():
        assert list(results) == ARCHITECTURES, launch
        for arch, result in results.items():
            assert result["local"] == 0, (launch, arch)
            assert result["registers"] <= 64, (launch, arch)
            assert result["fused"] == 0, (launch, arch)
            # Their -0 and NaN would differ from the CPU's, which compares and selects.
            assert result["bounds"] == [], (launch, arch)
    for launch, loads in VECTORS.items():
        for arch, result in launches[launch].items():
            assert set(result["loads"]) == loads, (launch, arch)
            assert result["stores"] == ["v4.b32"], (launch, arch)
