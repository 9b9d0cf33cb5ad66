"""How long does a Langevin step take, compared with other ways to take it? All interleaved.

    python -m benchmarks.step --out DIR [--device cpu|cuda] [--threads 1,2] [--only 64x3x32x32]
        [--quick]

writes DIR/step-DEVICE.json: medians, quartiles, and ratios to the baselines taken round by round.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import timing
from benchmarks.result_file import ResultFile, parse, parser_of
from benchmarks.variants import BASELINES, Case, cases, samplers, variants


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    file = ResultFile(
        options.out / f"step-{device.type}.json", "step", device=device.type, quick=options.quick
    )
    chosen = [case for case in cases(device, options.quick) if options.only in str(case)]
    torch.manual_seed(0)
    for threads in options.threads:
        if threads:
            torch.set_num_threads(threads)
        for case in chosen:
            rows = measure(case, options.seconds, options.compile)
            file.add(*({**row, "threads": threads} for row in rows))
            print(case if threads is None else f"{case}, {threads} threads", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the memory of the case's graphs
    failed = [row for row in file.rows if "error" in row]
    for row in failed:
        print(f"failed: {row['variant']} {row['size']} {row['dtype']}: {row['error']}")
    print(f"wrote {file.path}")
    if failed:
        raise SystemExit(1)


def measure(case: Case, budget: float, compiled: bool) -> list[dict[str, Any]]:
    """Time all variants; returns a row for each, and one for a copy of as many bytes."""
    ready, errors, sets = samplers(case, variants(case, compiled), least_seconds=budget / 1000)
    seconds = timing.interleave(ready, timing.rounds_within(ready, budget, least=5, most=200))
    about = {
        "size": case.size,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "noise_std": case.noise_std,
        "bytes": case.bytes_moved,
        "buffer_sets": sets,
    }
    rows = [{**about, "variant": name, **figures(case, name, seconds)} for name in seconds]
    return rows + [{**about, "variant": name, "error": text} for name, text in errors.items()]


def figures(case: Case, name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A variant's time with its spread, the same time in other units, and ratios."""
    time = timing.summary(seconds[name])
    return {
        "seconds": time,
        "gb_per_s": case.bytes_moved / time["median"] / 1e9,
        "ns_per_element": time["median"] / case.elements * 1e9,
        "percent_of_copy": 100 * timing.speedup(seconds["copy"], seconds[name])["median"],
        "speedup_over": {
            base: timing.speedup(seconds[base], seconds[name])
            for base in BASELINES
            if base in seconds
        },
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("step", quick="one small size; takes seconds")
    parser.add_argument("--threads", default=None, help="CPU threads, as in 1,2; default: torch's")
    parser.add_argument("--only", default="", help="cases by part of their name: 64x3x32x32-fp32")
    parser.add_argument("--seconds", type=float, default=None, help="seconds per case; default 2")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also time torch.compile; the default unless --quick",
    )
    options = parse(parser, arguments)
    if options.device == "cuda":
        options.threads = [None]
    else:
        counts = options.threads or str(torch.get_num_threads())
        options.threads = [int(count) for count in counts.split(",")]
    options.seconds = options.seconds or (0.1 if options.quick else 2.0)
    options.compile = not options.quick if options.compile is None else options.compile
    return options


if __name__ == "__main__":
    main()
