"""Sweeps: which runs are made, cut and resumed, shared by processes, refused, and summed up."""

import dataclasses
import importlib
import importlib.util
import json
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

import fastlangevin as fl
from fastlangevin.learn import load_images, resolve, sweep, train
from fastlangevin.learn.checkpoint import read_checkpoint
from fastlangevin.learn.data.load import ImageData
from fastlangevin.learn.evaluation.classifier import QualityCheck, coarse
from fastlangevin.learn.evaluation.evaluate import evaluate
from fastlangevin.learn.evaluation.features import make_features
from fastlangevin.learn.seeds import SWEEP
from fastlangevin.learn.sweep.plan import Sweep, read_sweep
from fastlangevin.learn.sweep.run import run_sweep
from fastlangevin.learn.sweep.write_sweep import summarise, to_markdown, write_report
from tests.learn.sweep.shared import CENTRE, interrupted

Results = list[dict[str, Any]]


class CutError(Exception):
    """What stops a sweep in these tests."""


@pytest.fixture(scope="module")
def whole(plan: Sweep, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The folder and the results of the sweep, never cut."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    results = run_sweep(plan, out)
    assert results is not None
    return out, results


def untimed(results: Results | None) -> Results:
    assert results is not None
    return [{k: v for k, v in result.items() if k != "seconds"} for result in results]


def assert_same(out: Path, results: Results | None, whole: tuple[Path, Results]) -> None:
    """The same results, and the same weights in folders of the same names."""
    assert untimed(results) == untimed(whole[1])
    names = sorted(path.name for path in whole[0].iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        if (whole[0] / name).is_dir():
            got, want = (read_checkpoint(folder / name)[0] for folder in (out, whole[0]))
            assert all(torch.equal(value, want[key]) for key, value in got.items())


def cut() -> None:
    raise CutError


def settings(plan: Sweep) -> list[tuple[Any, ...]]:
    return [tuple(point.values()) for point in plan.points()]


def test_axes_through_the_centre() -> None:
    """One axis at a time; the centre, on all of them, once; an axis need not hold the centre."""
    centre = resolve(overrides=CENTRE)
    axes: dict[str, list[Any]] = {"steps": [1, 2, 3], "width": [2, 4], "noise_std": [0.5]}
    own = Sweep(centre, axes)
    b = centre.noise_std
    assert settings(own) == [(1, 2, b), (2, 2, b), (3, 2, b), (2, 4, b), (2, 2, 0.5)]
    assert own.lines("width") == [[{"steps": 2, "width": w, "noise_std": b} for w in (2, 4)]]


def test_a_grid_has_a_run_for_every_combination() -> None:
    own = Sweep(resolve(overrides=CENTRE), {"steps": [1, 2], "width": [2, 4]}, grid=True)
    assert sorted(settings(own)) == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert own.lines("steps") == [[{"steps": k, "width": w} for k in (1, 2)] for w in (2, 4)]


def test_runs_differ_in_what_is_swept_and_in_the_seed(plan: Sweep) -> None:
    runs = plan.runs()
    assert [(run.config.steps, run.config.seed) for run in runs] == [(1, 5), (1, 6), (2, 5), (2, 6)]
    assert len({run.name for run in runs}) == 4
    for run in runs:
        same = dataclasses.replace(run.config, steps=2, seed=5)
        assert same == plan.centre


@pytest.mark.parametrize(
    ("start", "final", "values", "finals"),
    [(0.04, 0.01, [0.0, 0.04, 0.08], [0.0, 0.01, 0.02]), (0.03, 0.03, [0.1, 0.03], [0.1, 0.03])],
)
def test_annealing_follows_what_is_swept(
    start: float, final: float, values: list[float], finals: list[float]
) -> None:
    centre = resolve(overrides=CENTRE | {"data_noise": start, "data_noise_final": final})
    runs = Sweep(centre, {"data_noise": values}, seeds=1).runs()
    assert [run.config.data_noise for run in runs] == values
    assert [run.config.data_noise_final for run in runs] == pytest.approx(finals)
    both = Sweep(centre, {"data_noise": values, "data_noise_final": [0.5]}, seeds=1)
    assert {run.config.data_noise_final for run in both.runs()} == {final, 0.5}


def test_fields_change_together_with_an_axis(tmp_path: Path) -> None:
    """At the axis' values; elsewhere the centre, which need not be one of them, keeps its own."""
    content: dict[str, Any] = {
        **CENTRE,
        "data_noise": 0.04,
        "data_noise_final": 0.01,
        "axes": {"steps": [1, 5], "width": [2, 4]},
        "together": {"steps": {"data_noise": ["8e-2", 0.02], "noise_std": [0, 1]}},
        "seeds": 1,
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content))
    swept = read_sweep(file)
    settings = [
        (c.steps, c.width, c.data_noise, c.data_noise_final, c.noise_std)
        for c in (run.config for run in swept.runs())
    ]
    noise_std = swept.centre.noise_std
    assert settings[:2] == [(1, 2, 0.08, pytest.approx(0.02), 0), (5, 2, 0.02, 0.005, 1)]
    assert settings[2:] == [(2, 2, 0.04, 0.01, noise_std), (2, 4, 0.04, 0.01, noise_std)]
    text = to_markdown(summarise(swept, []))
    assert "data_noise changes with steps: 0.08 at 1, 0.02 at 5. noise_std changes with" in text
    alone = read_sweep(file, {"steps": [3]})
    assert alone.together == {}
    assert [run.config.data_noise for run in alone.runs()] == [0.04, 0.04]
    with pytest.raises(
        ValueError, match=r"data_noise changes together with steps in .*plan\.yaml$"
    ):
        read_sweep(file, {"data_noise": [0.5]})
    file.write_text(yaml.safe_dump({"axes": {"steps": [1, 2]}, "together": None}))
    assert read_sweep(file).together == {}


def test_energies_of_the_users_own_are_swept_without_settings_of_the_packages() -> None:
    swept = Sweep(resolve("digits"), {"energy": [None, "mine:Net"]}, seeds=1)
    assert [(run.config.energy, run.config.width) for run in swept.runs()] == [
        (None, 32),
        ("mine:Net", None),
    ]
    with pytest.raises(ValueError, match="at energy=mine:Net, width=8: width is of ConvEnergy al"):
        Sweep(resolve("digits"), {"energy": ["mine:Net"], "width": [8]}, grid=True).runs()


def test_a_file_and_options(tmp_path: Path) -> None:
    """Options take the place of the file's; a list of one is the centre's."""
    file = tmp_path / "plan.yaml"
    content = {**CENTRE, "axes": {"steps": [1, 2], "width": ["2", "4e0"]}, "seeds": 1, "grid": True}
    file.write_text(yaml.safe_dump(content))
    assert read_sweep(file) == Sweep(
        resolve(overrides=CENTRE), {"steps": [1, 2], "width": [2, 4]}, 1, True
    )
    changed = read_sweep(file, {"steps": [7], "width": [3, 5]}, seeds=2, grid=False)
    want = Sweep(resolve(overrides=CENTRE | {"steps": 7}), {"width": [3, 5]}, 2)
    assert changed == want


def test_a_sweeps_run_equals_a_training_run(
    plan: Sweep, whole: tuple[Path, Results], tmp_path: Path
) -> None:
    """The same weights, and a record of what the sweep says of it."""
    run, (out, results) = plan.runs()[1], whole
    train(run.config, tmp_path / "own")
    got, want = (read_checkpoint(f)[0] for f in (out / run.name, tmp_path / "own"))
    assert all(torch.equal(value, want[key]) for key, value in got.items())
    lines = (out / run.name / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])  # the last quarter of four records
    found = results[1]
    assert (found["settings"], found["seed"], found["diverged"]) == ({"steps": 1}, 6, None)
    assert (found["gap"], found["gap_rms"]) == pytest.approx((last["gap"], abs(last["gap"])))
    assert found["grad_norm"] == pytest.approx(last["grad_norm"])
    assert found["seconds"] == statistics.median(json.loads(line)["seconds"] for line in lines)
    assert 0 <= found["sure"] <= 1


@pytest.mark.parametrize(("at_run", "at_iteration"), [(1, 2)])
def test_an_interrupted_sweep_goes_on_when_called_again(
    at_run: int,
    at_iteration: int,
    plan: Sweep,
    whole: tuple[Path, Results],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished runs are skipped, the cut one goes on, and the end is that of an uncut sweep."""
    out = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(sweep.run, "train", interrupted(at_run, at_iteration, cut))
        with pytest.raises(CutError):
            run_sweep(plan, out)
    trained: list[tuple[str, int]] = []

    def counted(config: Any, folder: Path, *, report: Any, **options: Any) -> Path:
        def follow(iteration: int, record: Any) -> None:
            trained.append((folder.name, iteration))
            report(iteration, record)

        return train(config, folder, report=follow, **options)

    monkeypatch.setattr(sweep.run, "train", counted)
    results = run_sweep(plan, out)
    names = [run.name for run in plan.runs()]
    left = [(name, i) for name in names[at_run + 1 :] for i in range(1, 5)]
    # A checkpoint is written after every iteration, before it is reported.
    again = [(names[at_run], i) for i in range(at_iteration + 1, 5)]
    assert trained == again + left
    assert_same(out, results, whole)


def test_a_signal_stops_the_sweep(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = interrupted(1, 2, lambda: signal.raise_signal(signal.SIGTERM))
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(sweep.run, "train", stop)
        out = tmp_path / "sweep"
        assert run_sweep(plan, out, report=lambda run, _: seen.append(run.name)) is None
    assert seen == [plan.runs()[0].name]


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    """Kept apart from the means, with its reason, which names no file; and not made again."""
    centre = resolve(overrides=CENTRE | {"max_energy": 1e6})
    plan = Sweep(centre, {"max_energy": [1e-9, 1e6]}, seeds=1)
    results = run_sweep(plan, tmp_path / "sweep")
    assert results is not None
    assert results[0]["diverged"]["iteration"] == 1
    assert "energies run away at iteration 1" in results[0]["diverged"]["reason"]
    assert str(tmp_path) not in results[0]["diverged"]["reason"]
    assert results[0]["frechet"] is None
    assert results[1]["diverged"] is None
    assert run_sweep(plan, tmp_path / "sweep") == results
    content = summarise(plan, results)
    assert content["points"][0]["measures"] == dict.fromkeys(sweep.run.MEASURES)
    text = to_markdown(content)
    assert "| diverged | 1 of 1 | 0 of 1 |" in text
    assert "max_energy=1e-09, seed 5: iteration 1: energies run away" in text
    pytest.importorskip("matplotlib")
    lost = Sweep(centre, {"max_energy": [1e-9]}, seeds=1)
    write_report(lost, results[:1], tmp_path)
    assert "1 diverged" in (tmp_path / "sweep.svg").read_text()


def test_means_and_standard_errors(plan: Sweep, whole: tuple[Path, Results]) -> None:
    content = summarise(plan, whole[1])
    for point, own in zip(content["points"], (whole[1][:2], whole[1][2:]), strict=True):
        assert point["runs"] == own
        a, b = (run["frechet"] for run in own)
        assert point["measures"]["frechet"]["mean"] == pytest.approx((a + b) / 2)
        # Two values: their deviation is |a - b| / sqrt 2, and that over sqrt 2 is the error.
        assert point["measures"]["frechet"]["error"] == pytest.approx(abs(a - b) / 2)
        assert point["measures"]["frechet"]["n"] == 2
    found = content["points"][1]["measures"]["gap"]
    assert f" {found['mean']:.3g} ± {found['error']:.1g} |" in to_markdown(content)
    alone = summarise(dataclasses.replace(plan, seeds=1), whole[1][::2])
    assert alone["points"][0]["measures"]["gap"]["error"] is None


def test_a_sweep_writes_its_tables_and_pictures(
    plan: Sweep, whole: tuple[Path, Results], tmp_path: Path
) -> None:
    written = write_report(plan, whole[1], tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content == summarise(plan, whole[1])
    text = (tmp_path / "sweep.md").read_text()
    assert text == to_markdown(content)
    assert content["samples"] == 50
    for name, mark in content["marks"].items():
        assert (mark["images"], mark["reference"]) == (50, 100)
        assert f"Frechet distance {mark['frechet']:.3g} (50 against 100)" in text, name
    pytest.importorskip("matplotlib")
    before = (tmp_path / "sweep.svg").read_bytes()
    texts = {e.text for e in ElementTree.fromstring(before).iter() if e.tag.endswith("}text")}
    measured = sweep.run.MEASURES.keys() - sweep.run.OF_FEATURES.keys()
    assert {"steps", "1", "2", *(sweep.run.MEASURES[name] for name in measured)} <= texts
    assert "of features" not in text
    write_report(plan, whole[1], tmp_path)
    assert (tmp_path / "sweep.svg").read_bytes() == before
    assert len(written) == 3


def test_the_pages_tables_are_those_of_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/sweep.md holds what the files say, and --marks measures their marks again."""
    root = Path(__file__).resolve().parents[3]
    monkeypatch.syspath_prepend(str(root))
    report_sweep = importlib.import_module("benchmarks.report_sweep")
    page = Path(shutil.copy(root / "docs" / "sweep.md", tmp_path))
    found = sorted((root / "benchmarks" / "results").glob("sweep-*.json"))
    files = [Path(shutil.copy(path, tmp_path)) for path in found]
    contents = {path: json.loads(path.read_text()) for path in files}
    assert all(to_markdown(content) in page.read_text() for content in contents.values())
    # The other sweeps' data are not in the package, so that their marks are not measured again.
    digits = [path for path in files if contents[path]["plan"]["centre"]["data"] == "digits"]
    digits[0].write_text(json.dumps(contents[digits[0]] | {"marks": {}}))
    report_sweep.main([*map(str, digits), "--marks", "--docs", str(page)])
    for path, content in ((path, contents[path]) for path in digits):
        again = json.loads(path.read_text())
        for name, mark in content["marks"].items():
            # Another machine's classifier may differ a little.
            assert again["marks"][name] == pytest.approx(mark, rel=0.01)
        assert to_markdown(again) in page.read_text()
    assert capsys.readouterr().out.count("real images: sure") == len(digits)


def test_the_table_of_a_grid_has_a_line_for_each_point(whole: tuple[Path, Results]) -> None:
    axes = {"steps": [1, 2], "width": [2, 4]}
    plan = Sweep(resolve(overrides=CENTRE), axes, seeds=1, grid=True)
    results = [
        whole[1][0] | {"settings": dict(point), "gap": float(i)}
        for i, point in enumerate(plan.points())
    ]
    lines = to_markdown(summarise(plan, results)).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| steps | width |")))
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 :]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (str(p["steps"]), str(p["width"]), str(i)) for i, p in enumerate(plan.points())
    ]


def test_figures_are_of_coarse_clamped_pixels() -> None:
    fine = torch.rand(50, 2, 8, 8).repeat_interleave(2, -1).repeat_interleave(2, -2)
    x = (2 * fine[:, :, ::2, ::2]).clamp(max=1).flatten(1).double()
    torch.testing.assert_close(coarse(2 * fine), x, atol=1e-6, rtol=0)


def test_quality_orders_data_and_noise() -> None:
    check = QualityCheck(load_images("digits", limit=400))
    marks = check.marks(300)
    data = check(check.images)
    assert data.frechet == pytest.approx(0, abs=1e-9)
    assert data.sure == marks["real images"].sure
    noisy = check(check.images + 0.5 * torch.randn(check.images.shape)).frechet
    assert 0 < marks["real images"].frechet < noisy < marks["uniform noise"].frechet


def test_marks_have_the_samples_counts() -> None:
    """60 images against 100 of uniform pixels: the marks against independent sets of these counts.

    Means of 20 and of 100, that scatter by 1 % each, and small data make a mark about 5 % low. Sets
    of other counts are far off: two halves of the 100 at 1.5 times, the data themselves at 0.6.
    """
    rng = np.random.default_rng(0)

    def images(n: int) -> ImageData:
        pixels = rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
        return ImageData(pixels, None, "uniform pixels", 127.5, 1.0)

    marks = [QualityCheck(images(100)).marks(60)["real images"] for _ in range(20)]
    sets = ((QualityCheck(images(100)), QualityCheck(images(60)).images) for _ in range(100))
    want = statistics.fmean(check(others).frechet for check, others in sets)
    assert statistics.fmean(mark.frechet for mark in marks) == pytest.approx(want, rel=0.15)
    assert marks[0][2:] == (60, 100)


def test_a_sweep_also_compares_features(
    plan: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the figures of evaluate, for the samples that the run's model draws."""
    monkeypatch.setattr(sweep.run, "FEATURE_SAMPLES", 30)
    axes = dataclasses.replace(plan, axes={"steps": [1]}, seeds=1, features="pixels")
    results = run_sweep(axes, tmp_path / "sweep")
    assert results is not None
    data = load_images("digits", limit=100)
    x = fl.load(tmp_path / "sweep" / axes.runs()[0].name)(n=30, seed=fl.noise.fold_in(5, SWEEP))
    features = make_features("pixels", data)
    with pytest.warns(UserWarning, match="its covariance has rank 49"):
        of_samples = evaluate({"samples": x}, data, features, reference=50, seed=1)
    figures = of_samples.figures["samples"]
    found = [results[0][name] for name in sweep.run.OF_FEATURES]
    want = [figures.frechet_distance, figures.kernel_distance, figures.recall]
    assert found == pytest.approx(want)
    content = summarise(axes, results)
    marks = [content["marks"][name] for name in ("real images", "uniform noise")]
    assert marks[0]["feature_frechet"] < marks[1]["feature_frechet"]
    assert f"| Frechet distance of features | {found[0]:.3g} |" in to_markdown(content)
    assert f", of features {marks[0]['feature_frechet']:.4g}" in to_markdown(content)


def test_unknown_features_are_refused_before_a_run(plan: Sweep, tmp_path: Path) -> None:
    unknown = dataclasses.replace(plan, features="pixel")
    with pytest.raises(ValueError, match=r"features must be auto, .* got 'pixel'"):
        run_sweep(unknown, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    few = dataclasses.replace(plan.centre, limit=7, batch_size=4)
    with pytest.raises(ValueError, match="the data must have at least 8 images, got 7"):
        run_sweep(dataclasses.replace(plan, centre=few, features="pixels"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    with pytest.raises(ValueError, match="sweep: features must be a name, got 3"):
        dataclasses.replace(plan, features=3)


def test_quality_of_data_without_labels() -> None:
    data = dataclasses.replace(load_images("digits", limit=50), labels=None)
    assert QualityCheck(data)(torch.zeros(8, 1, 8, 8)).sure is None


def test_sweep_refuses_folders_that_it_cannot_use(
    plan: Sweep, whole: tuple[Path, Results], tmp_path: Path
) -> None:
    other = dataclasses.replace(plan, axes={"steps": [1, 2, 3]})
    with pytest.raises(FileExistsError, match=r"another sweep: axes is .*\[1, 2\].* there"):
        run_sweep(other, whole[0])
    other = dataclasses.replace(plan, together={"steps": {"lr": [0.1, 0.2]}})
    with pytest.raises(FileExistsError, match=r"another sweep: together is \{\} there"):
        run_sweep(other, whole[0])
    older = tmp_path.with_name(f"{tmp_path.name}-older")
    older.mkdir()
    text = (whole[0] / "sweep.yaml").read_text("utf-8")
    without = text.replace("together: {}\n", "")
    assert without != text
    (older / "sweep.yaml").write_text(without, "utf-8")
    sweep.run._check_folder(plan, older)  # from before fields could change together
    lines = [line for line in text.splitlines(keepends=True) if "learn_precision" not in line]
    before, axes = "".join(lines).split("axes:")
    text = f"{before}axes:{axes.replace('steps', 'precision', 1)}"
    (older / "sweep.yaml").write_text(text, "utf-8")
    with pytest.raises(FileExistsError, match="from before train learned in bfloat16"):
        run_sweep(plan, older)
    centre = dataclasses.replace(plan.centre, lr=0.1)
    with pytest.raises(FileExistsError, match=r"another sweep: lr is 0\.005 there, 0\.1 here"):
        run_sweep(dataclasses.replace(plan, centre=centre), whole[0])
    (tmp_path / "sweep.yaml").write_text(sweep.run.MARK + "version: 0\n")
    with pytest.raises(ValueError, match="of version 0; this fastlangevin reads version 1"):
        run_sweep(plan, tmp_path)
    (tmp_path / "sweep.yaml").write_text(sweep.run.MARK + "version: 1\ncentre: 3\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml is damaged, it has no centre"):
        run_sweep(plan, tmp_path)
    (tmp_path / "sweep.yaml").rename(tmp_path / "thesis.tex")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex but no sweep\.yaml"):
        run_sweep(plan, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        run_sweep(plan, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "\xff",
        lambda text: text.replace('"gap"', '"gaps"'),
        lambda text: text.replace('"seed"', '"need"'),
        lambda text: text.replace('"diverged": null', '"diverged": {"iteration": 3}'),
        lambda text: text.replace(' "frechet": ', ' "frechet": "lost", "other": '),
    ],
    ids=["cut", "empty", "list", "bytes", "no measure", "no seed", "no reason", "no number"],
)
def test_damaged_sweep_results_are_named(
    damage: Callable[[str], str],
    plan: Sweep,
    whole: tuple[Path, Results],
    tmp_path: Path,
) -> None:
    """The file and what to do are named before any run goes on."""
    out, runs = tmp_path / "sweep", plan.runs()
    shutil.copytree(whole[0], out)
    (out / runs[0].name / "result.json").unlink()
    path = out / runs[2].name / "result.json"
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_bytes(changed.encode("latin-1"))
    with pytest.raises(ValueError, match=r"result\.json is damaged or .*; remove it, and") as error:
        run_sweep(plan, out)
    assert str(path) in str(error.value)
    assert not (out / runs[0].name / "result.json").exists()


def test_a_sweep_whose_damaged_result_is_removed_ends_as_the_whole_one(
    plan: Sweep, whole: tuple[Path, Results], tmp_path: Path
) -> None:
    out, run = tmp_path / "sweep", plan.runs()[2]
    shutil.copytree(whole[0], out)
    (out / run.name / "result.json").unlink()
    assert_same(out, run_sweep(plan, out), whole)
