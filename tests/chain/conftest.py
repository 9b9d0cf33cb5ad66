"""Fixtures of the tests of CUDA graphs."""

import functools

import pytest

from fastlangevin import step
from fastlangevin.gradients import passes, select
from fastlangevin.gradients.explicit import ExplicitGradient
from fastlangevin.gradients.trace import rewrite
from fastlangevin.kernels import triton_backend
from tests.chain.shared import CPU, OnCuda, taped_step_


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = triton_backend.available(CPU)
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    monkeypatch.setattr(
        select, "ExplicitGradient", functools.partial(ExplicitGradient, inplace=True)
    )
    monkeypatch.setattr(passes, "Activation", OnCuda)
    # Traces keep torch's convolutions, and bring values into channels_last as they do on a GPU.
    monkeypatch.setattr(rewrite, "_is_on_cpu", lambda draft: False)
    monkeypatch.setitem(step._STEPS, "triton", taped_step_)
