"""sample: pictures and arrays of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastlangevin as fl
from fastlangevin.learn.images import to_grid
from tests.cli.shared import Command, assert_refused, options


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["absent"], "absent does not exist"),
        (["[/bold]"], r"\[/bold\] does not exist"),
        (["RUN", "--out", "grid.jpg"], r"--out must end in \.png, \.gif or \.npy, got grid\.jpg"),
        (["RUN", "--per-file", "8"], r"--per-file belongs to a folder of files"),
        (["RUN", "--seed", "-1"], r"seed must be in \[0, 2\*\*64\), got -1"),
        (["RUN", "--seed", str(2**64)], r"seed must be in \[0, 2\*\*64\)"),
        (["RUN", "--device", "gpu"], "device"),
        (["foreign.safetensors"], "foreign.safetensors is truncated or not a safetensors file"),
    ],
    ids=str,
)
def test_sample_refuses(
    arguments: list[str], match: str, command: Command, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"not one")
    given = [run if argument == "RUN" else argument for argument in arguments]
    assert_refused(command("sample", *given), match)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.safetensors"]


@pytest.mark.parametrize("out", [None, "grid.png"])
def test_several_processes_need_a_folder(
    out: str | None, command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("sample", run, *(() if out is None else ("--out", out)))
    assert_refused(result, "several processes write a folder: give --out, a name without an ending")
    assert result.stderr.strip().endswith("got grid.png" if out else "a name without an ending")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(device: str, command: Command, run: Path) -> None:
    match = f"device '{device}' was asked for, but torch sees no CUDA device"
    assert_refused(command("train", *options(device=device)), match)
    assert_refused(command("sample", run, "--device", device), match)


def test_sample_a_grid(command: Command, run: Path, tmp_path: Path) -> None:
    result = command("sample", run, "--n", 9, "--out", "new/grid.png")
    assert (result.exit_code, result.stdout) == (0, "new/grid.png\n"), result.output
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (3 * 34 + 2, 3 * 34 + 2))


def test_a_grids_columns_and_tiles(command: Command, run: Path, tmp_path: Path) -> None:
    arguments = ("--n", 6, "--columns", 2, "--tile", 17, "--device", "cpu", "--out", "grid.png")
    assert command("sample", run, *arguments).exit_code == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 18 + 2, 3 * 18 + 2)
        want = to_grid(fl.load(run)(n=6, seed=0), columns=2, tile=17)
        assert np.array_equal(np.asarray(picture), want)


@pytest.mark.parametrize(
    ("arguments", "changes", "seed"),
    [
        ([], {}, 0),
        (["--seed", "5"], {}, 5),
        (["--steps", "7"], {"steps": 7}, 0),
        (["--no-averaged"], {"averaged": False}, 0),
    ],
    ids=str,
)
def test_sample_an_array(
    arguments: list[str], changes: dict, seed: int, command: Command, run: Path, tmp_path: Path
) -> None:
    """Each option changes the samples as `fl.load` does."""
    result = command("sample", run, "--n", 3, "--device", "cpu", "--out", "x.npy", *arguments)
    assert result.exit_code == 0, result.output
    want = fl.load(run, **changes)(n=3, seed=seed)
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, want.numpy())
    if changes or seed:
        assert not np.array_equal(found, fl.load(run)(n=3, seed=0).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_a_cooldown_is_that_of_python(command: Command, run: Path, tmp_path: Path) -> None:
    arguments = ("--n", 3, "--device", "cpu", "--cooldown", 4, "--out", "x.npy")
    assert command("sample", run, *arguments).exit_code == 0
    model = fl.load(run)
    cooled = fl.LangevinSampler(model.energy, **fl.anneal.cooldown(model.settings(), 4))
    assert np.array_equal(np.load(tmp_path / "x.npy"), cooled(n=3, seed=0).numpy())


def test_sample_from_one_checkpoint(command: Command, run: Path, tmp_path: Path) -> None:
    earlier = run / "checkpoints" / "00000002.safetensors"
    for path, name in ((earlier, "earlier.npy"), (run, "newest.npy")):
        assert command("sample", path, "--n", 2, "--device", "cpu", "--out", name).exit_code == 0
    found = {path.stem: np.load(path) for path in tmp_path.iterdir()}
    assert np.array_equal(found["earlier"], fl.load(earlier)(n=2, seed=0).numpy())
    assert not np.array_equal(found["earlier"], found["newest"])


def test_the_command_writes_and_evaluate_reads_a_folder(
    command: Command, run: Path, tmp_path: Path
) -> None:
    drawn = command("sample", run, "--n", 30, "--per-file", 8, "--out", "many/", "--device", "cpu")
    assert (drawn.exit_code, drawn.stdout) == (0, "many\n"), drawn.output
    assert len(list((tmp_path / "many").glob("*.npy"))) == 4
    judge = ("--features", "pixels", "--reference", 99, "--samples", "many")
    judged = command("evaluate", run, *judge)
    assert judged.exit_code == 0, judged.output
    assert "30 of many, 30 x 1x8x8" in judged.stdout
    (tmp_path / "many" / "00000008.npy").unlink()
    judged = command("evaluate", run, *judge)
    assert judged.exit_code == 1
    assert "00000008.npy is missing, as are 1 of 4 files" in judged.stderr
