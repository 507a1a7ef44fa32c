"""Training dictionaries of all layers at once."""

from throughline.training.engine import Progress, train

__all__ = ["Progress", "train"]
