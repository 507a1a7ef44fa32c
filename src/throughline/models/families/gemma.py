"""Gemma: RMSNorm that multiplies by one plus its weight."""

from throughline.models.families import Family, one_plus_weight_of

FAMILY = Family("gemma", centres=False, scale_of_norm=one_plus_weight_of)
