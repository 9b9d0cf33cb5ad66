"""How long does a step of a chain take on the energies of other people's code?

    python -m benchmarks.networks [--energies NAME...] [--gradient auto explicit fused]
        [--precision fp32 bf16] [--threads 1 2] [--seconds 6] [--memory] [--json FILE]

compares the sampler with the five-line loop of autograd, on about 35 energies written in the manner
of public code. Loop and samplers are timed in turn. The table has the median times of a step, the
median of the ratios taken round by round, the engine that ran, the relative error of its gradient
against float64 next to the loop's and, where autograd ran, the first reason for it. With bf16 the
loop runs under torch.autocast.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report_networks, timing
from benchmarks.networks.cases import cases
from benchmarks.networks.measure import measure


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    content: dict[str, Any] = {
        "benchmark": "networks",
        "device": "cpu",
        "command": sys.argv[1:] if arguments is None else list(arguments),
        "quick": options.quick,
        "machine": timing.machine(),
        "results": [],
    }
    for precision in options.precision:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in options.energies:
                case = case.small() if options.quick else case
                rows = measure(case, precision, options.gradient, options.seconds, options.memory)
                content["results"] += rows
                content["machine"]["load_at_end"] = timing.machine()["load"]
                if options.json:
                    timing.write_json(options.json, content)
                for row in rows[1:]:
                    print(report_networks.summary_of(rows[0], row), flush=True)
    print(f"\n{report_networks.section(content)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks")
    parser.add_argument(
        "--energies", nargs="+", default=[""], metavar="NAME",
        help="run the energies whose names contain one of these; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--gradient", nargs="+", default=["auto"],
        choices=("auto", "autograd", "explicit", "fused"), help="engines of the sampler",
    )  # fmt: skip
    parser.add_argument("--all-engines", action="store_true", help="auto and every engine")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds per energy")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a result file")
    parser.add_argument("--quick", action="store_true", help="tiny networks, for tests")
    options = parser.parse_args(arguments)
    if options.all_engines:
        options.gradient = ["auto", "autograd", "explicit", "fused"]
    options.energies = [
        case for case in cases()
        if any(part.lower() in case.name.lower() for part in options.energies)
    ]  # fmt: skip
    if not options.energies:
        parser.error(f"--energies: expected parts of {', '.join(case.name for case in cases())}")
    return options


if __name__ == "__main__":
    main()
