"""Mistral: RMSNorm, attention with a window."""

from throughline.models.families import Family

FAMILY = Family("mistral", centres=False)
