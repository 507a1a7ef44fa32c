"""GPT-NeoX, such as Pythia: LayerNorm, rotary positions, attention and MLP side by side."""

from throughline.models.families import Family

FAMILY = Family("gpt_neox", centres=True)
