"""The Triton kernels of the noise and the step.

They mirror csrc/common/philox.h and csrc/common/step.h operation by operation, with each operation
rounded once (compile with enable_fp_fusion=False). Their normals and steps therefore equal the
native ones bit for bit.

A program processes a tile of LINES x PIXELS elements. A line is a chain, or one channel of a chain
if an operand is channels_last; a pixel is an element of a line. Four neighbours along a line share
a Philox block, so that a tile draws each block once in any order of the elements in memory.
"""

import triton
import triton.language as tl


@triton.jit
def word(number):
    """The 32-bit word with the bits of an int32 argument."""
    return tl.full([1, 1], number, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _words(block, chain, step, stream, seed_low, seed_high):
    """Philox4x32-10 (Salmon et al. 2011, constants of Random123), all arguments uint32."""
    c0, c1, c2, c3 = block, chain, step, stream
    k0, k1 = seed_low, seed_high
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _uniform(w):
    """u(w) in [0, 1)."""
    return (w >> 8).to(tl.int32, bitcast=True).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def _radius(w):
    """sqrt(-2 ln v(w)), computed from (w >> 8) + 1 = m 2**e with m in [sqrt(1/2), sqrt(2)).

    It uses a polynomial: with the hardware's logarithm the radius near v = 1 is wrong by 5e-4.
    """
    number = ((w >> 8) + 1).to(tl.int32, bitcast=True).to(tl.float32)
    offset = number.to(tl.int32, bitcast=True) - 0x4B3504F3  # the bits of 2**24 sqrt(1/2)
    exponent = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0  # m - 1
    p = f * -0.17444715 + 0.2873369  # approximates -2 ln(1 + f) / f
    p = p * f + -0.29904532
    p = p * f + 0.33124787
    p = p * f + -0.39913666
    p = p * f + 0.5000415
    p = p * f + -0.66668373
    p = p * f + 0.99999976
    p = p * f + -2.0
    return tl.sqrt_rn(exponent * -1.3862944 + f * p)  # -2 ln 2 e - 2 ln m


@triton.jit
def _box_muller(w_radius, w_angle):
    """Two normals. Half turns are removed exactly; an odd number of them flips both signs."""
    shifted = w_angle << 1
    sign = (w_angle ^ shifted) & 0x80000000
    # y = 4 (u - half turns) in [-1, 1)
    y = (shifted & 0xFFFFFE00).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    q = y * y
    s = q * 0.00015082264 + -0.004672233  # sin(pi / 2 y) / y
    s = s * q + 0.07968848
    s = s * q + -0.6459634
    s = s * q + 1.5707963
    c = q * 0.0008596901 + -0.020813966  # cos(pi / 2 y)
    c = c * q + 0.2536532
    c = c * q + -1.2336988
    c = c * q + 1.0
    r = (_radius(w_radius).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return r * c, r * (y * s)


@triton.jit
def draw(block, chain, step, stream, seed_low, seed_high, UNIFORM: tl.constexpr):
    """The numbers [LINES, PIXELS] of the blocks [LINES, PIXELS / 4]."""
    w0, w1, w2, w3 = _words(block, chain, step, stream, seed_low, seed_high)
    if UNIFORM:
        z0, z1, z2, z3 = _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)
    else:
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
    quads = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [..., 2, 2], in order z0, z1, z2, z3
    return tl.reshape(quads, [block.shape[0], block.shape[1] * 4])


@triton.jit
def clamp(x, lo, hi):
    """x clamped to [lo, hi]. NaN keeps its bits, and so does -0 at a bound of 0."""
    x = tl.where(x < lo, lo, x)
    return tl.where(x > hi, hi, x)


@triton.jit
def update(value, move, kick, lo, hi, NOISE_LAST: tl.constexpr):
    """clamp(value + (move + kick)) or, with NOISE_LAST, clamp(value + move) + kick.

    A term that is absent is None.
    """
    if NOISE_LAST:
        if move is not None:
            value += move
        value = clamp(value, lo, hi)
        if kick is not None:
            value += kick
    else:
        if move is None:
            if kick is not None:
                value += kick
        elif kick is not None:
            value += move + kick
        else:
            value += move
        value = clamp(value, lo, hi)
    return value


@triton.jit
def _tile(channels, LINES: tl.constexpr, PIXELS: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """A program's chains and channels [LINES, 1] and its first pixel, in 64 bits.

    A tile has LINES chains or, with BY_CHANNEL, LINES channels of one chain. In the second case one
    program touches every byte of a run of pixels in either order of memory.
    """
    column = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    line = tl.arange(0, LINES)[:, None].to(tl.int64)
    if BY_CHANNEL:
        groups = tl.cdiv(channels, LINES)
        chain = tl.program_id(0) // groups + line * 0
        channel = tl.program_id(0) % groups * LINES + line
    else:
        chain = tl.program_id(0).to(tl.int64) * LINES + line
        channel = line * 0
    return chain, channel, column * PIXELS


@triton.jit
def _blocks(channel, first_pixel, pixels, PIXELS: tl.constexpr):
    """The Philox blocks [LINES, PIXELS / 4] of a tile. By channel, 4 must divide pixels."""
    quad = first_pixel // 4 + tl.arange(0, PIXELS // 4)[None, :]
    return (channel * (pixels // 4) + quad).to(tl.uint32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "first_chain"])
def step_kernel(
    x, grad, noise, x_chain, x_channel, x_pixel, grad_chain, grad_channel, grad_pixel,
    chains, channels, pixels, step_size, noise_std, step_sizes, noise_stds, clip, lo, hi,
    seed_low, seed_high, step, first_chain, rng_state,
    DRAW: tl.constexpr, NOISE_LAST: tl.constexpr,
    LINES: tl.constexpr, PIXELS: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """x <- clamp(x + (a clip(g) + b z)), where a is signed. The pointer of an absent term is None.

    Tensors [chains, channels, pixels] are addressed by their strides; noise has the strides of x.
    step_sizes and noise_stds hold float32 factors of step_size and noise_std per chain. The words
    of the seed, step and first_chain are passed as signed int32. rng_state holds {seed, a number
    that is added to step} in int64. Infinite bounds have no effect.
    """
    chain, channel, first_pixel = _tile(channels, LINES, PIXELS, BY_CHANNEL)
    pixel = first_pixel + tl.arange(0, PIXELS)[None, :]
    live = chain < chains
    mask = live & (channel < channels) & (pixel < pixels)
    at = chain * x_chain + channel * x_channel + pixel * x_pixel
    value = tl.load(x + at, mask=mask).to(tl.float32)

    move = None
    if grad is not None:
        a = step_size
        if step_sizes is not None:
            a *= tl.load(step_sizes + chain, mask=live)
        grad_at = chain * grad_chain + channel * grad_channel + pixel * grad_pixel
        g = tl.load(grad + grad_at, mask=mask).to(tl.float32)
        if clip is not None:
            g = clamp(g, -clip, clip)
        move = a * g

    kick = None
    if DRAW or noise is not None:
        b = noise_std
        if noise_stds is not None:
            b *= tl.load(noise_stds + chain, mask=live)
        if DRAW:
            low, high, number = word(seed_low), word(seed_high), word(step)
            if rng_state is not None:
                seed = tl.load(rng_state)
                low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
                number += tl.load(rng_state + 1).to(tl.uint32)
            block = _blocks(channel, first_pixel, pixels, PIXELS)
            row = chain.to(tl.uint32) + word(first_chain)
            z = draw(block, row, number, word(0), low, high, False)
        else:
            z = tl.load(noise + at, mask=mask).to(tl.float32)
        kick = b * z

    value = update(value, move, kick, lo, hi, NOISE_LAST)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream", "first_chain"])
def fill_kernel(
    out, chains, elements, seed_low, seed_high, step, stream, first_chain,
    UNIFORM: tl.constexpr, LINES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Fills out [chains, elements], contiguous and float32, with normals or uniforms."""
    chain, channel, first_pixel = _tile(1, LINES, PIXELS, False)
    pixel = first_pixel + tl.arange(0, PIXELS)[None, :]
    block = _blocks(channel, first_pixel, elements, PIXELS)
    row = chain.to(tl.uint32) + word(first_chain)
    low, high = word(seed_low), word(seed_high)
    z = draw(block, row, word(step), word(stream), low, high, UNIFORM)
    tl.store(out + chain * elements + pixel, z, mask=(chain < chains) & (pixel < elements))
