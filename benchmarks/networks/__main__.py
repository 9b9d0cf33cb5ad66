"""How long does a step of a chain take on the energies of other people's code?

    python -m benchmarks.networks [--energies NAME...] [--gradient auto explicit fused]
        [--precision fp32 bf16] [--threads 1 2] [--seconds 6] [--memory] [--json FILE]
    python -m benchmarks.networks --device cuda [--precision tf32 fp16] [--steps 20] ...

compares the sampler with the five-line loop of autograd, on about 35 energies written in the manner
of public code. Loop and samplers are timed in turn. The table has the median times of a step, the
median of the ratios taken round by round, the engine that ran, the relative error of its gradient
against float64 next to the loop's and, where autograd ran, the first reason for it. The loop runs
in the same precision: in TF32, strictly in float32, or under torch.autocast. On CUDA each row says
whether the chains were replayed as a CUDA graph.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report_networks
from benchmarks.networks.cases import cases
from benchmarks.networks.measure import measure
from benchmarks.result_file import ResultFile, parse
from fastlangevin.gradients.precision import check_precision


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    file = ResultFile(
        options.json, "networks", device=options.device, quick=options.quick,
        command=sys.argv[1:] if arguments is None else list(arguments),
    )  # fmt: skip
    for precision in options.precision:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in options.energies:
                rows = measure(case, precision, options.gradient, options.seconds, options.memory)
                file.add(*rows)
                for row in rows[1:]:
                    print(report_networks.summary_of(rows[0], row), flush=True)
    print(f"\n{report_networks.section(file.content)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks")
    parser.add_argument(
        "--energies", "--only", nargs="+", default=[""], metavar="NAME",
        help="run the energies of these names, or whose names contain one; default: all",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--gradient", nargs="+", default=["auto"],
        choices=("auto", "autograd", "explicit", "fused"), help="engines of the sampler",
    )  # fmt: skip
    parser.add_argument("--all-engines", action="store_true", help="auto and every engine")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], choices=("fp32", "tf32", "fp16", "bf16")
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, help="of a chain; default: each energy's own")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds per energy")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a result file")
    parser.add_argument("--quick", action="store_true", help="tiny networks, for tests")
    options = parse(parser, arguments)
    if options.all_engines:
        options.gradient = ["auto", "autograd", "explicit", "fused"]
    device = torch.device(options.device)
    for precision in options.precision:
        try:
            check_precision(precision, device)
        except ValueError as error:
            parser.error(f"--precision: {error}")
    names = [case.name for case in cases()]
    options.energies = [
        case._replace(device=device, steps=options.steps or case.steps)
        for case in cases() if any(_names(part, case.name, names) for part in options.energies)
    ]  # fmt: skip
    if not options.energies:
        parser.error(f"--energies: expected parts of {', '.join(names)}")
    if options.quick:
        options.energies = [case.small() for case in options.energies]
    return options


def _names(part: str, name: str, names: Sequence[str]) -> bool:
    """Whether an argument is an energy's name or, if it is no energy's, a part of it."""
    return part == name or (part not in names and part.lower() in name.lower())


if __name__ == "__main__":
    main()
