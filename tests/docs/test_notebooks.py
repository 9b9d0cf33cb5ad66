"""The notebooks run, and the outputs in the repository are those of the code beside them."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.docs.snippets import ROOT, not_finite

pytest.importorskip("nbclient", reason='notebooks need pip install -e ".[docs]"')
_spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs/notebooks/run.py")
assert _spec is not None
assert _spec.loader is not None
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

notebooks = pytest.mark.parametrize("name", run.names())


@notebooks
def test_outputs_belong_to_the_code(name: str) -> None:
    notebook = run.read(name)
    assert notebook.metadata.get("ran") == run.digest(notebook), (
        f"{name} was edited: python docs/notebooks/run.py {name}"
    )
    assert run.pictures(notebook)
    assert max(run.pictures(notebook)) <= run.MOST_BYTES


@pytest.mark.slow
@notebooks
def test_the_code_of_a_notebook_runs_and_prints_its_lines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines are compared by their first words, as figures and what follows from them may differ.

    In this process, where torch is imported already: a kernel would take seconds to start.
    """
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with torch.random.fork_rng(devices=()):
        for cell in run.read(name).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, name, "exec"), namespace)
                text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
                assert first_words(capsys.readouterr().out) == first_words(text)
    pyplot.close("all")
    assert not_finite(namespace) == []


def first_words(text: str) -> list[str]:
    return [re.sub(r"\d+", "0", line.split()[0]) for line in text.splitlines() if line.strip()]
