"""Figures: functions that take records and return a matplotlib Figure, so that page, plot and test share one number."""

from throughline.figures.comparison import draw_comparison
from throughline.figures.curves import draw_decay, draw_divergence, draw_persistence
from throughline.figures.matches import draw_best_matches
from throughline.figures.quality import draw_quality
from throughline.figures.ribbons import draw_ribbon
from throughline.figures.style import save_figure
from throughline.figures.trace import draw_trace
from throughline.figures.transfer import draw_all_models, draw_transfer

__all__ = [
    "draw_all_models",
    "draw_best_matches",
    "draw_comparison",
    "draw_decay",
    "draw_divergence",
    "draw_persistence",
    "draw_quality",
    "draw_ribbon",
    "draw_trace",
    "draw_transfer",
    "save_figure",
]
