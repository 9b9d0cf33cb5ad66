"""Compare random steps and random energies with float64, on every backend that runs here.

    python -m benchmarks.fuzz --steps 2000 --networks 500

Case k of a run has the number seed + k and is the same on every machine. A failure is printed with
the command that repeats it alone, and the exit status is then 1.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.fuzz.engines import DTYPES, ENGINES, check_network, describe
from benchmarks.fuzz.machine import instruction_set, instruction_sets
from benchmarks.fuzz.steps import check_step, step_case
from fastlangevin.step import backend_status, resolve_backend

_CPU = torch.device("cpu")


class Report:
    """The worst ratio of an error to its bound for every backend or engine, and the failures."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = defaultdict(int)
        self.refused: dict[str, int] = defaultdict(int)
        self.worst: dict[str, list[float]] = {}
        self.failures = 0

    def add(self, place: str, check: Callable[[], Any], command: str, about: Any) -> None:
        try:
            result = check()
        except AssertionError as error:
            self.fail(place, str(error), command, about)
            return
        if result is None:
            self.refused[place] += 1
            return
        ratios = result if isinstance(result, tuple) else (result,)
        self.cases[place] += 1
        self.worst[place] = [
            max(pair) for pair in zip(ratios, self.worst.get(place, ratios), strict=True)
        ]
        if max(ratios) > 1:
            errors = ", ".join(f"{ratio:.3g}" for ratio in ratios)
            self.fail(place, f"{errors} times the bound", command, about)

    def fail(self, place: str, reason: str, command: str, about: Any) -> None:
        self.failures += 1
        print(f"{place}: {reason}\n  {command}\n  {about}", flush=True)

    def lines(self) -> Iterator[str]:
        for place in sorted({*self.cases, *self.refused}):
            worst = ", ".join(f"{ratio:.3g}" for ratio in self.worst.get(place, []))
            refused = f", {self.refused[place]} refused" if self.refused[place] else ""
            yield f"{place}: {self.cases[place]} cases{refused}; largest error / bound {worst}"


def fuzz_steps(report: Report, numbers: range, sets: list[str]) -> None:
    places: list[tuple[str, str | None]] = []
    for name, reason in backend_status(_CPU).items():
        if reason is None:
            places += [(name, isa) for isa in (sets if name == "native" else [None])]
    for number, (name, isa) in itertools.product(numbers, places):
        command = f"python -m benchmarks.fuzz --networks 0 --steps 1 --seed {number}"
        place = f"step, {name}" + (f" {isa}" if isa else "")
        case = step_case(number)
        with instruction_set(isa):
            run = resolve_backend(name, _CPU)
            options = {"shape": list(case.x.shape), "dtype": case.x.dtype, **case.options}
            report.add(place, lambda: check_step(case, run), command, options)  # noqa: B023


def fuzz_networks(
    report: Report, numbers: range, engines: list[str], dtypes: list[str], sets: list[str]
) -> None:
    for number, name, dtype in itertools.product(numbers, engines, dtypes):
        # The other engines use torch's convolutions, which have no choice of instruction set.
        for isa in sets if name == "fused" else [None]:
            chosen = f"--engine {name} --dtype {dtype}" + (f" --instruction-set {isa}" * bool(isa))
            command = f"python -m benchmarks.fuzz --steps 0 --networks 1 --seed {number} {chosen}"
            place = f"network, {name} {dtype}" + (f" {isa}" if isa else "")
            report.add(
                place,
                lambda: check_network(number, name, dtype, isa),  # noqa: B023
                command,
                describe(number),
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--networks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--engine", choices=ENGINES, help="this engine only")
    parser.add_argument("--dtype", choices=DTYPES, help="networks in this dtype only")
    sets = instruction_sets()
    parser.add_argument("--instruction-set", choices=sets, help="this instruction set only")
    chosen = parser.parse_args()
    sets = [chosen.instruction_set] if chosen.instruction_set else sets
    report = Report()
    fuzz_steps(report, range(chosen.seed, chosen.seed + chosen.steps), sets)
    fuzz_networks(
        report,
        range(chosen.seed, chosen.seed + chosen.networks),
        [chosen.engine] if chosen.engine else list(ENGINES),
        [chosen.dtype] if chosen.dtype else list(DTYPES),
        sets,
    )
    for line in report.lines():
        print(line)
    if report.failures:
        raise SystemExit(f"fuzz: {report.failures} cases failed")


if __name__ == "__main__":
    main()
