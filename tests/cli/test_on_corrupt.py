"""Commands that read a folder of pictures in which one cannot be decoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import run_command

FIT = ("--restarts", 1, "--iterations", 1)
COMMANDS = {
    "reconstruct": ("--images", "--samples", 1, *FIT),
    "restore": ("--images", "--answers", 1, "--samples", 2),
    "interpolate": ("--images", "--frames", 2, *FIT),
    "transfer": ("--images",),
    "evaluate": ("--images", "--features", "pixels", "--reference", 8),
    "diagnose": ("--data", "--n", 16, "--long", 1, "--starts", 2, "--out", "diagnosis"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "pictures"
    out.mkdir()
    rng = np.random.default_rng(0)
    for k in range(18):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(out / f"{k:02}.png")
    whole = (out / "03.png").read_bytes()
    (out / "03.png").write_bytes(whole[: len(whole) // 2])
    return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_picture_that_cannot_be_decoded_stops_the_command_or_is_left_out(
    name: str, folder: Path
) -> None:
    source, *options = COMMANDS[name]
    stopped = run_command(name, "digits", source, folder, *options)
    assert stopped.exit_code == 1
    assert "03.png" in stopped.stderr
    done = run_command(name, "digits", source, folder, "--on-corrupt", "skip", *options)
    assert done.exit_code == 0, done.output
    if name != "transfer":
        return
    wrong = run_command(name, "digits", source, folder, "--on-corrupt", "skp", *options)
    assert wrong.exit_code == 1
    assert "on_corrupt must be" in wrong.stderr or "did you mean skip" in wrong.stderr
