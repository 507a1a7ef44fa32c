"""Sparse autoencoders of residual streams: trained, saved, loaded."""

from throughline.dictionaries.dictionary import Dictionary, Sparse, untrained_like
from throughline.dictionaries.storage import load_dictionary, save_dictionary

__all__ = ["Dictionary", "Sparse", "load_dictionary", "save_dictionary", "untrained_like"]
