"""Convolutions by minimal filtering in the fused CPU engine, against autograd in float64."""

import pytest
import torch
from torch import nn

from fastlangevin.kernels import extension
from tests.backends import needs_native
from tests.gradients.fused_shared import check, fused, numbers

pytestmark = needs_native
FP32 = {"fp32": 1e-6}
WIDTH = 33  # a last block of one vector, and a last vector of one channel

# Convolution, height and width of its input.
GEOMETRIES = {
    "3x3": (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), 8, 6),
    "3x3 on odd sizes": (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), 9, 7),
    "3x3 without padding": (nn.Conv2d(WIDTH, WIDTH, 3), 9, 8),
    "3x3 with much padding": (nn.Conv2d(WIDTH, WIDTH, 3, padding=3), 7, 6),
    "4x4 of stride 2": (nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1), 12, 8),
    "4x4 of stride 2 on odd sizes": (nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1), 15, 9),
    "4x4 of stride 2 without padding": (nn.Conv2d(WIDTH, WIDTH, 4, stride=2), 13, 14),
    "2x2": (nn.Conv2d(WIDTH, WIDTH, 2), 9, 8),
    "6x6 of stride 2": (nn.Conv2d(WIDTH, WIDTH, 6, stride=2, padding=2), 12, 11),
    "9x9 of stride 3": (nn.Conv2d(WIDTH, WIDTH, 9, stride=3, padding=4), 12, 12),
    "one row": (nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1)), 4, 16),
    "one column, stride along the other axis": (
        nn.Conv2d(WIDTH, WIDTH, (3, 2), stride=(1, 2), padding=(1, 0)), 16, 8
    ),
    "taps of two lengths": (nn.Conv2d(WIDTH, WIDTH, (4, 3), stride=(2, 1), padding=1), 16, 8),
}  # fmt: skip


def energy(conv: nn.Conv2d, height: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.SiLU(), conv, nn.SiLU(), nn.Flatten())
    conv.reset_parameters()
    features = body(torch.zeros(1, 3, height, width)).shape[1]
    head = nn.Linear(features, 1)
    with torch.no_grad():
        head.weight.abs_()  # no energy near zero, whose relative error would say little
    return nn.Sequential(body, head)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tiles_give_the_gradient_for_every_geometry(geometry, instruction_set):
    if extension.has_matrix_unit():
        pytest.skip("a matrix unit may compute float32 products instead")
    conv, height, width = GEOMETRIES[geometry]
    module, x = energy(conv, height, width), numbers((5, 3, height, width))
    assert fused(module, x).net.tiled_passes > 0
    check(module, x, FP32)


def test_in_bfloat16_convolutions_multiply_directly():
    module, x = energy(*GEOMETRIES["3x3"]), numbers((2, 3, 8, 6))
    assert fused(module, x, "bf16").net.tiled_passes == 0


def test_dilated_and_narrow_convolutions_multiply_directly():
    dilated = energy(nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2), 8, 8)
    narrow = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(4 * 6 * 6, 1),
    )  # fmt: skip
    for module in (dilated, narrow):
        x = numbers((2, 3, 8, 8))
        assert fused(module, x).net.tiled_passes == 0
        check(module, x, FP32)


def test_a_state_that_one_convolution_reads_is_multiplied_directly():
    module = nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(WIDTH * 64, 1)
    )
    x = numbers((3, WIDTH, 8, 8))
    assert fused(module, x).net.tiled_passes == 0
    check(module, x, FP32)


def test_a_chain_that_is_not_finite_leaves_the_others_as_they_are():
    module, x = energy(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), 8, 8), numbers((4, 3, 8, 8))
    engine = fused(module, x)
    _, expected = engine(x, False)
    x[1, 0, 2, 3] = torch.nan
    x[2, 1, 7, 7] = torch.inf
    _, grad = engine(x, False)
    assert torch.equal(grad[0], expected[0])
    assert torch.equal(grad[3], expected[3])
    assert not grad[1].isfinite().all()
