"""One prompt through every layer: layers across, positions down, a dot for every feature shown."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from throughline.figures.style import SMALL, diverging, new_figure, shorten, show_token, styled
from throughline.records import ActiveFeature, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_FEATURES = 10  # so many of the strongest get their label, if there is room
_ROW, _COLUMN, _CHARACTER = 0.34, 1.25, 0.062  # inches: a position, a layer, a character of small type


class _Dot(NamedTuple):
    x: float
    y: float
    area: float  # points squared
    feature: ActiveFeature


def name_feature(feature: ActiveFeature) -> str:
    """Its label, or that it has none and the tokens it is most active on."""
    if feature.label is not None:
        return feature.label.text
    return "unlabelled: " + " ".join(show_token(token) for token in feature.top_tokens[:3])


def describe_answer(trace: Trace) -> str:
    """The answer and its probability; if it is wrong, that comes first."""
    answer = f"“{trace.answer}” (p = {trace.answer_probability:.2f})"
    if trace.correct is False:
        return f"WRONG, expected “{trace.expected}”: {answer}"
    return answer


def draw_trace(trace: Trace) -> "Figure":
    """The features shown in `trace` by layer (across) and position (down), and the answer at the end.

    Area: activation, relative to the largest one shown in the same layer. Colour: measured change of the answer score
    (logits) when the feature is off; blue features support the answer, orange ones work against it.
    """
    dots = _place_dots(trace)
    rows, columns = len(trace.tokens), max(1, len(trace.layers))
    with styled():
        figure = new_figure(2.8 + _COLUMN * columns, 1.9 + _ROW * max(rows, 5))
        axes = figure.add_subplot()
        largest = max((abs(dot.feature.effect) for dot in dots), default=0.0) or 1.0
        points = axes.scatter(
            [dot.x for dot in dots],
            [dot.y for dot in dots],
            s=[dot.area for dot in dots],
            c=[dot.feature.effect for dot in dots],
            cmap=diverging(),
            vmin=-largest,
            vmax=largest,
            edgecolors="#444444",
            linewidths=0.6,
            zorder=3,
        )
        _mark_axes(axes, trace, rows, columns)
        _name_strongest(axes, dots, trace, columns)
        figure.colorbar(points, ax=axes, shrink=0.8, pad=0.02).set_label(
            f"change of the answer score (logits) when off\noff: {shorten(trace.off, 60)}"
        )
        gate = "quality gate overridden; " if trace.forced else ""
        r = "none" if trace.prediction_r is None else f"{trace.prediction_r:.2f}"
        figure.suptitle(
            f"{trace.model}: {shorten(repr(trace.prompt), 70)} → {describe_answer(trace)}\n"
            f"{gate}{trace.num_verified} effects measured, r with the prediction {r}; "
            f"random features: mean |effect| {trace.random_effect:.2g}"
        )
    return figure


def _place_dots(trace: Trace) -> list[_Dot]:
    """Features of one layer and position stand side by side within their cell, the most influential one first."""
    dots = []
    for column, layer in enumerate(trace.layers):
        largest = max((feature.activation for feature in layer.features), default=0.0) or 1.0
        for position in sorted({feature.position for feature in layer.features}):
            here = [feature for feature in layer.features if feature.position == position]
            offsets = (np.arange(len(here)) - (len(here) - 1) / 2) * min(0.19, 0.8 / len(here))
            for offset, feature in zip(offsets, here, strict=True):
                area = 18 + 110 * max(0.0, feature.activation) / largest
                dots.append(_Dot(column + float(offset), position, area, feature))
    return dots


def _mark_axes(axes: "Axes", trace: Trace, rows: int, columns: int) -> None:
    axes.set_xlim(-0.55, columns + 0.25)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xticks([*range(columns), columns], [*(str(layer.layer) for layer in trace.layers), "answer"])
    labels = [shorten(show_token(text), 14) for _, text, _, _ in trace.tokens]
    axes.set_yticks(range(rows), labels, parse_math=False)
    for label in axes.get_yticklabels()[trace.num_prompt_tokens :]:
        label.set_fontweight("bold")
    axes.set_xlabel("layer")
    axes.set_ylabel("token (the answer's in bold)")
    axes.hlines(range(rows), -0.55, columns - 0.45, color="#e3e3e3", linewidth=0.7, zorder=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    last = max(0, min(trace.num_prompt_tokens, rows) - 1)
    answer = show_token(shorten(trace.answer, 14))
    axes.text(columns, last, answer, ha="center", va="center", fontweight="bold", zorder=4)
    axes.text(
        columns, last + 0.5, f"p = {trace.answer_probability:.2f}", ha="center", va="center", fontsize=SMALL, zorder=4
    )


def _name_strongest(axes: "Axes", dots: list[_Dot], trace: Trace, columns: int) -> None:
    """Write labels beside the strongest dots, each where it covers neither a dot nor another label, or not at all."""
    height = 0.13 / _ROW
    last = trace.num_prompt_tokens - 1
    taken = [(columns - 0.5, last - 0.4, columns + 0.5, last + 0.9)]  # the answer
    taken += [(d.x - 0.09, d.y - 0.24, d.x + 0.09, d.y + 0.24) for d in dots]
    for dot in sorted(dots, key=lambda d: -abs(d.feature.effect))[:NAMED_FEATURES]:
        text = shorten(name_feature(dot.feature), 26)
        width = len(text) * _CHARACTER / _COLUMN
        for x, y in (
            (dot.x + 0.13, dot.y),
            (dot.x - 0.13 - width, dot.y),
            (dot.x - width / 2, dot.y - 0.46),
            (dot.x - width / 2, dot.y + 0.46),
            (dot.x, dot.y - 0.46),
            (dot.x, dot.y + 0.46),
        ):
            box = (x, y - height / 2, x + width, y + height / 2)
            inside = box[0] > -0.55 and box[2] < columns + 0.25
            if inside and not any(_overlap(box, other) for other in taken):
                axes.text(x, y, text, va="center", fontsize=SMALL, color="#222222", zorder=4)
                taken.append(box)
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
