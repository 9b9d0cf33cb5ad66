"""What limits this device: its versions and flags, a copy, and products of random matrices.

    python -m benchmarks.limits --out DIR [--device cpu|cuda] [--quick]

writes DIR/limits-DEVICE.json after each figure.
"""

from collections.abc import Sequence

import torch

from benchmarks import timing
from benchmarks.result_file import ResultFile, parser_of
from fastlangevin.gradients.precision import switches
from fastlangevin.roofline import matrix_rate

COPIED = 2**32  # bytes; many times a GPU's L2 cache
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser_of("limits", quick="a small copy and one product").parse_args(arguments)
    device = torch.device(options.device)
    file = ResultFile(
        options.out / f"limits-{device.type}.json", "limits", device=device.type,
        quick=options.quick, switches=[str(value) for value in switches()],
    )  # fmt: skip
    content = file.content
    content["copy_gb_per_s"] = copy_rate(2**24 if options.quick else COPIED, device) / 1e9
    content["tflop_per_s"] = {}
    file.write()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    for precision in ("fp32",) if options.quick else PRECISIONS:
        content["tflop_per_s"][precision] = matrix_rate(device, precision, threads) / 1e12
        file.write()
    print(f"copy: {content['copy_gb_per_s']:.0f} GB/s")
    for precision, rate in content["tflop_per_s"].items():
        print(f"{precision} product: {rate:.3g} TFLOP/s")


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes per second that a copy of ``size`` bytes reads and writes, the median of nine."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timing.timed(lambda: target.copy_(source), device)
    copy()
    return 2 * size / timing.summary([copy() for _ in range(9)])["median"]


if __name__ == "__main__":
    main()
