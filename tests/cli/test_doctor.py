"""doctor: what is installed, and what runs on this machine."""

from types import SimpleNamespace

import pytest
import torch

import fastlangevin as fl
from tests.cli.shared import Command


def test_doctor_lists_backends_and_versions(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions, optional packages, and each backend with the reason where it does not serve."""
    reasons = {"native": "no compiler was found", "triton": None, "reference": None}
    monkeypatch.setattr("fastlangevin.doctor.backend_status", lambda device: reasons)
    library = SimpleNamespace(
        CUDA=False,
        WHY_NO_CUDA="no nvcc was found",
        instruction_set=lambda: "avx2",
        why_no_amx=lambda: "the system refuses",
        matrix_unit=lambda: False,
    )
    monkeypatch.setattr("fastlangevin.kernels.extension.library", library)
    found = {"pyarrow": "99.9", "torch": torch.__version__}
    monkeypatch.setattr("fastlangevin.doctor._installed", found.get)
    result = command("doctor")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    said = {name: rest for name, rest in lines}
    assert said["fastlangevin"] == fl.__version__
    assert said["torch"].startswith(torch.__version__)
    assert said["pyarrow"] == "99.9"
    assert said["kernels"] == (
        "for CPUs (here avx2, no AMX: the system refuses), not CUDA (no nvcc was found)"
    )
    library.instruction_set, library.why_no_amx = (lambda: "amx"), (lambda: "")
    library.matrix_unit = lambda: True
    assert "(here amx, float32 by tiles (bf16x6) where" in command("doctor").stdout
    assert said["tensorboard"] == "not installed (for TensorBoard logs)"
    assert said["native"] == "no: no compiler was found"
    assert said["triton"] == "available"
    assert said["reference"] == "available"


def test_doctor_tells_the_truth(command: Command) -> None:
    """Of the backends here: as many lines say `available` as backends do, on each device."""
    from fastlangevin.step import backend_status

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    want = sum(list(backend_status(device).values()).count(None) for device in devices)
    result = command("doctor").stdout
    assert result.count("available") == want
    assert ("no: torch" in result) == (not torch.cuda.is_available())
