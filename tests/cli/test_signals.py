"""What the command does on real signals: it saves, and its exit status names the signal."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlangevin.learn.checkpoint import list_checkpoints, read_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="only POSIX has these signals")

# TensorBoard's import takes seconds.
COMMAND = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *m: None if name == "tensorboard" else find_spec(name, *m)
from fastlangevin.cli import main
main()
"""
SETTINGS = {
    "data": "digits",
    "width": 1,
    "steps": 1,
    "batch-size": 2,
    "samples": 1,
    "device": "cpu",
}
SETTINGS |= {"iterations": 1_000_000, "save-every": 500_000, "sample-every": 500_000}


def command(run: Path) -> list[str]:
    options = [f"--{name}={value}" for name, value in (SETTINGS | {"log-every": 1}).items()]
    return [sys.executable, "-c", COMMAND, "train", f"--out={run}", *options]


def wait_until_it_learns(process: subprocess.Popen[bytes], run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_saved(run: Path) -> None:
    """One checkpoint, whose iteration is the last one that there is a record of."""
    (last,) = list_checkpoints(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert read_checkpoint(last)[1]["iteration"] == json.loads(lines[-1])["iteration"] > 0
    assert (run / "samples.png").exists()


def test_sigterm_saves_and_exits_143(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until_it_learns(process, run)
        process.terminate()
        out, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert b"Traceback" not in error
    assert b"continue with --resume" in error
    assert b"checkpoint " in out
    assert_saved(run)


def test_a_terminal_that_closes_saves_and_exits_129(tmp_path: Path) -> None:
    """The kernel sends SIGHUP then, and whatever is printed from then on fails."""
    import pty

    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command(run))
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            assert time.monotonic() < deadline
            os.read(terminal, 4096)
    finally:
        os.close(terminal)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 129
    assert_saved(run)


def test_a_reader_that_goes_does_not_end_the_run(tmp_path: Path) -> None:
    """As in `fastlangevin train 2>&1 | head -1`."""
    run = tmp_path / "run"
    arguments = [*command(run), "--iterations=60", "--log-every=60"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    (last,) = list_checkpoints(run)
    assert read_checkpoint(last)[1]["iteration"] == 60
