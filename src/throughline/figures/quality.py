"""How well every layer's dictionary stands in for the residual stream, all models in one figure."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from throughline.figures.style import MODEL_COLORS, MODEL_MARKERS, new_figure, styled
from throughline.records import LayerQuality
from throughline.study import GateSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Panel(NamedTuple):
    title: str
    measure: Callable[[LayerQuality], float]
    threshold: Callable[[GateSpec], float] | None
    better: str


_PANELS = (
    _Panel("FVU", lambda q: q.fvu, lambda g: g.max_fvu, "lower is better"),
    _Panel("L0 / d_sae", lambda q: q.l0 / q.d_sae, lambda g: g.max_l0_share, "share of features active on a token"),
    _Panel("dead features", lambda q: q.dead, lambda g: g.max_dead, "share, lower is better"),
    _Panel("CE score", lambda q: q.ce_loss_score, lambda g: g.min_ce_recovered, "against zero ablation, 1 is perfect"),
    _Panel(
        "answers kept", lambda q: np.nan if q.answers_kept is None else q.answers_kept, None, "share, higher is better"
    ),
)


def relative_depth(layers: list[int]) -> np.ndarray:
    """Layers as 0 (the first block) to 1 (the last of `layers`); a single layer 0 is at 0."""
    return np.asarray(layers, float) / max(1, *layers, 1)


def draw_quality(qualities: dict[str, list[LayerQuality]], gate: GateSpec | None = None) -> "Figure":
    """One small panel a measure: the layers of all models by relative depth, failed layers ringed, the gate dashed.

    Relative depth is layer / last evaluated layer. Raises ValueError if no model has an evaluated layer.
    """
    models = {name: layers for name, layers in qualities.items() if layers}
    if not models:
        raise ValueError("draw_quality expected at least one evaluated layer, found none")
    with styled():
        figure = new_figure(10.5, 5.6)
        for axes, panel in zip(figure.subplots(2, 3).flat[:-1], _PANELS, strict=True):
            _draw_panel(axes, panel, models, gate)
        _draw_legend(figure.axes[-1], figure.axes[0], gate, [q for layers in models.values() for q in layers])
        figure.suptitle("Quality of the dictionaries on held-out text")
    return figure


def _draw_panel(axes: "Axes", panel: _Panel, models: dict[str, list[LayerQuality]], gate: GateSpec | None) -> None:
    for number, (name, layers) in enumerate(models.items()):
        x = relative_depth([q.layer for q in layers])
        y = np.array([panel.measure(q) for q in layers], float)
        color, marker = MODEL_COLORS[number % len(MODEL_COLORS)], MODEL_MARKERS[number % len(MODEL_MARKERS)]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.3, label=name)
        failed = np.array([not q.passed for q in layers])
        axes.plot(x[failed], y[failed], "o", markersize=10, markerfacecolor="none", color="#444444", linewidth=0)
    if gate is not None and panel.threshold is not None:
        axes.axhline(panel.threshold(gate), color="#444444", linestyle="--", linewidth=0.9, label="gate")
    if not any(np.isfinite(line.get_ydata(orig=False)).any() for line in axes.lines):  # pyright: ignore[reportArgumentType]
        axes.text(0.5, 0.5, "the text has no answers", ha="center", va="center", transform=axes.transAxes)
    high = axes.get_ylim()[1]
    lowest = min([0.0, *(panel.measure(q) for layers in models.values() for q in layers)])  # NaN is never the smaller
    axes.set_ylim(lowest - (0.0 if lowest == 0 else 0.05 * (high - lowest)), high + 0.03 * (high - lowest))
    axes.set_xlim(-0.04, 1.04)
    axes.set_title(f"{panel.title} ({panel.better})")
    axes.set_xlabel("relative depth")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_legend(axes: "Axes", source: "Axes", gate: GateSpec | None, layers: list[LayerQuality]) -> None:
    """The last place of the grid: which model is which, and how many tokens the numbers rest on."""
    axes.axis("off")
    handles, labels = source.get_legend_handles_labels()
    handles = [h for h, text in zip(handles, labels, strict=True) if text != "gate"]
    axes.legend(handles, [text for text in labels if text != "gate"], loc="upper left", frameon=False, title="model")
    tokens = sorted({q.num_tokens for q in layers})
    spliced = sorted({q.num_spliced_tokens for q in layers})
    lines = [
        f"n = {_range(tokens)} tokens ({_range(spliced)} for CE)",
        f"{sum(not q.passed for q in layers)} of {len(layers)} layers fail the gate (ringed)",
    ]
    if gate is not None:
        lines.append("dashed: gate threshold")
    axes.text(0.02, 0.02, "\n".join(lines), va="bottom", transform=axes.transAxes)


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
