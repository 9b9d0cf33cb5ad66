"""Compile the Triton kernels ahead of time, as launches would, and print what came out as JSON.

    python tests/kernels/compile_triton.py 80 90 100

Needs no GPU, but a Python without TRITON_INTERPRET. Every launch in LAUNCHES is made on CPU tensors
with the kernel replaced by a recorder; its arguments give the types, alignments and constants that
the launch would be compiled for.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton as compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlangevin.kernels import triton_backend as triton
from fastlangevin.kernels import triton_step as triton_kernels
from fastlangevin.kernels.philox import Address

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
ADDRESS = {"seed": 2**64 - 1, "step": 5, "first_chain": 0}
OPTIONS = {"step_size": 0.5, "noise_std": 0.1, "clamp": (-1.0, 1.0), **ADDRESS}
_IN_ORDER = r"\b(?:LDG|LDGSTS|UTMALDG|STG|PREEXIT|ACQBULK)\b"
CUOBJDUMP = Path(compiler.__path__[0]) / "backends/nvidia/bin/cuobjdump"


def images(dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(64, 3, 32, 32, dtype=dtype, memory_format=layout)


def step(x: torch.Tensor, grad: torch.Tensor | None, **options: Any) -> None:
    triton.step_(x, grad, None, **OPTIONS | options)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAUNCHES = {
    "fp32": lambda: step(images(FP32), images(FP32)),
    "bf16": lambda: step(images(BF16), images(BF16)),
    "fp32, bf16 grad": lambda: step(images(FP32), images(BF16)),
    "no noise": lambda: step(images(FP32), images(FP32), noise_std=0.0),
    "noise alone": lambda: step(images(FP32), None),
    "channels_last": lambda: step(images(FP32, True), images(FP32, True)),
    "channels_last fp16 grad, all options": lambda: step(
        images(FP32),
        images(FP16, True),
        step_size=torch.ones(64),
        noise_std=torch.ones(64),
        grad_clip=1.0,
        noise_last=True,
        rng_state=torch.zeros(2, dtype=torch.int64),
    ),
    "normal": lambda: triton.fill(
        (64, 3, 32, 32), Address(stream=0, **ADDRESS), torch.device("cpu"), uniform=False
    ),
}


class Recorder:
    """Stands in for a kernel: keeps the arguments of its last launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Any:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options

    def source(self) -> ASTSource:
        """The kernel, specialised as Triton does it for these arguments."""
        values = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options
        types, constants, aligned = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value, specialised = values[name], not self.kernel.params[i].do_not_specialize
            at_hand = value.data_ptr() if isinstance(value, torch.Tensor) else value
            one = specialised and type(value) is int and value == 1
            if self.kernel.params[i].is_constexpr or value is None or one:
                types[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                types[name] = "*" + TYPES[value.dtype]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
            if specialised and isinstance(at_hand, int) and at_hand % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, types, constants, aligned)


def compiled(recorder: Recorder, arch: int) -> dict[str, Any]:
    """What the machine code has and uses; ``local`` are the bytes that registers spill to memory.

    ``copies`` are the instructions that copy to shared memory, ``awaited`` the bytes that barriers
    wait for. ``order`` has the instructions that read and write global memory, and those that let
    the next launch begin (PREEXIT) and wait for the one before (ACQBULK), by their first places.
    ``shared_order`` has the barriers and the stores to shared memory after the last asynchronous
    product, also by their first places.
    """
    options = {k: v for k, v in recorder.options.items() if k not in recorder.kernel.arg_names}
    target = GPUTarget("cuda", arch, 32)
    kernel = compiler.compile(recorder.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx, after_products = kernel.asm["ptx"], usage.rpartition("WARPGROUP.DEPBAR")[2]
    return {
        "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"],
        "loads": sorted(set(re.findall(r"ld\.global\.(\S+)", ptx))),
        "stores": sorted(set(re.findall(r"st\.global\.(\S+)", ptx))),
        "shared": kernel.metadata.shared,
        "copies": sorted(set(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", usage))),
        "shared_order": list(dict.fromkeys(re.findall(r"\b(?:BAR|STSM?)\b", after_products))),
        "order": list(dict.fromkeys(re.findall(_IN_ORDER, usage))),
        "awaited": sorted({int(n) for n in re.findall(r"expect_tx\S* _, \S+, (\d+)", ptx)}),
        "matrix": sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b[.\w]*", usage))),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
        "bounds": sorted(set(re.findall(r"\b(?:min|max)\S*\.f32", ptx))),
    }


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    for name, launch in LAUNCHES.items():
        which = "step_kernel" if name != "normal" else "fill_kernel"
        recorder = Recorder(getattr(triton_kernels, which))
        with mock.patch.object(triton_kernels, which, recorder):
            launch()
        results[name] = {arch: compiled(recorder, int(arch)) for arch in sys.argv[1:]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
