"""16-bit convolutions on a CPU: where torch's own are not to be trusted, and what is done there."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastlangevin.gradients import conv_layers, layers, onednn
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.graph.ir import Graph
from fastlangevin.gradients.graph.record import recognise, record
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.rewrite import rewrite
from fastlangevin.gradients.trace.split import Draft

CPU = torch.device("cpu")


def recorded(conv: nn.Conv2d, x: Tensor) -> Graph:
    energy = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(1))
    energy(x)
    graph = recognise(energy, x)
    assert isinstance(graph, Graph), graph
    return graph


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX, on which oneDNN runs every dtype."""
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "runs", lambda dtype: True)


@pytest.mark.parametrize(
    ("size", "options", "wrong"),
    [
        ((10, 1), {"kernel_size": 3, "stride": 2, "padding": 1}, True),
        ((10, 1), {"kernel_size": 3, "stride": (1, 2), "padding": 1}, True),
        ((10, 1), {"kernel_size": 3, "stride": (2, 1), "padding": 1}, False),
        ((1, 10), {"kernel_size": 3, "stride": 2, "padding": 1}, False),
        ((10, 3), {"kernel_size": 3, "stride": 2, "padding": 1}, False),
        ((10, 2), {"kernel_size": 1, "stride": 2}, True),
        ((10, 10), {"kernel_size": 1, "stride": 2}, False),
        ((10, 10), {"kernel_size": 1, "stride": 2, "padding": 1}, True),
        ((10, 10), {"kernel_size": 2, "stride": 3}, True),
        ((10, 10), {"kernel_size": (2, 3), "stride": (3, 1)}, True),
        ((10, 10), {"kernel_size": 4, "stride": 2, "padding": 1}, False),
    ],
)
def test_shapes_that_amx_computes_wrongly_run_in_float32(size, options, wrong, amx):
    node = recorded(nn.Conv2d(5, 3, **options), torch.zeros(2, 5, *size)).nodes[0]
    assert onednn.is_wrong_with_amx(node) == wrong
    want = torch.float32 if wrong else torch.bfloat16
    assert onednn.product_dtype(node, torch.bfloat16, CPU) == want
    assert onednn.product_dtype(node, torch.float32, CPU) == torch.float32
    assert onednn.product_dtype(node, torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_float32_replaces_16_bits_only_on_cpus_with_amx(monkeypatch):
    conv = nn.Conv2d(31, 3, 3, 2, 1)
    node = recorded(conv, torch.zeros(2, 31, 10, 1)).nodes[0]
    monkeypatch.setattr(onednn, "runs", lambda dtype: True)
    monkeypatch.setattr(onednn, "has_amx", lambda: False)
    assert onednn.product_dtype(node, torch.bfloat16, CPU) == torch.bfloat16


def test_a_convolution_that_amx_computes_wrongly_is_right(amx, monkeypatch):
    """oneDNN's fault by proxy: NaN for every 16-bit convolution of the faulty shapes."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride, *rest) -> Tensor:
        out = torch.ops.aten.convolution(x, weight, bias, stride, *rest)
        transposed = rest[2]
        faulty = not transposed and out.shape[3] == 1 and stride[1] > 1
        return out * float("nan") if faulty and x.dtype == torch.bfloat16 else out

    monkeypatch.setattr("fastlangevin.gradients.explicit.packs", lambda *_: False)
    torch.manual_seed(0)
    x = torch.randn(9, 31, 10, 1)
    graph = recorded(nn.Conv2d(31, 3, 3, 2, 1), x)
    want = ExplicitGradient(graph, x, "fp32")(x, True)
    names = ("tanh", "tanh_", "tanh_backward")
    others = {name: getattr(torch.ops.aten, name) for name in names}
    monkeypatch.setattr(layers, "aten", SimpleNamespace(convolution=convolution, **others))
    for got, exact in zip(ExplicitGradient(graph, x, "bf16")(x, True), want, strict=True):
        assert got is not None
        assert exact is not None
        assert (got - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_without_onednn_sums_are_still_float32(dtype, inplace):
    """Ones of a 16-bit dtype: 4,096 of them sum to 256 where sums are bfloat16."""
    conv = nn.Conv2d(64, 64, 8, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.ones(2, 64, 9, 9)
    node = recorded(conv, x).nodes[0]
    with torch.backends.mkldnn.flags(enabled=False):
        layer = conv_layers.Conv(node, (64, 9, 9), dtype, inplace)
        layer.pack()
        layer.pack()
        out = layer.forward(layers.laid_out(x.to(dtype)))
        back = layer.backward(layers.laid_out(torch.ones(2, 64, 2, 2, dtype=dtype)))
    assert out.dtype == back.dtype == dtype
    assert torch.equal(out, torch.full_like(out, 4096))
    windows = torch.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 8, 8))
    assert torch.equal(back, (64 * windows).to(dtype).expand_as(back))


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_are_rounded_to_16_bits_before_they_are_widened(inplace):
    conv = nn.Conv2d(1, 1, 1)
    node = recorded(conv, torch.zeros(2, 1, 3, 3)).nodes[0]
    with torch.backends.mkldnn.flags(enabled=False):
        layer = conv_layers.Conv(node, (1, 3, 3), torch.bfloat16, inplace)
    for value in (1.001, 1.003):
        for parameter in conv.parameters():
            nn.init.constant_(parameter, value)
        layer.pack()
        for parameter, read in zip(conv.parameters(), (layer.weight, layer.bias), strict=True):
            assert read is not None
            assert read.dtype == torch.float32
            assert torch.equal(read, parameter.bfloat16().float())


def test_products_in_16_bits_are_kept_where_all_is_well(amx):
    """Every plain geometry stays as it is: what goes round oneDNN costs time."""
    for kernel, stride in itertools.product((1, 3, 4), (1, 2)):
        if stride <= kernel:
            x = torch.zeros(2, 4, 8, 8)
            node = recorded(nn.Conv2d(4, 4, kernel, stride, kernel // 2), x).nodes[0]
            assert onednn.product_dtype(node, torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "skipped"),
    [
        ((4, 1), (1, 2), (1, 1), True),
        ((1, 4), (2, 2), (4, 2), True),
        ((1, 1), (2, 2), (0, 0), False),  # the shortcut of a residual block
        ((1, 1), (2, 2), (1, 1), True),
        ((3, 3), (2, 2), (1, 1), False),
    ],
)
def test_convolutions_that_skip_pixels_are_not_packed(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], skipped: bool
) -> None:
    """With packed weights, oneDNN writes past the end of a buffer for them."""
    assert onednn.skips(kernel, stride, padding) == skipped
    energy = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, kernel, stride, padding),
        nn.Flatten(1), nn.LogSoftmax(1),
    )  # fmt: skip
    x = torch.randn(2, 3, 5, 5)
    trace = record(lambda x: energy(x).square().sum(1), x)[0].trace
    assert isinstance(trace, Trace)
    draft = Draft(trace, (trace.grad,))
    rewrite(draft)
    packs = [i for i in draft.added if "reorder" in str(i.op)]
    if onednn.runs(torch.float32):
        assert len(packs) == (2 if skipped else 4)  # of each convolution, forward and back
