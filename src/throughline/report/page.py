"""The one-file page: `report/index.html` opens offline, and `report/figures/` holds the figures as png, svg and pdf."""

import re
from pathlib import Path

from throughline.figures.comparison import draw_comparison, name_prompts
from throughline.figures.quality import draw_quality
from throughline.figures.style import save_figure
from throughline.figures.trace import draw_trace
from throughline.figures.transfer import draw_all_models, draw_transfer
from throughline.files import replacing
from throughline.records import TransferResult
from throughline.report.bundle import render_page
from throughline.report.contents import collect
from throughline.report.drawings import draw_analysis
from throughline.run_dir import RunDir, digest_key
from throughline.views.reading import RunReader


def write_report(run: RunDir) -> Path:
    """The path of `run`'s page, written from whatever results the run has, with its figures beside it.

    Missing results are no error: their section names the command that makes them.
    """
    write_figures(run, read_transfers(run))
    path = run.report_folder() / "index.html"
    with replacing(path) as temporary:
        # A lone surrogate (half of a character that a token cuts in two) becomes its JSON escape.
        temporary.write_bytes(render_page(run.study().name, collect(run)).encode("utf-8", "backslashreplace"))
    run.push_report()
    return path


def read_transfers(run: RunDir) -> list[TransferResult]:
    """All transfer results of `run`, metrics and models in the study's order."""
    study = run.study()
    names = [model.name for model in study.models]
    metrics = study.transfer.metrics

    def place(known: list[str], name: str) -> tuple[int, str]:
        return (known.index(name) if name in known else len(known), name)

    infos = sorted(
        run.transfers(), key=lambda i: (place(metrics, i.metric), place(names, i.source), place(names, i.target))
    )
    return [run.transfer(info.metric, info.source, info.target) for info in infos]


def write_figures(run: RunDir, results: list[TransferResult]) -> None:
    """Save every figure that `run` has records for, named after what it shows."""
    folder, reader = run.report_folder() / "figures", RunReader(run)
    study = run.study()
    qualities = {model.name: run.quality(model.name) for model in study.models}
    if any(qualities.values()):
        save_figure(draw_quality(qualities, study.gate), folder / "quality")
    for result in results:
        name = _file_name("transfer", result.info.metric, f"{result.info.source}__{result.info.target}")
        save_figure(draw_transfer(result), folder / name)
    for metric in sorted({result.info.metric for result in results}):
        figure = draw_all_models([result for result in results if result.info.metric == metric])
        save_figure(figure, folder / _file_name("all-models", metric))
    for trace in (reader.trace(row.id) for row in reader.traces()):
        name = _file_name("trace", trace.model, digest_key(trace.model, trace.prompt)[:8])
        save_figure(draw_trace(trace), folder / name)
    for comparison in (*run.comparisons(), *run.totals()):
        name = _file_name("compare", digest_key(comparison.models, name_prompts(comparison))[:8])
        save_figure(draw_comparison(comparison), folder / name)
    for drawing in draw_analysis(run.analysis(), results):
        name = _file_name(drawing.name)
        save_figure(drawing.figure, folder / name)


def _file_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)
