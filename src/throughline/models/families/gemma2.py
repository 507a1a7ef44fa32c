"""Gemma 2: as Gemma; attention logits are capped, which sdpa cannot do, and every other layer has a window."""

from throughline.models.families import Family, one_plus_weight_of

FAMILY = Family("gemma2", centres=False, scale_of_norm=one_plus_weight_of, attn_implementation="eager")
