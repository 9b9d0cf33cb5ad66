"""The benchmarks' own code: interleaving, the report's tables, and its commands."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastlangevin as fl
from fastlangevin.kernels import extension
from fastlangevin.step import backend_status
from tests.benchmarks.shared import ROOT, python

PEERS = {"torchebm": "torchebm", "ebmkit": "ebm"}  # presets whose original is a package
GPU_SH = ROOT / "benchmarks" / "gpu.sh"
CPU = torch.device("cpu")


def test_interleave_calls_everyone_once_a_round(load):
    calls = []

    def sampler(name):
        return lambda: calls.append(name) or float(len(calls))

    seconds = load("timing").interleave({name: sampler(name) for name in "abc"}, rounds=20)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(calls) == 60
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1  # nobody always runs after the same one
    for name in "abc":  # a figure stands under the name that it was measured for
        assert seconds[name] == [i + 1 for i, called in enumerate(calls) if called == name]


def test_sampler_counts_every_step_that_it_divides_by(load, monkeypatch):
    timing = load("timing")
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    counts = Counter()

    def step(name, seconds):
        counts[name] += 1
        now[0] += seconds

    steps = [lambda: step("first", 1.0), lambda: step("second", 3.0)]
    assert timing.sampler(steps, CPU, least=40.0)() == 2.0
    assert counts["first"] == counts["second"]


def test_summary_of_one_and_of_many(load):
    summary = load("timing").summary
    assert summary([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "min": 3.0, "samples": 1}
    many = summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert many == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "samples": 5}


@pytest.mark.parametrize("noise_std", [0.01, 0.0])
def test_check_refuses_a_wrong_step(load, noise_std):
    variants = load("variants")
    case = variants.Case("x", (64, 3, 16, 16), "fp32", "contiguous", noise_std, CPU)
    right = variants.variants(case, compiled=False)
    for variant in right:
        if variant.name != "triton":  # interpreted here; the tests of the step run it
            variants.check(case, variant)
    assert {"eager", "eager in place", "reference"} <= {variant.name for variant in right}

    def louder(x, g):
        x.add_(g).add_(torch.randn_like(x), alpha=1.1 * noise_std)
        return x.clamp_(-1, 1).mul_(1.0 if noise_std else 1.0001)

    for name in ("eager", "native"):  # foreign noise by its statistics, ours by element
        with pytest.raises(AssertionError, match=name):
            variants.check(case, variants.Variant(name, louder))


def measured(variant: str, median: float, **extra: object) -> dict:
    """A row of a result file; the figures are chosen so that each is recognised in the table."""
    return {
        "size": "64x3x32x32",
        "dtype": "fp32",
        "layout": "contiguous",
        "noise_std": 0.01,
        "threads": 2,
        "variant": variant,
        "seconds": {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "samples": 9},
        "gb_per_s": 12.34,
        "percent_of_copy": 56.7,
        "ns_per_element": 0.891,
        "speedup_over": {},
        **extra,
    }


@pytest.fixture
def results(tmp_path):
    """A result file: one case whole, native in it twice as fast, and one failure elsewhere."""
    machine = {"cpu": "A CPU", "cores": 2, "torch": "2.9", "python": "3.11.7", "load": 0.04}
    machine |= {"commit": "0123456789abcdef", "changed": False, "date": "2026-01-02T03:04:05"}
    over = {"eager in place": {"median": 8.76}}
    rows = [
        measured("copy", 10e-6),
        measured("eager in place", 876e-6),
        measured("native", 100e-6, speedup_over=over),
        measured("native", 1.0, dtype="bf16") | {"error": "off by 1"},
    ]
    path = tmp_path / "step-cpu.json"
    path.write_text(
        json.dumps({"benchmark": "step", "device": "cpu", "machine": machine, "results": rows})
    )
    return path


def test_report_makes_the_tables(load, results, capsys):
    load("report").main([str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "**CPU**: A CPU, 2 cores, torch 2.9, python 3.11.7, commit 0123456789, 2026-01-02, "
        "load before the run 0.0."
    )
    assert "| case | copy | eager | eager in place | torch.compile | reference | native |" in lines
    whole = "64x3x32x32, fp32, with noise, 2 threads"
    assert (
        f"| {whole} | 10 (20 %) | not measured | 876 (20 %) | not measured | not measured "
        "| 100 (20 %) |" in lines
    )
    assert f"| {whole} | native | 12.3 | 57 % | 0.891 | 8.76x | not measured |" in lines
    broken = "64x3x32x32, bf16, with noise, 2 threads"
    assert f"| {broken} | native | failed | failed | failed | failed | failed |" in lines
    assert lines[-1] == "**CUDA**: not measured."


def test_report_fills_a_readme(load, results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbelow\n")
    for _ in range(2):  # a second time replaces, not adds
        load("report").main([str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("above\n<!-- benchmarks -->\n\n### The update alone")
    assert text.endswith("**CUDA**: not measured.\n\n<!-- /benchmarks -->\nbelow\n")
    assert "old" not in text
    assert text.count("8.76x") == 1
    assert "bf16" not in text  # the short tables


def test_report_refuses_a_readme_without_markers(load, results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no place for tables\n")
    with pytest.raises(SystemExit, match="expected one line <!-- benchmarks -->"):
        load("report").main([str(results), "--readme", str(readme)])
    assert readme.read_text() == "no place for tables\n"


@pytest.mark.slow
def test_report_draws(load, results, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        load("report").main([str(results), "--plots", str(tmp_path / name)])
    first, second = ((tmp_path / name / "step-cpu.svg").read_bytes() for name in ("one", "two"))
    assert first == second
    assert b"<svg" in first


def test_a_result_names_the_build_of_torch(load, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert load("result_file").machine()["torch"] == "2.11.0+cu130"


def test_step_runs_and_writes_what_it_promises(load, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with torch.random.fork_rng([]):
        load("step").main(["--quick", "--threads", "1,2", "--out", str(tmp_path / "new")])
    content = json.loads((tmp_path / "new" / "step-cpu.json").read_text())
    keys = "date cpu cores load gpu driver cuda platform python torch triton commit changed"
    assert set(keys.split()) <= set(content["machine"])
    assert content["machine"]["torch"] == torch.__version__
    rows = content["results"]
    # Triton would be interpreted.
    here = [n for n, reason in backend_status(CPU).items() if reason is None and n != "triton"]
    expected = {"copy", "eager", "eager in place", *here}
    for threads in (1, 2):
        for b in (0.01, 0.0):
            found = {
                row["variant"]: row
                for row in rows
                if (row["threads"], row["noise_std"]) == (threads, b)
            }
            assert set(found) == expected
            for row in found.values():
                assert row["bytes"] == 3 * 4 * 64 * 64
                time = row["seconds"]
                assert 0 < time["min"] <= time["q1"] <= time["median"] <= time["q3"]
                assert row["gb_per_s"] == pytest.approx(row["bytes"] / time["median"] / 1e9)
                assert row["percent_of_copy"] > 0
                assert set(row["speedup_over"]) == {"eager", "eager in place"}
            assert found["eager"]["speedup_over"]["eager"]["median"] == 1.0


@pytest.mark.slow
def test_chains_are_timed_beside_the_papers_loop_and_reported(load, tmp_path, monkeypatch):
    # Measuring it takes seconds on CPUs without bfloat16.
    monkeypatch.setattr(load("chain"), "matrix_rate", lambda *_: 1e10)
    with torch.random.fork_rng([]):
        load("chain").main(["--quick", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "chain-cpu.json").read_text())
    rows = {row["variant"]: row for row in content["results"]}
    scores = {f"{gradient} fp32" for gradient in ("autograd", "explicit", "fused")}
    assert {"paper's loop", "fused bf16"} | scores <= set(rows)
    served = {name: row for name, row in rows.items() if "error" not in row}
    assert served["paper's loop"]["speedup"]["median"] == 1.0
    # Two convolutions forward and back on 4 chains of 3x8x8: 4 x (64 x 27 x 2 + 16 x 32 x 4).
    flops = 4 * 4 * (64 * 27 * 2 + 16 * 32 * 4)
    for row in served.values():
        assert math.isclose(row["gflop_per_s"] * row["seconds"]["median"], flops * 1e-9)
        assert math.isclose(row["percent_of_matrix_rate"], 100 * row["gflop_per_s"] * 1e9 / 1e10)
        assert row["peak_bytes"] > 4 * 3 * 8 * 8 * 4  # at least the gradient
    text = load("report").report([content])
    assert "| paper's loop |" in text
    assert '| `gradient="explicit"`, fp32 |' in text
    assert "**CUDA**: not measured." in text


def test_a_chain_off_float64_is_timed_and_its_row_says_that_it_differs(load, monkeypatch):
    chain = load("chain")
    case, names = chain.Case(2, 4, 8, CPU), ["autograd fp32", "explicit fp32"]

    def rows():
        found = chain.measure(case, 1, 0.01, False, names)
        assert [row["variant"] for row in found] == [chain.PAPER, *names]
        assert all(row["seconds"]["median"] > 0 for row in found)
        return found

    right = rows()
    assert [row.get("differs") for row in right] == [None, False, False]
    assert all(0 < row["deviation"] < 1e-5 for row in right[1:])
    sampler = chain.fl.LangevinSampler

    def rough(energy, *args, gradient, **options):
        run = sampler(energy, *args, gradient=gradient, **options)
        return (lambda x, seed: run(x, seed=seed) * 1.01) if gradient == "explicit" else run

    monkeypatch.setattr(chain.fl, "LangevinSampler", rough)
    wrong = rows()
    assert [row.get("differs") for row in wrong] == [None, False, True]
    assert "differs by" in load("report_chain").speed(wrong[2])
    assert "differs" not in load("report_chain").speed(wrong[1])


def test_where_there_are_tiles_float32_is_also_timed_by_vectors(load):
    chain = load("chain")
    library = extension.library
    best = library.instruction_set()
    case, names = chain.Case(16, 2, 8, CPU), ["fused fp32", chain.BY_VECTORS, "fused tf32"]
    try:
        assert library.choose_instruction_set("amx_emulated")
        runs = chain.variants(case, 1, compiled=False)
        by_tiles, by_vectors, _ = (runs[name]() for name in names)
        assert library.instruction_set() == "amx_emulated"
        rows = chain.check(case, names)
        library.choose_instruction_set("baseline")
        expected = chain.variants(case, 1, compiled=False)["fused fp32"]()
    finally:
        library.choose_instruction_set(best)
    assert torch.equal(by_vectors, expected)
    assert not torch.equal(by_tiles, expected)
    torch.testing.assert_close(by_tiles, expected)
    assert list(rows) == names
    assert not any(row["differs"] for row in rows.values())
    assert load("report_chain").label(chain.BY_VECTORS) == '`gradient="fused"`, fp32 by vectors'


@pytest.mark.slow
def test_migrate_compares_every_preset_with_its_original(load, tmp_path, threads):
    with torch.random.fork_rng([]):
        load("migrate").main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "migrate-cpu.json").read_text())
    rows = {row["name"]: row for row in content["results"]}
    peers = {name for name, package in PEERS.items() if not importlib.util.find_spec(package)}
    # nae_mcmc is nae_v2's chain with other arguments and records.
    assert set(rows) == set(fl.presets.__all__) - peers - {"nae_mcmc"}
    assert max(row["difference_float64"] for row in rows.values()) < 1e-12


@pytest.mark.slow
def test_pytest_collects_the_benchmarks_only_when_asked(pytestconfig):
    asked = python("-m", "pytest", "benchmarks", "--collect-only")
    assert asked.returncode == 0, asked.stdout
    assert "step_test.py::test_step[64x3x32x32-fp32-channels_last-b=0-native]" in asked.stdout
    assert pytestconfig.getini("testpaths") == ["tests"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
class TestGpuScript:
    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *arguments],
            capture_output=True,
            text=True,
            # Hidden from torch where there is one: this is about what is said without.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
        )

    def test_is_well_formed(self):
        done = self.run("-n", str(GPU_SH))
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.slow
    def test_says_that_there_is_no_device(self, tmp_path):
        done = self.run(str(GPU_SH), str(tmp_path))
        assert done.returncode == 2
        assert "gpu.sh: no CUDA device: torch sees no CUDA device" in done.stderr

    def stand_in(
        self,
        folder: Path,
        python: str,
        sanitizer: str,
        *options: str,
        stages: tuple[str, ...] = (),
        **environment: str,
    ) -> subprocess.CompletedProcess:
        """Run with programs in place of Python, nvcc and the sanitizer, all in one folder."""
        programs = {"python": python, "nvcc": "", "compute-sanitizer": sanitizer}
        for name, body in programs.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        inherited = {key: v for key, v in os.environ.items() if not key.startswith("CMAKE")}
        return subprocess.run(
            ["bash", str(GPU_SH), *options, str(folder / "out"), *stages],
            capture_output=True,
            text=True,
            env={
                **inherited,
                "CUDA_HOME": str(folder),
                "PYTHON": str(folder / "python"),
                **environment,
            },
        )

    def test_a_sanitizer_that_is_refused_the_device(self, tmp_path):
        refused = 'echo "========= Error: Device not supported"; exit 1'
        done = self.stand_in(tmp_path, "echo 91", refused)
        for tool in ("memcheck", "racecheck"):
            assert f"{tool}: not run, it fails on a trivial program: =========" in done.stdout
        assert "Device not supported" in done.stdout
        assert done.returncode == 0

    def test_a_failed_stage_stops_no_other(self, tmp_path):
        """With stand-ins that only say what they were asked."""
        done = self.stand_in(
            tmp_path,
            'case "$*" in -c*) echo 91;; *junitxml*) exit 3;; esac\n'
            'echo "asked: $* for $CMAKE_CUDA_ARCHITECTURES"',
            'echo "asked: $*"; [ "$2" != racecheck ]',
            FASTLANGEVIN_DATA=str(tmp_path / "none"),
        )
        assert done.returncode == 1
        told = re.findall(r"^([\w-]+): (passed|FAILED \(\d+\))", done.stdout, re.MULTILINE)
        assert told == [
            ("limits", "passed"),
            ("build", "passed"),
            ("triton-cache", "passed"),
            ("checks", "passed"),
            ("tests", "FAILED (3)"),
            ("failed-capture", "passed"),
            ("kernels", "passed"),
            ("memcheck", "passed"),
            ("racecheck", "FAILED (1)"),
            ("chains", "passed"),
            ("networks", "passed"),
            ("steps", "passed"),
            ("chain-memory", "passed"),
            ("capacity", "passed"),
            ("patches", "passed"),
        ]
        assert re.search(r"gpu.sh: FAILED after \d+ s: tests racecheck; see", done.stdout)
        log = (tmp_path / "out" / "gpu.log").read_text()
        assert "asked: -m pip install -e . --no-build-isolation --no-deps for 91\n" in log
        assert "asked: --tool memcheck --error-exitcode 9" in log

    def test_says_how_it_is_called(self):
        done = self.run(str(GPU_SH))
        assert done.returncode == 2
        assert "usage: benchmarks/gpu.sh [--dry-run] OUT" in done.stderr

    def test_the_limits_of_the_stages_fit_into_the_budget(self):
        """All but the last two, patches and learning, which take what is left."""
        text = GPU_SH.read_text()
        limits = dict(re.findall(r"^ *(?:\S+=\S+ )*(?:device_)?stage ([\w-]+) (\d+) ", text, re.M))
        limits |= dict(re.findall(r"\|\| stage (kernels) (\d+) ", text))
        assert {"limits", "build", "tests", "racecheck", "chains", "profile"} <= set(limits)
        assert "learning" not in limits
        del limits["patches"]
        budget = int(re.search(r"GPU_SECONDS:-(\d+)", text)[1])
        assert 0.9 * budget <= sum(map(int, limits.values())) <= budget

    def test_a_dry_run_names_every_stage_and_each_file_exists(self, tmp_path):
        """With a stand-in for Python; the slow test below runs the stages themselves."""
        done = self.stand_in(tmp_path, "echo", "exit 1", "--dry-run")
        assert done.returncode == 0, done.stdout
        stages = dict(
            line.split("\t")[:2]
            for line in (tmp_path / "out" / "stages.tsv").read_text().splitlines()
        )
        printed = {"build", "racecheck", "profile", "patches", "learning"}
        ran = {"limits", "triton-cache", "checks", "tests", "failed-capture", "memcheck"}
        ran |= {"chains", "networks", "steps", "chain-memory", "capacity"}
        assert stages == dict.fromkeys(ran, "passed") | dict.fromkeys(printed, "printed")

    def test_only_the_stages_that_are_named_run(self, tmp_path):
        done = self.stand_in(tmp_path, "echo", "exit 1", "--dry-run", stages=("checks", "chains"))
        assert done.returncode == 0, done.stdout
        lines = (tmp_path / "out" / "stages.tsv").read_text().splitlines()
        assert [line.split("\t")[:2] for line in lines] == [
            ["checks", "passed"],
            ["chains", "passed"],
        ]

    def test_a_dry_run_fails_for_a_module_that_is_gone(self, tmp_path):
        script = tmp_path / "benchmarks" / "gpu.sh"
        script.parent.mkdir()
        for module in ("limits", "fused_step", "device_checks", "sanitize", "step", "report"):
            (script.parent / f"{module}.py").touch()
        script.write_text(GPU_SH.read_text())
        shutil.copy(GPU_SH.with_name("stages.sh"), script.parent)
        (tmp_path / "python").write_text("#!/bin/sh\n")
        (tmp_path / "python").chmod(0o755)
        done = subprocess.run(
            ["bash", str(script), "--dry-run", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(tmp_path / "python")},
        )
        assert done.returncode == 1
        assert "no module benchmarks.chain\n" in done.stdout
        assert "no module benchmarks.chain_memory" in done.stdout
        assert "no file tests/kernels/test_cuda.py" in done.stdout

    @pytest.mark.slow
    def test_a_dry_run_takes_every_stage_in_its_smallest_form(self, tmp_path):
        done = self.run(str(GPU_SH), "--dry-run", str(tmp_path))
        assert done.returncode == 0, done.stdout
        for name in ("limits", "checks", "chain", "networks", "step", "chain_memory"):
            assert json.loads((tmp_path / f"{name}-cpu.json").read_text())
        checks = json.loads((tmp_path / "checks-cpu.json").read_text())["results"]
        assert [row["right"] for row in checks] == [True] * len(checks)
        assert "paper's loop" in (tmp_path / "summary.md").read_text()
