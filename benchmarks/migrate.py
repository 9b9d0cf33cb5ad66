"""Is each preset the same chain as its original, and how much does it save?

    python -m benchmarks.migrate --out DIR [--rounds 15] [--threads 1] [--only jem] [--quick]

writes DIR/migrate-cpu.json with a row per preset, measured on the paper's net by
fl.testing.compare: the largest differences with equal noise in float32 and float64, times taken in
turns, and bytes of tensors.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

import fastlangevin as fl
from benchmarks import originals
from benchmarks.result_file import ResultFile, parser_of


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    size, width, batch, steps = (8, 2, 4, 4) if options.quick else (32, 16, 16, 20)
    file = ResultFile(
        options.out / "migrate-cpu.json", "migrate", device="cpu", threads=options.threads,
        quick=options.quick, steps=steps, size=size, width=width, batch=batch,
    )  # fmt: skip
    makes = [
        originals.cases(steps, size, width, batch, dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    for single, double in zip(*makes, strict=True):
        if options.only not in single.name:
            continue
        file.add(measure(single, double, steps, options.rounds))
        print(single.name, flush=True)
    print(f"wrote {file.path}")


def measure(
    single: originals.Case, double: originals.Case, steps: int, rounds: int
) -> dict[str, Any]:
    """A row; SystemExit if the chains differ, because their times would then mean nothing."""
    exact = fl.testing.compare(
        double.loop, double.ours, double.x0, energy=double.energy, dtype=torch.float64, rounds=1,
        steps=steps,
    )  # fmt: skip
    timed = fl.testing.compare(
        single.loop, single.ours, single.x0, energy=single.energy, rounds=rounds, steps=steps
    )
    if not exact.same:
        raise SystemExit(f"migrate: {single.name}: {exact}")
    return {
        "name": single.name,
        "difference_float64": max(exact.apart),
        "difference_float32": max(timed.apart),
        "compared": len(exact.differences),
        "seconds": timed.seconds,
        "speedup": timed.speedup,
        "peak_bytes": timed.peak_bytes,
        "notes": timed.notes,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("migrate", device=None, quick="tiny networks; takes seconds")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
