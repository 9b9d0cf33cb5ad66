"""The documentation site: `sphinx-build -W docs build/docs` writes it to build/docs/index.html.

Sphinx, because the docstrings are reStructuredText and its pages and search work from file://.
Equations become MathML, which browsers draw without a script, a font or the network.
"""

import dataclasses
import io
import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from rich.console import Console
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fastlangevin
from fastlangevin.cli.app import NAMES, make_app

project = "fastlangevin"
author = "the fastlangevin authors"
copyright = "the fastlangevin authors. Apache-2.0"
version = release = fastlangevin.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = True  # a reference to a function that does not exist is an error
nitpick_ignore_regex = [("py:(class|obj|data|exc|attr|mod)", ".*")]  # types of other packages

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the committed outputs are shown; tests/docs runs the notebooks

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"fastlangevin {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True


def write_math(self: Any, node: nodes.Element) -> None:
    """Write an equation as MathML."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    equation = convert(node.astext(), display=display)
    self.body.append(f'<div class="equation">{equation}</div>' if display == "block" else equation)
    raise nodes.SkipNode


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    """Make a docstring that was written to be read in an editor valid reStructuredText.

    Blocks indented by four spaces in its introduction are equations or code, shown as they are.
    Stars, bars and trailing underscores outside of literals have no meaning.
    """
    section = literal = False
    for i, line in enumerate(list(lines)):
        section = section or re.fullmatch(r"(Args|Returns|Raises|Yields):", line) is not None
        indented = line.startswith("    ")
        if not section and indented and not literal and not lines[i - 1].strip():
            lines[i] = line.replace("    ", "::\n\n    ", 1) if i else line
            literal = True
        elif line.strip() and not indented:
            literal = False
        if not (literal and not section):
            lines[i] = _plain(line)
    if what == "class" and dataclasses.is_dataclass(obj):  # fields explain themselves
        helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(obj)}
        entries = [f"    {name}: {_plain(text)}" for name, text in helps.items() if text]
        lines += ["", "Args:", *entries]
    lines[:] = "\n".join(lines).split("\n")


def _plain(line: str) -> str:
    """Escape what is markup only by accident; find referenced names in whichever module."""
    parts = re.split(r"(``.*?``|:\w+:`.*?`)", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_\b(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [re.sub(r":`(?!fastlangevin)", ":`.", part) for part in parts[1::2]]
    return "".join(parts)


class NetworkSpeed(SphinxDirective):
    """Shows the rows of the table in networks.md whose first cell is one of the arguments."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        path = f"{self.env.srcdir}/networks.md"
        self.env.note_dependency(path)
        with open(path, encoding="utf-8") as page:
            rows = [line.strip().strip("|").split("|") for line in page if line.startswith("| ")]
        table = {row[0].strip(): [cell.strip() for cell in row] for row in rows}
        missing = [name for name in self.content if name not in table]
        if missing:
            raise self.error(f"networks.md has no row {missing[0]!r}")
        columns = ("energy", "loop ms", "ours ms", "speed", "engine")
        places = [table["energy"].index(column) for column in columns]
        chosen = [table["energy"], *(table[name] for name in self.content)]
        lines = ["| " + " | ".join(row[place] for place in places) + " |" for row in chosen]
        lines.insert(1, "|" + " --- |" * len(columns))
        return self.parse_text_to_nodes("\n".join(lines))


class CommandHelp(SphinxDirective):
    """Shows the help of every command, as it is printed on a terminal of 88 columns."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for name in NAMES:
            console = Console(file=io.StringIO(), width=88)
            make_app(name).help_print([name], console=console)
            text = console.file.getvalue()  # type: ignore[attr-defined]
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.add_directive("network-speed", NetworkSpeed)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
