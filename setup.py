"""Builds fastlangevin._native with CMake; everything else about the package is in pyproject.toml.

The extension is optional: where it cannot be built (no compiler), the package installs without it
and runs in plain torch and Triton. ``FASTLANGEVIN_CUDA=1`` demands the CUDA kernels, ``0`` leaves
them out; by default they are built where nvcc is found. ``CMAKE_CUDA_ARCHITECTURES`` is honoured.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # A CUDA part that nobody asked for by name must not cost the CPU part.
        why_not = "FASTLANGEVIN_CUDA=0" if cuda_choice() == "0" else "no nvcc was found"
        if cuda_choice() != "0" and find_nvcc() is not None:
            try:
                return self.build_by_cmake(ext, None)
            except (OSError, subprocess.CalledProcessError) as error:
                if cuda_choice() == "1":
                    raise
                why_not = f"{find_nvcc()} could not build it, as pip install -v shows"
                self.warn(f"no native kernels for CUDA: {type(error).__name__}")
        try:
            self.build_by_cmake(ext, why_not)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"no native kernels: {type(error).__name__}")

    def build_by_cmake(self, ext: Extension, why_no_cuda: str | None) -> None:
        import pybind11

        cuda = why_no_cuda is None
        folder = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name))
            .resolve()
            .parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTLANGEVIN_CUDA": "ON" if cuda else "OFF",
            "FASTLANGEVIN_WHY_NO_CUDA": why_no_cuda or "",
        }
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
            if "CMAKE_CUDA_ARCHITECTURES" in os.environ:
                options["CMAKE_CUDA_ARCHITECTURES"] = os.environ["CMAKE_CUDA_ARCHITECTURES"]
        root = Path(__file__).parent.resolve()
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", root, "-B", folder, *definitions], check=True)
        subprocess.run(["cmake", "--build", folder], check=True)


def cuda_choice() -> str:
    choice = os.environ.get("FASTLANGEVIN_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"FASTLANGEVIN_CUDA must be 0 or 1, got {choice!r}")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit("FASTLANGEVIN_CUDA=1, but no nvcc was found; set CUDA_HOME or PATH")
    return choice


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=str(Path(home) / "bin")) or shutil.which("nvcc")


setup(
    ext_modules=[Extension("fastlangevin._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
