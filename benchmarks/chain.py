"""How long does a step of a chain take, including the network? Ours and the peers, interleaved.

    python -m benchmarks.chain --out DIR [--device cpu|cuda] [--threads 2] [--only width-32]
        [--batches 4 16] [--variants "fused fp16" ...] [--seconds 60] [--compile] [--quick]

writes DIR/chain-DEVICE.json: seconds per step, ratios to the paper's loop taken round by round, the
share of the rate of torch's matrix product, and the memory of one step by counting allocations.
Each of our rows also has its step's deviation from float64 on the same network with SiLU, and says
whether it differs by more than its precision explains.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile

import fastlangevin as fl
from benchmarks import timing
from benchmarks.fuzz.machine import instruction_set
from benchmarks.originals import torchebm_model
from benchmarks.report_chain import PAPER
from benchmarks.result_file import ResultFile, parse, parser_of
from fastlangevin.bench import plain_loop
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import extension
from fastlangevin.roofline import cost, matrix_rate

# Of the norm of a step. Torch's own precision is TF32 on GPUs. The check takes a smooth network,
# since LeakyReLU's kinks alone turn the rounding of TF32 into 2 to 3 % of a gradient.
LIMITS = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}
ENGINES = ("autograd", "explicit", "fused")
# Without the matrix unit, which "fused fp32" uses where this is estimated to be faster.
BY_VECTORS = "fused fp32 by vectors"
BFLOAT16_BY_VECTORS = "fused bf16 by vectors"
STEP_SIZE, NOISE_STD = 1.0, 0.01
_CPU_CASES = ((64, 64), (32, 64), (16, 64), (8, 16))
_CUDA_CASES = tuple((width, batch) for batch in (64, 256, 1024) for width in (64, 32, 128))


class Case(NamedTuple):
    """One of the paper's networks, on images 3 x size x size."""

    width: int
    batch: int
    size: int
    device: torch.device

    def __str__(self) -> str:
        return f"width-{self.width}-batch-{self.batch}"

    def energy(self, activation: str = "leaky_relu") -> fl.ConvEnergy:
        torch.manual_seed(0)
        net = fl.ConvEnergy(3, self.size, self.width, activation=activation)
        return net.to(self.device)

    def states(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((self.batch, 3, self.size, self.size), generator=generator)
        return (2 * x - 1).to(self.device)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    file = ResultFile(
        options.out / f"chain-{device.type}.json", "chain", device=device.type,
        threads=torch.get_num_threads(), quick=options.quick,
    )  # fmt: skip
    for case in cases(device, options.quick, options.batches):
        if options.only not in str(case):
            continue
        file.add(*measure(case, options.steps, options.seconds, options.compile, options.variants))
        print(case, flush=True)
    print(f"wrote {file.path}")


def cases(device: torch.device, quick: bool, batches: Sequence[int] = ()) -> list[Case]:
    if quick:
        return [Case(2, batch, 8, device) for batch in batches or (4,)]
    shapes = _CUDA_CASES if device.type == "cuda" else _CPU_CASES
    if batches:
        shapes = tuple((width, batch) for batch in batches for width in (64, 32, 16))
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
    cuda = case.device.type == "cuda"
    tiles = not cuda and extension.has_matrix_unit()
    precisions: tuple[str | None, ...] = (None, "tf32", "fp16", "bf16") if cuda else (None, "bf16")
    if tiles:
        precisions += ("tf32",)
    if compiled:
        loop = torch.compile(energy, dynamic=False)
        runs["compiled loop"] = functools.partial(plain_loop, loop, x, steps, STEP_SIZE, NOISE_STD)
    for precision in precisions:
        for gradient in ENGINES:
            if precision == "tf32" and gradient != "fused" and not cuda:
                continue  # only the fused engine computes it on CPUs
            if precision == "bf16" and gradient != "fused" and not _has_bfloat16(case.device):
                continue  # without bfloat16 instructions it is ten times slower than the loop
            sampler = fl.LangevinSampler(energy, steps, precision=precision, gradient=gradient)
            name = f"{gradient} {precision or 'fp32'}"
            runs[name] = functools.partial(sampler, x, seed=0)
            if name in ("fused fp32", "fused bf16") and tiles:
                runs[f"{name} by vectors"] = functools.partial(_by_vectors, sampler, x)
    return runs


def _by_vectors(sampler: fl.LangevinSampler, x: Tensor) -> Tensor:
    """Run a chain without the matrix unit."""
    vectors = {"amx": "avx512_bf16", "amx_emulated": "baseline"}
    with instruction_set(vectors[extension.library.instruction_set()]):
        return sampler(x, seed=0)


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


def measure(
    case: Case, steps: int, budget: float, compiled: bool, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Time all variants, or the paper's loop and ``only`` these; returns one row per variant."""
    runs = variants(case, steps, compiled)
    runs = {name: run for name, run in runs.items() if name == PAPER or not only or name in only}
    deviations = check(case, list(runs))
    errors = {}
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:  # the other variants are still timed
            errors[name] = f"{type(error).__name__}: {error}"
            del runs[name]
    samplers = {name: timing.timed(run, case.device) for name, run in runs.items()}
    seconds = timing.interleave(samplers, timing.rounds_within(samplers, budget, 5, 100))
    graph = recognise(case.energy(), case.states())
    assert not isinstance(graph, str), graph
    flops = cost(graph).flops * case.batch
    threads = torch.get_num_threads() if case.device.type == "cpu" else 0
    about = {"width": case.width, "batch": case.batch, "size": case.size, "steps": steps}
    rows = []
    for name, samples in seconds.items():
        step_seconds = [value / steps for value in samples]
        spread = timing.summary(step_seconds)
        precision = _precision(name)
        rate = matrix_rate(case.device, precision, threads)
        rows.append({
            **about,
            "variant": name,
            "seconds": spread,
            "speedup": timing.speedup(seconds[PAPER], samples),
            "gflop_per_s": flops / spread["median"] / 1e9,
            "percent_of_matrix_rate": 100 * flops / spread["median"] / rate,
            "peak_bytes": peak_bytes(variants(case, 1, compiled)[name]),
            **deviations.get(name, {}),
        })  # fmt: skip
    return rows + [{**about, "variant": name, "error": text} for name, text in errors.items()]


def check(case: Case, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How far each of our variants' steps is from the loop's in float64, without noise.

    The deviation is relative to the norm of the step, and "differs" says whether it is above the
    limit of its precision. A variant that cannot run is left out: its row gives the reason.
    """
    energy, x = case.energy("silu"), case.states()
    exact = plain_loop(case.energy("silu").double(), x.double(), 1, STEP_SIZE, 0.0)
    deviations = {}
    for name in names:
        gradient = name.split()[0]
        if gradient not in ENGINES:
            continue
        precision = _precision(name)
        options = {"gradient": gradient, "precision": precision}
        sampler = fl.LangevinSampler(energy, 1, STEP_SIZE, 0.0, **options)
        try:
            vectors = name in (BY_VECTORS, BFLOAT16_BY_VECTORS)
            stepped = _by_vectors(sampler, x) if vectors else sampler(x, seed=0)
        except Exception:  # "measure" meets it again, and writes it down
            continue
        deviation = float((stepped - exact).norm() / (exact - x).norm())
        limit = LIMITS[precision or ("tf32" if case.device.type == "cuda" else "fp32")]
        deviations[name] = {"deviation": deviation, "differs": not deviation <= limit}
    return deviations


def _precision(name: str) -> str | None:
    """The precision of a variant; "fp32" in a name stands for torch's own, which is None."""
    last = name.removesuffix(" by vectors").split()[-1]
    return last if last in ("bf16", "fp16", "tf32") else None


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("chain", quick="one tiny network; takes seconds")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument("--only", default="", help="cases by part of their name: width-32-batch-64")
    parser.add_argument("--batches", type=int, nargs="+", default=(), help="instead of the cases'")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=(),
        help="time these variants and the paper's loop, such as 'fused fp16' (default: all)",
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="of a chain; default 10, on CUDA 20"
    )
    parser.add_argument("--seconds", type=float, default=None, help="seconds per case; default 60")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    options = parse(parser, arguments)
    options.steps = options.steps or (20 if options.device == "cuda" else 10)
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 60.0
    return options


if __name__ == "__main__":
    main()
