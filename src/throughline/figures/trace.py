"""One prompt through every layer: layers across, positions down, a dot for every feature shown, a line for what passes on."""

import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from throughline.figures.style import DIVERGING_STOPS, SMALL, diverging, new_figure, shorten, show_token, styled
from throughline.figures.trace_words import describe_answer, describe_trace, name_feature
from throughline.records import ActiveFeature, Place, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_FEATURES = 10  # so many of the strongest get their label, if there is room
EDGES_OF_A_BOUNDARY = 6  # so many of the strongest between two layers are drawn, and from the last layer to each token
CHAINS_OF_A_TOKEN = 1
_ROW, _COLUMN, _CHARACTER = 0.34, 1.25, 0.062  # inches: a position, a layer, a character of small type
_TITLE_CHARACTER = 0.088  # inches, of large type
_BOW = 0.36  # rows by which a line within a row leaves it
_SUPPORTS, _OPPOSES, _CHAIN = DIVERGING_STOPS[0], DIVERGING_STOPS[-1], "#222222"


class Dot(NamedTuple):
    x: float
    y: float
    area: float  # points squared
    feature: ActiveFeature


class Line(NamedTuple):
    """A line of the figure: where it begins and ends, what it stands for, and how that compares with the strongest beside it."""

    start: tuple[float, float]
    end: tuple[float, float]
    value: float  # change of the target when the source is off; below zero: the source supports the target
    strength: float  # |value| over the largest of the boundary


def effect_of(feature: ActiveFeature) -> float:
    """The measured effect, or the predicted one where none was measured."""
    return feature.predicted_effect if feature.effect is None else feature.effect


def draw_trace(trace: Trace) -> "Figure":
    """The features shown in `trace` by layer (across) and position (down), the strongest edges, and the answer at the end.

    Area: activation, relative to the largest one shown in the same layer. Colour: change of the answer score (logits) when the
    feature is off; blue features support the answer, orange ones work against it. Lines: the strongest edges of every boundary,
    width and opacity relative to the strongest, above the row; blue if the target falls when the source is off. Dark lines, below
    the row: the strongest chain to each token, through rings where it passes a feature that is not shown.
    """
    dots = place_dots(trace)
    rows, columns = len(trace.tokens), max(1, len(trace.layers))
    words = describe_trace(trace, EDGES_OF_A_BOUNDARY)
    with styled():
        width = 2.8 + _COLUMN * columns
        caption = [line for part in words for line in textwrap.wrap(part, int((width - 0.3) / _CHARACTER))]
        figure = new_figure(width, 2.0 + _ROW * max(rows, 5) + 0.13 * len(caption))
        axes = figure.add_subplot()
        _draw_lines(axes, find_lines(trace, dots))
        _draw_chains(axes, trace, dots)
        largest = max((abs(effect_of(dot.feature)) for dot in dots), default=0.0) or 1.0
        points = axes.scatter(
            [dot.x for dot in dots],
            [dot.y for dot in dots],
            s=[dot.area for dot in dots],
            c=[effect_of(dot.feature) for dot in dots],
            cmap=diverging(),
            vmin=-largest,
            vmax=largest,
            edgecolors="#444444",
            linewidths=0.6,
            zorder=3,
        )
        _mark_axes(axes, trace, rows, columns)
        _name_strongest(axes, dots, trace, columns)
        kind = "predicted change" if trace.verification is None else "change"
        figure.colorbar(points, ax=axes, shrink=0.8, pad=0.02).set_label(
            f"{kind} of the answer score (logits) when off"
        )
        title = f"{trace.model}: {shorten(repr(trace.prompt), 70)} → {describe_answer(trace)}"
        figure.suptitle(textwrap.fill(title, int(width / _TITLE_CHARACTER)))
        figure.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=SMALL)
    return figure


def place_dots(trace: Trace) -> list[Dot]:
    """Features of one layer and position stand side by side within their cell, the most influential one first."""
    dots = []
    for column, layer in enumerate(trace.layers):
        largest = max((feature.activation for feature in layer.features), default=0.0) or 1.0
        for position in sorted({feature.position for feature in layer.features}):
            here = [feature for feature in layer.features if feature.position == position]
            offsets = (np.arange(len(here)) - (len(here) - 1) / 2) * min(0.19, 0.8 / len(here))
            for offset, feature in zip(offsets, here, strict=True):
                area = 18 + 110 * max(0.0, feature.activation) / largest
                dots.append(Dot(column + float(offset), position, area, feature))
    return dots


def _places(dots: list[Dot]) -> dict[Place, tuple[float, float]]:
    return {(d.feature.layer, d.feature.position, d.feature.feature): (d.x, d.y) for d in dots}


def find_lines(trace: Trace, dots: list[Dot]) -> list[Line]:
    """The strongest edges of every boundary, and from the last layer to each token of the answer, measured ones where there are."""
    where, columns = _places(dots), len(trace.layers)
    boundaries: dict[tuple[int, int], list[tuple[tuple[float, float], tuple[float, float], float]]] = {}
    for edge in trace.edges:
        if edge.source in where and edge.target in where:
            value = edge.predicted if edge.measured is None else edge.measured
            boundaries.setdefault((edge.source[0], -1), []).append((where[edge.source], where[edge.target], value))
    for dot in dots:
        if trace.layers and dot.feature.layer == trace.layers[-1].layer:
            effects = dot.feature.effects or dot.feature.predicted_effects
            for number, (target, value) in enumerate(zip(trace.targets, effects, strict=True)):
                end = (columns - 0.3, float(target.position))
                boundaries.setdefault((dot.feature.layer, number), []).append(((dot.x, dot.y), end, value))
    lines = []
    for found in boundaries.values():
        strongest = sorted(found, key=lambda line: -abs(line[2]))[:EDGES_OF_A_BOUNDARY]
        largest = abs(strongest[0][2]) or 1.0
        lines += [Line(*line, strength=abs(line[2]) / largest) for line in strongest if line[2]]
    return lines


def _curve(start: tuple[float, float], end: tuple[float, float], bow: float) -> np.ndarray:
    """Points from start to end: in a bow within a row, so that it does not lie on the others there; else level at both ends."""
    t = np.linspace(0, 1, 24)
    x, y = start[0] + t * (end[0] - start[0]), start[1] + (3 - 2 * t) * t**2 * (end[1] - start[1])
    return np.column_stack([x, y + bow * 4 * t * (1 - t) * (start[1] == end[1])])


def _draw_lines(axes: "Axes", lines: list[Line]) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    colors = [to_rgba(_SUPPORTS if line.value < 0 else _OPPOSES, 0.15 + 0.5 * line.strength) for line in lines]
    widths = [0.4 + 1.8 * line.strength for line in lines]
    curves = [_curve(line.start, line.end, -_BOW) for line in lines]
    axes.add_collection(LineCollection(curves, colors=colors, linewidths=widths, zorder=2), autolim=False)


def _draw_chains(axes: "Axes", trace: Trace, dots: list[Dot]) -> None:
    """The strongest chains to each token; a ring where one passes a feature that is not shown."""
    chains = [
        chain
        for i in range(len(trace.targets))
        for chain in [c for c in trace.chains if c.target == i][:CHAINS_OF_A_TOKEN]
    ]
    shown = _places(dots)
    hidden = _place_hidden(
        trace, dots, [p for c in chains for step in c.steps for p in step.features if p not in shown]
    )
    for chain in chains:
        points = [(shown | hidden)[place] for step in chain.steps for place in step.features]
        points.append((len(trace.layers) - 0.3, float(trace.targets[chain.target].position)))
        path = np.concatenate([_curve(a, b, _BOW) for a, b in pairwise(points)])
        axes.plot(path[:, 0], path[:, 1], color=_CHAIN, linewidth=1.3, zorder=2.5, solid_joinstyle="round")
    for x, y in hidden.values():
        axes.plot(x, y, "o", markersize=4, markerfacecolor="white", color=_CHAIN, zorder=2.6)


def _place_hidden(trace: Trace, dots: list[Dot], places: list[Place]) -> dict[Place, tuple[float, float]]:
    """Where features that are not shown stand: to the right of the dots at their layer and position."""
    columns = {layer.layer: i for i, layer in enumerate(trace.layers)}
    right: dict[tuple[int, int], float] = {}
    for dot in dots:
        key = dot.feature.layer, dot.feature.position
        right[key] = max(right.get(key, -np.inf), dot.x)
    found: dict[Place, tuple[float, float]] = {}
    for place in dict.fromkeys(places):
        layer, position, _ = place
        x = right[layer, position] + 0.15 if (layer, position) in right else float(columns[layer])
        right[layer, position] = x
        found[place] = (x, float(position))
    return found


def _mark_axes(axes: "Axes", trace: Trace, rows: int, columns: int) -> None:
    axes.set_xlim(-0.55, columns + 0.25)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xticks([*range(columns), columns - 0.12], [*(str(layer.layer) for layer in trace.layers), "answer"])
    labels = [shorten(show_token(text), 14) for _, text, _, _ in trace.tokens]
    axes.set_yticks(range(rows), labels, parse_math=False)
    for label in axes.get_yticklabels()[trace.num_prompt_tokens :]:
        label.set_fontweight("bold")
    axes.set_xlabel("layer")
    axes.set_ylabel("token (the answer's in bold)")
    axes.hlines(range(rows), -0.55, columns - 0.45, color="#e3e3e3", linewidth=0.7, zorder=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for target in trace.targets:
        said, against = (show_token(shorten(text, 6)) for text in (target.text, target.against))
        axes.text(columns - 0.24, target.position, said, va="center", fontweight="bold", zorder=4)
        axes.text(columns - 0.24, target.position + 0.38, f"over {against}", va="center", fontsize=SMALL - 1, zorder=4)


def _name_strongest(axes: "Axes", dots: list[Dot], trace: Trace, columns: int) -> None:
    """Write labels beside the strongest dots, each where it covers neither a dot nor another label, or not at all."""
    height = 0.13 / _ROW
    taken = [(columns - 0.35, t.position - 0.4, columns + 0.5, t.position + 0.6) for t in trace.targets]
    taken += [(d.x - 0.09, d.y - 0.24, d.x + 0.09, d.y + 0.24) for d in dots]
    behind = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}  # lines do not run through words
    for dot in sorted(dots, key=lambda d: -abs(effect_of(d.feature)))[:NAMED_FEATURES]:
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
                axes.text(x, y, text, va="center", fontsize=SMALL, color="#222222", zorder=4, bbox=behind)
                taken.append(box)
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
