"""train --energy: a module of the user's own, from the command line to the report of its run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import fastlangevin as fl
from fastlangevin.learn import resolve
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.custom_energy import open_energy
from fastlangevin.learn.model import class_name
from tests.cli.shared import TINY, Command, assert_refused, snapshot

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, x):
        return self.layers(x)

class Nested:
    Net = Net

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(1)

    def forward(self, x):
        return self.head(x.flatten(1)).flatten()

def make():
    return Net(width=3)

def wide(width):
    return Net(width)

def colour():
    net = Net()
    net.shape = (3, 8, 8)
    return net

def fixed():
    return Net().requires_grad_(False)

ready = Net()
classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
conv = nn.Conv2d(3, 1, 8)
number = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write a module of the user's own, which every test imports anew."""
    (tmp_path / "usermodel.py").write_text(CODE)
    (tmp_path / "userpackage").mkdir()
    (tmp_path / "userpackage" / "nets.py").write_text("from usermodel import Net")
    (tmp_path / "lacking.py").write_text("import not_installed")
    (tmp_path / "broken.py").write_text("x = (")
    (tmp_path / "script.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("usermodel", "userpackage", "lacking", "broken", "script"):
            del sys.modules[name]


def options(**changes: object) -> list[str]:
    given = {k: v for k, v in TINY.items() if k != "width"} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.mark.parametrize(
    "place", ["usermodel:ready", "usermodel:Nested.Net", "userpackage.nets:Net"]
)
def test_an_energy_is_found_where_the_user_says(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert class_name(open_energy(place, (1, 8, 8))) == "usermodel:Net"


@pytest.mark.parametrize(
    ("target", "kind"),
    [("usermodel:make", "usermodel:Net"), ("usermodel:Lazy", "usermodel:Lazy")],
)
def test_a_class_a_function_or_a_module_is_learned(
    target: str, kind: str, command: Command, tmp_path: Path
) -> None:
    done = command("train", "--energy", target, "--out", "run", *options(iterations=2))
    assert done.exit_code == 0, done.output
    assert f"2 iterations of 4 chains on energy {target}: 2 steps on 1x8x8" in done.stderr
    _, info = read_checkpoint(tmp_path / "run")
    assert (info["energy"], info["energy_class"]) == (None, kind)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [saved[k] for k in ("energy", "width", "activation", "leak")] == [
        target,
        None,
        None,
        None,
    ]
    assert fl.load(tmp_path / "run")(n=2, seed=0).shape == (2, 1, 8, 8)


def test_commands_use_the_run_without_being_told_its_energy(command: Command) -> None:
    command("train", "--energy", "usermodel:Net", "--out", "run", *options(limit=1500))
    for arguments in (
        ["sample", "run", "--n", 2],
        ["sample", "run/checkpoints/00000004.safetensors", "--n", 2],
        ["sample", "run", "--n", 2, "--out", "many"],
        ["interpolate", "run", "--n", 1, "--frames", 3],
        ["diagnose", "run", "--n", 16, "--long", 1, "--starts", 2],
        ["evaluate", "run", "--n", 8, "--features", "pixels", "--reference", 100],
        ["report", "run"],
    ):
        done = command(*arguments)
        assert done.exit_code == 0, done.output
        assert "forward pass may differ" not in done.stderr
    assert "usermodel:Net" in Path("run/report.html").read_text()


def test_a_run_is_resumed_as_if_it_had_not_stopped(command: Command, tmp_path: Path) -> None:
    arguments = ("--energy", "usermodel:Net", *options(anneal_start=1, ema=0.9))
    command("train", "--out", "whole", *arguments)
    command("train", "--out", "cut", *arguments, "--iterations", 2)
    done = command("train", "--out", "cut", "--resume", "--iterations", 4)
    assert done.exit_code == 0, done.output
    whole, cut = (read_checkpoint(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_first_weights_depend_on_the_seed_alone(command: Command, tmp_path: Path) -> None:
    weights = []
    for i, seed in enumerate((3, 3, 4)):
        torch.rand(i)
        out = tmp_path / str(i)
        command(
            "train",
            "--energy",
            "usermodel:Net",
            "--out",
            out,
            *options(seed=seed, iterations=1, lr=0),
        )
        weights.append(read_checkpoint(out)[0]["model.layers.1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_file_alone_imports_nothing(command: Command) -> None:
    """It may have come from anywhere. The folder of a run is the user's own."""
    command("train", "--energy", "usermodel:Net", "--out", "run", *options(iterations=1))
    command("export", "run", "--out", "alone.safetensors")
    done = command("sample", "alone.safetensors")
    assert_refused(
        done, "weights of a custom energy of the class usermodel:Net: pass it as energy="
    )
    energy = sys.modules["usermodel"].Net()
    sampler = fl.load("alone.safetensors", energy=energy)
    assert torch.equal(sampler(n=2, seed=0, shape=(1, 8, 8)), fl.load("run")(n=2, seed=0))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("usermodel", "energy must be module:attribute, such as mymodel:Net, got 'usermodel'$"),
        ("usermodel:", "energy must be module:attribute"),
        (
            "usermodle:Net",
            r"no module 'usermodle' in .* installed packages; did you mean usermodel",
        ),
        ("usermodel.py:Net", r"a module, not a file; did you mean usermodel:Net\?$"),
        ("/elsewhere/nets.py:Net", "put /elsewhere into PYTHONPATH and give nets:Net$"),
        ("userpackage/nets.py:Net", r"did you mean userpackage.nets:Net\?$"),
        ("userpackage.net:Net", "no module 'userpackage.net' in the working directory"),
        ("usermodel:Nett", r"usermodel has no attribute 'Nett'; did you mean Net\?$"),
        ("usermodel:number.x", "usermodel has no attribute 'number.x'"),
        ("usermodel:wide", r"called without arguments, and raised TypeError: wide\(\) missing 1"),
        ("usermodel:number", "must be an nn.Module, its class, or a function .*, got int$"),
        ("usermodel:conv", r"take images \[n, 1, 8, 8\] .* but on two images it raised RuntimeErr"),
        (
            "usermodel:classes",
            r"return energies \[n\], .* must return one .*, got shape \[2, 10\]$",
        ),
        (
            "usermodel:colour",
            r"images of shape \[1, 8, 8\].* but its attribute shape is \[3, 8, 8\]",
        ),
        ("usermodel:fixed", "no parameter that requires grad, so none to learn$"),
        ("lacking:Net", "importing lacking failed: No module named 'not_installed'$"),
        ("broken:Net", "importing broken raised SyntaxError: "),
        ("script:Net", 'importing script raised SystemExit: 2; .* under if __name__ == "__main__"'),
    ],
)
def test_what_cannot_be_learned_is_refused(
    target: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, ImportError), match=match):
        open_energy(target, (1, 8, 8))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("usermodel:fixed", "no parameter that requires grad, so none to learn$"),
        ("script:Net", 'importing script raised SystemExit: 2; .* under if __name__ == "__main__"'),
        ("usermodel:colour", "but its attribute shape is"),
    ],
)
def test_train_refuses_an_energy_before_anything_is_written(
    target: str, match: str, command: Command, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    done = command("train", "--energy", target, "--out", "run", *options())
    assert_refused(done, match)
    after = {name: content for name, content in snapshot(tmp_path).items() if "pycache" not in name}
    assert after == before
    assert not (tmp_path / "run").exists()


def test_settings_of_the_packages_network_are_refused(command: Command, tmp_path: Path) -> None:
    """In options, files and Python: they would change nothing."""
    arguments = ("train", "--energy", "usermodel:Net", "--out", "run")
    match = "are of ConvEnergy alone, and energy is usermodel:Net: leave out one or the other$"
    assert_refused(command(*arguments, "--width", 8, "--leak", 0.1), f"width, leak {match}")
    (tmp_path / "mine.yaml").write_text("energy: usermodel:Net\nactivation: relu")
    done = command("train", "--config", "mine.yaml", "--out", "run")
    assert_refused(done, "mine.yaml: activation is of ConvEnergy alone")
    with pytest.raises(ValueError, match="width is of ConvEnergy alone"):
        resolve("digits", {"energy": "usermodel:Net", "width": 8})


def test_the_search_path_of_python_is_as_before(command: Command) -> None:
    before = list(sys.path)
    for target in ("usermodel:Net", "broken:Net"):
        command("train", "--energy", target, "--out", "run", *options())
        assert sys.path == before


def test_a_lazy_module_gets_its_shapes_and_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usermodel.py").write_text(
        "from torch import nn\n"
        "norm = nn.BatchNorm2d(2)\n"
        "net = nn.Sequential(nn.LazyConv2d(2, 3), norm, nn.Flatten(), nn.LazyLinear(1))\n"
    )
    energy = open_energy("usermodel:net", (1, 8, 8))
    assert all(module.training for module in energy.modules())
    assert energy.get_submodule("1").num_batches_tracked == 0
