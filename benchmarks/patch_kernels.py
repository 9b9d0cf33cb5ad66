"""Convolutions by 4x4 at stride 2, their input gradients and that of a 3x3, in Gluon for Hopper.

This is an experiment, which :mod:`benchmarks.patches` compares with the package's kernels. Those
compute an address per 16 bytes, and read every pixel again for every tap. Here the tensor memory
accelerator (TMA) copies boxes, and two or three taps share a box. Written in the Gluon of Triton
3.6.

Tap (i, j) of a forward pass reads the pixels (2 y + i - 1, 2 x + j - 1). The source is taken as
four images, one for each parity (p, q) of a pixel's coordinates: in these, taps i and i + 2 read
neighbouring rows. An input gradient is four convolutions by 2x2, one for each parity (p, q) of its
result, whose taps are neighbours as well. A pass of the loop takes these two taps (TAPS), one below
the other, and BK channels. It copies a box of ``down + 1`` rows of pixels, and multiplies a window
of ``down`` of these rows by the weights of each tap. The rows of a tile are in the order (y, chain,
x), so that a window is contiguous in shared memory, where matrix instructions read it. Pixels of
the padding lie outside of the image, and TMA writes zeros for them.

The gradient of a 3x3 convolution at stride 1 with respect to the image takes three taps in a pass,
so it copies ``down + 2`` rows. The forward pass of a first layer is not here, since little would be
gained: its float32 pixels must pass through registers to be rounded, and the package's kernel reads
them through the L1 cache. On an H200 it took 6.1 us of a step's 114 (width 64, batch 64), and moved
15.6 MB through L2, 8.9 of them results. A patch would save 3.5 MB, or 0.3 to 0.6 us. A warp runs
1,104 instructions, most of them to compute and store the results, and a patch would save at most a
sixth of these. To gather taps, it would need indexed reads of shared memory, which Gluon in Triton
3.6 does not have.

:func:`offsets`, :func:`corner` and :func:`place` compute with numbers as with Triton's values. The
tests call them in Python.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra import cuda

from fastlangevin.kernels.triton_conv_grad import drawn, finish


@gluon.jit
def offsets(
    step, p, q, FORWARD: gl.constexpr, TAPS: gl.constexpr, C: gl.constexpr, BK: gl.constexpr
):
    """What pass ``step`` of the loop reads: (p of the source, y, x, channel, weight).

    y and x count from the tile's first pixel. A forward pass takes every parity of its source in
    turn, and (p, q) of the arguments is the parity of an input gradient's result.
    """
    block, shift = step % (C // BK) * BK, step // (C // BK) % TAPS
    if TAPS == 3:
        return 0, -1, shift - 1, block, (2 - shift) * C + block
    elif FORWARD:
        p, q = step // (C // BK) // 4, step // (C // BK) // 2 % 2
        tap = (1 - p) * 4 + 1 - q + 2 * shift
        return p, -p, shift - q, q * C + block, tap * C + block
    else:
        return 0, p - 1, q - 1 + shift, block, (1 - shift) * C + block


@gluon.jit
def corner(tile, H: gl.constexpr, W: gl.constexpr, BOX: gl.constexpr):
    """(y, chain, x) of the first pixel of a tile of BOX = (1, y, chains, x, ...) pixels."""
    return (
        tile // (W // BOX[3]) % (H // BOX[1]) * BOX[1],
        tile // (W // BOX[3] * (H // BOX[1])) * BOX[2],
        tile % (W // BOX[3]) * BOX[3],
    )


@gluon.jit
def place(
    row, y, chain, x, p, q,
    FORWARD: gl.constexpr, H: gl.constexpr, W: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """(chain, pixel) of the result for a row of the tile that begins at (y, chain, x).

    FORWARD means that the result has the H x W pixels of the tiles, and not four times as many.
    """
    y, x = y + row // (BOX[2] * BOX[3]), x + row % BOX[3]
    pixel = y * W + x if FORWARD else (2 * y + p) * (2 * W) + 2 * x + q
    return chain + row // BOX[3] % BOX[2], pixel


@gluon.jit
def _copy(
    step, ready, pixels, weights, box_desc, row_desc, weight_desc, y, chain, x, p, q, column,
    FORWARD: gl.constexpr, TAPS: gl.constexpr, C: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of a pass of the loop, if there is a pass of this number."""
    box: gl.constexpr = box_desc.block_type
    row: gl.constexpr = row_desc.block_type
    down: gl.constexpr = box.shape[1]
    copied: gl.constexpr = box.nbytes + row.nbytes + weight_desc.block_type.nbytes
    source, dy, dx, channel, weight = offsets(step, p, q, FORWARD, TAPS, C, box.shape[4])
    live, stage = step < STEPS, step % STAGES
    bar, first = ready.index(stage), stage * (down + TAPS - 1)
    mbarrier.expect(bar, copied, pred=live)
    to = pixels.index(first)._reinterpret(box_desc.dtype, box.shape, box_desc.layout)
    at = [source, y + dy, chain, x + dx, channel]
    tma.async_copy_global_to_shared(box_desc, at, bar, to, pred=live)
    to = pixels.index(first + down)._reinterpret(box_desc.dtype, row.shape, box_desc.layout)
    at = [source, y + dy + down, chain, x + dx, channel]
    tma.async_copy_global_to_shared(row_desc, at, bar, to, pred=live)
    to = weights.index(weight_desc.block_type.shape[0] * stage)
    to = to._reinterpret(box_desc.dtype, weight_desc.block_type.shape, weight_desc.layout)
    tma.async_copy_global_to_shared(weight_desc, [0, column, weight], bar, to, pred=live)


@gluon.jit
def _products(
    box_desc, row_desc, weight_desc, y, chain, x, p, q, column,
    FORWARD: gl.constexpr, TAPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The sums of a tile [BM, BN] over all taps and channels, in float32."""
    box: gl.constexpr = box_desc.block_type.shape
    flat: gl.constexpr = gl.NVMMASharedLayout(box_desc.layout.swizzle_byte_width, 16, rank=2)
    down: gl.constexpr = box[1] + TAPS - 1
    shape: gl.constexpr = [STAGES * down, box[2] * box[3], box[4]]
    pixels = gl.allocate_shared_memory(box_desc.dtype, shape, flat)
    tiles: gl.constexpr = weight_desc.block_type.shape[0]
    weights = gl.allocate_shared_memory(box_desc.dtype, [STAGES * tiles, BN, box[4]], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    # If launches may overlap, the next one begins as this one does, and waits here for its results.
    cuda.gdc_launch_dependents()
    cuda.gdc_wait()
    steps: gl.constexpr = C // box[4] * (8 if FORWARD else TAPS)
    for i in gl.static_range(STAGES - 1):
        _copy(
            i, ready, pixels, weights, box_desc, row_desc, weight_desc, y, chain, x, p, q,
            column, FORWARD, TAPS, C, steps, STAGES,
        )  # fmt: skip
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    acc = gl.zeros([BM, BN], gl.float32, products)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES % 2)
        for tap in gl.static_range(TAPS):
            window = pixels.index(stage * down + tap)
            window = window._reinterpret(box_desc.dtype, [BM, box[4]], flat)
            # The weights of an input gradient's taps are in the order of the taps.
            weight = weights.index(tiles * stage + (tap if FORWARD else TAPS - 1 - tap))
            acc = hopper.warpgroup_mma(window, weight.permute((1, 0)), acc, is_async=True)
        # The products of the pass before have been read: the copies may overwrite its stage.
        acc = hopper.warpgroup_mma_wait(TAPS, deps=[acc])
        _copy(
            step + STAGES - 1, ready, pixels, weights, box_desc, row_desc, weight_desc, y, chain, x,
            p, q, column, FORWARD, TAPS, C, steps, STAGES,
        )  # fmt: skip
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    # Warps wait for their own products alone, and may store results where others still read.
    gl.thread_barrier()
    return acc


@gluon.jit
def _words(acc, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    """(acc [BM, BN / 32, 32], row, word, bit): 8 columns a thread, for accesses of 16 bytes."""
    words: gl.constexpr = BN // 32
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [8 // words, words, 4], [WARPS, 1, 1], [2, 1, 0]
    )
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    row = gl.arange(0, BM, rows)[:, None][:, :, None]
    word = gl.arange(0, words, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :][:, :, None]
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    return gl.convert_layout(gl.reshape(acc, [BM, words, 32]), layout), row, word, bit


@gluon.jit
def patch_forward_kernel(
    box_desc, row_desc, weight_desc, bias, out, saved, head, energies, overflow, n, slope,
    C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, COLUMNS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As triton_conv.forward_kernel, with leaky_relu; the result has H x W pixels."""
    tiles: gl.constexpr = COLUMNS // BN
    box: gl.constexpr = box_desc.block_type.shape
    y, chain, x = corner(gl.program_id(0) // tiles, H, W, box)
    column = gl.program_id(0) % tiles * BN
    acc = _products(
        box_desc, row_desc, weight_desc, y, chain, x, 0, 0, column,
        True, 2, C, BM, BN, STAGES, WARPS,
    )  # fmt: skip
    value, row, word, bit = _words(acc, BM, BN, WARPS)
    chain, pixel = place(row, y, chain, x, 0, 0, True, H, W, box)
    live, line = chain < n, chain.to(gl.int64) * (H * W) + pixel
    columns = column + word * 32 + bit
    value += gl.load(bias + columns)
    if overflow is not None:  # 65520 rounds to infinity
        large = (~(gl.abs(value) < 65520.0)).to(gl.int32)
        large = gl.max(gl.max(large, axis=2, keep_dims=True), axis=1, keep_dims=True)
        gl.store(overflow + row * 0, large, mask=live & (large != 0))
    factor = gl.where(value > 0, 1.0, slope)
    at, mask = line * COLUMNS + columns, live & (bit < 32)
    if head is None:
        gl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=mask)
        signs = gl.sum(gl.where(value > 0, 1 << bit, 0), axis=2, keep_dims=True)
        gl.store(saved + line * (COLUMNS // 32) + column // 32 + word, signs, mask=live)
    else:
        v = gl.load(head + pixel * COLUMNS + columns)
        gl.store(out + at, (v * factor).to(out.dtype.element_ty), mask=mask)
        if energies is not None:
            energy = gl.sum(
                gl.sum(value * factor * v, axis=2, keep_dims=True), axis=1, keep_dims=True
            )
            gl.store(energies + line * tiles + gl.program_id(0) % tiles, energy, mask=live)


@gluon.jit
def patch_backward_kernel(
    box_desc, row_desc, weight_desc, saved, out, n, slope,
    C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, COLUMNS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As triton_conv_grad.backward_kernel with SIGNS; the source has H x W pixels."""
    tiles: gl.constexpr = COLUMNS // BN
    box: gl.constexpr = box_desc.block_type.shape
    p, q = gl.program_id(1) // 2, gl.program_id(1) % 2
    y, chain, x = corner(gl.program_id(0) // tiles, H, W, box)
    column = gl.program_id(0) % tiles * BN
    acc = _products(
        box_desc, row_desc, weight_desc, y, chain, x, p, q,
        gl.program_id(1) * COLUMNS + column, False, 2, C, BM, BN, STAGES, WARPS,
    )  # fmt: skip
    g, row, word, bit = _words(acc, BM, BN, WARPS)
    chain, pixel = place(row, y, chain, x, p, q, False, H, W, box)
    live, line = chain < n, chain.to(gl.int64) * (4 * H * W) + pixel
    signs = gl.load(saved + line * (COLUMNS // 32) + column // 32 + word, mask=live, other=0)
    g = gl.where((signs >> bit) & 1 != 0, g, g * slope)
    at = line * COLUMNS + column + word * 32 + bit
    gl.store(out + at, g.to(out.dtype.element_ty), mask=live & (bit < 32))


@gluon.jit(do_not_specialize=["seed_low", "seed_high", "step", "first_chain"])
def patch_image_kernel(
    box_desc, row_desc, weight_desc, unscale, overflow, x, grad, noise, n, x_chain,
    step_size, noise_std, step_sizes, noise_stds, clip, lo, hi,
    seed_low, seed_high, step, first_chain, rng_state,
    PIXEL_STRIDE: gl.constexpr, CHANNEL_STRIDE: gl.constexpr,
    DRAW: gl.constexpr, NOISE_LAST: gl.constexpr,
    C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, COLUMNS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As triton_conv_grad.image_kernel, for 3x3 at stride 1. Matrix instructions need 8 columns."""
    box: gl.constexpr = box_desc.block_type.shape
    columns: gl.constexpr = max(BN, 8)
    y, first, left = corner(gl.program_id(0), H, W, box)
    acc = _products(
        box_desc, row_desc, weight_desc, y, first, left, 0, 0, 0,
        False, 3, C, BM, columns, STAGES, WARPS,
    )  # fmt: skip
    # Through shared memory to [BN, BM], four neighbours a thread, without the columns that are 0.
    lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [columns, BM], lines, gl.permute(acc, (1, 0)))
    g = shared.slice(0, BN).load(layout) * gl.load(unscale)
    row = gl.arange(0, BM, gl.SliceLayout(0, layout))[None, :]
    channel = gl.arange(0, BN, gl.SliceLayout(1, layout))[:, None]
    chain, pixel = place(row, y, first, left, 0, 0, True, H, W, box)
    z = None
    if DRAW:
        quads: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        row = 4 * gl.arange(0, BM // 4, gl.SliceLayout(0, quads))[None, :]
        drawn_chain, quad = place(row, y, first, left, 0, 0, True, H, W, box)
        zero = drawn_chain.to(gl.uint32) * 0  # words of 32 bits are computed without a sign
        z = drawn(
            gl.arange(0, BN, gl.SliceLayout(1, quads))[:, None],
            drawn_chain.to(gl.uint32) + (zero + first_chain), quad // 4,
            zero + step, zero, zero + seed_low, zero + seed_high, rng_state, H * W // 4,
        )  # fmt: skip
        z = gl.convert_layout(z, layout)
    finish(
        g, z, channel, chain, pixel, chain < n, overflow, x, grad, noise, x_chain,
        step_size, noise_std, step_sizes, noise_stds, clip, lo, hi,
        PIXEL_STRIDE, CHANNEL_STRIDE, NOISE_LAST, COLUMNS,
    )  # fmt: skip
