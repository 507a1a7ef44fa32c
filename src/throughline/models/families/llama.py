"""Llama: RMSNorm."""

from throughline.models.families import Family

FAMILY = Family("llama", centres=False)
