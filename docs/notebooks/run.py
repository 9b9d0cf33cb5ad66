"""Run the notebooks and save them with their outputs: `python docs/notebooks/run.py [NAME...]`.

The digest of the code that ran is saved with its outputs, so that a test can tell when a notebook
has been edited and not run again.
"""

import hashlib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
MOST_BYTES = 100_000  # of a picture


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def digest(notebook: nbformat.NotebookNode) -> str:
    """The digest of all code, which the outputs depend on."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def run(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook in place; an error in a cell is raised."""
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in every run
    notebook.metadata["ran"] = digest(notebook)


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """The bytes of every picture among the outputs."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [len(o.data["image/png"]) * 3 // 4 for o in outputs if "image/png" in o.get("data", {})]


if __name__ == "__main__":
    for name in sys.argv[1:] or names():
        notebook = read(name)
        run(notebook)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(name, pictures(notebook))
