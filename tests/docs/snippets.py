"""The examples of the documentation, taken out of its Markdown files.

On a page, every block of Python is run, in order and in one namespace. Two kinds of comments, which
readers do not see, change this:

    <!-- run             Python that the next blocks need, such as the names of another codebase
    CODE
    -->
    <!-- not run: REASON -->    the next block is only compiled

Some loops are shortened; SHORTER in test_snippets.py says which.

Lines of a bash block that start the ``fastlangevin`` command are checked against its options.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
_BLOCK = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->$|^<!-- (?P<not_run>not run: .*?) -->$"
    r"|^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the first line of code in the file
    run: bool


def blocks(page: Path) -> list[Block]:
    text, found, run = page.read_text("utf-8"), [], True
    for match in _BLOCK.finditer(text):
        if match["not_run"]:
            run = False
            continue
        code, group = (match["hidden"], "hidden") if match["hidden"] else (match["code"], "code")
        line = text.count("\n", 0, match.start(group)) + 1
        found.append(Block(match["language"] or "python", code, line, run))
        run = True
    return found


def commands(page: Path) -> list[tuple[int, str]]:
    """The lines of a page's bash blocks without comments, continued lines joined."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            code = block.code.replace("\\\n", "  ")
            for i, line in enumerate(code.splitlines()):
                if line := re.sub(r"(^|\s)#.*", "", line).strip():
                    found.append((block.line + i, line))
    return found


def not_finite(namespace: dict[str, Any]) -> list[str]:
    """The names of the tensors that code has left with an infinite number or a NaN."""
    return [
        name
        for name, value in namespace.items()
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all())
    ]
