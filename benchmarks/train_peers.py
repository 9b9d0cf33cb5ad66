"""Is a training run the same if its sampling loop is replaced by ours, and how much faster?

    python -m benchmarks.train_peers --out DIR [--iterations 200] [--seeds 3] [--quick]

Three published ways to learn an energy, on digits: the short-run paper's (chains from noise), JEM's
(a classifier with class-conditional chains in a replay buffer) and the UvA tutorial's (a first-in
first-out buffer, noise before the gradient, clamp, elementwise clip). Each is one training loop,
run four times: with the original's sampling loop, with the same loop on other noise, with our
sampler, and with our sampler at half of the steps. The second run shows how much noise alone
changes a run, and the last one which differences the comparison can detect. The four runs start
from equal weights, see equal batches and take their iterations in turn, so that slow phases of the
machine affect all of them.

writes DIR/train_peers-cpu.json: the gap and the seconds of every iteration, and the distance
between the curves.
"""

import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlangevin as fl
from benchmarks import timing
from benchmarks.report_train import AGAIN, CONTROL, LOOP, OURS
from benchmarks.result_file import ResultFile, parser_of
from fastlangevin.learn import load_images

BATCH, STEPS, WIDTH, CLASSES, SHAPE = 64, 20, 8, 10, (1, 8, 8)
# The originals' buffers of 10,000 and 8,192 would not fill in so few iterations.
CAPACITY = 1000
REINIT = 0.05
WARM_UP = 10  # iterations that are not timed

Sample = Callable[[Tensor], Tensor]  # (labels of the batch) -> samples


class Classifier(nn.Module):
    """JEM's network: f(x, y) = logits[y] and f(x) = logsumexp(logits). Here f = -energy."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * WIDTH, CLASSES, 4), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.logits(x)
        return logits.logsumexp(1) if y is None else logits.gather(1, y[:, None]).squeeze(1)


def langevin(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    noise_std: float = 0.01,
) -> Tensor:
    """The short-run paper's and JEM's chain: x <- x + (df/dx + noise_std z)."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(f(x).sum(), x, retain_graph=True)
        x.data += grad + noise_std * torch.randn(x.shape, generator=generator)
    return x.detach()


def uva_chain(
    f: nn.Module, x: Tensor, steps: int, generator: torch.Generator, noise_std: float = 0.005
) -> Tensor:
    """The UvA tutorial's chain, in [-1, 1].

    x <- clamp(x + noise_std z), then x <- clamp(x + 10 clip(df/dx, 0.03))
    """
    for parameter in f.parameters():
        parameter.requires_grad_(False)
    x = x.clone().requires_grad_()
    for _ in range(steps):
        x.data.add_(noise_std * torch.randn(x.shape, generator=generator)).clamp_(-1, 1)
        (grad,) = torch.autograd.grad(-f(x).sum(), x)
        x.data.add_(grad.clamp_(-0.03, 0.03), alpha=-10).clamp_(-1, 1)
    for parameter in f.parameters():
        parameter.requires_grad_(True)
    return x.detach()


def paper_loop(f: nn.Module, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return lambda y: langevin(f, noise(BATCH, generator), STEPS, generator)


def paper_ours(f: nn.Module, seed: int, steps: int = STEPS) -> Sample:
    sampler = fl.LangevinSampler(f, steps, maximize=True)
    iterations = itertools.count()
    return lambda y: sampler(n=BATCH, seed=fl.noise.fold_in(seed, next(iterations)))


def jem_loop(f: nn.Module, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    buffer = noise(CAPACITY, generator)
    block = CAPACITY // CLASSES

    def sample(y: Tensor) -> Tensor:
        slots = y * block + torch.randint(block, (BATCH,), generator=generator)
        fresh = torch.rand(BATCH, 1, 1, 1, generator=generator) < REINIT
        x = torch.where(fresh, noise(BATCH, generator), buffer[slots])
        f.eval()
        x = langevin(functools.partial(f, y=y), x, STEPS, generator)
        f.train()
        buffer[slots] = x
        return x

    return sample


def jem_ours(f: nn.Module, seed: int, steps: int = STEPS) -> Sample:
    sampler = fl.LangevinSampler(f, steps, maximize=True)
    buffer = fl.ReplayBuffer(CAPACITY, SHAPE, seed=seed, reinit=REINIT, n_classes=CLASSES)
    iterations = itertools.count()

    def sample(y: Tensor) -> Tensor:
        iteration = next(iterations)
        slots, x = buffer.draw(BATCH, iteration, y=y)
        x = sampler(x, seed=fl.noise.fold_in(seed, iteration), y=y)
        buffer.put(slots, x)
        return x

    return sample


def uva_loop(f: nn.Module, seed: int) -> Sample:
    generator, choices = torch.Generator().manual_seed(seed), random.Random(seed)
    examples = list(noise(BATCH, generator).split(1))

    def sample(y: Tensor) -> Tensor:
        nonlocal examples
        fresh = int((torch.rand(BATCH, generator=generator) < REINIT).sum())
        old = torch.cat(choices.choices(examples, k=BATCH - fresh))
        x = torch.cat([noise(fresh, generator), old])
        x = uva_chain(f, x, STEPS, generator)
        examples = (list(x.split(1)) + examples)[:CAPACITY]
        return x

    return sample


def uva_ours(f: nn.Module, seed: int, steps: int = STEPS) -> Sample:
    sampler = uva_sampler(f, steps)
    buffer = fl.ReplayBuffer(CAPACITY, SHAPE, seed=seed, reinit=REINIT, kind="fifo")
    buffer.put(None, noise(BATCH, torch.Generator().manual_seed(seed)))
    iterations = itertools.count()

    def sample(y: Tensor) -> Tensor:
        iteration = next(iterations)
        slots, x = buffer.draw(BATCH, iteration)
        x = sampler(x, seed=fl.noise.fold_in(seed, iteration))
        buffer.put(slots, x)
        return x

    return sample


def uva_sampler(f: nn.Module, steps: int, noise_std: float = 0.005) -> fl.LangevinSampler:
    return fl.LangevinSampler(
        f, steps, 10.0, noise_std, maximize=True, clamp=(-1, 1), grad_clip=0.03,
        noise_order="before",
    )  # fmt: skip


def noise(n: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand((n, *SHAPE), generator=generator) - 1


def paper_loss(f: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    gap = f(x).mean() - f(samples).mean()
    return -gap, gap


def jem_loss(f: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    gap = f(x).mean() - f(samples).mean()
    return nn.functional.cross_entropy(f.logits(x), y) - gap, gap


def uva_loss(f: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = f(x), f(samples)
    gap = real.mean() - fake.mean()
    return 0.1 * (real.square() + fake.square()).mean() - gap, gap


class Style(NamedTuple):
    """One way to train. ``loss`` of (f, x, labels of x, samples) returns (loss, gap)."""

    network: Callable[[], nn.Module]
    loop: Callable[..., Sample]
    ours: Callable[..., Sample]
    loss: Callable[..., tuple[Tensor, Tensor]]
    data_noise: float
    beta1: float = 0.9
    max_norm: float = math.inf


STYLES = {
    "short-run": Style(
        functools.partial(fl.ConvEnergy, 1, 8, WIDTH), paper_loop, paper_ours, paper_loss, 0.03
    ),
    "JEM": Style(Classifier, jem_loop, jem_ours, jem_loss, 0.03),
    "UvA": Style(
        functools.partial(fl.ConvEnergy, 1, 8, WIDTH, activation="silu"),
        uva_loop, uva_ours, uva_loss, 0.005, beta1=0.0, max_norm=0.1,
    ),
}  # fmt: skip


def train(style: Style, variant: str, seed: int) -> Iterator[tuple[float, float, float]]:
    """Run a training loop; yields (gap, sampling seconds, all seconds) of every iteration."""
    torch.manual_seed(seed)
    f = style.network()
    chains = seed + (2000 if variant == AGAIN else 1000)
    if variant in (LOOP, AGAIN):
        sample = style.loop(f, chains)
    else:
        sample = style.ours(f, chains, STEPS if variant == OURS else STEPS // 2)
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-3, betas=(style.beta1, 0.999))
    (images, labels), generator = digits(), torch.Generator().manual_seed(seed)
    while True:
        begin = time.perf_counter()
        indices = torch.randint(len(images), (BATCH,), generator=generator)
        x = images[indices]
        x = x + style.data_noise * torch.randn(x.shape, generator=generator)
        sampled_labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        sampling = time.perf_counter()
        samples = sample(sampled_labels)
        sampled = time.perf_counter()
        loss, gap = style.loss(f, x, labels[indices], samples)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(f.parameters(), style.max_norm)
        optimizer.step()
        end = time.perf_counter()
        yield gap.item(), sampled - sampling, end - begin


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_images("digits")
    return data.batch(range(len(data))), torch.from_numpy(data.labels)


def check() -> None:
    """SystemExit unless each loop and our sampler compute the same noiseless chain in float64."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x, y = noise(BATCH, generator), torch.arange(BATCH) % CLASSES
    for name, style in STYLES.items():
        f = style.network().double()
        for parameter in f.parameters():
            parameter.data *= 3  # with the initial weights no gradient would reach the clip
        start = x.double()
        if name == "UvA":
            expected = uva_chain(f, start, 5, generator, noise_std=0.0)
            ours = uva_sampler(f, 5, noise_std=0.0)(start)
        else:
            labels = {"y": y} if name == "JEM" else {}
            expected = langevin(functools.partial(f, **labels), start, 5, generator, noise_std=0.0)
            ours = fl.LangevinSampler(f, 5, 1.0, 0.0, maximize=True)(start, **labels)
        error = float((ours - expected).abs().max())
        if not error <= 1e-9:
            raise SystemExit(f"train_peers: {name} is off the loop's chain by {error:.1e}")


def same(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Student's test that runs a and b have equal means over the seeds.

    t = (mean b - mean a) / (s sqrt(1 / n_a + 1 / n_b)) with the pooled standard deviation s; p is
    the probability of a larger |t| if the means are equal. A run is represented by its mean gap
    over the last third of the iterations.
    """
    from scipy import stats  # takes seconds to import

    freedom = len(a) + len(b) - 2
    difference = statistics.fmean(b) - statistics.fmean(a)
    squares = sum((value - statistics.fmean(run)) ** 2 for run in (a, b) for value in run)
    spread = math.sqrt(squares / freedom)
    t = difference / (spread * math.sqrt(1 / len(a) + 1 / len(b)))
    return {
        "difference": difference,
        "spread": spread,
        "t": t,
        "p": float(2 * stats.t.sf(abs(t), freedom)),
    }


def distance(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """The curves' root mean square difference over the iterations, averaged over the seeds."""
    return statistics.fmean(
        math.sqrt(statistics.fmean((u - v) ** 2 for u, v in zip(*pair, strict=True)))
        for pair in zip(a, b, strict=True)
    )


def measure(name: str, iterations: int, seeds: int) -> list[dict[str, Any]]:
    """Run all variants of a style; returns one row per variant."""
    variants = (LOOP, AGAIN, OURS, CONTROL)
    gaps: dict[str, list[list[float]]] = {variant: [] for variant in variants}
    seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    shuffle = random.Random(0)
    for seed in range(seeds):
        runs = {variant: train(STYLES[name], variant, seed) for variant in variants}
        for gap in gaps.values():
            gap.append([])
        for iteration in range(iterations):
            for variant in shuffle.sample(variants, len(variants)):
                gap, *times_taken = next(runs[variant])
                gaps[variant][-1].append(gap)
                if iteration >= min(WARM_UP, iterations - 1):
                    seconds[variant].append((times_taken[0], times_taken[1]))
    late = {variant: [last_third(run) for run in gaps[variant]] for variant in variants}
    rows = []
    for variant in variants:
        times, base = (list(zip(*seconds[each], strict=True)) for each in (variant, LOOP))
        rows.append({
            "style": name,
            "variant": variant,
            "gap": [[float(f"{value:.5g}") for value in run] for run in gaps[variant]],
            "late_gap": late[variant],
            "distance": distance(gaps[LOOP], gaps[variant]),
            "same_as_loop": None if variant == LOOP else same(late[LOOP], late[variant]),
            "sampling": timing.summary(times[0]),
            "iteration": timing.summary(times[1]),
            "sampling_speedup": timing.speedup(base[0], times[0]),
            "iteration_speedup": timing.speedup(base[1], times[1]),
        })  # fmt: skip
    return rows


def last_third(gaps: Sequence[float]) -> float:
    return statistics.fmean(gaps[-max(1, len(gaps) // 3) :])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("train_peers", device=None, quick="three iterations with two seeds")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.quick:
        options.iterations, options.seeds = 3, 2
    torch.set_num_threads(options.threads)
    check()
    file = ResultFile(
        options.out / "train_peers-cpu.json", "train_peers", device="cpu", threads=options.threads,
        quick=options.quick, iterations=options.iterations, seeds=options.seeds, batch=BATCH,
        steps=STEPS, width=WIDTH,
    )  # fmt: skip
    for name in STYLES:
        file.add(*measure(name, options.iterations, options.seeds))
        print(name, flush=True)
    print(f"wrote {file.path}")


if __name__ == "__main__":
    main()
