"""Predict how learning and sampling scale to many GPUs, from measured and assumed figures.

    python -m benchmarks.scaling [--docs docs/distributed.md]

No cluster was measured. The time of a step is that of benchmarks/results/chain-cuda.json, on the
card and in the precision that the page names. The links and the spread of computing times are
assumptions, which stand here by name. Iterations are simulated message by message.
"""

import argparse
import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import fill, number, table
from fastlangevin.distributed import shard

RESULTS = Path(__file__).parent / "results" / "chain-cuda.json"
WIDTH, STEPS, PARAMETERS = 64, 100, 2_763_393  # the paper's network for 32 x 32 colour images
VARIANT = "fused tf32"


class Link(NamedTuple):
    """What joins the GPUs: bytes per second of one GPU, and seconds before the first byte."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink, 450 GB/s", 450e9, 10e-6)
INFINIBAND = Link("InfiniBand, 50 GB/s a GPU", 50e9, 20e-6)
ETHERNET = Link("Ethernet, 100 Gb/s a node", 12.5e9 / 8, 50e-6)
MACHINES = (
    (64, ((1, NVLINK), (2, NVLINK), (4, NVLINK), (8, NVLINK), (64, INFINIBAND), (64, ETHERNET))),
    (1024, ((1, NVLINK), (8, NVLINK), (16, INFINIBAND), (32, INFINIBAND), (64, INFINIBAND),
            (64, ETHERNET))),
)  # fmt: skip
SPREAD = 0.01  # standard deviation of a GPU's computing time, relative to it: an assumption
SAMPLED = 256  # chains at a time on each GPU that draws samples: the most that were measured
ITERATIONS = 200  # simulated for each row


@functools.cache
def measured() -> dict[int, float]:
    """Seconds of a step of one GPU, by the number of its chains."""
    rows = json.loads(RESULTS.read_text("utf-8"))["results"]
    mine = [r for r in rows if r["width"] == WIDTH and r["variant"] == VARIANT]
    return {row["batch"]: row["seconds"]["median"] for row in mine}


def step(chains: int) -> float:
    """Seconds of a step of this many chains on one GPU.

    Those measured, and the line through the two largest numbers of chains. It is continued to fewer
    chains, which no file has. More chains than measured take proportionally longer.
    """
    (fewer, fast), (most_chains, slow) = sorted(measured().items())[-2:]
    if chains > most_chains:
        return slow * chains / most_chains
    return fast + (chains - fewer) * (slow - fast) / (most_chains - fewer)


def computing(chains: int) -> float:
    """Seconds of computing of an iteration on one GPU, for its chains."""
    # The pass for the weights costs about 1.5 steps of the data and of the samples each.
    return STEPS * step(chains) + 1.5 * step(2 * chains)


def communicate(ready: list[float], link: Link) -> float:
    """When the last GPU has the sum of the gradients, if GPU i has its own at ready[i].

    Each GPU sends a slice of its gradients to every other one, in turn. It adds the slices that it
    has received, and the sums travel around a ring. A GPU sends and receives one slice at a time.
    """
    gpus, slice_seconds = len(ready), 4 * PARAMETERS / len(ready) / link.bandwidth
    sends, receives, complete = list(ready), [0.0] * gpus, list(ready)
    for distance in range(1, gpus):
        for i in range(gpus):
            j = (i + distance) % gpus
            sends[i] = receives[j] = max(sends[i], receives[j]) + slice_seconds
            complete[j] = max(complete[j], receives[j] + link.latency)
    holds = complete  # when GPU i has the slice that it sends on
    for _ in range(gpus - 1):
        sends = [max(sends[i], holds[i]) + slice_seconds for i in range(gpus)]
        holds = [sends[i - 1] + link.latency for i in range(gpus)]
    return max(holds)


def simulated(gpus: int, link: Link, chains: int, spread: float) -> float:
    """Mean seconds of an iteration."""
    draw, seconds = random.Random(0), computing(chains)
    times = [
        communicate([seconds * draw.gauss(1, spread) for _ in range(gpus)], link)
        for _ in range(ITERATIONS if spread else 1)
    ]
    return sum(times) / len(times)


def rows() -> Iterator[list[str]]:
    """A row for every batch and machine."""
    for batch, machines in MACHINES:
        for gpus, link in machines:
            chains = shard(batch, 0, gpus).n
            even, total = (simulated(gpus, link, chains, s) for s in (0.0, SPREAD))
            total = total if gpus > 1 else even
            yield [
                str(batch), str(gpus), "-" if gpus == 1 else link.name, str(chains),
                number(1e3 * computing(chains)),
                number(2 * 4e-6 * PARAMETERS * (gpus - 1) / gpus),
                number(1e3 * (even - computing(chains))), number(1e3 * (total - even)),
                f"{3600 / total:,.0f}", f"{computing(batch) / total / gpus:.0%}",
                f"{gpus * SAMPLED / (STEPS * step(SAMPLED)):,.0f}",
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--docs", type=Path, help="write the table between a page's markers")
    page = parser.parse_args().docs
    text = table(
        ["batch", "GPUs", "link", "chains a GPU", "computing, ms", "sent a GPU, MB",
         "communication, ms", "waiting, ms", "iterations an hour", "efficiency",
         "samples a second"],
        list(rows()),
    )  # fmt: skip
    print(text)
    if page:
        fill(page, "scaling", text)


if __name__ == "__main__":
    main()
