"""The benchmarks of memory: gradients through a chain, by schedule, and the largest that fit."""

import json
import math

import pytest
import torch

CPU = torch.device("cpu")


def test_gradients_of_a_schedule_off_the_plain_loops_are_reported_and_not_raised(load):
    memory = load("chain_memory")
    case = memory.Case(steps=3, batch=2, width=2, size=8, device=CPU)
    net, x0 = case.make()
    chains, leaves = memory.chains(case, net, x0), [x0, *net.parameters()]
    chains = {name: chains[name] for name in ("plain loop", "step")}
    chains["rough"] = lambda: chains["step"]() * 1.001
    chains["not a number"] = lambda: chains["step"]() * math.nan
    rows = memory.check(chains, leaves)
    assert [row["differs"] for row in rows.values()] == [False, False, True, True]
    assert 1e-3 < rows["rough"]["deviation"] < 3e-3
    row = {"peak_bytes": 2**20, "seconds": {"median": 1.0}, **rows["rough"]}
    assert "differs by 2e-03" in load("report_memory").cell(row)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=["torch", "cuDNN", "another"],
)
def test_the_largest_case_is_the_last_before_the_memory_ends(load, monkeypatch, error):
    capacity = load("capacity")

    def differentiate(case, method):
        if case.width > 4:
            raise error

    monkeypatch.setattr(capacity, "differentiate", differentiate)
    monkeypatch.setattr(capacity.gc, "collect", int)  # which takes a tenth of a second here
    cases = [capacity.Case(16, 2, width, 8, CPU) for width in (2, 4, 8, 16)]
    if "illegal" in str(error):
        with pytest.raises(RuntimeError, match="illegal"):
            capacity.search("width", "none", cases, 60.0)
        return
    row = capacity.search("width", "none", cases, 60.0)
    assert (row["largest"], row["out_of_memory"]) == (4, True)


@pytest.mark.slow
def test_chain_memory_runs_and_draws(load, tmp_path, capsys):
    with torch.random.fork_rng([]):
        load("chain_memory").main(["--quick", "--out", str(tmp_path)])
    result = tmp_path / "chain_memory-cpu.json"
    content = json.loads(result.read_text())
    rows = {row["variant"]: row for row in content["results"]}
    assert set(rows) == {"plain loop", "torch checkpoint", "none", "step", "4 states", "64MiB"}
    assert not any(row["differs"] for row in rows.values())
    evaluations = {name: row["evaluations"] for name, row in rows.items()}
    # torch.utils.checkpoint evaluates twice forward; a budget measures a step; 4 states lack one.
    assert evaluations["plain loop"] == evaluations["none"] == 6
    assert (evaluations["step"], evaluations["4 states"]) == (12, 13)
    assert rows["4 states"]["peak_bytes"] < rows["step"]["peak_bytes"] < rows["none"]["peak_bytes"]
    assert content["figures"]["times"]["step_over_plain_loop"]["median"] > 0
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    load("report").main([str(result), "--plots", str(tmp_path)])
    assert "| plain loop |" in capsys.readouterr().out
    assert b"<svg" in (tmp_path / "chain_memory-cpu.svg").read_bytes()
