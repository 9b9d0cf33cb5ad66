"""The step's time per variant, for pytest-benchmark: ``pytest benchmarks -k 64x3x32x32``.

Cases run one after another here, which suits comparing a variant with its earlier times
(``--benchmark-autosave``, ``--benchmark-compare``). ``python -m benchmarks.step`` measures ratios.
"""

import functools
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.variants import BASELINES, OURS, Case, cases, check, variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", BASELINES + OURS)
@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_step(case: Case, name: str, benchmark: BenchmarkFixture) -> None:
    chosen = {variant.name: variant for variant in variants(case, name == "torch.compile")}
    if name not in chosen:
        pytest.skip(f"{name} does not take this step on {DEVICE}")
    check(case, chosen[name])
    sets = timing.buffer_sets(case.bytes_moved * 2 // 3, DEVICE)
    steps = [functools.partial(chosen[name].take, *case.tensors()) for _ in range(sets)]
    run, count = _repeated(steps)
    benchmark(run)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median / count
    benchmark.extra_info.update(
        steps_per_round=count,
        us_per_step=seconds * 1e6,
        bytes=case.bytes_moved,
        gb_per_s=case.bytes_moved / seconds / 1e9,
        percent_of_copy=100 * _copy_seconds(case.bytes_moved) / seconds,
        ns_per_element=seconds / case.elements * 1e9,
    )


def _repeated(steps: list) -> tuple:
    """Return a function that takes steps and waits for them, and how many steps it takes."""
    if DEVICE.type == "cpu":
        return steps[0], 1
    replay, count = timing.capture(steps)
    replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    # At least 2 ms, so that some 10 us for a launch and a wait are negligible.
    replays = 1 + int(2e-3 / (time.perf_counter() - start))

    def run() -> None:
        for _ in range(replays):
            replay()
        torch.cuda.synchronize()

    return run, replays * count


@functools.lru_cache
def _copy_seconds(bytes_moved: int) -> float:
    sampler = timing.sampler(timing.copy_steps(bytes_moved, DEVICE), DEVICE, least=1e-3)
    return timing.summary([sampler() for _ in range(11)])["median"]
