"""GPT-2: LayerNorm, learned positions; unembedding tied to the embedding."""

from throughline.models.families import Family

FAMILY = Family("gpt2", centres=True)
