"""The one-file page: `report/index.html` opens offline, and `report/figures/` holds the figures as png, svg and pdf."""

from pathlib import Path

from throughline.files import replacing
from throughline.report.bundle import render_page
from throughline.report.contents import collect
from throughline.report.drawings import write_figures
from throughline.run_dir import RunDir


def write_report(run: RunDir) -> Path:
    """The path of `run`'s page, written from whatever results the run has, with its figures beside it.

    Missing results are no error: their section names the command that makes them.
    """
    write_figures(run)
    path = run.report_folder() / "index.html"
    with replacing(path) as temporary:
        # A lone surrogate (half of a character that a token cuts in two) becomes its JSON escape.
        temporary.write_bytes(render_page(run.study().name, collect(run)).encode("utf-8", "backslashreplace"))
    run.push_report()
    return path
