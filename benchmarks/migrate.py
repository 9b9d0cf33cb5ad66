"""Is each preset its original's chain, and what does it save? One case per codebase.

    python -m benchmarks.migrate --out DIR [--rounds 15] [--threads 1] [--only jem] [--quick]

writes DIR/migrate-DEVICE.json: the largest differences with equal noise in float32 and float64,
times taken in turns and bytes of tensors, all by fl.testing.compare, on the paper's net.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastlangevin as fl
from benchmarks import originals, timing


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    size, width, batch, steps = (8, 2, 4, 4) if options.quick else (32, 16, 16, 20)
    content: dict[str, Any] = {
        "benchmark": "migrate",
        "device": "cpu",
        "threads": options.threads,
        "quick": options.quick,
        "steps": steps,
        "size": size,
        "width": width,
        "batch": batch,
        "machine": timing.machine(),
        "results": [],
    }
    makes = [
        originals.cases(steps, size, width, batch, dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    for single, double in zip(*makes, strict=True):
        if options.only not in single.name:
            continue
        content["results"].append(measure(single, double, steps, options.rounds))
        print(single.name, flush=True)
    content["machine"]["load_at_end"] = timing.machine()["load"]
    path = options.out / "migrate-cpu.json"
    timing.write_json(path, content)
    print(f"wrote {path}")


def measure(
    single: originals.Case, double: originals.Case, steps: int, rounds: int
) -> dict[str, Any]:
    """A row; SystemExit where the chains differ, of which times would say nothing."""
    options: dict[str, Any] = {"steps": steps}
    exact = fl.testing.compare(
        double.loop, double.ours, double.x0, energy=double.energy, dtype=torch.float64, rounds=1,
        **options,
    )  # fmt: skip
    found = fl.testing.compare(
        single.loop, single.ours, single.x0, energy=single.energy, rounds=rounds, **options
    )
    if not exact.same:
        raise SystemExit(f"migrate: {single.name}: {exact}")
    return {
        "name": single.name,
        "difference_float64": max(exact.apart),
        "difference_float32": max(found.apart),
        "compared": len(exact.differences),
        "seconds": found.seconds,
        "speedup": found.speedup,
        "peak_bytes": found.peak_bytes,
        "notes": found.notes,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migrate")
    parser.add_argument("--out", type=Path, required=True, help="folder for migrate-cpu.json")
    parser.add_argument("--rounds", type=int, default=15, help="of timing, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="one case")
    parser.add_argument("--quick", action="store_true", help="tiny networks, seconds in all")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
