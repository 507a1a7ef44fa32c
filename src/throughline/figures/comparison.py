"""Models side by side on one prompt or on many: when each concept is there, and how many active features are shared."""

from typing import TYPE_CHECKING, NamedTuple

from throughline.figures.style import MISSING_COLOR, MODEL_COLORS, SMALL, new_figure, shorten, shorten_name, styled
from throughline.records import Comparison, ComparisonTotals, Concept, Standing, Standings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CONCEPTS = 14
STANDING_COLORS: dict[Standing, str] = {"universal": "#0b4f9c", "shared": "#5b9bd5", "specific": MISSING_COLOR}
_ROW = 0.15  # inches of a model's bar
LEAST = 0.5  # share of prompts from which a bar is opaque


class _Bar(NamedTuple):
    """A concept in a model: where it begins and ends, and in how many prompts it is there."""

    birth: float
    death: float
    share: float


def name_prompts(found: Comparison | ComparisonTotals) -> list[str]:
    """The prompts that were compared."""
    return [found.prompt] if isinstance(found, Comparison) else found.prompts


def draw_comparison(found: Comparison | ComparisonTotals) -> "Figure":
    """Left, bars from birth to death of each concept in each model, by relative depth (pale: there on less than half of the
    prompts); right, the standings of the active features (thick, with the interval of the universal ones) over those of all live
    ones (thin); dotted, the most that would be universal by the kind of token alone; red, the ceiling by another seed, of
    several the mean with their range.
    """
    bars = _list_bars(found)
    with styled():
        height = max(len(bars) * (len(found.models) + 1) * _ROW, len(found.models) * 0.75)
        figure = new_figure(11.0, 1.8 + height)
        concepts, shares = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_concepts(concepts, bars, found.models)
        _draw_shares(shares, found.models, found.standings)
        figure.legend(*concepts.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
        figure.legend(*shares.get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False)
        figure.suptitle(_title(found))
    return figure


def _list_bars(found: Comparison | ComparisonTotals) -> dict[str, dict[str, _Bar]]:
    """By concept and model; concepts without values only if there are no others."""
    facts = [c for c in found.concepts if c.valued] or list(found.concepts)
    bars: dict[str, dict[str, _Bar]] = {}
    for concept in facts[:MOST_CONCEPTS]:
        if isinstance(concept, Concept):
            bars[concept.name] = {m: _Bar(life.birth, life.death, 1.0) for m, life in concept.lives.items()}
        else:
            each = {m: (c.birth.value, c.death.value, c.present.value) for m, c in concept.models.items()}
            bars[concept.name] = {m: _Bar(b, d, s) for m, (b, d, s) in each.items() if b is not None}  # pyright: ignore[reportArgumentType]
    return bars


def _draw_concepts(axes: "Axes", bars: dict[str, dict[str, _Bar]], models: list[str]) -> None:
    step = len(models) + 1
    for number, mine in enumerate(bars.values()):
        for place, model in enumerate(models):
            if model not in mine:
                continue
            bar, y = mine[model], number * step + place
            color = MODEL_COLORS[place % len(MODEL_COLORS)]
            alpha = 1.0 if bar.share >= LEAST else 0.35
            axes.plot([bar.birth, bar.death], [y, y], color=color, alpha=alpha, linewidth=5, solid_capstyle="butt")
            axes.plot([bar.birth, bar.death], [y, y], "o", color=color, alpha=alpha, markersize=4)
    names = [shorten(name, 34) for name in bars]
    axes.set_yticks([i * step + (len(models) - 1) / 2 for i in range(len(bars))], names, parse_math=False)
    axes.set_ylim(max(1, len(bars)) * step - 0.5, -1)
    axes.set_xlim(-0.03, 1.03)
    axes.axvline(0.5, color="#bbbbbb", linewidth=0.7, zorder=0)
    axes.set_xlabel("relative depth (0: first layer, 1: last)")
    axes.set_title("concepts, from birth to death" if bars else "no labelled feature is active")
    for place, model in enumerate(models):
        axes.plot([], [], color=MODEL_COLORS[place % len(MODEL_COLORS)], linewidth=5, label=shorten_name(model, 24))


def _draw_shares(axes: "Axes", models: list[str], standings: dict[str, Standings]) -> None:
    for row, model in enumerate(models):
        mine = standings[model]
        active = {s: e.value or 0.0 for s, e in mine.active.items()}
        for y, height, shares in ((row - 0.12, 0.36, active), (row + 0.24, 0.2, mine.live)):
            left = 0.0
            for standing, color in STANDING_COLORS.items():
                share = shares.get(standing, 0.0)
                axes.barh(y, share, left=left, height=height, color=color, edgecolor="white", linewidth=0.5)
                left += share
        universal = mine.active["universal"]
        if universal.low is not None and universal.high is not None:
            axes.plot([universal.low, universal.high], [row - 0.12] * 2, color="black", linewidth=1.2)
        kind = mine.most_universal_by_kind
        axes.plot([kind] * 2, [row - 0.34, row + 0.38], color="white", linewidth=1.2, linestyle=":")
        if mine.ceiling is not None:
            axes.plot([mine.ceiling] * 2, [row - 0.34, row + 0.38], color="#b34700", linewidth=1.2)
        if mine.ceiling_min is not None and mine.ceiling_max is not None:
            axes.plot([mine.ceiling_min, mine.ceiling_max], [row + 0.38] * 2, color="#b34700", linewidth=2.4)
    axes.set_yticks(range(len(models)), [shorten_name(m, 16) for m in models], parse_math=False)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of features; thick: active, thin: all live\ndotted: most that kinds of token would give")
    axes.set_title("partner above chance in the other models", fontsize=SMALL + 1.5)
    for standing, color in STANDING_COLORS.items():
        axes.bar([0], [0], color=color, label=standing)
    twins = max((found.num_twins for found in standings.values()), default=0)
    seeds = f"{twins} other seeds, mean and range" if twins else "other seed"
    axes.plot([], [], color="#b34700", linewidth=1.2, label=f"ceiling: {seeds}")


def _title(found: Comparison | ComparisonTotals) -> str:
    gate = "quality gate overridden; " if found.forced else ""
    if isinstance(found, Comparison):
        answers = ", ".join(f"{shorten_name(m, 12)} {found.answers[m]!r}" for m in found.models)
        counts = "/".join(f"{found.standings[m].num_active:.0f}" for m in found.models)
        return f"{shorten(repr(found.prompt), 60)}: {answers}\n{gate}{counts} active features; seed {found.seed}"
    right = ", ".join(f"{shorten_name(m, 12)} {e.value:.0%}" for m, e in found.right.items() if e.value is not None)
    known = f"; right: {right}" if right else ""
    return f"{len(found.prompts)} prompts{known}\n{gate}means over prompts; seed {found.seed}"
