"""Input gradients of convolutions in Triton, and the Langevin step at the end of the last one.

The kernels gather, as the forward kernel in triton_conv does. Pixels of x whose coordinates have
the same remainders modulo the stride meet the same taps. Each such class of pixels is a dense
convolution with its own part of the taps: four of 2x2 instead of one of 4x4 at stride 2, without
products with inserted zeros.
"""

import triton
import triton.language as tl

from fastlangevin.kernels.triton_conv import begin, operand, products
from fastlangevin.kernels.triton_step import clamp, draw, update, word


@triton.jit
def _input_gradient(
    source, weight, row, column, rows, source_chain,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(gradient [BM, BN], chain, pixel, live) of the rows of one class; live says if a row exists.

    The class is program_id(1), and each class numbers its own rows. source is the gradient of the
    convolution's result, H x W x C; OUT_H x OUT_W is the size of the convolution's input.
    """
    class_h: tl.constexpr = (OUT_H + STRIDE_Y - 1) // STRIDE_Y
    class_w: tl.constexpr = (OUT_W + STRIDE_X - 1) // STRIDE_X
    rest_y, rest_x = tl.program_id(1) // STRIDE_X, tl.program_id(1) % STRIDE_X
    chain, pixel = row // (class_h * class_w), row % (class_h * class_w)
    y, x = pixel // class_w, pixel % class_w
    to_y, to_x = y * STRIDE_Y + rest_y, x * STRIDE_X + rest_x
    live = (row < rows) & (to_y < OUT_H) & (to_x < OUT_W)
    # to_y = (source's y) STRIDE_Y - PAD_Y + tap DILATION_Y; a stride never occurs with a dilation.
    tap_y, tap_x = (rest_y + PAD_Y) % STRIDE_Y, (rest_x + PAD_X) % STRIDE_X
    acc = products(
        tl.zeros([BM, BN], tl.float32),
        source + chain.to(tl.int64) * source_chain,
        weight + (tl.program_id(1) * COLUMNS + column) * K,
        y + (rest_y + PAD_Y) // STRIDE_Y, x + (rest_x + PAD_X) // STRIDE_X,
        live, column < COLUMNS,
        (TAPS_Y - tap_y + STRIDE_Y - 1) // STRIDE_Y, (TAPS_X - tap_x + STRIDE_X - 1) // STRIDE_X,
        H, W, C, W * C, C, 1, -DILATION_Y, -DILATION_X, False, PRECISION, FLAT, BK,
    )  # fmt: skip
    return acc, chain, to_y * OUT_W + to_x, live


@triton.jit
def _unpacked(words, BM: tl.constexpr, BN: tl.constexpr):
    """Words [BM, BN / 32] as signs [BM, BN]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [BM, BN]) != 0


@triton.jit
def backward_kernel(
    source, weight, saved, out, rows, source_chain, p, SIGNS: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [chain, pixel, COLUMNS] = input gradient times the derivative of the activation below.

    saved is what forward_kernel saved for that activation: with SIGNS the signs, which select the
    slope 1 or p, else derivatives. rows counts the rows of one class, and the classes are the
    grid's second axis.
    """
    tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    begin(EARLY)
    row = tl.program_id(0) // tiles * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    g, chain, pixel, live = _input_gradient(
        source, weight, row, column, rows, source_chain,
        H, W, C, OUT_H, OUT_W, COLUMNS, TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X,
        DILATION_Y, DILATION_X, K, PRECISION, FLAT, BM, BN, BK,
    )  # fmt: skip
    line = chain.to(tl.int64) * (OUT_H * OUT_W) + pixel
    at, mask = line * COLUMNS + column, live & (column < COLUMNS)
    if SIGNS:
        words: tl.constexpr = (COLUMNS + 31) // 32
        word = tl.program_id(0) % tiles * (BN // 32) + tl.arange(0, BN // 32)[None, :]
        signs = tl.load(saved + line * words + word, mask=live & (word < words), other=0)
        g = tl.where(_unpacked(signs, BM, BN), g, g * p)
    else:
        g *= tl.load(saved + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, operand(g, out.dtype.element_ty, PRECISION == "tf32"), mask=mask)


@triton.jit
def drawn(channel, chain, quad, number, stream, low, high, rng_state, QUADS: tl.constexpr):
    """The noise of step_kernel [channels, 4 quads], for quads of neighbouring pixels of chains."""
    if rng_state is not None:
        seed = tl.load(rng_state)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        number += tl.load(rng_state + 1).to(tl.uint32)
    block = (channel * QUADS + quad).to(tl.uint32)
    return draw(block, chain, number, stream, low, high, False)


@triton.jit
def finish(
    g, z, channel, chain, pixel, live, overflow, x, grad, noise, x_chain,
    step_size, noise_std, step_sizes, noise_stds, clip, lo, hi,
    PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, NOISE_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What image_kernel does with the gradient g [channels, pixels] and the noise z that it drew.

    z is None if it drew none; channel is [channels, 1], and chain, pixel and live are [1, pixels].
    """
    mask = live & (channel < COLUMNS)
    at = chain.to(tl.int64) * x_chain + channel * CHANNEL_STRIDE + pixel * PIXEL_STRIDE
    if overflow is not None:
        infinite = mask & ~(tl.abs(g) < float("inf"))
        tl.store(overflow + at * 0, 1, mask=infinite)
    if grad is not None:
        tl.store(grad + at, g, mask=mask)
    else:
        a = step_size
        if step_sizes is not None:
            a *= tl.load(step_sizes + chain, mask=live)
        if clip is not None:
            g = clamp(g, -clip, clip)
        kick = None
        if noise is not None:
            z = tl.load(noise + at, mask=mask).to(tl.float32)
        if z is not None:
            b = noise_std
            if noise_stds is not None:
                b *= tl.load(noise_stds + chain, mask=live)
            kick = b * z
        value = tl.load(x + at, mask=mask).to(tl.float32)
        value = update(value, a * g, kick, lo, hi, NOISE_LAST)
        tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "first_chain"])
def image_kernel(
    source, weight, unscale, overflow, x, grad, noise, rows, source_chain, x_chain,
    step_size, noise_std, step_sizes, noise_stds, clip, lo, hi,
    seed_low, seed_high, step, first_chain, rng_state,
    PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    DRAW: tl.constexpr, NOISE_LAST: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the energy with respect to x, times unscale [1], or steps along it.

    With grad (float32, in x's layout with x_chain between chains) the gradient is stored there, and
    x may be None. Otherwise x takes the step of step_kernel, with its arguments, and the gradient
    stays in registers. Noise is drawn for four neighbouring pixels at once: DRAW requires a
    convolution of stride 1 and a number of pixels per channel that 4 divides. overflow [1] is set
    if the gradient is not finite.
    """
    begin(EARLY)
    row = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    g, chain, pixel, live = _input_gradient(
        source, weight, row, tl.arange(0, BN)[None, :], rows, source_chain,
        H, W, C, OUT_H, OUT_W, COLUMNS, TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X,
        DILATION_Y, DILATION_X, K, PRECISION, FLAT, BM, BN, BK,
    )  # fmt: skip
    # As in the tiles of the step, lines are channels, and four neighbours share a Philox block.
    channel = tl.arange(0, BN)[:, None]
    z = None
    if DRAW:
        quads: tl.constexpr = OUT_H * OUT_W // 4
        quad = tl.program_id(0) * (BM // 4) + tl.arange(0, BM // 4)[None, :]
        z = drawn(
            channel, (quad // quads).to(tl.uint32) + word(first_chain), quad % quads, word(step),
            word(0), word(seed_low), word(seed_high), rng_state, quads,
        )  # fmt: skip
    finish(
        tl.trans(g) * tl.load(unscale), z, channel, tl.trans(chain), tl.trans(pixel),
        tl.trans(live), overflow, x, grad, noise, x_chain, step_size, noise_std, step_sizes,
        noise_stds, clip, lo, hi, PIXEL_STRIDE, CHANNEL_STRIDE, NOISE_LAST, COLUMNS,
    )  # fmt: skip
