"""Make a page's tables and plots from the result files of sweeps.

    python -m benchmarks.report_sweep RESULT.json... [--marks] [--docs docs/sweep.md] \\
        [--plots docs/]

prints every table. ``--docs`` writes the tables of NAME.json between the lines ``<!-- NAME -->``
and ``<!-- /NAME -->`` of a page. ``--plots`` draws NAME.svg for the files whose picture the page
shows, or for all of them without a page. ``--marks`` first measures the marks again, which needs
the data but no training, and writes them to the file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import fill
from fastlangevin.learn import resolve
from fastlangevin.learn.sweep.write_sweep import marks_of, plot, to_markdown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_sweep")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--marks", action="store_true", help="measure the marks again")
    parser.add_argument("--docs", type=Path, help="write the tables between a page's markers")
    parser.add_argument("--plots", type=Path, help="folder to write the plots to")
    options = parser.parse_args(arguments)
    page = options.docs.read_text("utf-8") if options.docs else ""
    for path in options.results:
        content = json.loads(path.read_text("utf-8"))
        if options.marks:
            centre = resolve(overrides=content["plan"]["centre"])
            features = content["plan"].get("features")
            content["marks"] = marks_of(centre, content["samples"], features)
            path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        tables = to_markdown(content).rstrip()
        print(tables)
        if options.docs:
            fill(options.docs, path.stem, tables)
        if options.plots and (not page or f"]({path.stem}.svg)" in page):
            plot(content, options.plots / f"{path.stem}.svg")


if __name__ == "__main__":
    main()
