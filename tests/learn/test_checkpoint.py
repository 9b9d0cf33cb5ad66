"""Checkpoints: whole or absent, ours or refused, and never code."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn import ShortRunLearner
from fastlangevin.learn import checkpoint as checkpoints
from fastlangevin.learn.checkpoint import (
    CheckpointError,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from tests.processes import start

SAMPLER = {"steps": 3, "step_size": 0.5, "noise_std": 0.02, "clamp": [-1.0, 1.0]}
HEADER = {"format": "fastlangevin checkpoint", "version": 1}


def learner(energy: nn.Module | None = None, ema: float | None = 0.9) -> ShortRunLearner:
    """Two steps of learning on uniform images, from weights that are always the same."""
    if energy is None:
        torch.manual_seed(4)
        energy = fl.ConvEnergy(1, 8, 4)
    images = 2 * fl.noise.uniform((9, 1, 8, 8), seed=1, step=0) - 1
    learning = ShortRunLearner(
        fl.LangevinSampler(energy, **SAMPLER), images, batch_size=4, lr=1e-2, ema=ema
    )
    for _ in range(2):
        learning.step()
    return learning


def info(learning: ShortRunLearner) -> dict[str, Any]:
    ours = isinstance(learning.energy, fl.ConvEnergy)
    energy = learning.energy.settings() if ours else None
    return {"iteration": learning.iteration, "energy": energy, "sampler": SAMPLER}


@pytest.fixture(scope="module")
def learned() -> ShortRunLearner:
    return learner()


@pytest.fixture
def saved(learned: ShortRunLearner, tmp_path: Path) -> Path:
    """A checkpoint of ``learned``."""
    path = tmp_path / "00000002.safetensors"
    save_checkpoint(path, learned.tensors(), info(learned))
    return path


# Round trip --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.arange(12.0).view(3, 4).T,
        torch.arange(60.0)
        .view(1, 3, 4, 5)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last),
        torch.tensor([torch.inf, -torch.inf, -0.0, torch.nan]),
        torch.tensor([2**62, -1]),
        torch.ones(2, requires_grad=True),
    ],
    ids=["scalar", "empty", "float64", "transposed", "channels_last", "special", "int", "grad"],
)
def test_tensors_come_back_bit_for_bit(tensor: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / "one.safetensors"
    save_checkpoint(path, {"name.of.it": tensor}, {"iteration": 1})
    found = read_checkpoint(path)[0]["name.of.it"]
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    bits = [each.detach().flatten().view(torch.uint8) for each in (found, tensor)]
    assert torch.equal(*bits)


def test_info_comes_back(tmp_path: Path) -> None:
    given = {
        "iteration": 7,
        "lr": 1e-4 / 3,
        "none": None,
        "text": "ä \u2028 \U0001f40e\n",
        "n": [1, [2]],
    }
    save_checkpoint(tmp_path / "a", {"x": torch.zeros(1)}, given)
    found = read_checkpoint(tmp_path / "a")[1]
    assert found == given | HEADER


def test_weights_that_are_tied_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8, bias=False)
            self.two = nn.Linear(8, 8, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)).flatten(1).sum(1)

    learning = learner(Tied())
    save_checkpoint(tmp_path / "a", learning.tensors(), info(learning))
    x = fl.load(tmp_path / "a", energy=Tied())(torch.zeros(3, 1, 8, 8), seed=0)
    want = fl.LangevinSampler(learning.model, **SAMPLER)(torch.zeros(3, 1, 8, 8), seed=0)
    assert torch.equal(x, want)


def test_views_of_one_storage_come_back(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_checkpoint(tmp_path / "a", {"whole": whole, "end": whole[2:]}, {"iteration": 1})
    found = read_checkpoint(tmp_path / "a")[0]
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["end"], whole[2:])


def test_the_newest_checkpoint_stands_for_the_folder(tmp_path: Path) -> None:
    for iteration in (9, 10, 2, 100_000):
        path = checkpoint_path(tmp_path, iteration)
        save_checkpoint(path, {"x": torch.zeros(1)}, {"iteration": iteration})
    (tmp_path / "checkpoints" / ".00200000.safetensors.1.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert read_checkpoint(tmp_path)[1]["iteration"] == 100_000
    assert [int(path.stem) for path in list_checkpoints(tmp_path)] == [2, 9, 10, 100_000]


# fl.load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_a_loaded_sampler_gives_the_learners_samples(
    form: str, learned: ShortRunLearner, tmp_path: Path
) -> None:
    path = checkpoint_path(tmp_path, 2)
    save_checkpoint(path, learned.tensors(), info(learned))
    sampler = fl.load({"file": path, "folder": tmp_path, "text": str(path)}[form])
    want = fl.LangevinSampler(learned.model, **SAMPLER)(n=5, seed=3)
    assert torch.equal(sampler(n=5, seed=3), want)
    assert not sampler.energy.training
    assert sampler.clamp == (-1.0, 1.0)


def test_averaged_or_not(saved: Path, learned: ShortRunLearner) -> None:
    averaged, last = fl.load(saved), fl.load(saved, averaged=False)
    for sampler, module in ((averaged, learned.model), (last, learned.energy)):
        held = module.state_dict()
        found = sampler.energy.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in found.items())
    assert not torch.equal(averaged(n=3, seed=0), last(n=3, seed=0))


def test_a_run_without_an_average_gives_its_weights(tmp_path: Path) -> None:
    learning = learner(ema=None)
    save_checkpoint(tmp_path / "a", learning.tensors(), info(learning))
    x = fl.load(tmp_path / "a", averaged=True)(n=3, seed=0)
    assert torch.equal(x, learning.sampler(n=3, seed=0))


def test_changes_replace_the_samplers_settings(saved: Path, learned: ShortRunLearner) -> None:
    found = fl.load(saved, steps=7, noise_std=0.0, clamp=None)(n=3, seed=0)
    changed = SAMPLER | {"steps": 7, "noise_std": 0.0, "clamp": None}
    assert torch.equal(found, fl.LangevinSampler(learned.model, **changed)(n=3, seed=0))


def own() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.SiLU(), nn.Linear(5, 1))


def test_settings_of_another_version(saved: Path, tmp_path: Path) -> None:
    tensors, found = read_checkpoint(saved)
    found["sampler"] |= {"momentum": 0.9}
    found = {name: value for name, value in found.items() if name not in ("format", "version")}
    save_checkpoint(tmp_path / "new.safetensors", tensors, found)
    with pytest.raises(CheckpointError, match=r"new\.safetensors has settings .*: momentum"):
        fl.load(tmp_path / "new.safetensors")
    with pytest.raises(TypeError, match="momentum"):  # asked for here, and not in the file
        fl.load(saved, momentum=0.9)


def test_an_energy_of_ones_own(tmp_path: Path) -> None:
    learning = learner(own())
    save_checkpoint(tmp_path / "a", learning.tensors(), info(learning))
    x0 = torch.zeros(3, 1, 8, 8)
    want = fl.LangevinSampler(learning.model, **SAMPLER)(x0, seed=0)
    assert torch.equal(fl.load(tmp_path / "a", energy=own())(x0, seed=0), want)
    with pytest.raises(CheckpointError, match="weights of a custom energy: pass it as energy="):
        fl.load(tmp_path / "a")


@pytest.mark.parametrize(
    "energy",
    [own(), fl.ConvEnergy(1, 8, 5), fl.ConvEnergy(3, 8, 4), fl.ConvEnergy(1, 16, 4)],
    ids=["own", "width", "channels", "size"],
)
def test_another_architecture(energy: nn.Module, saved: Path) -> None:
    before = [value.clone() for value in energy.state_dict().values()]
    match = rf"{saved} is of another architecture: {type(energy).__name__}\.\S+ needs"
    with pytest.raises(CheckpointError, match=match):
        fl.load(saved, energy=energy)
    after = energy.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", ["nothing", "folder", "run without checkpoints"])
def test_missing_paths(kind: str, tmp_path: Path) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "run"
    if kind == "run without checkpoints":
        (path / "checkpoints").mkdir(parents=True)
    what = "does not exist" if kind == "nothing" else "holds no checkpoint yet"
    with pytest.raises(FileNotFoundError, match=f"{path} {what}"):
        fl.load(path)


# Files that are not whole, or not ours -----------------------------------------------------------


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(
    "cut",
    [
        lambda data: 0,
        lambda data: 1,
        lambda data: 7,
        lambda data: 8,
        lambda data: header_length(data) - 1,
        lambda data: header_length(data),
        lambda data: len(data) // 2,
        lambda data: len(data) - 4,
        lambda data: len(data) - 1,
    ],
    ids=["0", "1", "7", "8", "header - 1", "header", "half", "all - 4", "all - 1"],
)
def test_truncated(cut: Callable[[bytes], int], saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: cut(data)])
    with pytest.raises(CheckpointError, match=f"{saved} is truncated or not a safetensors file"):
        fl.load(saved)


@pytest.mark.parametrize("size", [3, 8, 100, 100_000])
def test_random_bytes(size: int, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    for seed in range(5):
        path.write_bytes(np.random.default_rng(seed).bytes(size))
        with pytest.raises(CheckpointError, match=f"{path} is truncated or not a safetensors file"):
            fl.load(path)


def foreign(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file({"weight": torch.zeros(3)}, path, metadata=metadata)


def ours(**changes: Any) -> Callable[[Path], None]:
    return foreign({"fastlangevin": json.dumps(HEADER | changes)})


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (foreign(None), "is a safetensors file, but not a fastlangevin checkpoint"),
        (foreign({"format": "pt"}), "is a safetensors file, but not a fastlangevin checkpoint"),
        (ours(format="other"), "is a 'other' of version 1; this fastlangevin reads version 1"),
        (ours(version=2), "of version 2; this fastlangevin reads version 1"),
        (ours(version=None), "of version None; this fastlangevin reads version 1"),
        (foreign({"fastlangevin": "{not json"}), ""),
        (foreign({"fastlangevin": "[1, 2]"}), ""),
        (foreign({"fastlangevin": "null"}), ""),
        (ours(), ""),
        (ours(sampler=SAMPLER, energy={"sizes": 3}), ""),
    ],
    ids=[
        "no metadata",
        "other metadata",
        "other format",
        "later version",
        "no version",
        "broken header",
        "list as header",
        "null as header",
        "nothing in it",
        "other energy",
    ],
)
def test_safetensors_files_that_are_not_ours(
    write: Callable[[Path], None], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=f"{path} .*{match}"):
        fl.load(path)


class Trap:
    """Unpickled, it touches a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch"])
def test_a_pickle_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "run.safetensors", tmp_path / "mark"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(mark)))
    else:
        torch.save(Trap(mark), path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(CheckpointError, match=f"{path} is truncated or not a safetensors file"):
        fl.load(path)
    assert not mark.exists()


def test_a_checkpoint_is_a_plain_safetensors_file(saved: Path, learned: ShortRunLearner) -> None:
    """So that other tools read it, and nothing in it is a pickle."""
    found, held = load_file(saved), learned.tensors()
    assert found.keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in found.items())


# Writing -----------------------------------------------------------------------------------------


def test_a_failure_half_way_leaves_the_previous_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fill_the_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(saved, {"x": torch.zeros(9)}, {"iteration": 3})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_previous_file(
    at: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"os.{at}", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(saved, {"x": torch.zeros(9)}, {"iteration": 3})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def save_with_limit(path: Path, said: Path) -> None:
    """Save 4 MB where the kernel takes 100 kB a file, and write down how that fails."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(path, {"x": torch.zeros(10**6)}, {"iteration": 3})
    except OSError as error:
        said.write_text(f"OSError: {error}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_file_that_the_system_does_not_take(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A real refused write, in another process: the kernel caps its files at 100 kB of 4 MB."""
    before = saved.read_bytes()
    said = tmp_path_factory.mktemp("limited") / "said"
    start(save_with_limit, saved, said).join(60)
    assert said.read_text().startswith("OSError:")
    assert str(saved) in said.read_text()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_new_checkpoint_takes_the_old_ones_place(saved: Path) -> None:
    save_checkpoint(saved, {"x": torch.ones(9)}, {"iteration": 3})
    tensors, found = read_checkpoint(saved)
    assert torch.equal(tensors["x"], torch.ones(9))
    assert found["iteration"] == 3
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_checkpoint_has_the_permissions_of_any_new_file(saved: Path) -> None:
    """So that a group that shares a folder can read it."""
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode
