"""report: a page that needs nothing else, says what the run's files say, and shows in a browser."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastlangevin.cli import report
from fastlangevin.cli.outputs import Result
from fastlangevin.learn import html_report, load_images, resolve, save_grid, train
from fastlangevin.learn.checkpoint import read_checkpoint, save_checkpoint
from fastlangevin.learn.diagnosis import write_diagnosis
from fastlangevin.learn.evaluation import evaluate, features
from fastlangevin.learn.model import export
from tests.command import run_command

TINY = {
    "width": 2, "steps": 2, "batch_size": 4, "iterations": 20, "save_every": 10, "log_every": 2,
    "sample_every": 5, "samples": 4, "device": "cpu", "limit": 1500,
}  # fmt: skip


DIAGNOSIS: dict[str, Any] = {
    "format": "fastlangevin diagnosis", "version": 1, "iteration": 20,
    "long_run": {"verdict": "steady"}, "reach": {}, "mixing": {}, "layers": [],
}  # fmt: skip


class Page(HTMLParser):
    """Tags, references to anything outside the tag, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.references: list[str] = []
        self.lines: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        names = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"} & set(given)
        self.references += [str(given[name]) for name in names]
        if tag == "img":
            self.images.append(str(given["src"]))
        if tag == "polyline":
            self.lines.append(str(given["points"]))
        if tag not in ("img", "meta", "link", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "a <b> & c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlangevin.learn.log._summary_writer", lambda *arguments: None)
        train(resolve(overrides=TINY), out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """With a picture, its text, and an evaluation in it."""
    out = Path(shutil.copytree(trained, tmp_path / trained.name))
    digits = load_images("digits")
    save_grid(digits.batch(range(4)), out / "my_results.png")
    (out / "my_results.txt").write_text("ratio 0.5 <script>alert(1)</script>\n")
    found = evaluate.evaluate(
        {"samples": digits.batch(range(100, 200))}, digits, features.make_features("pixels", digits)
    )
    evaluate.save(found, out / "evaluate.json", iteration=20)
    return out


def decoded(uri: str) -> Image.Image:
    kind, data = re.fullmatch(r"data:image/(png|gif);base64,(.+)", uri).groups()  # type: ignore
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    assert picture.format == kind.upper()
    return picture


def test_the_page_stands_alone(run: Path) -> None:
    text = html_report.to_html(run)
    page = Page(text)
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]+", "", text))
    assert "$" not in re.sub(r"base64,[^\"]+", "", text)  # the template is filled in


def test_every_picture_of_the_run_is_in_it(run: Path) -> None:
    found = [decoded(uri) for uri in Page(html_report.to_html(run)).images]
    files = [run / "samples.png", *sorted((run / "samples").iterdir()), run / "my_results.png"]
    assert len(found) == len(files) == 6
    for picture, file in zip(found, files, strict=True):
        with Image.open(file) as original:
            assert picture.tobytes() == original.tobytes()


def test_its_text_is_what_the_files_say(run: Path) -> None:
    page = Page(html_report.to_html(run))
    record = json.loads((run / "evaluate.json").read_text())
    for words in (
        "Run a <b> & c",
        "iteration 20 of 20",
        "ratio 0.5 <script>alert(1)</script>",
        "Features: pixels, 64",
        f"{record['figures']['samples']['frechet_distance']:.5g}",
        "rounded to 256 levels",
        "noise_std",
    ):
        assert words in page.text
    assert "FID" not in page.text


def test_results_of_other_weights_are_marked(run: Path) -> None:
    """By the iteration that they record, whatever a copy made of the files' times, or by these."""
    text = Page(html_report.to_html(run)).text
    assert "file's time" not in text
    assert "the last checkpoint is" not in text
    for path in (run / "evaluate.json", run / "my_results.png", run / "samples.png"):
        os.utime(path, (0, 0))
    (run / "diagnose.json").write_text(json.dumps(DIAGNOSIS))
    (run / "diagnose.png").write_bytes((run / "samples.png").read_bytes())
    text = Page(html_report.to_html(run)).text
    assert "Of iteration 20. Features" in text
    assert "my results (by its file's time older than the last checkpoint)" in text
    assert "the last weights (" not in text  # the run has ended, and drawn them then
    (run / "my_results.txt").write_text("iteration 20\nratio 0.5\n")
    assert "my results (" not in Page(html_report.to_html(run)).text
    (run / "my_results.txt").write_text("iteration 10\nratio 0.5\n")
    for name in ("evaluate.json", "diagnose.json"):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(found | {"iteration": 10}))
    text = Page(html_report.to_html(run)).text
    assert "Of iteration 10 (of iteration 10, the last checkpoint is of 20)" in text
    assert text.count("(of iteration 10, the last checkpoint is of 20)") == 3
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("iterations: 20", "iterations: 30"))
    text = Page(html_report.to_html(run)).text
    assert "the last weights (by its file's time older than the last checkpoint)" in text


def test_curves_lie_in_their_frames_and_keep_extremes(run: Path) -> None:
    lines = Page(html_report.to_html(run)).lines
    assert len(lines) >= 5
    points = [(float(i), math.sin(i / 300)) for i in range(5000)]
    points[1234] = (1234.0, 7.0)
    text = html_report.curve(points)
    assert ">7<" in text
    lines += Page(text).lines
    for line in lines:
        xy = [tuple(map(float, p.split(","))) for p in line.split()]
        assert 2 <= len(xy) <= 1000
        assert [x for x, _ in xy] == sorted(x for x, _ in xy)
        assert all(0 <= x <= 460 and 0 <= y <= 180 for x, y in xy)
    heights = [float(p.split(",")[1]) for p in lines[-1].split()]
    assert sorted(heights)[1] - min(heights) > 50  # one high point, and it is still there
    assert Page(html_report.curve([(1, 2.0), (2, 2.0)])).lines


def test_a_run_that_has_just_begun(tmp_path: Path, trained: Path) -> None:
    """Settings alone, and a log cut in its only line."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "config.yaml", bare)
    (bare / "metrics.jsonl").write_text('{"iteration": 1, "gap": NaN, "grad')
    page = Page(html_report.to_html(bare))
    assert "no checkpoint yet" in page.text
    assert (page.images, page.lines) == ([], [])


@pytest.fixture
def command() -> Any:
    return lambda *arguments: run_command("report", *arguments)


def test_refusals(command: Any, run: Path, tmp_path: Path) -> None:
    found = command(tmp_path / "absent")
    assert found.exit_code == 1
    assert "absent does not exist" in found.stderr
    assert "models that come with the package: cifar10, digits" in found.stderr
    evaluation = '{"format": "fastlangevin evaluation", "version": '
    for damaged in ("{", "[]", evaluation + "2}", evaluation + "1}"):
        (run / "evaluate.json").write_text(damaged)
        found = command(run)
        assert found.exit_code == 1
        assert "evaluate.json is damaged or not a 'fastlangevin evaluation' of version 1" in (
            found.stderr
        )
    (run / "evaluate.json").unlink()
    (checkpoint,) = (run / "checkpoints").glob("*20.safetensors")
    tensors, info = read_checkpoint(checkpoint)
    save_checkpoint(checkpoint, tensors, info | {"version": 99})
    for path in (run, checkpoint):
        found = command(path, "--compute")
        assert found.exit_code == 1
        assert "of version 99; this fastlangevin reads version 1" in found.stderr
    assert not (run / "report.html").exists()
    assert not (run / "evaluate.json").exists()


def test_a_model_alone(
    command: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipped, exported, or one checkpoint: what can be made of it, and why there are no curves."""
    monkeypatch.setitem(report._SHORT, "fit", {"restarts": 1, "iterations": 2})
    monkeypatch.chdir(tmp_path)
    export(run, tmp_path / "small.safetensors")
    (checkpoint,) = (run / "checkpoints").glob("*10.safetensors")
    before = sorted(run.rglob("*"))
    for model, title, end in (
        ("digits", "Model digits", "iteration 1600 of 1600"),
        ("small.safetensors", "Model small", "iteration 20 of 20"),
        (checkpoint, "Model 00000010", "iteration 10 of 20"),
    ):
        found = command(model, "--device", "cpu", "--overwrite")
        assert found.exit_code == 0, found.output
        assert found.stdout.strip() == "report.html"
        page = Page(Path("report.html").read_text("utf-8"))
        for words in (title, end, "No curves", "best of 64", "crossfade", "noise_std"):
            assert words in page.text
        assert "Evaluation" not in page.text
        samples, interpolated, reconstructed = map(decoded, page.images)
        assert samples.size == (8 * 34 + 2, 8 * 34 + 2)
        assert interpolated.size == (9 * 34 + 2, 8 * 34 + 2)
        assert reconstructed.size[1] == 3 * 34 + 2
        assert page.lines == []
    assert sorted(run.rglob("*")) == before
    tensors, info = read_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "own.safetensors", tensors, info | {"config": None})
    found = command("own.safetensors", "--device", "cpu", "--overwrite")
    assert found.exit_code == 0, found.output
    assert found.stderr.count("it names no data") == 2
    page = Page(Path("report.html").read_text("utf-8"))
    assert ("None" in page.text, "step_size" in page.text, len(page.images)) == (False, True, 1)
    bare = Page(html_report.to_html(Path("digits")))
    assert (bare.images, "No curves" in bare.text, "noise_std" in bare.text) == ([], True, True)


def test_compute_makes_what_is_missing(
    command: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command in its turn; what is there stays, and one that fails stops no other."""

    def fails(run: Path, **options: Any) -> Result:
        raise ValueError("this one fails")

    def fast(run: Path, out: Path, **options: Any) -> Result:
        save_grid(torch.zeros(1, 1, 8, 8), out)
        return Result("ratio 0.123", [out])

    def small(diagnosis: Any, path: Path, title: str) -> None:
        save_grid(torch.zeros(1, 1, 8, 8), path)

    monkeypatch.setattr(report, "reconstruct", fails)
    monkeypatch.setattr(report, "restore", fast)
    monkeypatch.setattr(write_diagnosis, "_plot", small)
    before = (run / "evaluate.json").read_bytes()
    found = command(run, "--compute", "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert "error: this one fails" in found.stderr
    assert (run / "evaluate.json").read_bytes() == before
    assert json.loads((run / "diagnose.json").read_text())["iteration"] == 20
    assert not (run / "reconstructed.png").exists()
    page = Page((run / "report.html").read_text("utf-8"))
    for words in ("restored", "ratio 0.123", "interpolated", "crossfade", "long run", "mixing"):
        assert words in page.text
    assert str(run / "restored.png") not in page.text


def test_compute_makes_again_what_is_of_other_weights(
    command: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def makes(name: str) -> Any:
        def command(run: Path, out: Path, **options: Any) -> Result:
            made.append(name)
            return Result("said", [out])

        return command

    names = {"reconstruct": 20, "interpolate": 10, "restore": None}
    for name, iteration in names.items():
        monkeypatch.setattr(report, name, makes(name))
        path = run / f"{name.removesuffix('e')}ed.png"
        save_grid(torch.zeros(1, 1, 8, 8), path)
        if iteration is not None:
            path.with_suffix(".txt").write_text(f"iteration {iteration}\n")
        os.utime(path, (0, 0))
    for name in ("evaluate", "diagnose"):
        monkeypatch.setattr(report, name, makes(name))
    found = json.loads((run / "evaluate.json").read_text())
    (run / "evaluate.json").write_text(json.dumps(found | {"iteration": 10}))
    (run / "diagnose.json").write_text(json.dumps(DIAGNOSIS))
    assert command(run, "--compute", "--device", "cpu").exit_code == 0
    assert made == ["interpolate", "restore", "evaluate"]
    assert (run / "interpolated.txt").read_text() == "iteration 20\nsaid\n"


def test_it_shows_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Chromium, without a network, as wide as a phone: all pictures and curves have a size, nothing
    was refused, and nothing is wider than the window."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(names)}")
    text = html_report.to_html(run)
    # The page allows no scripts: here, and here only, one counts what the browser shows.
    text = re.sub("<meta http-equiv[^>]+>", "", text)
    count = """<script>addEventListener("load", () => { document.title = [
        [...document.images].filter(i => i.complete && i.naturalWidth > 0).length,
        [...document.querySelectorAll("polyline")].filter(p => p.getTotalLength() > 0).length,
        performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
        innerWidth, Math.max(0, document.documentElement.scrollWidth - innerWidth)
    ].join(" ") })</script></body>"""
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", count), "utf-8")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=375,800",
         path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    page = Page(text)
    title = re.search("<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr
    assert title[1] == f"{len(page.images)} {len(page.lines)} 0 375 0"
