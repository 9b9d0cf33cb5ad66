"""What long commands show while they run."""

import errno
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest

from fastlangevin.cli.progress_bar import progress
from tests.cli.shared import Command


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_everything_that_is_counted_has_a_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with progress() as show:
        for done, state in ((1, "one"), (2, "gap -0.500  |grad| 0.250"), (3, "")):
            show("iteration", done, 3, state)
            time.sleep(0.01)
        show("set", 1, 2)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"iteration +3/3", text)
    assert re.search(r"\d+\.\d/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)
    assert "gap -0.500  |grad| 0.250" in text
    assert re.search(r"set +1/2", text)


def test_elsewhere_it_is_lines_and_short_work_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress() as show:
        for done in range(1, 101):
            now += 0.5
            show("step", done, 100)
    assert capsys.readouterr().err.splitlines() == [f"step {i}/100" for i in range(5, 101, 5)]
    with progress(pause=0.0) as show:
        for done in (10, 20, 10, 20):
            show("iteration", done, 20, "of a run")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["iteration 10/20  of a run", "iteration 20/20  of a run"] * 2
    with progress() as show:
        for done in range(1, 101):
            now += 0.015
            show("step", done, 100)
    with progress(shown=False, pause=0.0) as show:
        show("step", 1, 1)
    assert capsys.readouterr().err == ""


COMMANDS = {
    "sample": ["sample", "RUN", "--n", "3"],
    "folder": ["sample", "RUN", "--n", "3", "--out", "many"],
    "check": ["check", "RUN", "--n", "3"],
    "evaluate": ["evaluate", "RUN", "--n", "8", "--images", "IMAGES", "--reference", "100"],
    "diagnose": ["diagnose", "RUN", "--n", "16", "--long", "2", "--starts", "2"],
    "reconstruct": ["reconstruct", "RUN", "--images", "IMAGES", "--iterations", "1"],
    "interpolate": ["interpolate", "RUN", "--n", "1", "--frames", "2"],
    "restore": ["restore", "RUN", "--images", "IMAGES", "--answers", "1"],
    "latent": ["restore", "RUN", "--images", "IMAGES", "--method", "latent", "--iterations", "1"],
    "transfer": ["transfer", "RUN", "--images", "IMAGES", "--n", "1"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_long_command_says_what_runs_and_shows_how_far_it_is(
    case: str, command: Command, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlangevin.cli.progress_bar.PAUSE", 0.0)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8))
    names = {"RUN": str(copied), "IMAGES": "images.npy"}
    result = command(*(names.get(word, word) for word in COMMANDS[case]))
    first, *lines = result.stderr.splitlines()
    if case == "evaluate":
        assert re.search(r" against digits, 1797 x 1x8x8: features auto, cpu$", first)
    else:
        threads = r"(1 thread|up to \d+ threads)"
        assert re.search(
            rf": \d+ steps on 1x8x8, cpu with {threads}, engine fused, precision fp32", first
        )
    counts = [re.fullmatch(r"(\w+) (\d+)/(\d+)", line) for line in lines]
    ends = {match[1] for match in counts if match and match[2] == match[3]}
    expected = {"folder": {"image"}, "evaluate": {"sample", "set"}, "diagnose": {"chains"},
                "reconstruct": {"fit"}, "interpolate": {"frame"}, "latent": {"fit"}}  # fmt: skip
    assert ends == expected.get(case, {"step"})


class Closed(io.StringIO):
    """A terminal that has been closed, and the number of times that something was printed."""

    printed = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.printed += 1
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_closes_before_the_first_bar_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal, shown = Closed(), []
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress() as show:
        for done in range(3):
            show("iteration", done, 3)
            shown.append(done)
    assert shown == [0, 1, 2]
    assert terminal.printed > 0  # the bar was drawn, or tried to be
