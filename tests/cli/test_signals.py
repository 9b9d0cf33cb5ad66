"""What the command does on real signals: it saves, and its exit status names the signal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastlangevin.cli import main
from fastlangevin.learn.checkpoint import list_checkpoints, read_checkpoint
from tests.cli.shared import options
from tests.processes import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="only POSIX has these signals")

# One record an iteration and, in the time of these tests, one checkpoint: at the end.
SETTINGS = {"width": 1, "steps": 1, "batch_size": 2, "samples": 1, "log_every": 1}
SETTINGS |= {"iterations": 1_000_000, "save_every": 500_000, "sample_every": 500_000}


def train(run: Path, output: int) -> None:
    """The command in a forked process, with everything that it prints sent to ``output``."""
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
    main(["train", "--out", str(run), *options(**SETTINGS)])


def wait_until_it_learns(run: Path, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_saved(run: Path) -> int:
    """One checkpoint, whose iteration is the last one that there is a record of."""
    (last,) = list_checkpoints(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    reached = read_checkpoint(last)[1]["iteration"]
    assert reached == json.loads(lines[-1])["iteration"] > 0
    assert (run / "samples.png").exists()
    return reached


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_is_the_exit_status(
    tmp_path: Path, number: int, status: int
) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    with output.open("wb") as file:
        process = start(train, run, file.fileno())
    wait_until_it_learns(run, process.is_alive)
    os.kill(process.pid, number)
    process.join(120)
    text = output.read_text()
    assert process.exitcode == status, text
    assert "Traceback" not in text
    reached = assert_saved(run)
    assert f"stopped at {reached} of 1000000; continue with --resume" in text
    assert f"checkpoint  {run / 'checkpoints' / f'{reached:08d}.safetensors'}" in text


def test_a_terminal_that_closes_saves_and_exits_129(tmp_path: Path) -> None:
    """The kernel sends SIGHUP then, and whatever is printed from then on fails."""
    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        status = 1
        try:
            train(run, 1)
        except SystemExit as exit:
            status = int(str(exit.code))
        finally:
            os._exit(status)

    def alive() -> bool:
        os.read(terminal, 4096)
        return os.waitpid(child, os.WNOHANG) == (0, 0)

    try:
        wait_until_it_learns(run, alive)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert_saved(run)


@pytest.mark.slow
def test_a_reader_that_goes_does_not_end_the_run(tmp_path: Path) -> None:
    """As in `fastlangevin train 2>&1 | head -1`, with Python's own end of a process."""
    run = tmp_path / "run"
    changes = SETTINGS | {"iterations": 20, "log_every": 20}
    arguments = [sys.executable, "-m", "fastlangevin", "train", "--out", str(run)]
    with subprocess.Popen(
        [*arguments, *options(**changes)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    (last,) = list_checkpoints(run)
    assert read_checkpoint(last)[1]["iteration"] == 20
