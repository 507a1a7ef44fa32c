"""Throughlines as a river: what is born at each layer, how much of it flows on, and what dies."""

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from throughline.figures.style import SEQUENTIAL, SMALL, new_figure, styled
from throughline.records import Ribbon

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BANDS = 12  # more colours cannot be told apart
NUMBERED_LAYERS = 14  # with more layers the numbers are left to the axes
_HALF = 0.16  # half of the width, in layers, over which a band is level around its layer
_BIRTHS, _DEATHS = "#0072b2", "#d55e00"


class Flow(NamedTuple):
    """A ribbon as arrays, by layer; `deaths` are those whose last layer it is, and of the last layer none."""

    alive_BL: np.ndarray
    live: np.ndarray
    births: np.ndarray
    deaths: np.ndarray

    @classmethod
    def of(cls, ribbon: Ribbon) -> "Flow":
        alive_BL = np.array(ribbon.alive, int).reshape(len(ribbon.layers), len(ribbon.layers))
        lost_BL = np.triu(alive_BL[:, :-1] - alive_BL[:, 1:])  # a column before its birth has none to lose
        return cls(alive_BL, alive_BL.sum(0), np.diagonal(alive_BL).copy(), np.append(lost_BL.sum(0), 0))


def draw_ribbon(ribbon: Ribbon, *, num_tokens: int | None = None, seed: int | None = None) -> "Figure":
    """The throughlines of one model, layers across: bands by layer of birth, as high as many are alive; below, births and deaths.

    Layers of birth are taken together into at most MOST_BANDS bands. `num_tokens` and `seed` are of the analysis, for the
    title. Raises ValueError if the ribbon has no layers.
    """
    if not ribbon.layers:
        raise ValueError(f"draw_ribbon expected layers of {ribbon.model}, found none")
    flow, size = Flow.of(ribbon), len(ribbon.layers)
    with styled():
        figure = new_figure(min(12.5, max(7.0, 3.0 + 0.55 * size)), 6.2)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.2])
        _draw_bands(above, flow, ribbon.layers)
        _draw_counts(below, flow, size)
        for axes in (above, below):
            axes.set_xlim(-0.6, size - 0.4)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        step = -(-size // 16)
        below.set_xticks(range(0, size, step), [str(layer) for layer in ribbon.layers[::step]])
        if step > 1:
            below.set_xticks(range(size), minor=True)
            below.tick_params(which="minor", width=0.4, length=2)
        above.tick_params(axis="x", which="both", length=0)
        below.set_xlabel("layer")
        sample = [f"n = {int(flow.births.sum()):,} throughlines"]
        sample += [f"{num_tokens:,} tokens"] if num_tokens is not None else []
        sample += [f"seed {seed}"] if seed is not None else []
        figure.suptitle(f"{ribbon.model}: throughlines alive, by the layer of their birth\n{', '.join(sample)}")
    return figure


def band_members(size: int) -> list[range]:
    """Places of the layers of birth that each band stands for; consecutive, and as many in each as can be."""
    bounds = np.linspace(0, size, min(size, MOST_BANDS) + 1).round().astype(int)
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def _draw_bands(axes: "Axes", flow: Flow, layers: list[int]) -> None:
    import matplotlib

    bands, size = band_members(len(layers)), len(layers)
    colors = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.06, 0.94, len(bands)))
    x, height_BX = _heights(flow.alive_BL)
    tops = np.cumsum([height_BX[list(members)].sum(0) for members in bands], axis=0)
    bottoms = np.vstack([np.zeros_like(x), tops[:-1]])
    drawn = []
    for members, bottom, top, color in zip(bands, bottoms, tops, colors, strict=True):
        first, last = layers[members[0]], layers[members[-1]]
        name = f"layer {first}" if first == last else f"layers {first}-{last}"
        band = axes.fill_between(x, bottom, top, facecolor=color, edgecolor="white", linewidth=0.5, label=name)
        drawn.append(band)
    axes.plot(x, tops[-1], color="#222222", linewidth=1.0, label="_live")
    axes.legend(
        handles=drawn[::-1],
        loc="center left",
        bbox_to_anchor=(1.005, 0.5),
        frameon=False,
        title="born at",
        borderaxespad=0.2,
    )  # the last one born lies on top
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.09 * max(1, int(flow.live.max())))
    axes.set_ylabel("live features")
    if size <= NUMBERED_LAYERS:
        for place, number in enumerate(flow.live):
            axes.annotate(
                f"{number:,}", (place, number), (0, 3), textcoords="offset points", ha="center", fontsize=SMALL
            )


def _heights(alive_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places across, and the height of every layer of birth there: level around each layer, then a smooth way to the next.

    A band opens on the way to the layer of its birth, where it has its full height.
    """
    size = alive_BL.shape[1]
    between = np.linspace(0, 1, 9 if size <= 40 else 3)[1:-1]
    xs, heights = [], []
    for place in range(size):
        here = alive_BL[:, place]
        xs += [place - _HALF, place + _HALF]
        heights += [here, here]
        if place + 1 < size:
            change = alive_BL[:, place + 1] - here
            xs += [place + _HALF + share * (1 - 2 * _HALF) for share in between]
            heights += [here + change * share * share * (3 - 2 * share) for share in between]
    return np.array(xs, float), np.array(heights, float).T


def _draw_counts(axes: "Axes", flow: Flow, size: int) -> None:
    """Births upwards, deaths downwards; a first layer's features are all born there, so its bar is drawn empty."""
    places = np.arange(size)
    bars = axes.bar(places, flow.births, 0.62, color=_BIRTHS, label="born here")
    bars.patches[0].set(facecolor="white", edgecolor=_BIRTHS, linewidth=0.8)
    axes.bar(places, -flow.deaths, 0.62, color=_DEATHS, label="last layer")
    axes.axhline(0, color="#666666", linewidth=0.8)
    most = max(1, int(flow.births.max()), int(flow.deaths.max()))
    room = (0.35 if size <= NUMBERED_LAYERS else 0.08) * most
    axes.set_ylim(-int(flow.deaths.max()) - room, most + room)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_ylabel("born ↑   died ↓")
    if size <= NUMBERED_LAYERS:
        for place, (born, died) in enumerate(zip(flow.births, flow.deaths, strict=True)):
            for number, height, offset, side in ((born, born, 2, "bottom"), (died, -died, -2, "top")):
                if number:
                    axes.annotate(
                        f"{number:,}",
                        (place, height),
                        (0, offset),
                        textcoords="offset points",
                        ha="center",
                        va=side,
                        fontsize=SMALL,
                    )
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, borderaxespad=0.2)
