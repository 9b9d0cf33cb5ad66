"""Every tensor that the package makes says its dtype and device: torch's defaults may be set.

``torch.set_default_dtype``, ``torch.set_default_device`` and ``with torch.device(...)`` change
what a call of ``torch.empty`` returns, and a kernel that writes float32 into the memory of halves
writes beyond its end.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlangevin

PACKAGE = Path(fastlangevin.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "asarray", "blackman_window", "empty", "empty_permuted",
    "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# They have no argument for a dtype: the legacy constructors take it from their name or from the
# default, a generator has a device alone, and torch.load puts tensors on the default device.
WITHOUT_DTYPE = {"Generator": "device", "load": "map_location"}
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor"}


def unsaid(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is missing) of each call of a factory that leaves something to torch."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        wanted = {"dtype", "device"} if name in FACTORIES else {WITHOUT_DTYPE.get(name)} - {None}
        missing = set() if None in keywords else wanted - keywords  # None: **options
        if name in LEGACY:
            missing = {"another constructor"}
        if missing:
            yield node.lineno, f"torch.{name} without {' and '.join(sorted(missing))}"


def test_every_factory_says_dtype_and_device() -> None:
    """In every file that names torch and a factory: walking all syntax trees takes a second."""
    names = "|".join((*FACTORIES, *WITHOUT_DTYPE, *LEGACY))
    calls = re.compile(rf"\btorch\s*\.\s*({names})\b")
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path, source in sources.items()
        if calls.search(source)
        for line, what in unsaid(source)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("torch.zeros(3)", "torch.zeros without device and dtype"),
        ("torch.arange(3, device=x.device)", "torch.arange without dtype"),
        ("torch.tensor([1.0], dtype=torch.float32)", "torch.tensor without device"),
        ("torch.load(path)", "torch.load without map_location"),
        ("torch.Generator()", "torch.Generator without device"),
        ("torch.Tensor([1.0])", "torch.Tensor without another constructor"),
    ],
)
def test_a_tensor_factory_without_dtype_or_device_is_found(source: str, missing: str) -> None:
    assert list(unsaid(source)) == [(1, missing)]
    assert list(unsaid(f"def f():\n    return {source}")) == [(2, missing)]


def test_names_that_factories_go_by_are_not_imported_from_torch() -> None:
    """``from torch import zeros`` would hide a factory from the test above."""
    imports = re.compile(r"^\s*from torch import (\([^)]*\)|.*)", re.MULTILINE)
    for path in PACKAGE.rglob("*.py"):
        for found in imports.findall(path.read_text(encoding="utf-8")):
            assert not set(re.findall(r"\w+", found)) & (FACTORIES | set(WITHOUT_DTYPE)), path
