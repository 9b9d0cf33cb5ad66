"""The rates that a machine reaches."""

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


def test_a_copys_bandwidth_counts_what_it_reads_and_what_it_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = []
    monkeypatch.setattr(roofline, "_best", lambda run, device: copies.append(run()) or 0.5)
    assert roofline.copy_bandwidth.__wrapped__(CPU, 1) == 2 * copies[0].nbytes / 0.5
    assert bool(copies[0].all())  # the ones of the source
