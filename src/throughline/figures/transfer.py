"""Layer by layer heat maps of what carries over. Everywhere, rows are layers of the source, columns of the target."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from throughline.figures.style import LARGE, NORMAL, SMALL, color_limits, luminance, new_figure, sequential, styled
from throughline.records import TransferInfo, TransferResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED_LAYERS = 12  # with more layers the numbers in the cells cannot be read


class BlockMatrix(NamedTuple):
    """All layers of all models. `values` is [source layer, target layer], NaN where there is no such pair."""

    values: np.ndarray
    models: list[str]
    layers: list[list[int]]  # of each model

    @property
    def bounds(self) -> np.ndarray:
        """Where each model's rows begin, and the end of the last."""
        return np.cumsum([0, *(len(layers) for layers in self.layers)])


def block_matrix(results: list[TransferResult], array: str = "value") -> BlockMatrix:
    """The `array` of all pairs of models in one matrix; models in the order in which the results name them."""
    layers: dict[str, list[int]] = {}
    for info in (result.info for result in results):
        for model, own in ((info.source, info.source_layers), (info.target, info.target_layers)):
            layers[model] = sorted({*layers.get(model, []), *own})
    bounds = dict(zip(layers, np.cumsum([0, *(len(own) for own in layers.values())]), strict=False))
    size = sum(len(own) for own in layers.values())
    values = np.full((size, size), np.nan)
    for result in results:
        if array in result.arrays:
            info = result.info
            rows = [bounds[info.source] + layers[info.source].index(layer) for layer in info.source_layers]
            columns = [bounds[info.target] + layers[info.target].index(layer) for layer in info.target_layers]
            values[np.ix_(rows, columns)] = result.arrays[array]
    return BlockMatrix(values, list(layers), list(layers.values()))


def describe_sample(info: TransferInfo) -> str:
    """What the numbers rest on: `n = 50,000 tokens of 400 documents, 97 % aligned, seed 0`."""
    aligned = "" if info.source == info.target else f", {100 * info.coverage:.0f} % aligned"
    return f"n = {info.num_tokens:,} tokens of {info.num_documents:,} documents{aligned}, seed {info.seed}"


def draw_transfer(result: TransferResult, *, limits: tuple[float, float] | None = None) -> "Figure":
    """The heat map of `value`, with the null and the ceiling beside it on the same colour scale where there are any.

    `limits` are the values at both ends of the colour scale; by default those that fit the arrays shown.
    """
    info, arrays = result.info, result.arrays
    beside = [name for name in ("null", "ceiling") if name in arrays and np.isfinite(arrays[name]).any()]
    shown = [arrays[name] for name in ("value", *beside)]
    low, high = limits or color_limits(shown)
    rows, columns = arrays["value"].shape
    with styled():
        width = max(5.0, min(10.0, 2.2 + 0.62 * columns))
        height = max(4.2, min(9.5, 1.8 + 0.5 * rows))
        figure = new_figure(width + (2.9 if beside else 0), height)
        grid = figure.add_gridspec(max(1, len(beside)), 2 if beside else 1, width_ratios=[2.4, 1] if beside else [1])
        main = figure.add_subplot(grid[:, 0])
        image = _draw_cells(main, arrays["value"], info, low, high, max(rows, columns) <= NUMBERED_LAYERS)
        main.set_title("value")
        small = [figure.add_subplot(grid[number, 1]) for number in range(len(beside))]
        for axes, name in zip(small, beside, strict=True):
            _draw_cells(axes, arrays[name], info, low, high, max(rows, columns) <= 6)
            axes.set_title(name)
        bar = figure.colorbar(image, ax=[main, *small], shrink=0.8, extend=_extension(shown, low, high))
        bar.set_label(info.metric)
        figure.suptitle(_title(info))
    return figure


def draw_all_models(results: list[TransferResult]) -> "Figure":
    """All layers of all models against one another for one metric; pairs that were not computed are grey.

    Raises ValueError if `results` is empty or mixes metrics.
    """
    metrics = sorted({result.info.metric for result in results})
    if len(metrics) != 1:
        raise ValueError(f"draw_all_models expected results of one metric, found {', '.join(metrics) or 'none'}")
    matrix = block_matrix(results)
    low, high = color_limits([matrix.values])
    with styled():
        figure = new_figure(9.4, 8.2)
        axes = figure.add_subplot()
        image = axes.imshow(matrix.values, cmap=sequential(), vmin=low, vmax=high, interpolation="nearest")
        _mark_blocks(axes, matrix)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, extend=_extension([matrix.values], low, high))
        bar.set_label(metrics[0])
        tokens = [result.info.num_tokens for result in results]
        sample = f"{min(tokens):,}" if min(tokens) == max(tokens) else f"{min(tokens):,} to {max(tokens):,}"
        missing = int(np.isnan(matrix.values).sum())
        grey = f"; grey: {missing:,} pairs not computed" if missing else ""
        figure.suptitle(
            f"{metrics[0]} between all layers of {len(matrix.models)} models\n"
            f"{results[0].info.quantity}; n = {sample} tokens{grey}",
            fontsize=LARGE,
        )
    return figure


def _draw_cells(axes: "Axes", values: np.ndarray, info: TransferInfo, low: float, high: float, numbered: bool) -> Any:
    image = axes.imshow(values, cmap=sequential(), vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    for set_ticks, layers in ((axes.set_yticks, info.source_layers), (axes.set_xticks, info.target_layers)):
        step = -(-len(layers) // 16)
        set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("source layer")
    axes.set_xlabel("target layer")
    axes.spines[:].set_visible(False)
    if numbered:
        size = SMALL if values.size > 36 else NORMAL
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = luminance(tuple(image.cmap(image.norm(value)))) < 0.5
                color = "white" if dark else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=size)
    return image


def _mark_blocks(axes: "Axes", matrix: BlockMatrix) -> None:
    """White lines between the models, their names at the middle of their layers, a few layer numbers in between."""
    for bound in matrix.bounds[1:-1]:
        axes.axhline(bound - 0.5, color="white", linewidth=2)
        axes.axvline(bound - 0.5, color="white", linewidth=2)
    size = int(matrix.bounds[-1])
    step = max(1, -(-size // 30))
    places = [
        (int(begin) + i, layer)
        for begin, layers in zip(matrix.bounds, matrix.layers, strict=False)
        for i, layer in enumerate(layers)
        if i % step == 0
    ]
    middles = (matrix.bounds[:-1] + matrix.bounds[1:] - 1) / 2
    for axis, label, rotation in ((axes.yaxis, "source", 90), (axes.xaxis, "target", 0)):
        axis.set_ticks([place for place, _ in places], [str(layer) for _, layer in places], minor=True)
        axis.remove_overlapping_locs = False  # a name may stand at a layer that has a number
        axis.set_tick_params(which="minor", labelsize=5.5)
        axis.set_ticks(middles, matrix.models, fontsize=NORMAL, rotation=rotation)
        axis.set_tick_params(which="major", length=0, pad=15)
        axis.set_label_text(f"{label} layer")
    for label in axes.get_yticklabels():
        label.set_verticalalignment("center")
    axes.spines[:].set_visible(False)


def _title(info: TransferInfo) -> str:
    return f"{info.metric}: {info.source} → {info.target}\n{info.quantity}\n{describe_sample(info)}"


def _extension(arrays: list[np.ndarray], low: float, high: float) -> str:
    """Which ends of the colour scale have values beyond them."""
    below = any(np.nanmin(a, initial=low) < low for a in arrays)
    above = any(np.nanmax(a, initial=high) > high for a in arrays)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
