"""Every example in the documentation runs, with shorter loops and chains."""

import ast
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import CycloptsError

import fastlangevin as fl
from fastlangevin.cli.app import NAMES, make_app
from tests.docs.snippets import PAGES, ROOT, blocks, commands, not_finite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Examples are run with loops, chains, batches and timings that are shorter than what a page shows.
SHORTER = {
    r"\brange\(20\)(?=:  # hundreds)": "range(2)",
    r"\biterations=20\b": "iterations=2",
    r"\brand\(16, 3, 32, 32\)": "rand(9, 3, 32, 32)",
}
PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def the_same_chain(*args: Any, compare: Callable = fl.testing.compare, **kwargs: Any) -> Any:
    """Compare as a page does, timing once. The pages show loops that the sampler repeats."""
    comparison = compare(*args, rounds=1, **kwargs)
    assert comparison.same, comparison
    return comparison


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fl.testing, "compare", the_same_chain)
    namespace: dict = {}
    with torch.random.fork_rng(devices=()):
        for block in blocks(page):
            if block.language != "python":
                continue
            # With the page's own line numbers in the traceback.
            code = block.code
            for long, short in SHORTER.items():
                code = re.sub(long, short, code)
            tree = ast.parse("\n" * (block.line - 1) + code, str(page))
            if block.run:
                exec(compile(tree, str(page), "exec"), namespace)
    assert not_finite(namespace) == []


def test_every_command_of_the_documentation_exists_with_its_options() -> None:
    faults = []
    for page in PAGES:
        for line, command in commands(page):
            for part in re.split(r"\s(?:&&|>|\|)\s", command):
                words = shlex.split(part)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    del words[0]
                if words[:1] == ["fastlangevin"] and (fault := misuse(words[1:])):
                    faults.append(f"{name(page)}:{line}: {command}: {fault}")
    assert faults == []


app = functools.cache(make_app)


def misuse(words: list[str]) -> str | None:
    """What is wrong with the arguments of `fastlangevin`, or None."""
    if words[0].startswith("--") or words[0] == "COMMAND":
        return None
    if words[0] not in NAMES:
        return f"no command {words[0]}"
    try:
        app(words[0]).parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return str(error)
    return None


def test_misuse_of_a_command_is_found() -> None:
    assert misuse(["train", "--limit", "10"]) is None
    assert "no command" in (misuse(["trian"]) or "")
    assert misuse(["train", "--limits", "10"])
    assert misuse(["sample", "--n", "many"])


def test_what_the_documentation_installs_and_runs_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(extras["optional-dependencies"])
    for page in PAGES:
        text = page.read_text("utf-8")
        for named in re.findall(r"pip install [^\n`]*?\[([\w,]+)\]", text):
            assert set(named.split(",")) <= extras, f"{name(page)}: no extra {named}"
        for _, command in commands(page):
            for module in re.findall(r"python -m (benchmarks[\w.]*)", command):
                path = ROOT / module.replace(".", os.sep)
                assert path.is_dir() or path.with_suffix(".py").exists(), command
            for script in re.findall(r"(?:python|bash|torchrun.*?) ([\w/]+\.(?:py|sh))", command):
                assert (ROOT / script).exists(), command


def test_the_figures_of_the_readme_are_those_of_the_tables() -> None:
    tables = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("benchmarks", "networks"))
    figures = re.findall(r"\b\d+\.\d+x|\b[\d.]+ MiB", (ROOT / "README.md").read_text())
    assert len(figures) >= 6
    for figure in figures:
        assert figure.removesuffix(" MiB") in tables, f"README.md: {figure}"


def test_links_between_files_lead_somewhere_also_without_the_site() -> None:
    """As on a page that shows the Markdown itself. Building the site checks the sections."""
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{name(page)}: {target}")
    assert broken == []
