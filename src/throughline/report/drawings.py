"""The figures beside the page: which there are, and saving those that what they show has changed since.

To draw one takes a second, so `report/figures/.drawn.json` notes what each was drawn from, and several processes draw many.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel

import throughline.figures
from throughline.figures.comparison import draw_comparison, name_prompts
from throughline.figures.curves import draw_decay, draw_divergence, draw_persistence
from throughline.figures.matches import draw_best_matches
from throughline.figures.quality import draw_quality
from throughline.figures.ribbons import draw_ribbon
from throughline.figures.style import save_figure
from throughline.figures.trace import draw_trace
from throughline.figures.transfer import draw_all_models, draw_transfer
from throughline.files import checksum_of, replacing
from throughline.records import Analysis, TransferResult
from throughline.run_dir import RunDir, digest_key
from throughline.views.reading import RunReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {"divergence": draw_divergence, "decay": draw_decay, "persistence": draw_persistence}
DRAWN = ".drawn.json"
FIGURES_A_PROCESS = 4  # at least: to start one takes as long as to draw two
DRAWING_PROCESS = "throughline.report.drawing_process"


class Drawing(NamedTuple):
    """The name of a figure's files, and the call that draws it."""

    name: str
    draw: "Callable[..., Figure]"
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})


def write_figures(run: RunDir) -> None:
    """Save every figure that `run` has records for as png, svg and pdf in report/figures/; what is current stays untouched.

    Many that are to be drawn are divided among processes, as many as there are cores.
    """
    folder = run.report_folder() / "figures"
    before = _read_drawn(folder)
    sources = {drawing.name: _digest(drawing) for drawing in _drawings(run)}
    stale = [name for name, source in sources.items() if not _is_current(folder, before.get(name), source)]
    drawn = before | _draw_side_by_side(run, stale)
    drawn = {name: drawn[name] for name in sources}
    if drawn != before:
        with replacing(folder / DRAWN) as temporary:
            temporary.write_text(json.dumps(drawn, indent=1))


def _draw_side_by_side(run: RunDir, names: list[str]) -> dict[str, Any]:
    """`draw_figures`, divided among processes; what one of them could not draw is drawn here."""
    num_processes = max(1, min(os.cpu_count() or 1, len(names) // FIGURES_A_PROCESS))
    own, *shares = (names[i::num_processes] for i in range(num_processes))
    processes = [_start(run, share) for share in shares]
    try:
        drawn = draw_figures(run, own)
        for process, share in zip(processes, shares, strict=True):
            drawn |= _finish(process) or draw_figures(run, share)
        return drawn
    finally:
        for process in processes:
            process.kill()
            process.wait()


def draw_figures(run: RunDir, names: Collection[str]) -> dict[str, Any]:
    """Draw the figures of these names; by figure, what it was drawn from and the sums of its files."""
    folder, drawn = run.report_folder() / "figures", {}
    for drawing in _drawings(run) if names else ():
        if drawing.name in names:
            paths = save_figure(drawing.draw(*drawing.arguments, **drawing.options), folder / drawing.name)
            drawn[drawing.name] = {"source": _digest(drawing), "files": _sums(folder, [path.name for path in paths])}
    return drawn


def _start(run: RunDir, names: Sequence[str]) -> "subprocess.Popen[str]":
    """A process that draws these figures (`drawing_process`)."""
    process = subprocess.Popen(
        [sys.executable, "-m", DRAWING_PROCESS, str(run.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(names))
    return process


def _finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a process has drawn; nothing if it was ended, or failed."""
    assert process.stdout
    with process.stdout:
        said = process.stdout.read()
    return json.loads(said) if process.wait() == 0 else {}


def _is_current(folder: Path, known: dict[str, Any] | None, source: str) -> bool:
    return known is not None and known["source"] == source and _sums(folder, known["files"]) == known["files"]


def _drawings(run: RunDir) -> Iterator[Drawing]:
    """All figures of a run, named after what they show."""
    study, reader, results = run.study(), RunReader(run), _read_transfers(run)
    qualities = {model.name: run.quality(model.name) for model in study.models}
    if any(qualities.values()):
        yield Drawing("quality", draw_quality, (qualities, study.gate))
    for result in results:
        name = _file_name("transfer", result.info.metric, f"{result.info.source}__{result.info.target}")
        yield Drawing(name, draw_transfer, (result,))
    for metric in sorted({result.info.metric for result in results}):
        of_metric = [result for result in results if result.info.metric == metric]
        yield Drawing(_file_name("all-models", metric), draw_all_models, (of_metric,))
    for trace in (reader.trace(row.id) for row in reader.traces()):
        name = _file_name("trace", trace.model, digest_key(*trace.origin)[:8])
        yield Drawing(name, draw_trace, (trace,))
    for comparison in (*run.comparisons(), *run.totals()):
        name = _file_name("compare", digest_key(comparison.models, name_prompts(comparison))[:8])
        yield Drawing(name, draw_comparison, (comparison,))
    yield from _of_the_analysis(run.analysis(), results)


def _of_the_analysis(analysis: Analysis | None, results: list[TransferResult]) -> Iterator[Drawing]:
    """Those for which the analysis has numbers."""
    if analysis is not None:
        sample = {"num_tokens": analysis.num_tokens, "seed": analysis.seed}
        for kind, draw in CURVES.items():
            if any(curve.kind == kind and any(y is not None for y in curve.value) for curve in analysis.curves):
                yield Drawing(kind, draw, (analysis.curves,), sample)
        for ribbon in analysis.ribbons:
            if ribbon.layers:
                yield Drawing(_file_name(f"ribbon-{ribbon.model}"), draw_ribbon, (ribbon,), sample)
    matched = [result for result in results if {"correlation", "chance"} <= result.arrays.keys()]
    if matched:
        yield Drawing("best-matches", draw_best_matches, (matched,))


def _read_transfers(run: RunDir) -> list[TransferResult]:
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


def _file_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)


# ---- what was drawn


def _read_drawn(folder: Path) -> dict[str, Any]:
    """By figure, what it was drawn from and the sums of its files; empty if that cannot be told."""
    try:
        found = json.loads((folder / DRAWN).read_text())
        return {name: {"source": str(one["source"]), "files": dict(one["files"])} for name, one in found.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _sums(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Their check sums; None for a file that is not there."""
    return {name: checksum_of(folder / name) for name in names}


def _digest(drawing: Drawing) -> str:
    """The same if, and only if, the same would be drawn."""
    digest = hashlib.sha256(f"{_drawers()} {drawing.draw.__qualname__}".encode())
    _add(digest, (drawing.arguments, drawing.options))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Records, arrays and plain values, nested as they like, each after its size."""
    if isinstance(value, TransferResult):
        value = (value.info, value.arrays)
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            _add(digest, (str(key), item))
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode("utf-8", "surrogatepass"))


@cache
def _drawers() -> str:
    """The code that draws: ours and matplotlib's version."""
    sources = sorted(Path(throughline.figures.__file__).parent.glob("*.py"))
    return version("matplotlib") + hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
