"""Best matches: how well features correlate with their best partner, beside what chance gives."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from throughline.figures.style import MODEL_COLORS, SMALL, new_figure, shorten_name, styled
from throughline.records import TransferResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = np.linspace(0, 1, 201)  # correlations at which shares are drawn
_REAL, _CHANCE, _THRESHOLD, _CEILING = MODEL_COLORS[0], "#777777", "#222222", MODEL_COLORS[5]


class BestMatches(NamedTuple):
    """Of one pair of models: best correlations of the features, the same by chance, and the means to compare them with."""

    real: np.ndarray
    chance: np.ndarray
    threshold: float  # NaN where there is none
    ceiling: float
    ceiling_min: float = float("nan")  # of several seeds the least and the most
    ceiling_max: float = float("nan")


def best_matches(result: TransferResult) -> BestMatches:
    """Within a model the correlations with both neighbouring layers, of two models every feature's in its best layer.

    Features that are not live are left out. The mean threshold is of the pairs of layers that are used.
    """
    arrays, info = result.arrays, result.info
    correlation, chance = arrays["correlation"], arrays["chance"]
    rows, columns = correlation.shape[:2]
    used = np.ones((rows, columns), bool)
    if info.source == info.target:
        places = [info.target_layers.index(layer) for layer in info.source_layers]
        used = np.abs(np.subtract.outer(places, np.arange(columns))) == 1
        real, by_chance = correlation[used], chance[used]
    else:  # fmax knows no NaN unless there is nothing else
        real, by_chance = np.fmax.reduce(correlation, axis=1), np.fmax.reduce(chance, axis=1)
    ends = ("ceiling_correlation", "ceiling_correlation_min", "ceiling_correlation_max")
    return BestMatches(
        real[np.isfinite(real)],
        by_chance[np.isfinite(by_chance)],
        _mean(arrays["threshold"][used]),
        *(_mean(arrays.get(name, np.zeros((0, 0)))) for name in ends),
    )


def draw_best_matches(results: list[TransferResult]) -> "Figure":
    """One panel a pair of models: the share of features whose best correlation is at least r, against r, beside chance.

    Rows are source models, columns targets; of the results those of matching are drawn. Vertical lines are the mean threshold,
    and the mean best correlation with a dictionary of the same layer from another seed, shaded over several. Raises ValueError
    if there is none.
    """
    found = [result for result in results if {"correlation", "chance"} <= result.arrays.keys()]
    if not found:
        raise ValueError("draw_best_matches expected a result of matching with correlations by feature, found none")
    sources, targets = ([*dict.fromkeys(getattr(r.info, side) for r in found)] for side in ("source", "target"))
    with styled():
        wide, high = max(2.5, 5.6 / len(targets)), max(1.85, 3.4 / len(sources))
        figure = new_figure(max(6.6, 0.9 + wide * len(targets)), 1.5 + high * len(sources))
        grid = figure.subplots(len(sources), len(targets), squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat:
            axes.set_visible(False)
        for result in found:
            axes = grid[sources.index(result.info.source), targets.index(result.info.target)]
            axes.set_visible(True)
            _draw_pair(axes, best_matches(result), result)
        for axes in grid[:, 0]:
            axes.set_ylabel("share of features")
        for axes in grid[-1]:
            axes.set_xlabel("best correlation at least")
        _add_legend(figure, grid)
        figure.suptitle(_title(found))
    return figure


def share_at_least(values: np.ndarray) -> np.ndarray:
    """The share of `values` that are at least as large as each correlation in GRID."""
    return 1 - np.searchsorted(np.sort(values), GRID, side="left") / len(values)


def _draw_pair(axes: "Axes", best: BestMatches, result: TransferResult) -> None:
    info = result.info
    within = info.source == info.target
    name = f"{shorten_name(info.source, 24)}, neighbouring layers" if within else ""
    name = name or f"{shorten_name(info.source, 20)} → {shorten_name(info.target, 20)}"
    counted = ("features and layers" if within else "features") + ("" if np.isfinite(best.ceiling) else "; no ceiling")
    axes.set_title(f"{name}\nn = {len(best.real):,} {counted}", fontsize=SMALL, loc="left")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if not len(best.real):
        one = within and len(info.source_layers) < 2
        words = "one layer has no neighbours" if one else "no live features on both sides"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
        return
    axes.plot(GRID, share_at_least(best.real), color=_REAL, linewidth=1.6, label="found")
    if len(best.chance):
        axes.plot(GRID, share_at_least(best.chance), color=_CHANCE, linewidth=1.4, linestyle=":", label="by chance")
    for place, color, style, label in (
        (best.threshold, _THRESHOLD, (0, (4, 2)), "mean threshold"),
        (best.ceiling, _CEILING, (0, (6, 2, 1, 2)), "mean with a dictionary of the source layer from another seed"),
    ):
        if np.isfinite(place):
            axes.axvline(place, color=color, linestyle=style, linewidth=1.1, label=label)
    if np.isfinite(best.ceiling_min):
        axes.axvspan(best.ceiling_min, best.ceiling_max, color=_CEILING, alpha=0.2, linewidth=0)
        axes.plot([], [], color=_CEILING, alpha=0.2, linewidth=6, label="range over several other seeds")


def _add_legend(figure: "Figure", grid: np.ndarray) -> None:
    from matplotlib.lines import Line2D

    lines = {str(line.get_label()): line for axes in grid.flat if axes.get_visible() for line in axes.lines}
    if any("no ceiling" in axes.get_title("left") for axes in grid.flat if axes.get_visible()):
        lines["no ceiling: no dictionary from another seed"] = Line2D([], [], linewidth=0)
    if lines:
        columns = 3 if figure.get_figwidth() > 8 else 2
        figure.legend(lines.values(), list(lines), loc="outside lower center", ncols=columns, frameon=False)


def _title(results: list[TransferResult]) -> str:
    tokens = sorted({result.info.num_tokens for result in results})
    sample = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    seeds = ", ".join(str(seed) for seed in sorted({result.info.seed for result in results}))
    return (
        "How well features correlate with their best partner, and by chance\n"
        f"between models in the best layer of the target; n = {sample} tokens, seed {seeds}"
    )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
