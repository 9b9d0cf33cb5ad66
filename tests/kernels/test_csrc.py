"""The C++ sources on their own: sanitized tests, and what nvcc makes of the CUDA kernels."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# As CMakeLists.txt compiles them.
SOURCES = ROOT / "csrc"
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-I{SOURCES}", str(SOURCES / "cuda" / "step.cu")]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("c++", "cmake", "ninja")),
    reason="a C++ compiler, cmake and ninja are needed",
)


def run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not run from a checkout")
def test_cpp_tests_pass_under_sanitizers(tmp_path):
    options = ["-DFASTLANGEVIN_TESTS=ON", f"-DCMAKE_CXX_FLAGS={SANITIZERS}"]
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=None", *options)
    run("cmake", "--build", tmp_path)
    report = run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert re.search(r"100% tests passed.* out of 6", report)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Where CMake is run several times, and looks for the C++ compiler once."""
    return tmp_path_factory.mktemp("cmake")


@needs_compiler
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not run from a checkout")
@pytest.mark.parametrize(
    ("listed", "want"),
    [
        ("75 80 90", "80-real;90"),  # nvcc before 12.8
        ("", "80-real;90-real;100-real;120"),  # one that cannot say
    ],
)
def test_cuda_architectures_are_those_that_nvcc_knows(build, listed, want):
    nvcc = build / "nvcc"
    lines = [f"echo compute_{number}" for number in listed.split()]
    nvcc.write_text("\n".join(["#!/bin/sh", '[ "$1" = --list-gpu-arch ] || exit 1', *lines, ""]))
    nvcc.chmod(0o755)
    options = ["-DFASTLANGEVIN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    # It goes no further than this nvcc that compiles nothing.
    assert f"CUDA architectures: {want}\n" in done.stdout


@pytest.mark.slow
@needs_nvcc
def test_cuda_kernels_compile_everywhere_without_spills(tmp_path):
    architectures = [80, 90, 100, 120]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    output = ["-Xptxas", "-v", "--threads", "2", "-c", "-o", tmp_path / "step.o"]
    report = run(NVCC, *NVCC_FLAGS, *codes, *output)
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'", report)
    assert {int(a) for _, a in kernels} == set(architectures)
    # Three dtypes of x by three of the gradient, the strided kernel and the noise.
    assert len(kernels) == 11 * len(architectures)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(spills) == len(kernels)
    assert set(spills) == {("0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    # 64 registers let 1,024 threads share a multiprocessor, half of what it can hold.
    assert max(registers) <= 64


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / "step.ptx"
    run(NVCC, *NVCC_FLAGS, "-arch=sm_80", "-ptx", "-o", path)
    return path.read_text()


@pytest.mark.slow
@needs_nvcc
def test_cuda_kernels_move_16_bytes_at_a_time(ptx):
    entries = ptx.split(".entry ")[1:]
    linear = [entry for entry in entries if "linear_step" in entry.split("(")[0]]
    assert len(linear) == 9
    for entry in linear:
        assert re.search(r"ld\.global\.v4\.[fu]32", entry)
        assert re.search(r"st\.global\.wb\.v4\.[fu]32", entry)


@pytest.mark.slow
@needs_nvcc
def test_cuda_clamps_compare_and_select_as_the_cpus_do(ptx):
    """The bits of -0 and NaN that come out of PTX's min and max are others."""
    assert not re.search(r"\b(?:min|max)\S*\.f32", ptx)
