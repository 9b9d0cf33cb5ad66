"""benchmarks/amx.sh, for the first machine with AMX, and what it alone calls."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.shared import ROOT

AMX_SH = ROOT / "benchmarks" / "amx.sh"
STAGES = (
    "build", "doctor", "compile", "tiles", "tests", "limits", "chains-1", "chains-2",
    "small-batches", "networks", "iteration-1", "iteration-2",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path):
    """Runs the script with stand-ins for Python and the compiler."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "compiler").write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp "$0" "$2"\n'
    )
    for name in ("python", "compiler"):
        (tmp_path / name).chmod(0o755)
    programs = {"PYTHON": str(tmp_path / "python"), "CXX": str(tmp_path / "compiler")}

    def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | programs | environment,
        )

    return command


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def test_is_well_formed(run):
    done = run("-n", str(AMX_SH))
    assert (done.returncode, done.stderr) == (0, "")


def test_says_that_there_are_no_tiles(run, tmp_path):
    if re.search(r"\bamx_bf16\b", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this CPU has AMX")
    done = run(str(AMX_SH), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == "amx.sh: no AMX: /proc/cpuinfo has no flag amx_bf16\n"


def test_says_how_it_is_called(run):
    done = run(str(AMX_SH))
    assert done.returncode == 2
    assert done.stderr == "usage: benchmarks/amx.sh [--dry-run] OUT [STAGE ...]\n"


def test_a_dry_run_names_every_stage_and_each_file_exists(run, tmp_path):
    done = run(str(AMX_SH), "--dry-run", str(tmp_path / "out"))
    assert done.returncode == 1  # the compiler's stand-in wrote a script that needs an option
    lines = (tmp_path / "out" / "stages.tsv").read_text().splitlines()
    stages = dict(line.split("\t")[:2] for line in lines)
    assert tuple(stages) == STAGES
    assert {stages.pop("build")} == {"printed"}
    stages.pop("tiles")
    assert set(stages.values()) == {"passed"}


def test_only_the_stages_that_are_named_run(run, tmp_path):
    done = run(str(AMX_SH), "--dry-run", str(tmp_path / "out"), "limits", "chains-2")
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "limits", "chains-2", "amx.sh",
    ]  # fmt: skip


def test_the_limits_of_the_stages_fit_into_ten_minutes():
    text = AMX_SH.read_text()
    single = dict(re.findall(r"^(?:device_)?stage ([\w-]+) (\d+) ", text, re.MULTILINE))
    assert set(single) == {name for name in STAGES if not name[-1].isdigit()}
    twice = re.search(r"chains-\$threads\" \$\(\((\d+) - (\d+) \* threads\)\)", text)
    iteration = re.search(r"iteration-\$threads\" (\d+) ", text)
    assert twice
    assert iteration
    longest, less = map(int, twice.groups())
    total = sum(map(int, single.values())) + 2 * longest - 3 * less + 2 * int(iteration[1])
    assert 0.9 * 590 <= total <= int(re.search(r"AMX_SECONDS:-(\d+)", text)[1]) <= 600


def test_an_iteration_is_timed_beside_its_chains(load, tmp_path):
    load("iteration").main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "iteration-cpu.json").read_text())
    assert [row["precision"] for row in content["results"]] == ["fp32", "bf16"]
    for row in content["results"]:
        assert 0 < row["chains"]["median"] < 10
        assert 0 < row["iteration"]["median"] < 10


def test_batches_of_a_chain_are_chosen(load):
    cases = load("chain").cases(load("chain").torch.device("cpu"), False, (4, 16))
    assert [(case.width, case.batch) for case in cases] == [
        (64, 4), (32, 4), (16, 4), (64, 16), (32, 16), (16, 16),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_dry_run_measures_in_the_smallest_form(tmp_path):
    done = subprocess.run(
        ["bash", str(AMX_SH), "--dry-run", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout
    for name in ("chain-1", "chain-2", "small-batches"):
        assert json.loads((tmp_path / name / "chain-cpu.json").read_text())["results"]
