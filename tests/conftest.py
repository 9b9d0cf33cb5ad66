"""What several test files share: the backends that can run here."""

import os

# Everything here is small: several threads would only wait for one another. Also in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from fastlangevin.step import backend_status

SERVING = [name for name, reason in backend_status(torch.device("cpu")).items() if reason is None]


@pytest.fixture(params=SERVING)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the step that serves the CPU.

    Those that do not are skipped, with their reason, once: test_step.py::test_backends_by_name.
    """
    return request.param
