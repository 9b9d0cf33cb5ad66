"""Help, version, misuse, warnings, and what the command imports."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fastlangevin as fl
from fastlangevin.cli import app as application
from fastlangevin.cli.app import NAMES, make_app
from fastlangevin.cli.options import FitOptions, ShortFitOptions
from fastlangevin.learn.config import FIELDS, read_settings
from fastlangevin.learn.tasks.reconstruct import reconstruct
from tests.cli.shared import Command


def plain(text: str) -> str:
    """Help without its boxes, as one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("flag", ["--help", "-h", None])
def test_help_groups_the_commands_by_use(flag: str | None, command: Command) -> None:
    text = command(*([flag] if flag else [])).stdout
    titles = re.findall(r"^╭─ (.*?) ─", text, re.MULTILINE)
    assert titles == ["Learn", "Sample", "Use a model", "Judge", "Machine", "Help"]
    lines = [line.strip("│ ").split(maxsplit=1) for line in text.splitlines() if line[:1] == "│"]
    assert [line[0] for line in lines] == [*NAMES, "--help", "--install-completion", "--version"]
    for line in lines[: len(NAMES)]:
        command_module = importlib.import_module(f"fastlangevin.cli.{line[0]}")
        assert inspect.getdoc(getattr(command_module, line[0])).splitlines()[0] == line[1]


def test_help_and_version_import_no_torch() -> None:
    """All in one process, which stops at the first line that imports it."""
    lines = [["--help"], ["-h"], [], ["--version"], *([name, "-h"] for name in NAMES)]
    program = (
        "import ast, contextlib, io, sys\n"
        "from fastlangevin.cli import main\n"
        "for line in ast.literal_eval(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n"
        "            main(line)\n"
        "        except SystemExit as exit:\n"
        "            assert not exit.code, line\n"
        "    assert out.getvalue(), line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(lines)], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_option_in_a_sentence(name: str, command: Command) -> None:
    done = command(name, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    for argument in make_app(name)[name].assemble_argument_collection(parse_docstring=True):
        if argument.show:
            text = argument.parameter.help or ""
            assert plain(text) in plain(done.stdout), argument.name
            assert argument.name.upper() in done.stdout or argument.name in done.stdout
            assert re.match(r"[A-Z]|auto|adam|posterior", text), (argument.name, text)
            assert text.endswith("."), (argument.name, text)
    text = plain(done.stdout)
    for setting, field in FIELDS.items() if name in ("train", "sweep") else ():
        assert re.search(rf"--{setting.replace('_', '-')} ", text), setting
        assert field.metadata["help"].lower() in text.lower(), setting


def test_help_of_a_fit_states_the_defaults_of_the_task() -> None:
    defaults = inspect.signature(reconstruct).parameters
    arguments = make_app("restore")["restore"].assemble_argument_collection(parse_docstring=True)
    for name in ShortFitOptions.__annotations__ | FitOptions.__annotations__:
        (text,) = [a.parameter.help for a in arguments if a.name == f"--{name.replace('_', '-')}"]
        want = "0.1 for adam, 0.05 for gd" if name == "lr" else defaults[name].default
        assert f"(default: {want}" in text, name


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["zzz"], 'Unknown command "zzz". Available commands: train, configs, '),
        (["sampel"], 'Unknown command "sampel". Did you mean "sample"?'),
        (["train", "--iteration", "5"], "Unknown option: --iteration. Did you mean --iterations?"),
        (["train", "--iterations", "many"], "--iterations: expected a whole number, got 'many'"),
        (["train", "--iterations", "2.5"], "--iterations: expected a whole number, got '2.5'"),
        (["train", "--size", "2.5"], "--size: expected a whole number, got '2.5'"),
        (["train", "--clamp", "1"], "--clamp requires 2 positional arguments. Only got 1."),
        (["train", "--lr"], "--lr requires an argument"),
        (["train", "digits"], "digits"),
        (["check"], "requires an argument"),
        (["sample", "run", "7"], "7"),
        (["sample", "run", "--n", "0"], 'Invalid value "0" for --n. Must be >= 1.'),
        (["sample", "run", "--steps", "0"], 'Invalid value "0" for --steps. Must be >= 1.'),
        (["sample", "run", "--n", "2.5"], "--n: expected a whole number, got '2.5'"),
        (["check", "run", "--n", "0"], 'Invalid value "0" for --n. Must be >= 1.'),
        (["diagnose", "run", "--n", "15"], 'Invalid value "15" for --n. Must be >= 16.'),
        (["evaluate", "run", "--n", "7"], 'Invalid value "7" for --n. Must be >= 8.'),
        (["report", "run", "--no-compute"], "Unknown option: --no-compute"),
    ],
    ids=" ".join,
)
def test_misuse_is_exit_status_2_and_one_line(
    arguments: list[str], match: str, command: Command, tmp_path: Path
) -> None:
    done = command(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert match in line
    assert list(tmp_path.iterdir()) == []


def test_version_is_printed(command: Command) -> None:
    assert command("--version")[:2] == (0, f"{fl.__version__}\n")


def test_the_installed_script_and_python_m_run_main() -> None:
    root = Path(__file__).resolve().parents[2]
    project = read_settings(root / "pyproject.toml")["project"]
    module, name = project["scripts"]["fastlangevin"].split(":")
    assert getattr(importlib.import_module(module), name) is application.main


def test_a_warning_is_one_line_on_standard_error(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn() -> None:
        warnings.warn("two\nlines", stacklevel=1)

    monkeypatch.setattr("fastlangevin.doctor.report", warn)
    assert command("doctor").stderr == "warning: two lines\n"


def test_ctrl_c_is_exit_status_130_without_a_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlangevin.doctor.report", interrupt)
    done = command("doctor")
    assert done.exit_code == 130
    assert "Traceback" not in done.output


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_tab_completes_commands_options_and_settings(command: Command, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    done = command(
        "--install-completion", "--shell", "bash", "--output", script, HOME=str(tmp_path)
    )
    assert done.exit_code == 0, done.output
    program = """
        source "$1"
        words() { COMP_WORDS=(fastlangevin "$@"); COMP_CWORD=$#; COMPREPLY=(); _fastlangevin; }
        for line in 'tr' 'train --ite' 'sample --col' 'sweep --step'; do
            words $line; echo "${COMPREPLY[@]}"
        done
    """
    shown = subprocess.run(
        ["bash", "-c", program, "bash", script], capture_output=True, text=True, check=True
    ).stdout
    assert shown.splitlines() == [
        "train transfer",
        "--iterations",
        "--columns",
        "--steps --step-size",
    ]


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_leave_the_cores_to_others_unless_the_user_says_otherwise(
    given: str | None, expected: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "fastlangevin.doctor.report", lambda: seen.append(os.environ["OMP_WAIT_POLICY"])
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    command("doctor", **({} if given is None else {"OMP_WAIT_POLICY": given}))
    assert seen == [expected]
