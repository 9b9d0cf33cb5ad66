"""The package's layout: which modules may import which, read off the source."""

import ast
import functools
import graphlib
from pathlib import Path

import fastlangevin

PACKAGE = Path(fastlangevin.__file__).parent
# From the bottom up. A module imports from its own floor and from those below it.
FLOORS = [
    (
        "_version",
        "arguments",
        "kernels",
        "locks",
        "names",
        "optional",
        "progress",
        "reprs",
        "timing",
    ),
    ("distributed", "noise", "energies"),
    ("anneal", "coarse", "replay", "step"),
    ("gradients",),
    ("chain", "roofline"),
    ("adjoint",),
    ("calls", "diagnostics", "explain", "inputs"),
    ("sampler",),
    ("",),  # fastlangevin itself: the list of public names
    ("bench", "doctor", "learn", "models", "presets", "testing", "train_config"),
    ("cli",),
    ("__main__",),
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    return {
        ".".join(("fastlangevin", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): ast.parse(path.read_text("utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@functools.cache
def imports(module: str) -> set[tuple[str, str]]:
    """(module, name) of everything imported from the package, also in functions and for types."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlangevin"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in modules():  # importing it also runs the package that contains it
                    found |= {(name, ""), (node.module or "", "")}
                else:
                    found.add((node.module or "", alias.name))
        elif isinstance(node, ast.Import):
            found |= {(a.name, "") for a in node.names if a.name.startswith("fastlangevin")}
    return found


def floor(module: str) -> int:
    return FLOOR[".".join(module.split(".")[1:2])]


def test_every_module_has_a_floor() -> None:
    assert {
        module for module in modules() if ".".join(module.split(".")[1:2]) not in FLOOR
    } == set()


def test_no_module_imports_from_a_floor_above_its_own() -> None:
    upward = [
        f"{module} imports {other}"
        for module in modules()
        for other, name in imports(module)
        # The list of public names is at hand everywhere above the sampler, and names its lazy ones.
        if floor(other) > floor(module) and module != "fastlangevin"
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {other for other, _ in imports(module)} - {module}
        for module in modules()
        if module != "fastlangevin"
    }
    for others in graph.values():
        others.discard("fastlangevin")
    assert circle_in(graph) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, each imported by the next one, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_private_names_stay_in_their_module() -> None:
    borrowed = []
    for module, tree in modules().items():
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in modules()
        }
        borrowed += [
            f"{module} imports {other}.{name}"
            for other, name in imports(module)
            if name.startswith("_") and not name.startswith("__")
        ]
        borrowed += [
            f"{module}:{node.lineno} uses {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    assert borrowed == []
