"""The energies of ``python -m benchmarks.networks``: chains on them, and the command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl

if not (Path(__file__).resolve().parents[2] / "benchmarks" / "networks").is_dir():
    pytest.skip("benchmarks are not installed", allow_module_level=True)
from benchmarks import report
from benchmarks.networks import __main__ as command
from benchmarks.networks import measure
from benchmarks.networks.cases import Built, Case, cases

Run = Callable[..., dict[str, Any]]
CASES = [pytest.param(case.small(), id=case.name) for case in cases()]
# Of the same operators as others.
ALIKE = ("wide residual 28-10", "wide residual, label", "residual, spectral norm by hook")


def plain_loop(case: Case, built: Built, noise: Tensor, create_graph: bool = False) -> Tensor:
    x = built.x if create_graph else built.x.clone().requires_grad_()
    for z in noise:
        energies = built.energy(x, **built.kwargs)
        (grad,) = torch.autograd.grad(energies.sum(), x, create_graph=create_graph)
        x = x - case.step_size * grad + case.noise_std * z
        x = x if create_graph else x.detach().requires_grad_()
    return x


def draw_noise(case: Case, built: Built) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((case.steps, *built.x.shape), generator=generator, dtype=torch.float64)


def test_names_are_unique_and_there_are_many() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) >= 26


@pytest.mark.parametrize("case", CASES)
def test_chains_have_one_energy_each_and_do_not_see_one_another(case: Case) -> None:
    built = case.build(torch.float64)
    x = built.x
    energies = built.energy(x, **built.kwargs)
    assert energies.shape in ((case.batch,), (case.batch, 1))
    others = x.clone()
    others[1] += 0.5
    changed = built.energy(others, **built.kwargs)
    torch.testing.assert_close(changed[[0, 2]], energies[[0, 2]], rtol=1e-12, atol=1e-12)
    assert abs(changed[1] - energies[1]) > 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case.id not in ALIKE])
def test_chains_equal_the_plain_loop_also_after_changes(case: Case) -> None:
    built = case.build(torch.float64)
    noise = draw_noise(case, built)
    sampler = fl.LangevinSampler(built.energy, case.steps, case.step_size, case.noise_std)

    def check() -> Tensor:
        want = plain_loop(case, built, noise).detach()
        got = sampler(built.x, noise=noise, **built.kwargs)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        return want

    first = check()
    built.kwargs.update({name: value.flip(0) for name, value in built.kwargs.items()})
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.mul_(1.2)
    assert (check() - first).abs().max() > 1e-8


@pytest.mark.parametrize("case", [case for case in CASES if case.id not in ALIKE])
def test_differentiable_chains_have_the_plain_loops_gradients(case: Case) -> None:
    built = case.build(torch.float64)
    noise, x0 = draw_noise(case, built), built.x.clone().requires_grad_()
    leaves = [x0, *(p for p in built.module.parameters() if p.requires_grad)]
    sampler = fl.LangevinSampler(built.energy, case.steps, case.step_size, case.noise_std)
    ours = sampler(x0, noise=noise, differentiable=True, **built.kwargs)
    loops = plain_loop(case, built._replace(x=x0), noise, create_graph=True)
    got, want = (
        torch.autograd.grad(x.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (ours, loops)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_same_case_in_another_dtype_is_its_rounding() -> None:
    case = cases()[0].small()
    single, double = case.build(), case.build(torch.float64)
    torch.testing.assert_close(single.x.double(), double.x, rtol=0, atol=1e-7)
    for one, other in zip(single.module.parameters(), double.module.parameters(), strict=True):
        assert torch.equal(one.double(), other)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs the command with as little timing as it can do, and returns its result file."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 1)

    def command_with(*arguments: str) -> dict[str, Any]:
        path = tmp_path / "networks.json"
        command.main([*arguments, "--quick", "--seconds", "0", "--json", str(path)])
        return json.loads(path.read_text())

    yield command_with
    torch.set_num_threads(threads)


def test_the_command_writes_rows_that_the_report_reads(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run("--energies", "paper", "2-128", "--gradient", "auto", "fused")
    rows = {(row["energy"], row["gradient"]): row for row in content["results"]}
    assert len(rows) == 6
    for row in rows.values():
        if "error" in row:
            continue
        assert row["seconds"]["median"] > 0
        assert row["gradient_error"] < 1e-5
    printed = capsys.readouterr().out
    report.main([str(tmp_path / "networks.json")])
    tables = capsys.readouterr().out
    for text in (printed, tables):
        assert '`gradient="auto"`: an engine other than autograd runs' in text
    assert "| MLP 2-128-128-1, `auto` |" in tables


def test_a_sampler_that_cannot_run_has_a_row_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError('LangevinSampler: gradient "fused" cannot run: no such layer')

    monkeypatch.setattr(fl.LangevinSampler, "choose_engine", refuse)
    content = run("--energies", "paper", "--gradient", "fused")
    loop, ours = content["results"]
    assert "error" not in loop
    assert ours["error"] == "no such layer"
    assert "cannot run" in capsys.readouterr().out


def test_the_name_of_an_energy_chooses_no_other_of_which_it_is_a_part(run: Run) -> None:
    content = run("--only", "MLP, LayerNorm", "residual", "--steps", "1")
    assert {row["energy"] for row in content["results"]} == {"MLP, LayerNorm", "residual"}


def test_a_failure_while_timing_leaves_the_other_energies(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(*arguments: Any) -> None:
        monkeypatch.undo()
        raise FloatingPointError("1 of 3 chains are not finite")

    monkeypatch.setattr(measure, "timed", fail_once)
    one, *others = run("--only", "residual", "MLP, LayerNorm", "--steps", "1")["results"]
    assert one["error"] == "1 of 3 chains are not finite"
    assert [row["gradient"] for row in others] == ["plain loop", "auto"]
    assert all(row["seconds"]["median"] > 0 for row in others)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_need_cuda(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--precision", precision])
    assert f'precision "{precision}" needs a CUDA device' in capsys.readouterr().err


def test_an_unknown_energy_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--energies", "nothing like it"])
    assert "--energies: expected parts of Swish tutorial" in capsys.readouterr().err
