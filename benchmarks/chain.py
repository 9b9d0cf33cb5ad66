"""How long does a step of a chain take, including the network? Ours and the peers, interleaved.

    python -m benchmarks.chain --out DIR [--device cpu|cuda] [--threads 2] [--only width-32]
        [--seconds 60] [--compile] [--quick]

writes DIR/chain-DEVICE.json: seconds per step, ratios to the paper's loop taken round by round, the
share of the rate of torch's matrix product, and the memory of one step by counting allocations.
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile

import fastlangevin as fl
from benchmarks import timing
from benchmarks.originals import torchebm_model
from fastlangevin.bench import plain_loop
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.roofline import cost, matrix_rate

PAPER = "paper's loop"
STEP_SIZE, NOISE_STD = 1.0, 0.01
_CPU_CASES = ((64, 64), (32, 64), (16, 64), (8, 16))
_CUDA_CASES = tuple((width, batch) for width in (32, 64, 128) for batch in (64, 256, 1024))


class Case(NamedTuple):
    """One of the paper's networks, on images 3 x size x size."""

    width: int
    batch: int
    size: int
    device: torch.device

    def __str__(self) -> str:
        return f"width-{self.width}-batch-{self.batch}"

    def energy(self) -> fl.ConvEnergy:
        torch.manual_seed(0)
        return fl.ConvEnergy(3, self.size, self.width).to(self.device)

    def states(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((self.batch, 3, self.size, self.size), generator=generator)
        return (2 * x - 1).to(self.device)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.out / f"chain-{options.device}.json"
    content: dict[str, Any] = {
        "benchmark": "chain",
        "device": options.device,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        "machine": timing.machine(),
        "results": [],
    }
    for case in cases(device, options.quick):
        if options.only not in str(case):
            continue
        content["results"] += measure(case, options.steps, options.seconds, options.compile)
        content["machine"]["load_at_end"] = timing.machine()["load"]
        timing.write_json(path, content)
        print(case, flush=True)
    print(f"wrote {path}")


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [Case(2, 4, 8, device)]
    shapes = _CUDA_CASES if device.type == "cuda" else _CPU_CASES
    return [Case(width, batch, 32, device) for width, batch in shapes]


def variants(case: Case, steps: int, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Chains of ``steps`` by name. A peer whose package is not installed is left out."""
    energy, x = case.energy(), case.states()
    runs: dict[str, Callable[[], Any]] = {
        PAPER: functools.partial(plain_loop, energy, x, steps, STEP_SIZE, NOISE_STD)
    }
    if importlib.util.find_spec("torchebm"):
        runs["torchebm"] = _torchebm(energy, x, steps)
    if importlib.util.find_spec("ebm"):
        import ebm

        dynamics = ebm.LangevinDynamics(step_size=STEP_SIZE, steps=steps, noise_scale=NOISE_STD)
        runs["ebmkit"] = functools.partial(dynamics.sample, energy, x)
    precisions = (None, "bf16", "fp16") if case.device.type == "cuda" else (None, "bf16")
    if compiled:
        loop = torch.compile(energy, dynamic=False)
        runs["compiled loop"] = functools.partial(plain_loop, loop, x, steps, STEP_SIZE, NOISE_STD)
    for precision in precisions:
        for gradient in ("autograd", "explicit", "fused"):
            if precision == "bf16" and gradient != "fused" and not _has_bfloat16(case.device):
                continue  # without bfloat16 instructions it is ten times slower than the loop
            sampler = fl.LangevinSampler(energy, steps, precision=precision, gradient=gradient)
            name = f"{gradient} {precision or 'fp32'}"
            runs[name] = functools.partial(sampler, x, seed=0)
    return runs


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _torchebm(energy: fl.ConvEnergy, x: Tensor, steps: int) -> Callable[[], Any]:
    from torchebm.samplers import LangevinDynamics

    # Its noise is multiplied by sqrt(2 step_size).
    scale = NOISE_STD / (2 * STEP_SIZE) ** 0.5
    dynamics = LangevinDynamics(
        torchebm_model(energy).to(x.device), step_size=STEP_SIZE, noise_scale=scale, device=x.device
    )
    return functools.partial(dynamics.sample, x=x, n_steps=steps)


def measure(case: Case, steps: int, budget: float, compiled: bool) -> list[dict[str, Any]]:
    """Time all variants; returns one row per variant."""
    check(case)
    runs = variants(case, steps, compiled)
    errors = {}
    for name in list(runs):
        try:
            runs[name]()
        except (RuntimeError, ValueError) as error:
            errors[name] = str(error)
            del runs[name]
    samplers = {name: _timed(run, case.device) for name, run in runs.items()}
    seconds = timing.interleave(samplers, timing.rounds_within(samplers, budget, 5, 100))
    graph = recognise(case.energy(), case.states())
    assert not isinstance(graph, str), graph
    flops = cost(graph).flops * case.batch
    threads = torch.get_num_threads() if case.device.type == "cpu" else 0
    about = {"width": case.width, "batch": case.batch, "size": case.size, "steps": steps}
    rows = []
    for name, samples in seconds.items():
        each = [value / steps for value in samples]
        spread = timing.summary(each)
        ratios = [loop / ours for loop, ours in zip(seconds[PAPER], samples, strict=True)]
        precision = name.split()[-1] if name.endswith(("bf16", "fp16")) else None
        rate = matrix_rate(case.device, precision, threads)
        rows.append({
            **about,
            "variant": name,
            "seconds": spread,
            "speedup": timing.summary(ratios),
            "gflop_per_s": flops / spread["median"] / 1e9,
            "percent_of_matrix_rate": 100 * flops / spread["median"] / rate,
            "peak_bytes": peak_bytes(variants(case, 1, compiled)[name]),
        })  # fmt: skip
    return rows + [{**about, "variant": name, "error": text} for name, text in errors.items()]


def check(case: Case) -> None:
    """SystemExit unless every engine takes the loop's step without noise, within 0.1 %."""
    energy, x = case.energy(), case.states()
    want = plain_loop(energy, x, 1, STEP_SIZE, 0.0)
    for gradient in ("autograd", "explicit", "fused"):
        try:
            got = fl.LangevinSampler(energy, 1, STEP_SIZE, 0.0, gradient=gradient)(x, seed=0)
        except RuntimeError:  # its row gives the reason
            continue
        error = float((got - want).norm() / (want - x).norm())
        if error > 1e-3:
            raise SystemExit(f"chain: {gradient} is off the loop's gradient by {error:.1e}")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that a first run holds at a time, including what it keeps for later runs."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        if torch.cuda.max_memory_allocated() > before:
            return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as events:
        run()
    allocated = peak = 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def _timed(run: Callable[[], Any], device: torch.device) -> timing.Sampler:
    """Time a whole chain as users call it, without capturing it in a CUDA graph."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sample() -> float:
        begin = wait()
        run()
        return wait() - begin

    return sample


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain")
    parser.add_argument("--out", type=Path, required=True, help="folder for chain-DEVICE.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument(
        "--only",
        default="",
        help="cases by part of their name: width-32-batch-64",
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="of a chain; default 10, on CUDA 20"
    )
    parser.add_argument("--seconds", type=float, default=None, help="seconds per case; default 60")
    parser.add_argument("--quick", action="store_true", help="one tiny network; takes seconds")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    options.steps = options.steps or (20 if options.device == "cuda" else 10)
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 60.0
    return options


if __name__ == "__main__":
    main()
