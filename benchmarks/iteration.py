"""How long is an iteration of learning, and how much of it are its chains?

    python -m benchmarks.iteration --out DIR [--threads 2] [--quick]

writes DIR/iteration-cpu.json: seconds of an iteration with the paper's network of width 32, K = 40
and 64 images, and of its chains alone, in turn. The data are random images: the time does not
depend on what they show.
"""

import functools
from collections.abc import Sequence

import torch

import fastlangevin as fl
from benchmarks import timing
from benchmarks.result_file import ResultFile, parser_of

WIDTH, STEPS, BATCH = 32, 40, 64
STEP_SIZE, NOISE_STD = 1.0, 0.01


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("iteration", device=None, quick="a tiny network; takes seconds")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=5, help="of each precision; default 5")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    width, steps, batch, size = (2, 2, 4, 8) if options.quick else (WIDTH, STEPS, BATCH, 32)
    file = ResultFile(
        options.out / "iteration-cpu.json", "iteration", threads=torch.get_num_threads(),
        width=width, steps=steps, batch=batch, quick=options.quick,
    )  # fmt: skip
    for precision in (None, "bf16"):
        torch.manual_seed(0)
        energy = fl.ConvEnergy(3, size, width)
        sampler = fl.LangevinSampler(energy, steps, STEP_SIZE, NOISE_STD, precision=precision)
        images = 2 * torch.rand(4 * batch, 3, size, size) - 1
        learner = fl.learn.ShortRunLearner(
            sampler, images, batch_size=batch, data_noise=0.03, lr=1e-5, precision=precision
        )
        chains = functools.partial(sampler, images[:batch].clone(), seed=0)
        runs = {"iteration": learner.step, "chains": chains}
        samplers = {name: timing.timed(run, torch.device("cpu")) for name, run in runs.items()}
        timing.interleave(samplers, 1)  # the engine is chosen in the first call
        seconds = timing.interleave(samplers, options.rounds)
        shares = [a / b for a, b in zip(seconds["chains"], seconds["iteration"], strict=True)]
        row = {
            "precision": precision or "fp32",
            **{name: timing.summary(samples) for name, samples in seconds.items()},
            "chains_share": timing.summary(shares),
        }
        file.add(row)
        print(f"{row['precision']}: {row['iteration']['median']:.3g} s an iteration, "
              f"{100 * row['chains_share']['median']:.0f} % of it chains")  # fmt: skip


if __name__ == "__main__":
    main()
