"""The analysis as lines: what is found of each layer elsewhere, what is left at a distance, and how long throughlines live.

In every panel a line is the value and its band the interval, dotted is the null, dashed the ceiling with its own band: its
interval or, where it has none, the range over several seeds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from throughline import throughlines
from throughline.figures.style import MODEL_COLORS, MODEL_MARKERS, SMALL, new_figure, shorten, shorten_name, styled
from throughline.records import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST = -1.0  # axes end here: an explained variance can be as negative as it likes
MARKED_POINTS = 16  # with more points their markers would hide the line
_GREY = "#444444"


def draw_divergence(curves: Sequence[Curve], *, num_tokens: int | None = None, seed: int | None = None) -> "Figure":
    """The curves of kind `divergence`: one panel a source model (and metric), one line a target, against relative depth.

    A panel without a ceiling says so. `num_tokens` and `seed` are of the analysis, for the title. Raises ValueError if
    there is no such curve.
    """
    found = _of_kind(curves, "divergence")
    colors = _number_models(found)
    panels = list(dict.fromkeys((curve.metric, curve.source) for curve in found))
    metrics = list(dict.fromkeys(metric for metric, _ in panels))
    with styled():
        figure, grid = _new_grid(len(panels))
        for axes, (metric, source) in zip(grid, panels, strict=True):
            own = [curve for curve in found if (curve.metric, curve.source) == (metric, source)]
            for curve in sorted(own, key=lambda c: colors[c.target]):
                _draw_curve(axes, curve, colors[curve.target], shorten_name(curve.target, 40))
            name = f"features of {shorten_name(source, 40)}" + (f", {metric}" if len(metrics) > 1 else "")
            _finish(axes, own, name, [curve.target for curve in own])
            axes.set_xlim(-0.03, 1.03)
        _label_outer(grid, "relative depth of the source layer", "share found in the best layer")
        ceiling = f"ceiling: the source layer against a dictionary of it from another seed{_seeds(found)}"
        _add_legend(figure, grid, "found in ", ceiling)
        title = f"What is found of each layer in other models: {', '.join(metrics)}"
        figure.suptitle(_title(title, found, "features", num_tokens, seed))
    return figure


def draw_decay(curves: Sequence[Curve], *, num_tokens: int | None = None, seed: int | None = None) -> "Figure":
    """The curves of kind `decay`: one panel a metric, one line a model, against the distance between two of its layers.

    `num_tokens` and `seed` are of the analysis, for the title. Raises ValueError if there is no such curve.
    """
    found = _of_kind(curves, "decay")
    colors = _number_models(found)
    metrics = list(dict.fromkeys(curve.metric for curve in found))
    with styled():
        figure, grid = _new_grid(len(metrics))
        for axes, metric in zip(grid, metrics, strict=True):
            own = [curve for curve in found if curve.metric == metric]
            for curve in own:
                _draw_curve(axes, curve, colors[curve.source], shorten_name(curve.source, 40))
            _finish(axes, own, metric, [curve.source for curve in own])
            _count_layers(axes)
        _label_outer(grid, "distance in layers", "mean over pairs of layers")
        ceiling = f"ceiling: another seed (matching), its own dictionary (reconstruction){_seeds(found)}"
        _add_legend(figure, grid, "", ceiling)
        title = "What two layers of a model share, by the distance between them"
        figure.suptitle(_title(title, found, "pairs of layers", num_tokens, seed))
    return figure


def draw_persistence(curves: Sequence[Curve], *, num_tokens: int | None = None, seed: int | None = None) -> "Figure":
    """The curves of kind `persistence`: share of throughlines alive against number of layers, one line a model.

    The half-life, where a line first comes down to one half, is ringed and said in the legend. `num_tokens` and `seed` are
    of the analysis, for the title. Raises ValueError if there is no such curve.
    """
    found = _of_kind(curves, "persistence")
    colors = _number_models(found)
    metrics = list(dict.fromkeys(curve.metric for curve in found))
    with styled():
        figure, grid = _new_grid(len(metrics))
        for axes, metric in zip(grid, metrics, strict=True):
            own = [curve for curve in found if curve.metric == metric]
            axes.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=1)
            for curve in own:
                half, number = half_life(curve), colors[curve.source]
                words = f"{shorten_name(curve.source, 40)}: {_describe_half_life(curve, half)}"
                _draw_curve(axes, curve, number, words + (f" ({metric})" if len(metrics) > 1 else ""))
                if half is not None:
                    color = MODEL_COLORS[number % len(MODEL_COLORS)]
                    axes.vlines(half, 0, 0.5, color=color, linewidth=0.9, zorder=2)
                    axes.plot([half], [0.5], "o", markersize=9, markerfacecolor="none", color=color, label="_half-life")
            _finish(axes, own, metric if len(metrics) > 1 else "", [curve.source for curve in own])
            _count_layers(axes)
        _label_outer(grid, "number of layers", "share of throughlines alive")
        _add_legend(figure, grid, "", f"ceiling: dictionaries of another seed{_seeds(found)}")
        title = "How long throughlines live" + (f": {metrics[0]}" if len(metrics) == 1 else "")
        figure.suptitle(_title(title, found, "throughlines", num_tokens, seed))
    return figure


def _seeds(curves: Sequence[Curve]) -> str:
    """`, mean of 3 seeds` where ceilings are of several, and what their band is if it is no interval."""
    several = [curve for curve in curves if curve.num_twins]
    if not several:
        return ""
    band = "" if any(curve.ceiling_low for curve in several) else ", band: their range"
    return f", mean of {max(curve.num_twins for curve in several)} seeds{band}"


def half_life(curve: Curve) -> float | None:
    """The x at which the curve first comes down to 0.5; None if it never does."""
    return throughlines.half_life(curve.x, curve.value)


def _describe_half_life(curve: Curve, half: float | None) -> str:
    if half is not None:
        return f"half-life {half:.1f} layers"
    known = [(x, y) for x, y in zip(curve.x, curve.value, strict=True) if y is not None]
    if known[0][1] <= 0.5:
        return f"no more than half alive at {known[0][0]:g} layers"
    return f"more than half alive at {known[-1][0]:g} layers"


def _of_kind(curves: Sequence[Curve], kind: Literal["divergence", "decay", "persistence"]) -> list[Curve]:
    found = [curve for curve in curves if curve.kind == kind and any(y is not None for y in curve.value)]
    if not found:
        raise ValueError(f"draw_{kind} expected a curve of kind {kind} with a value, found none")
    return found


def _number_models(curves: list[Curve]) -> dict[str, int]:
    """A number for every model, which stands for its colour and marker, in the order of their names as sources."""
    return {name: i for i, name in enumerate(dict.fromkeys([c.source for c in curves] + [c.target for c in curves]))}


def _new_grid(size: int) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels, at most three beside each other (two by two for four)."""
    columns = 2 if size == 4 else min(size, 3)
    rows = -(-size // columns)
    width = 8.0 if columns == 1 else 1.2 + 4.0 * columns
    figure = new_figure(width, 1.5 + 3.0 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in panels[size:]:
        empty.remove()
    return figure, panels[:size]


def _draw_curve(axes: "Axes", curve: Curve, number: int, label: str) -> None:
    color = MODEL_COLORS[number % len(MODEL_COLORS)]
    marker = MODEL_MARKERS[number % len(MODEL_MARKERS)] if len(curve.x) <= MARKED_POINTS else None
    x = np.array(curve.x, float)
    _draw_band(axes, x, curve.low, curve.high, color, 0.18)
    axes.plot(x, numbers(curve.value), color=color, marker=marker, markersize=4, linewidth=1.6, label=label, zorder=4)
    if any(y is not None for y in curve.null):
        axes.plot(x, numbers(curve.null), color=color, linestyle=":", linewidth=1.2, label="_null", zorder=3)
    if any(y is not None for y in curve.ceiling):
        band = (curve.ceiling_low, curve.ceiling_high) if curve.ceiling_low else (curve.ceiling_min, curve.ceiling_max)
        _draw_band(axes, x, *band, color, 0.1)
        axes.plot(x, numbers(curve.ceiling), color=color, linestyle="--", linewidth=1.1, label="_ceiling", zorder=3)


def _draw_band(axes: "Axes", x: np.ndarray, low: list[Any], high: list[Any], color: str, alpha: float) -> None:
    if low and high:
        axes.fill_between(x, numbers(low), numbers(high), color=color, alpha=alpha, linewidth=0, zorder=2)


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """As an array, NaN where there is none; lines break there."""
    return np.array([np.nan if y is None else y for y in values], float)


def _finish(axes: "Axes", curves: list[Curve], title: str, names: list[str]) -> None:
    """Title, what is not there, and an axis from 0 to 1 that is longer only if something lies beyond."""
    lacking = [_lacking(word, curves, names) for word in ("null", "ceiling")]
    drawn = np.concatenate([line.get_ydata(orig=False) for line in axes.lines])  # pyright: ignore[reportArgumentType, reportCallIssue]
    lowest, highest = np.nanmin([0.0, *drawn]), np.nanmax([1.0, *drawn])
    if lowest < LOWEST:
        lacking.append(f"points below {LOWEST:g} are not shown")
    low, high = max(float(lowest), LOWEST), float(highest)
    axes.set_ylim(low - (0.03 * (high - low) if low < 0 else 0), high + 0.03 * (high - low))
    if low < 0:
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=1, label="_zero")
    words = "; ".join(word for word in lacking if word)
    axes.set_title(title, loc="left", pad=15 if words else 5)
    if words:
        axes.annotate(
            words, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=SMALL, color="#666666", ha="left"
        )
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _lacking(word: Literal["null", "ceiling"], curves: list[Curve], names: list[str]) -> str:
    """`no ceiling (no dictionary from another seed)`, or for which of the lines there is none."""
    without = [
        name
        for name, curve in zip(names, curves, strict=True)
        if all(y is None for y in (curve.null if word == "null" else curve.ceiling))
    ]
    from_a_seed = word == "ceiling" and any(
        curve.metric == "matching" for curve in curves
    )  # others have theirs without, or none
    reason = " (no dictionary from another seed)" if from_a_seed else ""
    if len(without) == len(curves):
        return f"no {word}{reason}"
    return f"no {word} for {shorten(', '.join(without), 30)}{reason}" if without else ""


def _count_layers(axes: "Axes") -> None:
    """Whole numbers of layers across, from 0."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)


def _label_outer(grid: "list[Axes]", x: str, y: str) -> None:
    """Words for the axes: across under every panel, down at the first of each row."""
    for axes in grid:
        axes.set_xlabel(x)
        place = axes.get_subplotspec()
        if place is not None and place.is_first_col():
            axes.set_ylabel(y)


def _add_legend(figure: "Figure", grid: "list[Axes]", prefix: str, ceiling: str) -> None:
    """Below all panels: which model is which, after the word `prefix`, and the kinds of line; `ceiling` says what it is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = {str(line.get_label()): line for axes in grid for line in axes.lines}
    named: dict[str, Any] = {prefix + label: line for label, line in lines.items() if not label.startswith("_")}
    if any(axes.collections for axes in grid):
        named["95 % interval"] = Patch(color=_GREY, alpha=0.2, linewidth=0)
    if "_null" in lines:
        named["null"] = Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2)
    if "_ceiling" in lines:
        named[ceiling] = Line2D([], [], color=_GREY, linestyle="--", linewidth=1.1)
    # Side by side as far as the longest name lets them.
    room = figure.get_figwidth() / (0.6 + 0.058 * max(map(len, named)))
    columns = max(1, min(4, int(room), len(named)))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _title(title: str, curves: list[Curve], counted: str, num_tokens: int | None, seed: int | None) -> str:
    """Two lines: what is shown, and what it rests on as far as that is known."""
    sizes = sorted({number for curve in curves for number in curve.num})
    parts = []
    if sizes:
        span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        parts.append(f"n = {span} {counted} a point")
    if num_tokens is not None:
        parts.append(f"{num_tokens:,} tokens" if parts else f"n = {num_tokens:,} tokens")
    if seed is not None:
        parts.append(f"seed {seed}")
    return title + ("\n" + ", ".join(parts) if parts else "")
