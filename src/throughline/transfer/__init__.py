"""Relations between the dictionaries of layers and models, each with its null."""

from throughline.transfer.pairs import Metric, Side, bootstrap_interval

__all__ = ["Metric", "Side", "bootstrap_interval"]
