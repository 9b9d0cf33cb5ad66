"""How much memory and time do gradients through K steps take, by each schedule?

    python -m benchmarks.chain_memory --out DIR [--device cpu|cuda] [--quick] [--long]

writes DIR/chain_memory-DEVICE.json. For the plain loop, for torch.utils.checkpoint around each of
its steps and for our schedules, it records against K: the peak bytes of the tensors allocated in a
forward and backward pass, the seconds (rounds interleaved) and the evaluations of the energy.
Gradients go to x0 and all parameters of the paper's net with SiLU, at batch 8 and width 32. Each
row also has the largest deviation from the plain loop's gradients, relative to the largest element
of each, both in strict float32, and says whether it is above the limit. Two more figures: the cost
of "step" relative to the plain loop at K = 16, and the time of s states relative to the prediction
from their number of evaluations and the two passes of "step". ``--long`` adds K = 1000 with 20
states, and once more at batch 64 and width 16 with the memory of the process.
"""

import argparse
import functools
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlangevin as fl
from benchmarks import timing
from benchmarks.result_file import ResultFile, parser_of
from fastlangevin.adjoint.schedules import recomputed
from fastlangevin.adjoint.storage import Allocations
from fastlangevin.gradients.precision import network_precision

STEP_SIZE, NOISE_STD = 0.1, 0.01
STATES, BUDGET = (4, 10), "64MiB"
# In strict float32. In TF32, torch's default for convolutions on GPUs, rounding alone moved
# gradients through 4 steps by 6e-4 of their largest element (H200).
LIMIT = 1e-4


class Case(NamedTuple):
    steps: int
    batch: int
    width: int
    size: int
    device: torch.device

    def make(self) -> tuple[fl.ConvEnergy, Tensor]:
        torch.manual_seed(0)
        net = fl.ConvEnergy(size=self.size, width=self.width, activation="silu").to(self.device)
        x0 = torch.rand((self.batch, *net.shape), device=self.device) * 2 - 1
        return net, x0.requires_grad_()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    shape = (2, 4, 8) if options.quick else (8, 32, 32)
    case = functools.partial(Case, batch=shape[0], width=shape[1], size=shape[2], device=device)
    figures: dict[str, Any] = {}
    file = ResultFile(
        options.out / f"chain_memory-{device.type}.json", "chain_memory", device=device.type,
        quick=options.quick, batch=shape[0], width=shape[1], figures=figures,
    )  # fmt: skip

    def add(row: dict[str, Any]) -> None:
        file.add(row)
        print(f"K={row['steps']} {row['variant']}: {row['peak_bytes'] / 2**20:.1f} MiB", flush=True)

    if options.long:
        # First, because the other runs would leave the process larger than this one makes it.
        figures["long"] = long_chain(Case(1000, 64, 16, 32, device), 20)
    steps, rounds = (6, 1) if options.quick else (16, 9)
    figures["times"] = times(case(steps), STATES[0], rounds)
    for steps in (6,) if options.quick else (4, 16, 50, 100):
        for row in compare(case(steps), rounds=1 if options.quick or steps > 16 else 3):
            add(row)
    if options.long:
        for row in (memory(case(20), "20 states", 20), memory(case(1000), "20 states", 20)):
            add(row)
    print(f"wrote {file.path}")


def chains(case: Case, net: fl.ConvEnergy, x0: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forward pass of every variant, by name."""
    run = fl.LangevinSampler(net, case.steps, STEP_SIZE, NOISE_STD)
    ours = functools.partial(run, x0, seed=0, differentiable=True)
    return {
        "plain loop": functools.partial(plain_loop, case, net, x0),
        "torch checkpoint": functools.partial(plain_loop, case, net, x0, checkpointed=True),
        "none": functools.partial(ours, checkpoint="none"),
        "step": functools.partial(ours, checkpoint="step"),
        **{f"{s} states": functools.partial(ours, checkpoint=s) for s in STATES if s < case.steps},
        BUDGET: functools.partial(ours, checkpoint=BUDGET),
    }


def plain_loop(case: Case, net: fl.ConvEnergy, x: Tensor, checkpointed: bool = False) -> Tensor:
    """The loop that users write, with the noise contract's numbers."""

    def step(x: Tensor, k: int) -> Tensor:
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        z = fl.noise.normal(x.shape, seed=0, step=k, device=x.device)
        return x - STEP_SIZE * grad + NOISE_STD * z

    for k in range(case.steps):
        x = checkpoint(step, x, k, use_reentrant=False) if checkpointed else step(x, k)
    return x


def compare(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row per variant, with its deviation from the plain loop's gradients."""
    net, x0 = case.make()
    variants = chains(case, net, x0)
    leaves = [x0, *net.parameters()]
    deviations = check(variants, leaves)
    rows = [{**memory(case, name), **deviations[name]} for name in variants]
    seconds = timing.interleave(
        {name: functools.partial(_seconds, chain, leaves) for name, chain in variants.items()},
        rounds,
    )
    return [{**row, "seconds": timing.summary(seconds[row["variant"]])} for row in rows]


def check(
    variants: dict[str, Callable[[], Tensor]], leaves: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """How far the gradients of each variant are from those of the first, the plain loop."""
    deviations, plain_grads = {}, None
    for name, chain in variants.items():
        with network_precision("fp32", leaves[0].device):
            grads = torch.autograd.grad(chain().square().sum(), leaves, allow_unused=True)[:-1]
        plain_grads = plain_grads or grads
        errors = [
            (ours - plain).abs().max() / plain.abs().max()
            for ours, plain in zip(grads, plain_grads, strict=True)
        ]
        deviation = float(torch.stack(errors).max())
        deviations[name] = {"deviation": deviation, "differs": not deviation <= LIMIT}
    return deviations


def memory(case: Case, name: str, states: int | None = None) -> dict[str, Any]:
    """Peak bytes and evaluations of one variant, or of a schedule with so many states."""
    net, x0 = case.make()
    if states is None:
        chain = chains(case, net, x0)[name]
    else:
        run = fl.LangevinSampler(net, case.steps, STEP_SIZE, NOISE_STD)
        chain = functools.partial(run, x0, seed=0, differentiable=True, checkpoint=states)
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    with Allocations() as allocations:
        torch.autograd.grad(chain().square().sum(), [x0, *net.parameters()], allow_unused=True)
    return {
        "steps": case.steps,
        "variant": name,
        "peak_bytes": allocations.peak,
        "evaluations": len(calls),
    }


def times(case: Case, states: int, rounds: int) -> dict[str, Any]:
    """Ratios, round by round, of "step" to the plain loop and of s states to their prediction.

    "step" takes F seconds for its forward pass, with one evaluation per step, and B seconds for its
    backward pass. With s states R evaluations are repeated: the prediction is F (K + R) / K + B.
    """
    net, x0 = case.make()
    variants, leaves = chains(case, net, x0), [x0, *net.parameters()]
    timed_names = "plain loop", "step", f"{states} states"
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in timed_names}

    def sample(name: str) -> float:
        passes[name].append(_passes(variants[name], leaves))
        return sum(passes[name][-1])

    timing.interleave({name: functools.partial(sample, name) for name in timed_names}, 1 + rounds)
    plain, step, revolve = (passes[name][1:] for name in timed_names)
    recomputed_share = 1 + recomputed(case.steps, states) / case.steps
    return {
        "steps": case.steps,
        "states": states,
        "step_over_plain_loop": timing.summary(
            [sum(ours) / sum(theirs) for ours, theirs in zip(step, plain, strict=True)]
        ),
        "revolve_over_prediction": timing.summary(
            [sum(r) / (recomputed_share * s[0] + s[1]) for r, s in zip(revolve, step, strict=True)]
        ),
    }


def long_chain(case: Case, states: int) -> dict[str, Any]:
    """Run a long chain forward and backward: seconds, and the process's size before and at most."""
    net, x0 = case.make()
    run = fl.LangevinSampler(net, case.steps, STEP_SIZE, NOISE_STD)
    before, start = _resident(), time.perf_counter()
    out = run(x0, seed=0, differentiable=True, checkpoint=states)
    torch.autograd.grad(out.square().sum(), [x0, *net.parameters()], allow_unused=True)
    return {
        "steps": case.steps,
        "batch": case.batch,
        "width": case.width,
        "states": states,
        "evaluations": 2 * case.steps + recomputed(case.steps, states),
        "seconds": time.perf_counter() - start,
        "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "process_bytes_before": before,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if x0.is_cuda else None,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _seconds(chain: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    return sum(_passes(chain, leaves))


def _passes(chain: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    marks = [_now(leaves[0])]
    loss = chain().square().sum()
    marks.append(_now(leaves[0]))
    torch.autograd.grad(loss, leaves, allow_unused=True)
    marks.append(_now(leaves[0]))
    return marks[1] - marks[0], marks[2] - marks[1]


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("chain_memory", quick="a small net and short chains")
    parser.add_argument("--long", action="store_true", help="K = 1000 too: ten minutes on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
