"""What type checkers see of the package when they check the file of somebody who uses it."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each line says which type is revealed there, or that it must be reported.
USER_FILE = """\
import torch
import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner, load_images

energy = fl.ConvEnergy(channels=1, size=8, width=8)
sampler = fl.LangevinSampler(energy, steps=10, step_size=[1.0] * 10, clamp=(-1, 1))
reveal_type(sampler)  # type: LangevinSampler
x = sampler(n=4, seed=0)
reveal_type(x)  # type: Tensor
reveal_type(sampler.trajectory(x, every=5))  # type: Tensor
reveal_type(sampler.diagnose(x).energy)  # type: Tensor
reveal_type(fl.load("digits"))  # type: LangevinSampler
reveal_type(fl.noise.fold_in(0, 1))  # type: int
reveal_type(fl.anneal.linear(1.0, 3)[0])  # type: float
reveal_type(fl.presets.ula(energy, temperature=1.0))  # type: LangevinSampler
reveal_type(fl.testing.compare(lambda x: x, sampler, x).speedup)  # type: float
fl.langevin_step_(x, x, step_size=0.1, noise_std=0.0, seed=0, step=0)
learner = ShortRunLearner(sampler, load_images("digits"), lr=1e-3)
reveal_type(learner.step().gap)  # type: float
fl.LangevinSampler(energy, steps="many")  # error
fl.LangevinSampler(energy, step=10)  # error
fl.LangevinSampler(energy).sample()  # error
fl.LangevinSamplr  # error
"""
TYPES = {
    line: match[1]
    for line, text in enumerate(USER_FILE.splitlines(), 1)
    if (match := re.search(r"# type: (\w+)", text))
}
ERRORS = {line for line, text in enumerate(USER_FILE.splitlines(), 1) if "# error" in text}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in an environment of its own, in which this package is installed as editable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    # In this order: the tree under test hides a copy of the package that is installed here.
    (packages / "1.pth").write_text(f"{ROOT}\n")
    (packages / "2.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (tmp_path / "user.py").write_text(USER_FILE)
    return tmp_path


@pytest.mark.slow
def test_mypy_sees_the_types_of_the_package(project: Path) -> None:
    # With the settings and the cache of `mypy` on the package, torch is analysed once for both.
    done = run(
        project,
        *("mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"),
        *("--python-executable", project / "venv/bin/python", "user.py"),
    )
    types = re.findall(r'^user.py:(\d+): note: Revealed type is "([\w.]+)"', done, re.M)
    assert {int(line): name.split(".")[-1] for line, name in types} == TYPES, done
    assert {int(line) for line in re.findall(r"^user.py:(\d+): error", done, re.M)} == ERRORS


@pytest.mark.slow
def test_pyright_sees_the_types_of_the_package(project: Path) -> None:
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    done = run(
        project, "pyright", "--outputjson", "--pythonpath", project / "venv/bin/python", "user.py"
    )
    reports = json.loads(done)["generalDiagnostics"]
    lines = [(report["range"]["start"]["line"] + 1, report) for report in reports]
    types = {
        line: report["message"].split('"')[-2]
        for line, report in lines
        if report["severity"] == "information"
    }
    assert types == TYPES
    assert {line for line, report in lines if report["severity"] == "error"} == ERRORS


def test_an_editable_install_is_a_path_that_static_tools_follow() -> None:
    try:
        installed = importlib.metadata.distribution("fastlangevin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastlangevin is not installed")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("url") != ROOT.as_uri() or not origin.get("dir_info", {}).get("editable"):
        pytest.skip("this checkout is not installed as editable")
    (pth,) = (file for file in installed.files or [] if file.suffix == ".pth")
    assert pth.read_text().strip() == str(ROOT)


def run(project: Path, *command: object) -> str:
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=300).stdout
