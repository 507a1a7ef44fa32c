"""The one-file page: `report/index.html` opens offline, and `report/figures/` holds the figures as png, svg and pdf."""

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from throughline.figures.comparison import draw_comparison, name_prompts
from throughline.figures.quality import draw_quality
from throughline.figures.style import save_figure
from throughline.figures.trace import draw_trace
from throughline.figures.transfer import draw_all_models, draw_transfer
from throughline.files import replacing
from throughline.records import TransferResult
from throughline.report.contents import collect, collect_traces
from throughline.report.drawings import draw_analysis
from throughline.run_dir import RunDir, digest_key


def write_report(run: RunDir) -> Path:
    """The path of `run`'s page, written from whatever results the run has, with its figures beside it.

    Missing results are no error: their section names the command that makes them.
    """
    results = read_transfers(run)
    drawings = write_figures(run, results)
    path = run.report_folder() / "index.html"
    with replacing(path) as temporary:
        # A lone surrogate (half of a character that a token cuts in two) becomes its JSON escape.
        temporary.write_bytes(render_page(collect(run, results, drawings)).encode("utf-8", "backslashreplace"))
    run.push_report()
    return path


def load_page(run: RunDir) -> str:
    """The page as `write_report` last wrote it or, if that is older than what it shows, made anew in memory.

    Nothing is written. A page made here has the figures of the analysis from the last one that was written, if there is any.
    """
    path, css, js = run.report_folder() / "index.html", *inline_blocks()
    written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    shown = run.stamp("study", "quality", "tables", "transfer", "analysis", "traces")
    is_ours = f"<style>{css}</style>" in written and f"<script>{js}</script>" in written  # not another version's
    if is_ours and path.stat().st_mtime_ns >= max(changed for _, changed, _ in shown):
        return written
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)
    figures = json.loads(data[1])["figures"] if is_ours and data else []
    return render_page(collect(run, read_transfers(run), figures))


def inline_blocks() -> tuple[str, str]:
    """Exactly what stands in the page's elements style and script, whatever the run: for a policy that allows these alone."""
    css, js = _read_assets()
    return f"\n{css}\n", f"\n{js}\n"


def _read_assets() -> tuple[str, str]:
    assets = files("throughline.report") / "assets"
    css = (assets / "page.css").read_text(encoding="utf-8")
    return css, "\n".join((assets / name).read_text(encoding="utf-8") for name in ("trace.js", "page.js"))


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


def write_figures(run: RunDir, results: list[TransferResult]) -> list[dict[str, Any]]:
    """Save every figure that `run` has records for, named after what it shows.

    What the page shows of those of the analysis: name, topics, caption, and the picture as svg.
    """
    folder, shown = run.report_folder() / "figures", []
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
    for trace in collect_traces(run, run.comparisons()):
        name = _file_name("trace", trace.model, digest_key(trace.model, trace.prompt)[:8])
        save_figure(draw_trace(trace), folder / name)
    for comparison in (*run.comparisons(), *run.totals()):
        name = _file_name("compare", digest_key(comparison.models, name_prompts(comparison))[:8])
        save_figure(draw_comparison(comparison), folder / name)
    for drawing in draw_analysis(run.analysis(), results):
        name = _file_name(drawing.name)
        svg = next(path for path in save_figure(drawing.figure, folder / name) if path.suffix == ".svg")
        words = {"name": name, "topics": drawing.topics, "caption": drawing.caption}
        shown.append(words | {"svg": svg.read_text(encoding="utf-8")})
    return shown


def render_page(contents: dict[str, Any]) -> str:
    """The page as one text: template, style, script and `contents` as JSON without a `<` to end its element."""
    assets = files("throughline.report") / "assets"
    data = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    css, js = _read_assets()
    parts = {"title": html.escape(contents["study"]["name"]), "css": css, "js": js, "data": data}
    template = (assets / "page.html").read_text(encoding="utf-8")
    # One pass, so that data which looks like a placeholder stays data.
    return re.sub(r"\{\{(title|css|js|data)\}\}", lambda match: parts[match[1]], template)


def _file_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)
