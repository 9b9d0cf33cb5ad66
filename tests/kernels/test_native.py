"""The native kernels against the reference: numbers, steps, invariances, layouts, errors."""

import importlib.util
import itertools
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlangevin import noise
from fastlangevin.kernels import extension, native, reference
from fastlangevin.step import choose_backend
from tests.backends import choose, instruction_sets

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    extension.library is None, reason=f"native kernels: {native.available(CPU)}"
)

# An empty batch, less than a block, a block, one more, a prime-ish length, either side of two tiles
# of the CPU kernels, and more than one thread's share.
SIZES = [0, 1, 3, 4, 5, 1023, 4096, 4097, 100_000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADDRESS = {"seed": 2**64 - 3, "step": 7, "first_chain": 5}
OPTIONS = {**ADDRESS, "step_size": 0.3, "noise_std": 0.05, "clamp": (-1.0, 1.0)}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_package_was_built_with_its_extension_where_ci_demands_it():
    # A broken build would otherwise skip this whole file.
    assert choose_backend("auto", CPU) == "native"


def test_uniforms_are_the_words(instruction_set):
    address = {**ADDRESS, "stream": noise.USER}
    for elements in SIZES:
        u = noise.uniform((3, elements), **address)
        words = noise.words((3, elements), **address)
        assert torch.equal(u, (words >> 8).float() * 2.0**-24)


def test_normals_are_those_of_float64(instruction_set):
    for elements in SIZES:
        z = noise.normal((3, elements), **ADDRESS)
        exact = noise.normal((3, elements), dtype=torch.float64, **ADDRESS)
        torch.testing.assert_close(z.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 100_003), (4000, 2), (64, 3, 32, 32)])
def test_instruction_sets_give_the_same_bits(shape):
    best = extension.library.instruction_set()
    results = []
    for name in instruction_sets():
        assert choose(name)
        z = noise.normal(shape, **ADDRESS)
        x = native.step_(randn(*shape), randn(*shape, seed=1), None, grad_clip=0.7, **OPTIONS)
        results.append((z, x))
    choose(best)
    for z, x in results:
        assert torch.equal(z, results[0][0])
        assert torch.equal(x, results[0][1])


@pytest.mark.parametrize(
    ("elements", "clamp"), [(n, (None, (-1.0, 1.0))[i % 2]) for i, n in enumerate(SIZES)]
)
def test_a_step_is_as_exact_as_eager(instruction_set, elements, clamp):
    x, grad = randn(2, elements), randn(2, elements, seed=1)
    options = {**OPTIONS, "clamp": clamp}
    exact = reference.step(x.double(), grad.double(), None, **options)
    z = noise.normal_ref(x.shape, **ADDRESS)
    eager = x - 0.3 * grad + 0.05 * z
    eager = eager if clamp is None else eager.clamp(*clamp)
    error = (native.step_(x.clone(), grad, None, **options).double() - exact).abs()
    bound = (eager.double() - exact).abs()
    assert error.sum() <= 2 * bound.sum() + 1e-7
    assert torch.all(error <= 2 * bound.max() + 1e-7) if elements else True


def _zeros_beyond_32_bits(*shape: int) -> Tensor:
    needed = 1.25 * 2 * torch.Size(shape).numel()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free memory")
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.slow
def test_a_chain_longer_than_32_bits_count():
    elements = 2**31 + 5
    x = native.step_(_zeros_beyond_32_bits(1, elements), None, None, **OPTIONS)
    alone = native.step_(torch.zeros(1, 4099, dtype=torch.bfloat16), None, None, **OPTIONS)
    assert torch.equal(x[:, :4099], alone)
    for first in (0, 2**31 - 8, elements - 5):
        count = min(16, elements - first)
        alone = _normals_at(first, count)
        exact = (alone * 0.05).clamp(-1, 1).to(torch.bfloat16)
        assert torch.equal(x[0, first : first + count], exact)


@pytest.mark.slow
def test_more_elements_than_32_bits_count_in_many_chains():
    """Along a gradient alone: the test above draws noise, which takes most of its time."""
    rows = 2**20 + 3
    grad = randn(1, 2048, dtype=torch.bfloat16)
    x = _zeros_beyond_32_bits(rows, 2048)
    # One step of each chain, with sizes that tell neighbours apart.
    step_size = 0.1 + torch.arange(rows) % 7 / 7
    options = OPTIONS | {"noise_std": 0.0, "step_size": step_size}
    native.step_(x, grad.expand_as(x), None, **options)
    for first in (0, 2**20 - 2, rows - 2):
        alone = torch.zeros(2, 2048, dtype=torch.bfloat16)
        options["step_size"] = step_size[first : first + 2]
        native.step_(alone, grad.expand_as(alone), None, **options)
        assert torch.equal(x[first : first + 2], alone)


def _normals_at(first: int, count: int) -> Tensor:
    """Normals of elements first .. first + count - 1 (first a multiple of 4) from Philox alone."""
    assert first % 4 == 0
    block = torch.arange(first // 4, (first + count + 3) // 4)
    words = noise.philox((block, ADDRESS["first_chain"], ADDRESS["step"], 0), ADDRESS["seed"])
    u = [(w >> 8).double() * 2.0**-24 for w in words]
    pairs = []
    for radius, turn in ((u[0], u[1]), (u[2], u[3])):
        r = (-2 * torch.log(radius + 2.0**-24)).sqrt()
        pairs += [r * torch.cos(2 * torch.pi * turn), r * torch.sin(2 * torch.pi * turn)]
    return torch.stack(pairs, -1).flatten()[:count].float()


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (5000, 3), (1, 300_001)])
def test_threads_do_not_matter(threads, shape):
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(native.step_(randn(*shape), randn(*shape, seed=1), None, **OPTIONS))
        results[-1] = torch.stack([results[-1], noise.normal(shape, **ADDRESS)])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(7, 3, 5, 5), (7, 3, 32, 32), (9, 2), (6, 2049)])
def test_splits_offsets_and_repeats_do_not_matter(shape):
    x, grad = randn(*shape), randn(*shape, seed=1)
    whole = native.step_(x.clone(), grad, None, **OPTIONS)
    assert torch.equal(whole, native.step_(x.clone(), grad, None, **OPTIONS))
    parts = x.clone()
    for rows in (slice(0, 2), slice(2, None)):
        options = {**OPTIONS, "first_chain": ADDRESS["first_chain"] + rows.start}
        native.step_(parts[rows], grad[rows], None, **options)
    assert torch.equal(whole, parts)
    for offset in (1, 2, 3):
        moved = [torch.empty(x.numel() + 3)[offset:][: x.numel()].view(shape) for _ in range(2)]
        moved[0].copy_(x), moved[1].copy_(grad)
        assert torch.equal(whole, native.step_(moved[0], moved[1], None, **OPTIONS))


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 5, 7, 9), (2, 130, 9, 9), (2, 3, 4, 5, 6)])
def test_memory_formats_do_not_matter(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, grad = randn(*shape), randn(*shape, seed=1)
    plain = native.step_(x.clone(), grad, None, **OPTIONS)
    for of_x, of_grad in itertools.product((torch.contiguous_format, last), repeat=2):
        state = x.clone(memory_format=of_x)
        result = native.step_(state, grad.clone(memory_format=of_grad), None, **OPTIONS)
        assert result is state
        assert result.is_contiguous(memory_format=of_x)
        assert torch.equal(result, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_is_the_reference_bit_for_bit(instruction_set, dtype):
    x, grad, z = (randn(5, 3, 9, 7, seed=s, dtype=dtype) for s in range(3))
    for last, clip, up in itertools.product((False, True), (None, 0.5), (False, True)):
        options = {**OPTIONS, "noise_last": last, "grad_clip": clip, "maximize": up}
        expected = reference.step_(x.clone(), grad, z, **options)
        assert torch.equal(native.step_(x.clone(), grad, z, **options), expected)


def test_nan_stays(instruction_set):
    x, grad = torch.zeros(2, 33), torch.zeros(2, 33)
    x[0, 0] = grad[0, 20] = x[1, 32] = float("nan")
    options = {**OPTIONS, "grad_clip": 0.5}
    result = native.step_(x.clone(), grad, None, **options)
    assert torch.equal(torch.isnan(result), torch.isnan(x + grad))


@pytest.mark.parametrize("x", [randn(3, 7).double(), randn(2, 1, 1, 2, 1, 1, 3, 1, 2)])
def test_float64_and_nine_dimensions_take_the_reference(x):
    expected = reference.step(x, x, None, **OPTIONS)
    assert torch.equal(native.step_(x.clone(), x, None, **OPTIONS), expected)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (randn(2, 3), "only CUDA kernels read it, and x is on cpu"),
        (randn(2, 3).double(), "only CUDA kernels read it, and x is on cpu"),
    ],
    ids=str,
)
def test_a_seed_in_memory_is_not_ignored(x, match):
    rng_state = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"rng_state cannot be used: {match}"):
        native.step_(x, None, None, rng_state=rng_state, **OPTIONS)


def test_an_unknown_instruction_set_is_refused():
    assert not choose("avx1024")
    assert extension.library.instruction_set() in instruction_sets()


def test_tiles_and_amds_vectors_multiply_bfloat16_faster_than_float32():
    cpu = Path("/proc/cpuinfo")
    is_amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    best, faster = extension.library.instruction_set(), {}
    for name in (*instruction_sets(), "amx_emulated"):
        assert choose(name)
        faster[name] = extension.bfloat16_is_faster()
    choose(best)
    expected = {"amx": True, "amx_emulated": True, "avx512_bf16": is_amd}
    assert faster == {name: expected.get(name, False) for name in faster}


def test_a_missing_extension_says_so(monkeypatch):
    monkeypatch.setattr(extension, "library", None)
    assert "not built" in native.available(CPU)
    assert choose_backend("auto", CPU) != "native"
    with pytest.raises(RuntimeError, match='backend "native" cannot run on cpu: the extension'):
        choose_backend("native", CPU)
    assert noise.normal((2, 3), seed=0, step=0).shape == (2, 3)


@pytest.mark.parametrize("lacking", ["DTYPES", "fill_noise"])
def test_an_extension_that_is_out_of_date_says_so_at_import(monkeypatch, lacking):
    old = types.ModuleType("fastlangevin._native")
    old.__dict__.update(vars(extension.library), __file__="old.so")
    delattr(old, lacking)
    monkeypatch.setitem(sys.modules, old.__name__, old)
    spec = importlib.util.spec_from_file_location("again", extension.__file__)
    with pytest.raises(ImportError, match=rf"old.so is out of date, it has no {lacking}: reinst"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
