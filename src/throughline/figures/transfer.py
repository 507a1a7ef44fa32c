"""Layer by layer heat maps of what carries over. Everywhere, rows are layers of the source, columns of the target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from throughline.figures.style import (
    LARGE,
    NORMAL,
    SMALL,
    color_limits,
    luminance,
    new_figure,
    sequential,
    shorten_name,
    styled,
)
from throughline.records import TransferInfo, TransferResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED_LAYERS = 12  # with more layers the numbers in the cells cannot be read
Side = Literal["source", "target", "both"]
CEILINGS = ("ceiling", "twin_ceiling")
NO_CEILING = "no ceiling"


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


def varies_by(array: np.ndarray) -> Side:
    """By which layer an array [source layer, target layer] differs; NaN is no difference, and without any it is `source`."""
    known = np.ma.masked_invalid(array)
    if not np.any(np.ma.ptp(known, axis=1) > 0):
        return "source"
    return "both" if np.any(np.ma.ptp(known, axis=0) > 0) else "target"


def draw_transfer(result: TransferResult, *, limits: tuple[float, float] | None = None) -> "Figure":
    """The heat map of `value`, with the null and the ceilings beside it on the same colour scale where there are any.

    What differs by one layer alone, as ceilings do, is a strip along that side. `limits` are the values at both ends of the
    colour scale; by default those that fit the arrays shown.
    """
    info, arrays = result.info, result.arrays
    beside = [name for name in ("null", *CEILINGS) if name in arrays and np.isfinite(arrays[name]).any()]
    shown = [arrays[name] for name in ("value", *beside)]
    low, high = limits or color_limits(shown)
    rows, columns = arrays["value"].shape
    along: dict[str, Side] = {name: varies_by(arrays[name]) for name in beside if name in CEILINGS}
    small = [name for name in beside if along.get(name, "both") == "both"]
    right = [name for name in beside if along.get(name) == "source"]
    below = [name for name in beside if along.get(name) == "target"]
    with styled():
        width, height = max(5.0, min(10.0, 2.2 + 0.62 * columns)), max(4.2, min(9.5, 1.8 + 0.5 * rows))
        figure = new_figure(width + 0.7 * len(right) + 2.9 * len(small), height + 0.55 * len(below))
        main, strips, panels = _add_panels(figure, (rows, columns), right, below, small)
        image = _draw_cells(main, arrays["value"], info, (low, high), NORMAL if rows * columns <= 36 else SMALL)
        main.set_title("value")
        for name, axes in strips.items():
            _draw_strip(axes, name, along[name], arrays[name], (low, high), max(rows, columns) <= NUMBERED_LAYERS)
        for name, axes in panels.items():
            _draw_cells(axes, arrays[name], info, (low, high), SMALL, most=6)
            axes.set_title(_in_words(name))
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, extend=_extension(shown, low, high))
        bar.set_label(info.metric)
        figure.suptitle(_title(info) + (_describe_twins([result]) if along else f"; {NO_CEILING}"))
    return figure


def draw_all_models(results: list[TransferResult]) -> "Figure":
    """All layers of all models against one another for one metric; pairs that were not computed are grey.

    Strips along the side by whose layers the ceiling differs: the null and the ceilings of each layer, in the mean over all
    layers of the other side. Raises ValueError if `results` is empty or mixes metrics.
    """
    metrics = sorted({result.info.metric for result in results})
    if len(metrics) != 1:
        raise ValueError(f"draw_all_models expected results of one metric, found {', '.join(metrics) or 'none'}")
    matrix = block_matrix(results)
    ceilings = {name: [r.arrays[name] for r in results if name in r.arrays] for name in CEILINGS}
    known = {name: arrays for name, arrays in ceilings.items() if any(np.isfinite(a).any() for a in arrays)}
    sides = {varies_by(array) for arrays in known.values() for array in arrays}
    side: Literal["source", "target"] = "target" if "target" in sides and "both" not in sides else "source"
    strips = {name: mean_over_others(block_matrix(results, name).values, side) for name in ("null", *known)}
    strips = {name: values for name, values in strips.items() if np.isfinite(values).any()}
    shown = [matrix.values, *strips.values()]
    low, high = color_limits(shown)
    with styled():
        figure = new_figure(9.6 + (0.6 * len(strips) if side == "source" else 0), 8.4 + 0.45 * len(strips))
        right, below = (list(strips), []) if side == "source" else ([], list(strips))
        size = len(matrix.values)
        axes, drawn, _ = _add_panels(figure, (size, size), right, below)
        image = axes.imshow(
            matrix.values, cmap=sequential(), vmin=low, vmax=high, interpolation="nearest", aspect="auto"
        )
        for name, strip in drawn.items():
            _draw_strip(strip, name, side, _repeat(strips[name], side), (low, high), numbered=False)
            for bound in matrix.bounds[1:-1]:
                (strip.axhline if side == "source" else strip.axvline)(bound - 0.5, color="white", linewidth=2)
        _mark_blocks(axes, matrix, names_above=side == "target" and bool(strips))
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, extend=_extension(shown, low, high))
        bar.set_label(metrics[0])
        figure.suptitle(_title_of_all(matrix, results, side if strips else None, bool(known)), fontsize=LARGE)
    return figure


def mean_over_others(values: np.ndarray, side: Literal["source", "target"]) -> np.ndarray:
    """The mean of each row (`source`) or column of what is known there, NaN where nothing is."""
    return np.ma.masked_invalid(values).mean(axis=1 if side == "source" else 0).filled(np.nan)


def _repeat(values: np.ndarray, side: Literal["source", "target"]) -> np.ndarray:
    return values[:, None] if side == "source" else values[None, :]


def _in_words(name: str) -> str:
    return {"twin_ceiling": "ceiling, other seed"}.get(name, name)


def _add_panels(
    figure: "Figure", shape: tuple[int, int], right: list[str], below: list[str], small: Sequence[str] = ()
) -> "tuple[Axes, dict[str, Axes], dict[str, Axes]]":
    """Axes of a matrix of that shape, of the strips along its right side and under it, and of small matrices further right."""
    rows, columns = shape
    wide, high = max(1.0, columns / 24), max(1.0, rows / 24)  # of a strip, in cells
    grid = figure.add_gridspec(
        1 + len(below),
        1 + len(right) + len(small),
        width_ratios=[columns, *[wide] * len(right), *[columns / 2] * len(small)],
        height_ratios=[rows, *[high] * len(below)],
    )
    main = figure.add_subplot(grid[0, 0])
    strips = {name: figure.add_subplot(grid[0, 1 + i], sharey=main) for i, name in enumerate(right)}
    strips |= {name: figure.add_subplot(grid[1 + i, 0], sharex=main) for i, name in enumerate(below)}
    panels = {name: figure.add_subplot(grid[0, 1 + len(right) + i]) for i, name in enumerate(small)}
    return main, strips, panels


def _draw_strip(
    axes: "Axes",
    name: str,
    side: Side,
    array: np.ndarray,
    limits: tuple[float, float],
    numbered: bool,
) -> None:
    """One value a layer of `side`, beside the row or column of the matrix that it belongs to."""
    assert side != "both"
    values = _repeat(mean_over_others(array, side), side)
    low, high = limits
    image = axes.imshow(values, cmap=sequential(), vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axes.tick_params(axis="both", which="both", length=0, labelleft=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    if side == "source":
        axes.set_xticks([])
        axes.set_title(_in_words(name).replace(", ", ",\n"), fontsize=SMALL)
    else:
        axes.set_yticks([])
        axes.set_ylabel(_in_words(name).replace(", ", ",\n"), fontsize=SMALL, rotation=0, ha="right", va="center")
    if numbered:
        _write_numbers(axes, image, values, SMALL)


def _write_numbers(axes: "Axes", image: Any, values: np.ndarray, size: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = luminance(tuple(image.cmap(image.norm(value)))) < 0.5
            color = "white" if dark else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=size)


def _draw_cells(
    axes: "Axes",
    values: np.ndarray,
    info: TransferInfo,
    limits: tuple[float, float],
    size: float,
    most: int = NUMBERED_LAYERS,
) -> Any:
    """The matrix with its layers; up to `most` of them the numbers are written too, in type of that `size`."""
    low, high = limits
    image = axes.imshow(values, cmap=sequential(), vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    for set_ticks, layers in ((axes.set_yticks, info.source_layers), (axes.set_xticks, info.target_layers)):
        step = -(-len(layers) // 16)
        set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("source layer")
    axes.set_xlabel("target layer")
    axes.spines[:].set_visible(False)
    if max(values.shape) <= most:
        _write_numbers(axes, image, values, size)
    return image


def _mark_blocks(axes: "Axes", matrix: BlockMatrix, names_above: bool) -> None:
    """White lines between the models, their names at the middle of their layers, a few layer numbers in between.

    `names_above`: what belongs to the columns stands above them, since there are strips below.
    """
    for bound in matrix.bounds[1:-1]:
        axes.axhline(bound - 0.5, color="white", linewidth=2)
        axes.axvline(bound - 0.5, color="white", linewidth=2)
    size = int(matrix.bounds[-1])
    step = max(1, -(-size // 24))
    places = [
        (int(begin) + i, layer)
        for begin, layers in zip(matrix.bounds, matrix.layers, strict=False)
        for i, layer in enumerate(layers)
        if i % step == 0 and (i == 0 or len(layers) - i > step // 2)  # not too near to the next model's first
    ]
    middles = (matrix.bounds[:-1] + matrix.bounds[1:] - 1) / 2
    room = [max(6, int(88 * len(layers) / size)) for layers in matrix.layers]  # characters
    names = [shorten_name(model, length) for model, length in zip(matrix.models, room, strict=True)]
    if names_above:
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
    for axis, label, rotation in ((axes.yaxis, "source", 90), (axes.xaxis, "target", 0)):
        axis.set_ticks([place for place, _ in places], [str(layer) for _, layer in places], minor=True)
        axis.remove_overlapping_locs = False  # a name may stand at a layer that has a number
        axis.set_tick_params(which="minor", labelsize=6.5)
        axis.set_ticks(middles, names, fontsize=NORMAL, rotation=rotation)
        axis.set_tick_params(which="major", length=0, pad=17)
        axis.set_label_text(f"{label} layer")
    for label in axes.get_yticklabels():
        label.set_verticalalignment("center")
    axes.spines[:].set_visible(False)


def _title_of_all(matrix: BlockMatrix, results: list[TransferResult], side: str | None, ceiled: bool) -> str:
    info = results[0].info
    tokens, seeds = ({getattr(r.info, name) for r in results} for name in ("num_tokens", "seed"))
    sample = f"{min(tokens):,}" if len(tokens) == 1 else f"{min(tokens):,} to {max(tokens):,}"
    missing = int(np.isnan(matrix.values).sum())
    notes = [f"n = {sample} tokens, seed {', '.join(map(str, sorted(seeds)))}"]
    notes += [f"grey: {missing:,} pairs not computed"] if missing else []
    if side is not None:
        other = "target" if side == "source" else "source"
        notes.append(f"strips: mean over {other} layers" + (_describe_twins(results) if ceiled else f"; {NO_CEILING}"))
    else:
        notes.append(NO_CEILING)
    return f"{info.metric} between all layers of {len(matrix.models)} models\n{info.quantity}\n{'; '.join(notes)}"


def _title(info: TransferInfo) -> str:
    return f"{info.metric}: {info.source} → {info.target}\n{info.quantity}\n{describe_sample(info)}"


def _describe_twins(results: list[TransferResult]) -> str:
    """`; ceiling: mean of 3 seeds, at most 0.04 apart`, if ceilings are of several seeds."""
    twins = max(result.num_twins for result in results)
    pairs = [
        (r.arrays[f"{name}_min"], r.arrays[f"{name}_max"])
        for r in results
        for name in CEILINGS
        if f"{name}_min" in r.arrays
    ]
    apart = max((np.nanmax(most - least, initial=0.0) for least, most in pairs), default=0.0)
    name = "ceiling" if any("ceiling_min" in result.arrays for result in results) else "ceiling of other seeds"
    return f"; {name}: mean of {twins} seeds, at most {apart:.2f} apart" if twins else ""


def _extension(arrays: list[np.ndarray], low: float, high: float) -> str:
    """Which ends of the colour scale have values beyond them."""
    below = any(np.nanmin(a, initial=low) < low for a in arrays)
    above = any(np.nanmax(a, initial=high) > high for a in arrays)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
