"""A run as one HTML page that needs nothing else: no network, no other file, no script."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastlangevin._version import __version__
from fastlangevin.learn import diagnose_report, evaluate
from fastlangevin.learn.checkpoint import list_checkpoints
from fastlangevin.learn.config import read_settings
from fastlangevin.learn.files import replacing
from fastlangevin.learn.folder import CONFIG, is_run
from fastlangevin.learn.log import read_records, read_series

_TEMPLATE = Path(__file__).with_suffix(".html")
_TYPES = {".png": "image/png", ".gif": "image/gif"}
_GRIDS = 6
_POINTS = 800
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 180, 64, 24
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


def write_report(run: str | Path, out: str | Path) -> None:
    """Write the page of a run's folder, atomically.

    It has the samples and how they came to be, the curves, every picture in the run's folder with
    the text file of its name, an evaluation and a diagnosis where ``evaluate`` and ``diagnose``
    have left one, and the settings.

    Raises FileNotFoundError for a folder that holds no run, and ValueError naming a file in it that
    is damaged or of another version.
    """
    page = to_html(Path(run))
    with replacing(Path(out)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def to_html(run: Path) -> str:
    """The page itself; see :func:`write_report`."""
    if not is_run(run):
        raise FileNotFoundError(f"report: {run} holds no run (it has no {CONFIG} of one)")
    settings, checkpoints = read_settings(run / CONFIG), list_checkpoints(run)
    last = f"iteration {int(checkpoints[-1].stem)}" if checkpoints else "no checkpoint yet"
    intro = f"{settings.get('data')}, {last} of {settings.get('iterations')}; "
    sections = [
        f"<p>{escape(intro)}fastlangevin {escape(__version__)}</p>",
        _section("Samples", _samples(run)),
        _section("Learning", _curves(run)),
        _section("Results", _pictures(run)),
        _section("Evaluation", _evaluation(run)),
        _section("Diagnosis", _diagnosis(run)),
        _section("Settings", _table(["setting", "value"], settings.items())),
    ]
    title = escape(f"Run {run.resolve().name}")
    return Template(_TEMPLATE.read_text("utf-8")).substitute(title=title, body="\n".join(sections))


def _samples(run: Path) -> str:
    grids = sorted((run / "samples").glob("[0-9]" * 8 + ".png"))
    chosen = [grids[i * (len(grids) - 1) // (_GRIDS - 1)] for i in range(_GRIDS)] if grids else []
    final = run / "samples.png"
    parts = [_image(final, "the last weights")] if final.is_file() else []
    return "".join(parts + [_image(p, f"iteration {int(p.stem)}") for p in dict.fromkeys(chosen)])


def _curves(run: Path) -> str:
    records, series = read_records(run), read_series(run)
    parts = []
    for name, title in _CURVES.items():
        found = next((rows for rows in (series, records) if rows and name in rows[0]), [])
        points = [(r["iteration"], r[name]) for r in found if _is_number(r.get(name))]
        constant = name in ("lr", "data_noise") and len({y for _, y in points}) == 1
        if len(points) > 1 and not constant:
            caption = f"<figcaption>{escape(title)}</figcaption>"
            parts.append(f"<figure>{curve(points)}{caption}</figure>")
    return "".join(parts)


def curve(points: Sequence[tuple[float, float]]) -> str:
    """Points (x, y), x ascending, as inline SVG; of many, the extremes of each short stretch."""
    points = _thinned(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    spread = (high - low) or abs(high) or 1.0
    right, top = _WIDTH - 8, 8

    def at(x: float, y: float) -> str:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - low) / spread
        return (
            f"{_LEFT + across * (right - _LEFT):.1f},"
            f"{_HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - top):.1f}"
        )

    zero = ""
    if low < 0 < high:
        (x1, y0), (x2, _) = at(xs[0], 0).split(","), at(xs[-1], 0).split(",")
        zero = f'<line x1="{x1}" y1="{y0}" x2="{x2}" y2="{y0}" stroke="#bbb"/>'
    line = " ".join(at(x, y) for x, y in points)
    base = _HEIGHT - _BOTTOM
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f'<path d="M{_LEFT} {top}V{base}H{right}" fill="none" stroke="#999"/>{zero}'
        f'<polyline points="{line}" fill="none" stroke="#1667a8"/>'
        f'<text x="{_LEFT - 4}" y="{top + 8}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_LEFT - 4}" y="{base}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_LEFT}" y="{base + 16}">{xs[0]:g}</text>'
        f'<text x="{right}" y="{base + 16}" text-anchor="end">{xs[-1]:g}</text></svg>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-2 * len(points) // _POINTS)
    if size < 3:
        return list(points)
    kept = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _pictures(run: Path) -> str:
    parts = []
    for path in sorted(run.iterdir()):
        if path.suffix in _TYPES and path.name not in ("samples.png", "diagnose.png"):
            parts.append(_image(path, path.stem.replace("_", " ") + _age(path, run)))
            if (text := path.with_suffix(".txt")).is_file():
                parts.append(f"<pre>{escape(text.read_text('utf-8', errors='replace'))}</pre>")
    return "".join(parts)


def _evaluation(run: Path) -> str:
    path = run / "evaluate.json"
    found = _read(path, evaluate.FORMAT)
    if not found:
        return ""
    levels = f", rounded to {found['levels']} levels" if found["levels"] else ""
    facts = (
        f"Of iteration {found.get('iteration')}{_age(path, run)}. Features: {found['features']}, "
        f"{found['dimension']}. Reference: {found['reference_images']} of the training images "
        f"({found['reference']}), of rank {found['reference_rank']}. Images are clamped to "
        f"[-1, 1]{levels}; precision and recall have k = {found['k']}; nearest is the median "
        f"distance of at most {found['neighbours']} images to the nearest of "
        f"{found['training_images']} training images, close the share "
        "nearer to one than 95 % of held-out images are."
    )
    named = {"frechet_distance": "FID"} if found["inception"] else {}
    columns = list(next(iter(found["figures"].values())))
    heads = ["set", *(named.get(name, name.replace("_", " ")) for name in columns)]
    rows = [(name, *(row[c] for c in columns)) for name, row in found["figures"].items()]
    return f"<p>{escape(facts)}</p>{_table(heads, rows)}"


def _diagnosis(run: Path) -> str:
    path = run / "diagnose.json"
    found = _read(path, diagnose_report.FORMAT)
    if not found:
        return ""
    picture = run / "diagnose.png"
    lines = [("long run", found["long_run"]["verdict"])]
    for part in ("reach", "mixing"):
        lines += [(f"{part}, {name}", value) for name, value in found[part].items()]
    layers = [
        (row["name"], row["elements"], row["residual"], row["floor"]) for row in found["layers"]
    ]
    return (
        (f"<p>{escape(_age(path, run).strip())}</p>" if _age(path, run) else "")
        + (_image(picture, "") if picture.is_file() else "")
        + _table(["quantity", "value"], lines)
        + _table(["moments of layer", "elements", "residual", "by chance"], layers)
    )


def _read(path: Path, form: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        known = found["format"] == form and found["version"] == 1
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(
            f"report: {path} is damaged, or no {form!r} of version 1; write it again or remove it"
        )
    return dict(found)


def _age(path: Path, run: Path) -> str:
    """A warning where a result is older than the weights that lie there now."""
    newest = max((p.stat().st_mtime for p in list_checkpoints(run)), default=0.0)
    return " (older than the last checkpoint)" if path.stat().st_mtime < newest else ""


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _image(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return (
        f'<figure><img src="data:{_TYPES[path.suffix]};base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_shown(value))}</td>' for value in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
