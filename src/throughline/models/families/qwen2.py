"""Qwen 2 and 2.5: RMSNorm, biases in the attention."""

from throughline.models.families import Family

FAMILY = Family("qwen2", centres=False)
