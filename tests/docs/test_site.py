"""The documentation site: it builds without a warning, and browsers show it as it should be."""

import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import fastlangevin as fl
from tests.docs.snippets import ROOT

pytest.importorskip("furo", reason='the site needs pip install -e ".[docs]"')
pytestmark = pytest.mark.slow

PUBLIC = {
    "fastlangevin": fl.__all__,
    "fastlangevin.learn": fl.learn.__all__,
    "fastlangevin.noise": fl.noise.__all__,
    "fastlangevin.presets": fl.presets.__all__,
    "fastlangevin.testing": fl.testing.__all__,
}
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 700}
# What sticks out of the page to the right, unless it is in a box that scrolls. (The theme cuts off
# the rest, so that the width of the page tells nothing.)
OVERFLOW = """() => {
  const wide = document.documentElement.clientWidth;
  const scrolls = e => e.tagName != 'ARTICLE' && (
    ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e))
    .slice(0, 5).map(e => e.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built with warnings as errors: broken links and references among them.

    The workers of pytest-xdist share one build.
    """
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
            done = subprocess.run(
                [*command, "-d", f"{out}.doctrees", ROOT / "docs", f"{out}.new"],
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            Path(f"{out}.new").rename(out)
    return out


def documented(site: Path) -> set[str]:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {
        name
        for kind in ("class", "function", "method", "exception", "data", "attribute", "module")
        for name in inventory.data.get(f"py:{kind}", {})
    }


def test_every_public_name_has_a_docstring_and_a_place_in_the_reference(site: Path) -> None:
    names = documented(site)
    missing = []
    for module, public in PUBLIC.items():
        for name in public:
            value = getattr(importlib.import_module(module), name)
            if f"{module}.{name}" not in names:
                missing.append(f"{module}.{name} is not in the API pages")
            if (inspect.isroutine(value) or inspect.isclass(value)) and not value.__doc__:
                missing.append(f"{module}.{name} has no docstring")
    for name, method in vars(fl.LangevinSampler).items():
        shown = inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
        if shown and f"fastlangevin.LangevinSampler.{name}" not in names:
            missing.append(f"LangevinSampler.{name} is not in the API pages")
    assert missing == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} was found")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_pages_fit_a_desktop_and_a_phone_without_errors_or_the_network(
    site: Path, browser: Any
) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"{page.url}: {request.url} failed"))
    page.on(
        "console",
        lambda message: message.type == "error" and faults.append(f"{page.url}: {message.text}"),
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:")) or faults.append(f"{request.url} is remote")
        ),
    )
    pages = [path for path in sorted(site.rglob("*.html")) if not path.name.startswith("_")]
    assert len(pages) > 40
    for path in pages:
        page.set_viewport_size(DESKTOP)
        page.goto(path.as_uri(), wait_until="load")
        for size in (DESKTOP, PHONE):
            page.set_viewport_size(size)
            faults += [
                f"{path.name} at {size['width']}: {text}" for text in page.evaluate(OVERFLOW)
            ]
        broken = "[...document.images].filter(i => !i.naturalWidth && i.loading != 'lazy').length"
        if page.evaluate(broken):
            faults.append(f"{path.name}: an image cannot be shown")
    assert faults == []


def test_equations_are_drawn_and_the_search_finds_pages_without_a_server(
    site: Path, browser: Any
) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto((site / "short-run.html").as_uri())
    heights = page.evaluate(
        "[...document.querySelectorAll('math[display=block]')].map("
        "e => e.getBoundingClientRect().height)"
    )
    assert len(heights) >= 5
    assert min(heights) > 10
    assert page.evaluate("document.querySelectorAll('merror').length") == 0
    page.goto((site / "search.html").as_uri() + "?q=saturation")
    page.wait_for_selector("ul.search li a", timeout=20_000)
