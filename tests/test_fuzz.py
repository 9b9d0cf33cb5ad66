"""Native steps of any shape, layout, dtype and option, equal to the reference's."""

import pytest
import torch
from conftest import choose, instruction_sets
from torch import Tensor

from fastlangevin import noise
from fastlangevin.kernels import extension, native, reference
from fastlangevin.step import apply_step_

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    extension.library is None, reason=f"native kernels: {native.available(torch.device('cpu'))}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def tensors(draw, shape, seed, dtypes=DTYPES):
    """A tensor of some dtype in some layout: dimensions permuted, padded or at an offset."""
    order = draw(st.permutations(range(len(shape))))
    pads = [draw(st.integers(0, 1)) for _ in shape]
    offset = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(dtypes))
    sizes = [shape[d] + pads[d] for d in order]
    storage = torch.empty(offset + torch.Size(sizes).numel(), dtype=dtype)
    view = storage[offset:].view(sizes).permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(0, size) for size in shape)]
    return view.copy_(randn(*shape, seed=seed))


@st.composite
def steps(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    if draw(st.booleans()):
        shape = (*shape[:2], draw(st.sampled_from([61, 256, 2050])))
    x = draw(tensors(shape, 0))
    grad = draw(st.none() | tensors(shape, 1))
    z = draw(st.none() | tensors(shape, 2))

    def coefficient(seed):
        per_chain = randn(shape[0], seed=seed).abs()
        return draw(st.sampled_from([0.0, 0.37, per_chain, per_chain.double(), per_chain[0]]))

    options = {
        "step_size": coefficient(3),
        "noise_std": coefficient(4),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "step": draw(st.integers(0, 2**32 - 1)),
        "first_chain": draw(st.integers(0, 2**32 - shape[0])),
        "clamp": draw(st.sampled_from([None, (-0.5, 1.0)])),
        "grad_clip": draw(st.sampled_from([None, 0.6, ("chain_norm", 2.0), ("batch_norm", 5.0)])),
        "maximize": draw(st.booleans()),
        "noise_last": draw(st.booleans()),
        "joined": draw(st.booleans()),
    }
    outputs = {
        "out": draw(st.none() | tensors(shape, 5, [x.dtype])),
        "cast": draw(st.none() | tensors(shape, 6)),
    }
    return x, grad, z, options, outputs


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(steps(), st.sampled_from(instruction_sets() or ["none"]))
def test_any_step_is_the_reference(case, name):
    x, grad, z, options, outputs = case
    drawn = z is None and not reference.is_zero(options["noise_std"])
    before, expected, independent = x.clone(), x.clone(), x.clone()
    apply_step_(reference.step_, expected, grad, z, **options)
    address = (x.shape, options["seed"], options["step"])
    by_torch = noise.normal_ref(*address, first_chain=options["first_chain"]) if drawn else z
    apply_step_(reference.step_, independent, grad, by_torch, **options)
    best = extension.library.instruction_set()
    choose(name)
    got = apply_step_(native.step_, x, grad, z, **options, **outputs)
    choose(best)
    out, cast = outputs["out"], outputs["cast"]
    assert got is (x if out is None else out)
    assert out is None or torch.equal(x, before)
    assert cast is None or torch.equal(cast, expected.to(cast.dtype))
    assert torch.equal(got, expected)
    # Normals may differ by 4e-6, times b; then one rounding to x's dtype.
    b = float(torch.as_tensor(options["noise_std"]).max())
    spacing = torch.finfo(x.dtype).eps * float(independent.abs().max())
    torch.testing.assert_close(
        got.float(), independent.float(), rtol=0, atol=4e-6 * max(b, 1) + spacing
    )
