"""The rate of products that a machine reaches."""

import pytest
import torch

from fastlangevin import roofline

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_matrix_rate_multiplies_random_numbers(
    precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant matrices would run faster than data do, on GPUs and on AMX."""
    seen = []
    monkeypatch.setattr(roofline.torch, "mm", lambda a, b: seen.append((a, b)))
    state = torch.get_rng_state()
    assert roofline.matrix_rate.__wrapped__(CPU, precision, 1) > 0
    assert torch.equal(torch.get_rng_state(), state)
    dtypes = {a.dtype for a, _ in seen}
    assert dtypes == {torch.float32} | ({torch.bfloat16} if precision else set())
    for matrix in (*seen[0], *seen[-1]):
        assert float(matrix.float().mean().abs()) < 0.01  # 10 standard errors of 2**20 normals
        assert abs(float(matrix.float().std()) - 1) < 0.01
    assert not torch.equal(*seen[0])
