"""The figures of the analysis: what is drawn, and under which name it is saved."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from throughline.figures.curves import draw_decay, draw_divergence, draw_persistence
from throughline.figures.matches import draw_best_matches
from throughline.figures.ribbons import draw_ribbon
from throughline.records import Analysis, TransferResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {"divergence": draw_divergence, "decay": draw_decay, "persistence": draw_persistence}


class Drawing(NamedTuple):
    """One figure and the name of its files."""

    name: str
    figure: "Figure"


def draw_analysis(analysis: Analysis | None, results: list[TransferResult]) -> Iterator[Drawing]:
    """Every figure of the analysis for which there are numbers."""
    if analysis is not None:
        sample = {"num_tokens": analysis.num_tokens, "seed": analysis.seed}
        for kind, draw in CURVES.items():
            if any(curve.kind == kind and any(y is not None for y in curve.value) for curve in analysis.curves):
                yield Drawing(kind, draw(analysis.curves, **sample))
        for ribbon in analysis.ribbons:
            if ribbon.layers:
                yield Drawing(f"ribbon-{ribbon.model}", draw_ribbon(ribbon, **sample))
    matched = [result for result in results if {"correlation", "chance"} <= result.arrays.keys()]
    if matched:
        yield Drawing("best-matches", draw_best_matches(matched))
