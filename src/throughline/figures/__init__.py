"""Figures: functions that take records and return a matplotlib Figure, so that page, plot and test share one number."""

from throughline.figures.quality import draw_quality
from throughline.figures.style import save_figure
from throughline.figures.trace import draw_trace
from throughline.figures.transfer import draw_all_models, draw_transfer

__all__ = ["draw_all_models", "draw_quality", "draw_trace", "draw_transfer", "save_figure"]
