"""Fixtures for every test: the backends that can run here, and settings of the process."""

import dataclasses
import functools
import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

# Everything here is small: several threads would only wait for one another. Also in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Without a GPU Triton's kernels run interpreted: set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastlangevin.kernels import extension, triton_backend
from fastlangevin.learn.data import arrays
from fastlangevin.learn.data.arrays import ArraySource
from tests.backends import SERVING, choose, instruction_sets

TILE_BYTES = triton_backend._TILE_BYTES

# A shell has SIGINT ignored for what it runs in the background, and so for the runs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


# All modules and tests stay until the end. To look for garbage among them takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n`, each worker runs neighbouring tests, which share fixtures and caches."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(params=SERVING, ids=lambda place: f"{place[0]} on {place[1].type}")
def place(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """Every backend of the step on every kind of device that it serves here.

    Those that serve none are skipped, with the reason, once: test_step.py::test_backends_by_name.
    """
    return request.param


@pytest.fixture
def backend(place: tuple[str, torch.device]) -> str:
    return place[0]


@pytest.fixture
def device(place: tuple[str, torch.device]) -> torch.device:
    return place[1]


@pytest.fixture(scope="session", autouse=True)
def _tritons_interpreter() -> None:
    """Triton's interpreter, with bfloat16 as on GPUs, and without what only costs time.

    In bfloat16 the interpreter truncates where GPUs round, loses subnormals and NaN, and multiplies
    matrices of the bits as if those were integers. Its check of every integer operation for
    overflow takes half of its time, and is only looked at in debug mode. Around every launch it
    replaces the functions of `triton.language` and puts them back: here they stay replaced.
    """
    if ("triton", torch.device("cpu")) not in SERVING:
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), to.scalar)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_widened(self, v) for v in (a, b)), *rest)

    def _widened(self: Any, v: Any) -> Any:
        return cast_impl(self, v, tl.float32) if v.dtype.scalar == tl.bfloat16 else v

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return  # another version of Triton, which is slower and no less right
    patch, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        modules = frozenset(id(v) for v in (tl, tl.core) if v in function.__globals__.values())
        if modules not in scopes:
            scopes[modules] = patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


@pytest.fixture
def real_tiles() -> Iterator[None]:
    """Triton's programs with the tiles that GPUs get, also where they are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "_TILE_BYTES", TILE_BYTES)
        yield


@pytest.fixture(scope="session", autouse=True)
def _large_tiles() -> Iterator[None]:
    """Interpreted programs run one by one, and cost the same whatever their tile: so few of them.

    Tests of the tiles themselves use the fixture `real_tiles`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if ("triton", torch.device("cpu")) in SERVING:
            patch.setattr(triton_backend, "_TILE_BYTES", 16 * TILE_BYTES)
        yield


@pytest.fixture(scope="session", autouse=True)
def _without_tensorboard() -> Iterator[None]:
    """Training runs write no TensorBoard events: importing it takes seconds in every process."""
    find_spec = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name == "tensorboard" else find_spec(name, *more),
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def _without_waiting_for_disks() -> Iterator[None]:
    """Nothing waits until a file is on the disk: training writes hundreds of small files.

    tests/learn/test_interruptions.py simulates power cuts by what was synced.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _without_measured_rates() -> Iterator[None]:
    """Nothing waits for the rate of this machine's products, which takes seconds.

    tests/core/test_roofline.py measures it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.bench.matrix_rate", lambda *_: 1e10)
        yield


@pytest.fixture(scope="session", autouse=True)
def _digits_that_are_parsed_once() -> Iterator[None]:
    """Hundreds of tests read scikit-learn's digits, whose text takes longer than a short run.

    Every reader gets arrays of its own.
    """
    read = functools.cache(arrays.read_digits)

    def read_digits() -> ArraySource:
        name, pixels, labels = read()
        return ArraySource(name, pixels.copy(), labels.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "read_digits", read_digits)
        yield


@pytest.fixture(params=instruction_sets())
def instruction_set(request):
    best = extension.library.instruction_set()
    choose(request.param)
    yield request.param
    choose(best)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
