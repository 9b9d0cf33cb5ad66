"""The launches of a fused step as Nsight Compute saw them, beside the bytes that were predicted.

    python -m benchmarks.profile NCU_CSV --out DIR [--width 64] [--batch 64] [--precision fp16]

reads what ncu wrote of one step of :mod:`benchmarks.fused_step`, and writes
DIR/fused-profile-cuda.json. The profiler's times are longer than those in a CUDA graph, since it
empties the caches before every launch.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.traffic import predicted

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "dram_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
}
KERNELS = ("forward_kernel", "backward_kernel", "image_kernel")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("csv", type=Path, metavar="NCU_CSV")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="fp16")
    options = parser.parse_args(arguments)
    case = options.width, options.batch, options.precision
    rows = launches(options.csv.read_text(), predicted(*case)["launches"])
    content = {
        "benchmark": "fused-profile",
        "device": "cuda",
        "width": options.width,
        "batch": options.batch,
        "precision": options.precision,
        "machine": timing.machine(),
        "results": rows,
    }
    timing.write_json(options.out / "fused-profile-cuda.json", content)
    for row in rows:
        print(
            f"{row['launch']}: {row['ns'] / 1e3:.1f} us, {row['l2_bytes'] / 1e6:.1f} MB from L2 "
            f"(predicted {row['predicted_l2_bytes'] / 1e6:.1f}), tensor pipe "
            f"{row['tensor_percent']:.0f} %"
        )


def launches(text: str, prediction: dict[str, int]) -> list[dict[str, Any]]:
    """One row per launch of the step's kernels, in their order; ValueError if some are missing."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[header:]):
        if row["Kernel Name"] in KERNELS and row["Metric Name"] in METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            found.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    if len(found) != len(prediction):
        raise ValueError(f"expected {len(prediction)} launches of {KERNELS}, got {len(found)}")
    return [
        {"launch": launch, **row, "predicted_l2_bytes": size}
        for (launch, size), row in zip(prediction.items(), found.values(), strict=True)
    ]


if __name__ == "__main__":
    main()
