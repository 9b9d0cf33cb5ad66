"""Are the kernels of this device right? The first check on a new GPU, before its tests.

    python -m benchmarks.device_checks --out DIR [--device cuda] [--quick]

compares the native step with the CPU's bit for bit, and the fused engine with float64 on smooth
networks of odd sizes. Memory that torch allocates is first filled with NaN, so that values which no
kernel wrote show. Writes DIR/checks-DEVICE.json after each check. The exit status is 1 if one
fails.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fused_step import BATCH, NETS, engine
from benchmarks.result_file import ResultFile, parser_of
from benchmarks.sanitize import DTYPES, SHAPES, options
from fastlangevin.kernels import native, triton_backend

# Of the norm of the gradient.
LIMITS = {"fp32": 1e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}
ADDRESS = {"seed": 2**63 + 11, "step": 5, "first_chain": 3}
Check = Callable[[], float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("device_checks", device="cuda", quick="one check of each kind")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    file = ResultFile(chosen.out / f"checks-{device.type}.json", "checks")
    for name, limit, check in checks(device, chosen.quick):
        row: dict[str, Any] = {"check": name, "limit": limit}
        try:
            row["error"] = check()
            row["right"] = row["error"] <= limit
        except Exception as error:  # the other checks still say something
            row |= {"right": False, "raised": f"{type(error).__name__}: {error}"}
        file.add(row)
        message = row.get("raised", f"{row.get('error', 0):.1e} of {limit:.0e}")
        print(f"{name}: {'right' if row['right'] else 'WRONG'}, {message}", flush=True)
    if not all(row["right"] for row in file.rows):
        raise SystemExit(1)


def checks(device: torch.device, quick: bool) -> Iterator[tuple[str, float, Check]]:
    """(name, the largest error allowed, a function that returns the error) of every check."""
    if native.available(device) is None:
        cases = list(itertools.product(SHAPES[1:2] if quick else SHAPES, DTYPES))
        for shape, dtype in cases[:1] if quick else cases:
            yield f"native {list(shape)} {dtype}", 0.0, lambda s=shape, d=dtype: bits(s, d, device)
    if triton_backend.available(device) is None:
        for (name, (make, shape)), precision in itertools.product(NETS.items(), LIMITS):
            if quick and (name, precision) != ("paper", "fp32"):
                continue
            if precision == "bf16" and device.type == "cpu":
                continue  # Triton's interpreter multiplies the bits of bfloat16 as integers
            yield (
                f"fused {name} {precision}",
                LIMITS[precision],
                lambda m=make, s=shape, p=precision: deviation(m().to(device), s, p),
            )


def bits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """How many elements of the native steps with every option differ from the CPU's."""
    generator, different = torch.Generator().manual_seed(0), 0
    cpu = torch.device("cpu")
    for cpu_options, device_options in zip(
        options(shape[0], cpu), options(shape[0], device), strict=False
    ):
        x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        x.view(-1)[0] = -0.0
        on_device, on_cpu = (
            take(x.to(target, copy=True), g.to(target), **step_options)
            for target, step_options in ((device, device_options), (cpu, cpu_options))
        )
        integers = torch.int32 if dtype.itemsize == 4 else torch.int16
        different += int((on_device.cpu().view(integers) != on_cpu.view(integers)).sum())
    return float(different)


def take(x: Tensor, g: Tensor, **step_options: Any) -> Tensor:
    step_options = {"step_size": 0.5, "noise_std": 0.1, **ADDRESS, **step_options}
    grad = step_options.pop("grad", g)
    return native.step_(
        x, grad, g.float() if step_options.pop("z", False) else None, **step_options
    )


def deviation(energy: nn.Module, shape: tuple[int, ...], precision: str) -> float:
    """The error of the fused gradient, relative to the norm of the one in float64."""
    device = next(energy.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x = (2 * torch.rand((BATCH, *shape), generator=generator) - 1).to(device)
    _, grad = engine(energy, shape, len(x), precision)(x, want_energies=True)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(energy.double()(leaf).sum(), leaf)
    error = float((grad - exact).norm() / exact.norm())
    return error if error == error else float("inf")  # NaN came from memory nobody wrote


if __name__ == "__main__":
    main()
