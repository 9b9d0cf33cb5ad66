"""Compile the convolution kernels ahead of time, as a fused score would launch them: JSON.

    python -m tests.kernels.compile_triton_conv [--all] [--early] 80 90 100

As compile_triton.py does it, for the paper's network at batch 64 and width 64. With --all,
every launch in fp16 and tf32, and the image's at width 32, and else one of each kind. With --early,
launches begin early.
"""

import contextlib
import json
import sys
from typing import Any
from unittest import mock

import torch

import fastlangevin as fl
from fastlangevin.gradients import fused_gpu
from fastlangevin.gradients import fused_gpu_plan as conv_plan
from fastlangevin.gradients.graph.conv_stack import conv_stack
from fastlangevin.gradients.graph.record import recognise
from fastlangevin.kernels import triton_backend as triton
from fastlangevin.kernels import triton_conv, triton_conv_grad
from tests.kernels.compile_triton import OPTIONS, Recorder, compiled

ENDS = "forward 0", "backward 0"


class Launches(Recorder):
    """Keeps the arguments of every launch, not of the last alone."""

    def __init__(self, kernel: Any, kept: list[Recorder]) -> None:
        super().__init__(kernel)
        self.kept = kept

    def __call__(self, *args: Any, **options: Any) -> None:
        launch = Recorder(self.kernel)
        launch(*args, **options)
        self.kept.append(launch)


def launches(precision: str, n: int = 64, width: int = 64) -> dict[str, Recorder]:
    """Of a step, with a GPU's tiles: forward 0, 1, ..., and backward to 0, which is the image's."""
    kept: list[Recorder] = []
    places = (
        (triton_conv, "forward_kernel"),
        (triton_conv_grad, "backward_kernel"),
        (triton_conv_grad, "image_kernel"),
    )
    with contextlib.ExitStack() as patches:
        for module, name in places:
            recorder = Launches(getattr(module, name), kept)
            patches.enter_context(mock.patch.object(module, name, recorder))
        patches.enter_context(mock.patch.object(triton, "available", return_value=None))
        stack = conv_stack(recognise(fl.ConvEnergy(width=width), torch.zeros(1, 3, 32, 32)))
        score = fused_gpu.FusedGradient(stack, n, torch.device("cpu"), precision)
        score.step_(torch.empty(n, 3, 32, 32), **OPTIONS)
    layers = len(kept) // 2
    names = [f"forward {i}" for i in range(layers)]
    names += [f"backward {i}" for i in reversed(range(layers))]
    return dict(zip(names, kept, strict=True))


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    every, conv_plan.EARLY = "--all" in sys.argv, "--early" in sys.argv
    architectures = [word for word in sys.argv[1:] if word.isdigit()]
    for precision in ("fp16", "tf32") if every else ("fp16", "bf16", "tf32"):
        for name, launch in launches(precision).items():
            # The others differ from the second in their sizes alone.
            if every or name[-1] == "1" or (precision == "fp16" and name in ("forward 3", *ENDS)):
                key = f"{precision} {name}"
                results[key] = {arch: compiled(launch, int(arch)) for arch in architectures}
    if every:
        launch = launches("fp16", width=32)["backward 0"]
        results["fp16 narrow backward 0"] = {a: compiled(launch, int(a)) for a in architectures}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
