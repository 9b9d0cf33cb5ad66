"""Forward convolutions in Triton, and the functions that the backward kernels share with them.

Every convolution is an implicit matrix product. A row is a pixel of the result, a column is one of
its channels, and the sum runs over the taps and channels of the source: [BM, BK] values gathered
from the source, times [BK, BN] weights, accumulated in float32. Images are stored as
[chain, y, x, channel] and weights as [column, tap, channel], so that both tiles are read along
their contiguous axis.

If BK does not divide the channels of the source, the sum runs over (tap, channel) pairs (FLAT). The
27 pairs of an image are then padded to 32; padding its channels to the 16 of a matrix instruction
would make them 144.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def operand(value, dtype: tl.constexpr, TF32: tl.constexpr):
    """Float32 in the form that matrix instructions read; TF32 is rounded, since they truncate."""
    if TF32:  # ties away from zero; NaN stays as it is, since adding to its bits could change it
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _length(number):
    """The number of passes of a loop."""
    return number


def _interpreted_length(number):
    """For Triton 3.6, which interprets a number as an array [1]: NumPy 2.4 makes no int of it."""
    return number.handle.data.item() if isinstance(number, tl.tensor) else number


length = _length if isinstance(_length, triton.JITFunction) else _interpreted_length


@triton.jit
def _begin(EARLY: tl.constexpr):
    """With EARLY, let the next launch begin, and wait for the results of the one before.

    This is a kernel's first statement: after the computation of addresses, the first layer's kernel
    needs 162 registers for sm_90 instead of 103.
    """
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def _begin_late(EARLY: tl.constexpr):
    """Do nothing: Triton before 3.3 has no such instructions, and looks their names up even so."""


def _interpreted_begin(EARLY):
    """Interpreted launches run one after the other."""


can_begin_early = hasattr(cuda, "gdc_wait")
_compiled_begin = _begin if can_begin_early else _begin_late
begin = _compiled_begin if isinstance(_begin, triton.JITFunction) else _interpreted_begin


@triton.jit
def products(
    acc, source, weight, y, x, live, filled, taps_y, taps_x,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    Y_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    TAP_Y: tl.constexpr, TAP_X: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + source [BM, K] weight [K, BN], K = taps_y taps_x C padded to a multiple of BK.

    source [BM, 1] points to the chain of each row and weight [1, BN] to the first tap of each
    column. Tap (i, j) reads the pixel (y + i TAP_Y, x + j TAP_X), which is zero outside H x W.
    STATE means that the source is x, which is read as float32 and rounded to the weights' dtype.
    """
    inner = tl.arange(0, BK)
    for k in range(0, length(tl.cdiv(taps_y * taps_x * C, BK))):
        if FLAT:
            tap, c = ((k * BK + inner) // C)[None, :], (k * BK + inner) % C
            inside = live & (tap < taps_y * taps_x)
        else:  # BK divides C: one tap at a time
            tap, c = k // (C // BK), k % (C // BK) * BK + inner
            inside = live
        from_y, from_x = y + tap // taps_x * TAP_Y, x + tap % taps_x * TAP_X
        inside &= (from_y >= 0) & (from_y < H) & (from_x >= 0) & (from_x < W)
        at = from_y * Y_STRIDE + from_x * X_STRIDE + (c * C_STRIDE)[None, :]
        a = tl.load(source + at, mask=inside, other=0.0)
        if STATE:
            a = operand(a.to(tl.float32), weight.dtype.element_ty, PRECISION == "tf32")
        b = tl.load(weight + (k * BK + inner)[:, None], mask=filled, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr, p, q):
    """(value, derivative) of an activation with the parameters p and q."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-value))
        return value * s, s * (1.0 + value * (1.0 - s))
    elif ACTIVATION == "softplus":  # p is beta, and above the threshold q it is the identity
        scaled = value * p
        linear = scaled > q
        soft = tl.log(1.0 + tl.exp(scaled)) / p
        slope = 1.0 / (1.0 + tl.exp(-scaled))
        return tl.where(linear, value, soft), tl.where(linear, 1.0, slope)
    elif ACTIVATION == "elu":
        e = p * tl.exp(value)
        return tl.where(value > 0, value, e - p), tl.where(value > 0, 1.0, e)
    elif ACTIVATION == "relu":
        positive = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive, tl.where(value > 0, 1.0, 0.0)
    else:  # leaky_relu; as in torch, the slope at zero and at NaN is p
        slope = tl.where(value > 0, 1.0, p)
        return value * slope, slope


@triton.jit
def _packed(positive, BM: tl.constexpr, BN: tl.constexpr):
    """Signs [BM, BN] as words [BM, BN / 32], with the first channel in the lowest bit."""
    bits = tl.reshape(positive.to(tl.int32), [BM, BN // 32, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def forward_kernel(
    source, weight, bias, out, saved, head, energies, overflow, rows, source_chain, p, q,
    Y_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, STATE: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h = activation(conv(source) + bias) [rows, COLUMNS], and the values its derivative needs.

    saved receives int32 sign words [rows, COLUMNS / 32] if the activation is piecewise linear, and
    its derivative in out's dtype otherwise. With head = v [pixels, COLUMNS] this is the last
    layer, and the energy is <h, v>. Then out receives v times the derivative, which is the first
    gradient of the backward pass, nothing is saved, and energies [rows, tiles of columns], unless
    None, receives <h, v> over the tile's columns. overflow [1] is set if a value is NaN or too
    large for float16.
    """
    tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    begin(EARLY)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    live, filled = row < rows, column < COLUMNS
    chain, pixel = row // (OUT_H * OUT_W), row % (OUT_H * OUT_W)
    value = products(
        tl.zeros([BM, BN], tl.float32),
        source + chain.to(tl.int64) * source_chain, weight + column * K,
        pixel // OUT_W * STRIDE_Y - PAD_Y, pixel % OUT_W * STRIDE_X - PAD_X, live, filled,
        TAPS_Y, TAPS_X, H, W, C, Y_STRIDE, X_STRIDE, C_STRIDE, DILATION_Y, DILATION_X,
        STATE, PRECISION, FLAT, BK,
    )  # fmt: skip
    value += tl.load(bias + column, mask=filled, other=0.0)
    if overflow is not None:  # 65520 rounds to infinity
        overflows = tl.max((~(tl.abs(value) < 65520.0)).to(tl.int32), axis=1, keep_dims=True)
        tl.store(overflow + row * 0, overflows, mask=live & (overflows != 0))
    h, slope = _activate(value, ACTIVATION, p, q)
    at, mask = row.to(tl.int64) * COLUMNS + column, live & filled
    if head is None:
        tl.store(out + at, operand(h, out.dtype.element_ty, PRECISION == "tf32"), mask=mask)
        if ACTIVATION == "leaky_relu" or ACTIVATION == "relu":
            words: tl.constexpr = (COLUMNS + 31) // 32
            word = tl.program_id(0) % tiles * (BN // 32) + tl.arange(0, BN // 32)[None, :]
            signs_at = row.to(tl.int64) * words + word
            tl.store(saved + signs_at, _packed(value > 0, BM, BN), mask=live & (word < words))
        else:
            tl.store(saved + at, slope.to(saved.dtype.element_ty), mask=mask)
    else:
        v = tl.load(head + pixel * COLUMNS + column, mask=mask, other=0.0)
        g = operand(v * slope, out.dtype.element_ty, PRECISION == "tf32")
        tl.store(out + at, g, mask=mask)
        if energies is not None:
            energy = tl.sum(tl.where(mask, h * v, 0.0), axis=1, keep_dims=True)
            tile = row.to(tl.int64) * tiles + tl.program_id(0) % tiles
            tl.store(energies + tile, energy, mask=live)
