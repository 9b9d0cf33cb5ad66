"""Write a run, or a model alone, as one self-contained HTML page without scripts or network use."""

import base64
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fastlangevin._version import __version__
from fastlangevin.learn.atomic import save_text
from fastlangevin.learn.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from fastlangevin.learn.config import resolve, resolve_saved
from fastlangevin.learn.data.pictures import read_picture
from fastlangevin.learn.diagnosis.write_diagnosis import FORMAT as DIAGNOSIS
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.evaluation.evaluate import FORMAT as EVALUATION
from fastlangevin.learn.log import read_records, read_series
from fastlangevin.learn.reading import (
    brief,
    check_file,
    check_inside,
    read_bytes,
    read_json,
    read_text,
    reading,
)
from fastlangevin.learn.run_folder import CONFIG, DIVERGED, divergence, is_run

_TEMPLATE = Path(__file__).with_suffix(".html")
_TYPES = {".png": "image/png", ".gif": "image/gif"}
_READ = (*_TYPES, ".txt", ".json", ".jsonl", ".yaml")
ITERATION = "iteration "  # the text of a picture begins with this and the number
_NO_CURVES = (
    "No curves: this is a model alone. The log of its learning is in the folder of its run; the "
    "page of the run shows the curves."
)
_GRIDS = 6
_POINTS = 800
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 360, 160, 72, 24
_CURVES = {
    "gap": "gap, E_data - E_samples",
    "grad_norm": "|dE/dx|, mean over chains and steps",
    "reach": "reach, |x_K - x_0|",
    "energy_data": "mean energy of data",
    "energy_samples": "mean energy of samples",
    "saturation": "saturation, share of elements outside (-1, 1)",
    "lr": "learning rate",
    "data_noise": "noise on the data",
}


class Weights(NamedTuple):
    """The newest weights of a run or the weights of a model, which all results should match."""

    checkpoint: Path | None  # None for a run that has none yet
    info: dict[str, Any]

    @property
    def iteration(self) -> int | None:
        iteration = self.info.get("iteration")
        return iteration if isinstance(iteration, int) else None


def find_weights(run: str | Path) -> Weights:
    """Return the :class:`Weights` of a run's folder, a checkpoint, or a model in the package.

    Raises FileNotFoundError if there is none of these, and CheckpointError for a file that is
    damaged or from another version.
    """
    if is_run(Path(run)) and not list_checkpoints(Path(run)):
        return Weights(None, {})
    checkpoint = find_checkpoint(run)
    return Weights(checkpoint, read_checkpoint(checkpoint)[1])


def write_report(run: str | Path, out: str | Path, results: Path | None = None) -> None:
    """Write the page of a run's folder, or of a model alone, atomically.

    The page of a run has samples from several iterations, curves, every picture in the folder with
    the text file of the same name, the results of ``evaluate`` and ``diagnose`` if they exist, and
    the settings. The page of a model alone, which has no folder and no log, has the settings and
    the pictures and results in the folder ``results``.

    Raises as :func:`find_weights` does, and FileError for a file in the folder that is damaged,
    from another version, or a link to a place outside.
    """
    save_text(Path(out), to_html(Path(run), results))


def to_html(run: Path, results: Path | None = None) -> str:
    """Return the page of a run's folder, or of a model alone.

    The page of a model alone, which has no folder and no log, has the settings, and the pictures
    and results in the folder ``results``. Raises FileNotFoundError if there is neither, and
    FileError for a file that is damaged, from another version, or a link to a place outside.
    """
    weights = find_weights(run)
    if is_run(run):
        title, learning = f"Run {run.resolve().name}", _curves(run)
        _files_of_run(run, CONFIG)
        settings = dataclasses.asdict(resolve(run / CONFIG))
    else:
        title, learning = f"Model {run.stem}", f"<p>{_NO_CURVES}</p>"
        settings = _settings_in_header(weights.info, run)
        if weights.info.get("config") is not None:
            settings = dataclasses.asdict(resolve_saved(weights.info, run, {}))
    last = f"iteration {weights.iteration}" if weights.checkpoint else "no checkpoint yet"
    diverged = divergence(run) if _files_of_run(run, DIVERGED) else None
    iterations = settings.get("iterations")
    trained = f"{settings['data']}, {last} of {iterations}" if "data" in settings else last
    folder = results or run
    if results:
        weights = weights._replace(checkpoint=None)  # these results are new
    sections = [
        f"<p>{escape(trained)}; fastlangevin {escape(__version__)}</p>",
        f"<p>The run {escape(diverged)}</p>" if diverged else "",
        _section("Samples", _samples(folder, weights, iterations)),
        _section("Learning", learning),
        _section("Results", _pictures(folder, weights)),
        _section("Evaluation", _evaluation(folder, weights)),
        _section("Diagnosis", _diagnosis(folder, weights)),
        _section("Settings", _table(["setting", "value"], settings.items())),
    ]
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        title=escape(title), body="\n".join(sections)
    )


def _settings_in_header(info: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Return the settings of the energy and the sampler in the header of a model."""
    settings: dict[str, Any] = {}
    for name in ("energy", "sampler"):
        if not isinstance(info.get(name), dict | None):
            raise FileError(f"{model} has a damaged header: {name} must be settings by name")
        settings |= info.get(name) or {}
    return settings


def age(path: Path, weights: Weights) -> str:
    """Return a text that says that a result is of other weights, or "" if it is of these.

    A result records its iteration: JSON under that name, a picture in the first line of its text.
    Without one, the times of the files are compared, although copying may change them.
    """
    if weights.checkpoint is None:
        return ""
    iteration = _iteration_of(path)
    if iteration is not None and weights.iteration is not None:
        other = f"of iteration {iteration}, the last checkpoint is of {weights.iteration}"
        return f" ({other})" if iteration != weights.iteration else ""
    older = path.stat().st_mtime < weights.checkpoint.stat().st_mtime
    return " (by its file's time older than the last checkpoint)" if older else ""


def _iteration_of(path: Path) -> int | None:
    """Return the iteration that a result records, in JSON or in the text of a picture, or None."""
    text = path if path.suffix == ".json" else path.with_suffix(".txt")
    try:
        if text.suffix == ".txt":
            first = read_text(text).splitlines()[0]
            return int(first.removeprefix(ITERATION)) if first.startswith(ITERATION) else None
        iteration = read_json(text)["iteration"]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
    return iteration if isinstance(iteration, int) else None


def _samples(run: Path, weights: Weights, iterations: Any) -> str:
    grids = _files_of_run(run, "samples/" + "[0-9]" * 8 + ".png")
    picked = [grids[i * (len(grids) - 1) // (_GRIDS - 1)] for i in range(_GRIDS)] if grids else []
    final = run / "samples.png"
    parts = []
    if final in _files_of_run(run, final.name):
        # It is drawn when a run ends, so it is outdated only while a resumed run is not done.
        old = "" if weights.iteration == iterations else age(final, weights)
        parts.append(_image(final, "the last weights" + old))
    return _grid(parts + [_image(p, f"iteration {int(p.stem)}") for p in dict.fromkeys(picked)])


def _curves(run: Path) -> str:
    _files_of_run(run, "*.jsonl")
    with reading(run / "metrics.jsonl", "records"):
        records = read_records(run)
    with reading(run / "series.jsonl", "records"):
        series = read_series(run)
    parts = []
    for name, title in _CURVES.items():
        rows = next((log for log in (series, records) if log and name in log[0]), [])
        numbers = [r for r in rows if _is_number(r.get(name)) and _is_number(r["iteration"])]
        points = sorted((r["iteration"], r[name]) for r in numbers)
        constant = name in ("lr", "data_noise") and len({y for _, y in points}) == 1
        if len(points) > 1 and not constant:
            caption = f"<figcaption>{escape(title)}</figcaption>"
            parts.append(f"<figure>{curve(points)}{caption}</figure>")
    return _grid(parts)


def curve(points: Sequence[tuple[float, float]]) -> str:
    """Draw points (x, y), with x ascending, as inline SVG; many points are reduced to extremes."""
    points = _extremes(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    extent = (high - low) or abs(high) or 1.0
    right, top = _WIDTH - 8, 8

    def at(x: float, y: float) -> str:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - low) / extent
        return (
            f"{_LEFT + across * (right - _LEFT):.1f},"
            f"{_HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - top):.1f}"
        )

    zero = ""
    if low < 0 < high:
        (x1, y0), (x2, _) = at(xs[0], 0).split(","), at(xs[-1], 0).split(",")
        zero = f'<line x1="{x1}" y1="{y0}" x2="{x2}" y2="{y0}"/>'
    line = " ".join(at(x, y) for x, y in points)
    base = _HEIGHT - _BOTTOM
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f'<path d="M{_LEFT} {top}V{base}H{right}"/>{zero}'
        f'<polyline points="{line}"/>'
        f'<text x="{_LEFT - 4}" y="{top + 8}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_LEFT - 4}" y="{base}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_LEFT}" y="{base + 16}">{xs[0]:g}</text>'
        f'<text x="{(_LEFT + right) / 2:g}" y="{base + 16}" text-anchor="middle">iteration</text>'
        f'<text x="{right}" y="{base + 16}" text-anchor="end">{xs[-1]:g}</text></svg>'
    )


def _extremes(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-2 * len(points) // _POINTS)
    if size < 3:
        return list(points)
    extremes = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        extremes += sorted(ends)
    return [points[0], *extremes, points[-1]]


def _pictures(run: Path, weights: Weights) -> str:
    parts = []
    texts = _files_of_run(run, "*.txt")
    for path in _files_of_run(run, "*"):
        if path.suffix in _TYPES and path.name not in ("samples.png", "diagnose.png"):
            parts.append(_image(path, path.stem.replace("_", " ") + age(path, weights)))
            if (text := path.with_suffix(".txt")) in texts:
                words = read_bytes(text).decode("utf-8", errors="replace")
                parts[-1] = f"<div>{parts[-1]}<pre>{escape(words)}</pre></div>"
    return _grid(parts)


def _files_of_run(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern; FileError for a link that leaves the folder."""
    paths = sorted(path for path in folder.glob(pattern) if path.suffix in _READ)
    for path in paths:
        check_inside(path, folder)
        check_file(path)
    return paths


def _evaluation(run: Path, weights: Weights) -> str:
    path = run / "evaluate.json"

    def show(record: Mapping[str, Any]) -> str:
        levels = f", rounded to {record['levels']} levels" if record["levels"] else ""
        facts = (
            f"Of iteration {record.get('iteration')}{age(path, weights)}. Features: "
            f"{record['features']}, {record['dimension']}. Reference: {record['reference_images']} "
            f"of the training images ({record['reference']}), of rank {record['reference_rank']}. "
            f"Images are clamped to [-1, 1]{levels}; precision and recall have k = {record['k']}; "
            f"nearest is the median distance of at most {record['neighbours']} images to the "
            f"nearest of {record['training_images']} training images, close the share nearer to "
            "one than 95 % of held-out images are."
        )
        named = {"frechet_distance": "FID"} if record["inception"] else {}
        columns = list(next(iter(record["figures"].values())))
        heads = ["set", *(named.get(name, name.replace("_", " ")) for name in columns)]
        rows = [(name, *(row[c] for c in columns)) for name, row in record["figures"].items()]
        return f"<p>{escape(facts)}</p>{_table(heads, rows)}"

    return _result_section(path, EVALUATION, show)


def _diagnosis(run: Path, weights: Weights) -> str:
    path, picture = run / "diagnose.json", run / "diagnose.png"

    def show(record: Mapping[str, Any]) -> str:
        old = age(path, weights).strip()
        lines = [("long run", record["long_run"]["verdict"])]
        for part in ("reach", "mixing"):
            lines += [(f"{part}, {name}", value) for name, value in record[part].items()]
        layers = [
            (row["name"], row["elements"], row["residual"], row["floor"])
            for row in record["layers"]
        ]
        return (
            (f"<p>{escape(old)}</p>" if old else "")
            + (_image(picture, "") if picture in _files_of_run(run, picture.name) else "")
            + _table(["quantity", "value"], lines)
            + _table(["moments of layer", "elements", "residual", "by chance"], layers)
        )

    return _result_section(path, DIAGNOSIS, show)


def _result_section(path: Path, form: str, show: Callable[[Mapping[str, Any]], str]) -> str:
    """Show the file of a result, if there is one; FileError if it is damaged."""
    if path not in _files_of_run(path.parent, path.name):
        return ""
    with contextlib.suppress(
        AttributeError, IndexError, KeyError, OverflowError, StopIteration, TypeError, ValueError
    ):
        record = read_json(path)
        if (record["format"], record["version"]) == (form, 1):
            return show(record)
    raise FileError(
        f"{path} is damaged or not a {form!r} of version 1; write it again or remove it"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def _image(path: Path, caption: str) -> str:
    data = base64.b64encode(read_picture(path)).decode()
    text = escape(caption)
    return (
        f'<figure><img src="data:{_TYPES[path.suffix]};base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_text_of(value))}</td>' for value in row)}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text_of(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.5g}" if isinstance(value, float) else brief(value)


def _is_number(value: Any) -> bool:
    """Return whether a value can be drawn: JSON may hold integers beyond the range of floats."""
    return isinstance(value, int | float) and abs(value) < 1e300
