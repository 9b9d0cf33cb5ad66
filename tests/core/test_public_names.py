"""The names of `fastlangevin` are imported when they are first asked for."""

import subprocess
import sys

import pytest

import fastlangevin as fl


@pytest.mark.parametrize("name", dir(fl))
def test_every_public_name_resolves_and_stays_the_same(name: str) -> None:
    assert getattr(fl, name) is getattr(fl, name)
    assert name in (*fl.__all__, "learn", "presets", "testing")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LangevinSampled'"):
        _ = fl.LangevinSampled
    with pytest.raises(ImportError, match="cannot import name 'lod'"):
        from fastlangevin import lod  # noqa: F401


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, fastlangevin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_star_gives_every_name_but_the_subpackages() -> None:
    names: dict[str, object] = {}
    exec("from fastlangevin import *", names)
    assert set(fl.__all__) <= names.keys()
    assert not {"learn", "presets", "testing"} & names.keys()
