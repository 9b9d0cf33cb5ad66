"""Predict how learning and sampling scale to many GPUs, from measured and assumed figures.

    python -m benchmarks.scaling [--docs docs/distributed.md]

No cluster was measured. The operations of a step come from benchmarks/results/chain-cpu.json. The
rate of a GPU, the least time of a step and the links are assumptions, which stand here by name.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import insert
from benchmarks.tables import number, table
from fastlangevin.distributed import shard

RESULTS = Path(__file__).parent / "results" / "chain-cpu.json"
WIDTH, STEPS, PARAMETERS = 64, 100, 2_763_393  # the paper's network for 32 x 32 colour images
RATE = 100e12  # floating-point operations a second of one GPU, for large batches: an assumption
LEAST = 100e-6  # seconds of a step, however few its chains: the kernels of a replayed graph


class Link(NamedTuple):
    """What joins the GPUs: bytes per second of one GPU, and seconds before the first byte."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink, 450 GB/s", 450e9, 10e-6)
INFINIBAND = Link("InfiniBand, 50 GB/s a GPU", 50e9, 20e-6)
ETHERNET = Link("Ethernet, 100 Gb/s a node", 12.5e9 / 8, 50e-6)
MACHINES = ((1, NVLINK), (8, NVLINK), (64, INFINIBAND), (64, ETHERNET))


def operations() -> float:
    """Floating-point operations of one step of one chain."""
    rows = json.loads(RESULTS.read_text("utf-8"))["results"]
    row = next(r for r in rows if r["width"] == WIDTH and r["variant"] == "fused fp32")
    return row["gflop_per_s"] * 1e9 * row["seconds"]["median"] / row["batch"]


def step(chains: int) -> float:
    """Seconds of a step of this many chains on one GPU."""
    return max(LEAST, chains * operations() / RATE)


def communication(gpus: int, link: Link) -> float:
    """Seconds of an all-to-all and an all-gather of the gradients in float32."""
    if gpus == 1:
        return 0.0
    moved = 4 * PARAMETERS * (gpus - 1) / gpus
    return 2 * (moved / link.bandwidth + link.latency * math.log2(gpus))


def rows() -> Iterator[list[str]]:
    """A row for every batch and machine."""
    for batch in (64, 1024):
        for gpus, link in MACHINES:
            chains = shard(batch, 0, gpus).n
            # The pass for the weights costs about 1.5 steps of the data and of the samples each.
            computing = STEPS * step(chains) + 1.5 * step(2 * chains)
            talking = communication(gpus, link)
            alone = STEPS * step(batch) + 1.5 * step(2 * batch)
            yield [
                str(batch), str(gpus), "-" if gpus == 1 else link.name, str(chains),
                number(1e3 * computing), number(1e3 * talking),
                f"{3600 / (computing + talking):,.0f}",
                f"{alone / (computing + talking) / gpus:.0%}",
                f"{gpus * 1024 / (STEPS * step(1024)):,.0f}",
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--docs", type=Path, help="write the table between a page's markers")
    page = parser.parse_args().docs
    text = table(
        ["batch", "GPUs", "link", "chains a GPU", "computing, ms", "communication, ms",
         "iterations an hour", "efficiency", "samples a second"],
        list(rows()),
    )  # fmt: skip
    print(text)
    if page:
        marks = ("<!-- scaling -->", "<!-- /scaling -->")
        page.write_text(insert(page.read_text("utf-8"), text, marks), "utf-8")


if __name__ == "__main__":
    main()
