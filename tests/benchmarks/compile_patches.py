"""Compile the convolutions in Gluon ahead of time, as the fused engine would launch them: JSON.

    python -m tests.benchmarks.compile_patches

A list with the width, the prediction and the machine code of every launch for sm_90, of the paper's
networks in fp16 at batch 64. Needs no GPU, but a Python without TRITON_INTERPRET.
"""

import json
import sys
from typing import Any

from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks import patch_kernels, patches
from tests.kernels.compile_triton import TYPES, Recorder, compiled
from tests.kernels.compile_triton_conv import launches


class GluonRecorder(Recorder):
    def source(self) -> GluonASTSource:
        source = super().source()
        for name, value in self.options.items():
            if isinstance(value, TensorDescriptor):
                dtype = TYPES[value.base.dtype]
                source.signature[name] = f"tensordesc<{dtype}{value.block_shape},{value.layout!r}>"
        return GluonASTSource(source.fn, source.signature, source.constants, source.attrs)


def recorded(launch: Recorder) -> tuple[GluonRecorder, patches.Values] | None:
    """A launch of the package as one in Gluon, with the package's arguments."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    if not patches.is_supported(values):
        return None
    recorder = GluonRecorder(getattr(patch_kernels, f"patch_{patches.kind_of(values)}_kernel"))
    patches.PatchKernel(launch.kernel, recorder)[(1,)](*launch.args, **launch.options)
    return recorder, values


def main() -> None:
    results: list[dict[str, Any]] = []
    for width in (32, 64, 128):
        for name, launch in launches("fp16", width=width).items():
            found = recorded(launch)
            if found is not None:
                recorder, values = found
                result = {"width": width, "launch": name} | patches.predicted(values)
                result["programs"] = patches.grid_of(values)
                result["passes"] = patches.passes_of(values)
                results.append(result | compiled(recorder, 90))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
