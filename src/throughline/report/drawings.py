"""The figures of the analysis: what is drawn, under which name it is saved, and where on the page it stands."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from throughline.figures.curves import draw_decay, draw_divergence, draw_persistence
from throughline.figures.matches import draw_best_matches
from throughline.figures.ribbons import draw_ribbon
from throughline.records import Analysis, TransferResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {
    "divergence": (
        draw_divergence,
        ("diverge",),
        "Share of each layer's features that the best layer of another model has, against relative depth.",
    ),
    "decay": (draw_decay, ("decay",), "What two layers of a model share, against the distance between them."),
    "persistence": (
        draw_persistence,
        ("persist", "half-li", "throughline"),
        "Share of throughlines that live so many layers; rings are half-lives.",
    ),
}


class Drawing(NamedTuple):
    """One figure: the name of its files, words of which one is in the topic of findings on the same thing, and what it shows."""

    name: str
    topics: tuple[str, ...]
    caption: str
    figure: "Figure"


def draw_analysis(analysis: Analysis | None, results: list[TransferResult]) -> Iterator[Drawing]:
    """Every figure of the analysis for which there are numbers."""
    if analysis is not None:
        sample = {"num_tokens": analysis.num_tokens, "seed": analysis.seed}
        for kind, (draw, topics, caption) in CURVES.items():
            if any(curve.kind == kind and any(y is not None for y in curve.value) for curve in analysis.curves):
                yield Drawing(kind, topics, caption, draw(analysis.curves, **sample))
        for ribbon in analysis.ribbons:
            if ribbon.layers:
                caption = (
                    f"{ribbon.model}: throughlines alive at each layer, by the layer of their birth; births and deaths."
                )
                yield Drawing(
                    f"ribbon-{ribbon.model}", ("birth", "throughline"), caption, draw_ribbon(ribbon, **sample)
                )
    matched = [result for result in results if {"correlation", "chance"} <= result.arrays.keys()]
    if matched:
        caption = "Share of features whose best partner correlates at least so well, beside the same by chance."
        yield Drawing("best-matches", ("match",), caption, draw_best_matches(matched))
