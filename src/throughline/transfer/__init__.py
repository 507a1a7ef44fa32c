"""Relations between the dictionaries of layers and models, each with its null."""

from throughline.transfer.pairs import Metric, Side

__all__ = ["Metric", "Side"]
