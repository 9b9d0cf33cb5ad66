"""What the page of several processes says is what the file of results says."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import main, shown
from benchmarks.result_file import machine
from tests.benchmarks.shared import ROOT

RESULTS: dict[str, Any] = {
    "equal": {"weights": {"equal": True, "1": "a"}, "figures": {"equal": False, "1": "b"}},
    "kills": {
        "kills": 3,
        "jobs": [
            {"last_checkpoint_at_kill": [0, 25], "exit_status": 0, "weights_equal": True},
            {"last_checkpoint_at_kill": [0], "exit_status": 1, "weights_equal": True},
        ],
    },
    "hang": {"limit_s": 15, "ended_after_s": 53.2, "errors": ["no answer from rank 2"]},
    "nodes": {"weights_equal": True},
    "samples": {"n": 50_000, "files_at_kill": 50, "files": 98, "equal": False},
    "speed": {"seconds_per_sample": {"1 process": 0.002, "2 processes": 0.001}, "rounds": 3},
}


def test_what_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = tmp_path / "page.md", tmp_path / "processes.json"
    page.write_text("before\n<!-- processes -->\nold\n<!-- /processes -->\nafter\n")
    file.write_text(json.dumps(RESULTS | {"machine": machine()}))
    line = ["processes", "--out", str(tmp_path), "--only", "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", line)
    main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for line in (
        "- 1, 2, 3 and 4 processes: weights equal, figures DIFFERENT.",
        "- 3 kills of a random process, 2 of them before the first checkpoint: 1 of 2 jobs ended",
        "- A stopped process (SIGSTOP): named. With a limit of 15 s, the job ended 53 s after",
        "- Two launchers on one machine: weights equal.",
        "- 50,000 samples, stopped at 50 of 98 files and continued: DIFFERENT.",
        "- Milliseconds per sample: 2 with 1 process, 1 with 2 processes.",
    ):
        assert line in text


def test_the_page_holds_what_was_measured() -> None:
    file = ROOT / "benchmarks" / "results" / "processes.json"
    if not file.exists():
        pytest.skip("benchmarks/results/processes.json is not there")
    page = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    assert shown(json.loads(file.read_text("utf-8"))) in page
