"""How long a chain, and how wide a network, can be differentiated in 16 GiB of a GPU?

    python -m benchmarks.capacity --out DIR [--device cuda] [--seconds 60] [--quick]

writes DIR/capacity-DEVICE.json after each figure: for the plain loop, torch.utils.checkpoint around
each of its steps, and our schedules, the most steps K at width 64 and the largest width at K = 16
whose gradients with respect to x0 and all parameters do not run out of memory. The network is that
of :mod:`benchmarks.chain_memory`, at batch 64 on 3x32x32 states. K and the width are tried in
powers of two, up to the largest that are listed or until the time is used. On a CPU, which has no
such limit, only the smallest are tried.
"""

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.chain_memory import Case, chains
from benchmarks.result_file import ResultFile, parser_of

MEMORY = 2**34  # bytes
METHODS = ("plain loop", "torch checkpoint", "none", "step", "10 states")
STEPS = tuple(2**k for k in range(4, 13))
WIDTHS = tuple(2**k for k in range(6, 12))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("capacity", device="cuda", quick="tiny cases")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all; default 60")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / total))
    file = ResultFile(
        options.out / f"capacity-{device.type}.json", "capacity", device=device.type,
        quick=options.quick, bytes=MEMORY,
    )  # fmt: skip
    end = time.perf_counter() + options.seconds
    if options.quick:
        searches = [("steps", [Case(12, 2, 2, 8, device)]), ("width", [Case(12, 2, 2, 8, device)])]
    else:
        searches = [
            ("steps", [Case(steps, 64, 64, 32, device) for steps in STEPS]),
            ("width", [Case(16, 64, width, 32, device) for width in WIDTHS]),
        ]
    for k, (quantity, cases) in enumerate(searches):
        for m, method in enumerate(METHODS):
            searches_left = (len(searches) - k) * len(METHODS) - m
            row = search(quantity, method, cases, (end - time.perf_counter()) / searches_left)
            file.add(row)
            open_end = "" if row["out_of_memory"] else " or more"
            print(f"{method}: {quantity} {row['largest']}{open_end}", flush=True)


def search(quantity: str, method: str, cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    """Run the cases until one is out of memory, or until a further one would take too long."""
    row: dict[str, Any] = {"quantity": quantity, "method": method, "largest": 0}
    row |= {"out_of_memory": False, "seconds": None}
    end = time.perf_counter() + seconds
    differentiate(cases[0], method)  # the first run takes seconds to load kernels
    for case in cases:
        if row["seconds"] and 3 * row["seconds"] > end - time.perf_counter():
            break
        start = time.perf_counter()
        try:
            differentiate(case, method)
        except RuntimeError as error:
            # cuDNN says that it found no engine if none of them got its workspace.
            if "out of memory" not in str(error) and "unable to find an engine" not in str(error):
                raise
            row["out_of_memory"] = True
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        row["largest"] = case.steps if quantity == "steps" else case.width
        row["seconds"] = time.perf_counter() - start
    return row


def differentiate(case: Case, method: str) -> None:
    net, x0 = case.make()
    out = chains(case, net, x0)[method]()
    grads = torch.autograd.grad(out.square().sum(), [x0, *net.parameters()], allow_unused=True)
    assert all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


if __name__ == "__main__":
    main()
