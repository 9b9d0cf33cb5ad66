"""A step is the same bits in every memory layout, batch split and thread count."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.core.step_shared import DTYPES, numbers


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers [n, c, h, w] in other memory."""
    misaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    wider = torch.empty(*x.shape[:3], x.shape[3] + 3, dtype=x.dtype)[..., 1:-2].copy_(x)
    rows = torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)
    return {
        "channels_last": x.to(memory_format=torch.channels_last, copy=True),
        "misaligned": misaligned,
        "sliced": wider,
        "every other row": rows,
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "reversed dims": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


LAYOUTS = ["contiguous", *layouts(torch.zeros(2, 3, 5, 7))]
# Every layout is that of a gradient whose state is contiguous, and that of a state whose gradient
# has another layout.
PAIRS = dict.fromkeys(
    pair
    for one, other in zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)
    for pair in (("contiguous", one), (one, other))
)


@pytest.mark.parametrize(
    ("layout", "grad_layout", "dtype"),
    [(*pair, dtype) for pair, dtype in zip(PAIRS, itertools.cycle(DTYPES), strict=False)],
    ids=str,
)
def test_a_step_is_the_same_bits_in_every_memory_layout(
    step_: Callable[..., Tensor], layout: str, grad_layout: str, dtype: torch.dtype
) -> None:
    x, grad = numbers((4, 3, 5, 7), dtype), numbers((4, 3, 5, 7), dtype, 1)
    options = {"clamp": (-0.9, 0.8), "grad_clip": 0.9}
    want = step_(x.clone(), grad, **options)
    state = x if layout == "contiguous" else layouts(x)[layout]
    gradient = grad if grad_layout == "contiguous" else layouts(grad)[grad_layout]
    strides = state.stride()
    assert torch.equal(step_(state, gradient, **options), want)
    assert state.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS[1::2])
def test_memory_layouts_of_supplied_noise(step_: Callable[..., Tensor], layout: str) -> None:
    x, grad, z = (numbers((4, 3, 5, 7), seed=seed) for seed in range(3))
    want = step_(x.clone(), grad, noise=z)
    assert torch.equal(step_(x.clone(), grad, noise=layouts(z)[layout]), want)


def test_a_slice_is_written_and_nothing_beside_it(step_: Callable[..., Tensor]) -> None:
    around = numbers((4, 3, 5, 11))
    inside, before = around[1:3, :, :, 2:9], around.clone()
    want = step_(inside.clone(), None)
    step_(inside, None)
    assert torch.equal(inside, want)
    around[1:3, :, :, 2:9] = before[1:3, :, :, 2:9]
    assert torch.equal(around, before)


@pytest.mark.parametrize(
    ("elements", "clip", "dtype"),
    [
        (1023, None, torch.float32),
        (1024, 0.4, torch.bfloat16),
        (1, ("chain_norm", 5.0), torch.float16),
        (1023, ("chain_norm", 5.0), torch.float64),
    ],
    ids=str,
)
def test_a_step_is_the_same_bits_in_every_batch_split(
    step_: Callable[..., Tensor], elements: int, clip: Any, dtype: torch.dtype
) -> None:
    x, grad = numbers((16, elements), dtype), numbers((16, elements), dtype, 1)
    parts = [
        step_(x[i:j].clone(), grad[i:j], first_chain=100 + i, grad_clip=clip)
        for i, j in ((0, 1), (1, 6), (6, 16))
    ]
    assert torch.equal(step_(x, grad, first_chain=100, grad_clip=clip), torch.cat(parts))


@pytest.mark.parametrize("shape", [(8, 20_001), (1, 100_003)])
def test_a_step_is_the_same_bits_for_every_thread_count(
    step_: Callable[..., Tensor], place: tuple[str, torch.device], shape: tuple
) -> None:
    backend, device = place
    if backend == "triton" or device.type != "cpu":
        pytest.skip(f"backend {backend} on {device.type}: does not use torch's threads")
    x, grad = numbers(shape), numbers(shape, seed=1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(step_(x.clone(), grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_repeated_steps_are_equal_and_other_addresses_differ(step_: Callable[..., Tensor]) -> None:
    """The same address gives the same bits; any other gives other numbers everywhere."""
    x, grad = numbers((3, 1023)), numbers((3, 1023), seed=1)
    first = step_(x.clone(), grad)
    assert torch.equal(step_(x.clone(), grad), first)
    for other in ({"seed": 4}, {"seed": 3 + 2**32}, {"step": 6}, {"first_chain": 3}):
        assert (step_(x.clone(), grad, **other) == first).float().mean() < 0.01


@pytest.mark.parametrize("kind", [np.int64, np.uint32])
def test_numpy_integers_are_integers(step_: Callable[..., Tensor], kind: type) -> None:
    address = {"seed": 40, "step": 50, "first_chain": 60}
    want = step_(torch.zeros(3, 5), None, **address)
    got = step_(torch.zeros(3, 5), None, **{name: kind(value) for name, value in address.items()})
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["grad", "noise"])
def test_memory_shared_with_x(step_: Callable[..., Tensor], name: str) -> None:
    """An operand may be x itself or lie beside it; x must not overwrite one before it is read."""
    memory = numbers((8, 4))
    x = memory[:4]
    before = memory.clone()
    given = {"grad": memory[4:], name: x.T} | ({"noise": memory[4:]} if name == "grad" else {})
    with pytest.raises(ValueError, match=f"{name} shares memory with x in another layout"):
        step_(x, **given)
    with pytest.raises(ValueError, match=f"{name} shares memory with x in another layout"):
        step_(x, **given | {name: memory[1:5]})
    assert torch.equal(memory, before)
    step_(x, memory[4:], noise_std=0.0)
    assert torch.equal(memory[4:], before[4:])
    alone = step_(before[:4].clone(), before[:4].clone(), noise_std=0.0)
    assert torch.equal(step_(y := before[:4].clone(), y, noise_std=0.0), alone)


@pytest.mark.parametrize("name", ["step_size", "noise_std"])
def test_coefficients_that_share_memory_with_x(step_: Callable[..., Tensor], name: str) -> None:
    """Read row by row while x is written: a row's value could be a state."""
    memory = numbers((4, 4)).abs()
    x, before = memory[:, :3], memory.clone()
    for shared in (memory[:, 0], memory[1, :], memory[2, 2]):
        with pytest.raises(ValueError, match=f"langevin_step_: {name} shares memory with x"):
            step_(x, None, **{name: shared})
    assert torch.equal(memory, before)
    want = step_(before[:, :3].clone(), None, **{name: before[:, 3].clone()})
    assert torch.equal(step_(x, None, **{name: memory[:, 3]}), want)


def test_strides_that_interleave_without_sharing(step_: Callable[..., Tensor]) -> None:
    """Offsets 0, 2, 4 and 3, 5, 7: neither dimension steps over the other."""
    x = numbers((8,)).as_strided((3, 2), (2, 3))
    want = step_(x.clone(), None)
    assert torch.equal(step_(x, None), want)


def test_views_that_share_a_storage_but_no_element(step_: Callable[..., Tensor]) -> None:
    memory = numbers((6, 2, 3, 4))
    x, grad = memory.clone()[:, 0], memory[:, 1]
    want = step_(x.clone(), grad.clone())
    assert torch.equal(step_(memory[:, 0], memory[:, 1]), want)


def test_a_gradient_whose_sign_is_noted_and_not_written(step_: Callable[..., Tensor]) -> None:
    grad = torch.complex(numbers((3, 4)), numbers((3, 4), seed=1)).conj().imag
    assert grad.is_neg()
    x = numbers((3, 4), seed=2)
    assert torch.equal(step_(x.clone(), grad), step_(x.clone(), grad.clone().resolve_neg()))
