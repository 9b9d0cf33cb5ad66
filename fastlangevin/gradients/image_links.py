"""Which pixels of a channel the pixels of a pooling or an interpolation read, as links."""

import itertools

import torch

from fastlangevin.gradients.graph.ir import Node
from fastlangevin.gradients.graph.linear import run_linear
from fastlangevin.gradients.image_graph import Image, Link


def pool_windows(image: Image, node: Node) -> tuple[Link, ...]:
    """Return the links of avg_pool2d, by its definition."""
    kernel, stride, padding, _, counted, divisor = node.settings
    axes = []
    for axis in range(2):
        size, pad = image[1 + axis], padding[axis]
        windows = []
        for o in range(node.shape[1 + axis]):
            first = o * stride[axis] - pad
            last = min(first + kernel[axis], size + pad)
            windows.append((range(max(first, 0), min(last, size)), last - first))
        axes.append(windows)
    links = []
    for pixel, ((rows, tall), (columns, wide)) in enumerate(itertools.product(*axes)):
        count = divisor or (tall * wide if counted else len(rows) * len(columns))
        links += [Link(pixel, y * image[2] + x, 1 / count) for y in rows for x in columns]
    return tuple(links)


def interpolation(image: Image, node: Node) -> tuple[Link, ...]:
    """Return the links of an interpolation, which weighs rows and columns independently."""
    shares = []
    for axis in range(2):
        # A row (or column) of ones at a time: its share in every row of the result.
        size = image[1 + axis]
        ones = torch.eye(size, dtype=torch.float32, device="cpu").view(
            (size, 1, -1, 1) if axis == 0 else (size, 1, 1, -1)
        )
        ones = ones.expand(size, 1, *image[1:])
        out = run_linear(node, ones)[:, 0]
        share = (out[:, :, 0] if axis == 0 else out[:, 0]).T
        shares.append([[(k, float(row[k])) for k in row.nonzero()[:, 0].tolist()] for row in share])
    return tuple(
        Link(pixel, y * image[2] + x, tall * wide)
        for pixel, (rows, columns) in enumerate(itertools.product(*shares))
        for (y, tall), (x, wide) in itertools.product(rows, columns)
    )


def max_windows(image: Image, node: Node) -> tuple[Link, ...]:
    """Return the links of max_pool2d; the factors are positions in the window."""
    kernel, stride, padding, dilation, _ = node.settings
    axes = []
    for axis in range(2):
        firsts = [o * stride[axis] - padding[axis] for o in range(node.shape[1 + axis])]
        reach = range(0, dilation[axis] * kernel[axis], dilation[axis])
        axes.append([[f + r for r in reach if 0 <= f + r < image[1 + axis]] for f in firsts])
    return tuple(
        Link(pixel, y * image[2] + x, float(position))
        for pixel, (rows, columns) in enumerate(itertools.product(*axes))
        for position, (y, x) in enumerate(itertools.product(rows, columns))
    )
