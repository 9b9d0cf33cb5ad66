"""No command replaces a file without being told to, and none works in vain for a bad folder."""

import os
from pathlib import Path

import pytest

from tests.cli.shared import Command, assert_refused, snapshot

DIGITS = ("--images", "digits")
FIT = ("--restarts", 1, "--iterations", 1)
QUICK = {
    "sample": ("samples", ".png", ["--n", 1]),
    "reconstruct": (
        "reconstructed",
        ".png",
        ["--n", 1, "--samples", 1, *DIGITS, *FIT],
    ),
    "interpolate": ("interpolated", ".png", ["--n", 1, "--frames", 2]),
    "restore": ("restored", ".png", ["--n", 1, "--answers", 1, "--samples", 2, *DIGITS]),
    "transfer": ("transferred", ".png", ["--n", 1, *DIGITS]),
    "export": ("model", ".safetensors", []),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_default_file_that_exists_stays(
    name: str, command: Command, run: Path, tmp_path: Path
) -> None:
    stem, suffix, options = QUICK[name]
    (tmp_path / f"{stem}{suffix}").write_text("mine")
    for i in (2, 3):
        result = command(name, run, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == f"{stem}-{i}{suffix}"
    assert (tmp_path / f"{stem}{suffix}").read_text() == "mine"
    assert (tmp_path / f"{stem}-2{suffix}").read_bytes()[:4] != b"mine"
    assert command(name, run, *options, "--overwrite").exit_code == 0
    assert (tmp_path / f"{stem}{suffix}").read_bytes()[:4] != b"mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", QUICK)
def test_a_named_file_that_exists_is_refused_before_the_work(
    name: str, command: Command, tmp_path: Path
) -> None:
    _, suffix, options = QUICK[name]
    out = f"mine{suffix}"
    (tmp_path / out).write_text("mine")
    # The run is absent too: the file is looked at first.
    result = command(name, "absent", *options, "--out", out)
    assert_refused(result, f"{out} exists; name another --out, or replace it by --overwrite")
    assert snapshot(tmp_path) == {out: b"mine"}


@pytest.mark.parametrize("name", [*QUICK, "evaluate", "report"])
def test_a_folder_that_cannot_be_is_refused_before_the_work(
    name: str, command: Command, tmp_path: Path
) -> None:
    _, suffix, options = QUICK.get(name, ("", ".out", []))
    (tmp_path / "file").write_text("mine")
    result = command(name, "absent", *options, "--out", f"file/new/x{suffix}")
    assert_refused(result, "file/new cannot be a folder: .*file is a file")
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "arguments", [["diagnose", "absent", "--out", "file/new"], ["sweep", "--out", "file/new"]]
)
def test_a_folder_of_results_is_tried_before_the_work(
    arguments: list[str], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(command(*arguments), "file/new cannot be a folder: .*file is a file")


def test_a_folder_without_permission_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    allowed = os.access  # the superuser may write anywhere, so the answer is replaced
    monkeypatch.setattr(
        os, "access", lambda path, mode: path.name != "locked" and allowed(path, mode)
    )
    result = command("sample", "absent", "--out", "locked/new/x.png")
    assert_refused(result, "locked/new cannot be written to: no permission in .*locked")
    assert list((tmp_path / "locked").iterdir()) == []


def test_a_page_in_a_run_is_replaced_and_the_command_says_so(
    command: Command, copied: Path, run: Path
) -> None:
    assert command("report", copied).stderr == ""
    assert command("report", copied).stderr == f"replacing {copied}/report.html\n"
    assert_refused(command("report", copied, "--out", copied / "report.html"), ".* exists; name")
