import re

from fastlangevin.cli.options import Count, Device
from fastlangevin.cli.outputs import Result, note


def bench(
    target: str = "digits", /, *, shape: str | None = None, batch: Count = 64, steps: Count = 4,
    seconds: float = 10.0, precision: list[str] | None = None, device: Device = "auto",
) -> Result:  # fmt: skip
    """Time a step of an energy's chain with a plain loop and with every engine.

    Args:
        target: A training config, or your own energy as module:attribute. The attribute may be an
            nn.Module, or a function or class that returns one.
        shape: Shape of the state of one chain, such as 3,32,32 (default: the energy's).
        batch: Number of chains, 1 or more.
        steps: Number of steps of the timed chains, 1 or more.
        seconds: Approximate duration of the measurement, 0 or more.
        precision: Also time this precision: bf16, fp16, tf32 or fp32. Repeatable.
    """
    import torch

    from fastlangevin import bench as benchmark
    from fastlangevin.learn.build import choose_device, find_energy
    from fastlangevin.sampler import LangevinSampler

    if seconds < 0:
        raise ValueError(f"--seconds must be at least 0, got {seconds}")
    torch_device = choose_device(device)
    energy = find_energy(target).to(torch_device)
    if shape is None:
        sizes = getattr(energy, "shape", None)
    elif re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", shape):
        sizes = tuple(map(int, shape.split(",")))
    else:
        raise ValueError(f"--shape must be positive integers like 3,32,32, got {shape!r}")
    if sizes is None:
        raise ValueError(f"{target} has no attribute shape: give --shape, for example 3,32,32")
    x = 2 * torch.rand((batch, *sizes), dtype=torch.float32, device=torch_device) - 1
    explanation = LangevinSampler(energy, steps=steps).explain(x)
    note(f"timing {target}, {batch} chains on {torch_device}, for about {seconds:g} s")
    rows = benchmark.bench(energy, x, (None, *(precision or ())), steps, seconds)
    return Result(f"{explanation}\n\n{benchmark.to_text(rows)}")
