"""Phi 1, 1.5 and 2: LayerNorm, attention and MLP side by side, an unembedding with a bias."""

from throughline.models.families import Family

FAMILY = Family("phi", centres=True)
