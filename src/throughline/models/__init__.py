"""Language models: opened from a hub id, a folder or the zoo; read and edited at the stream after every block."""

from throughline.model_files import check_layers
from throughline.models.families import FAMILIES, Family
from throughline.models.language_model import Inputs, LanguageModel, ModelOutput, Past
from throughline.models.opening import check_model, open_model, outline_model, read_tokenizer

__all__ = [
    "FAMILIES",
    "Family",
    "Inputs",
    "LanguageModel",
    "ModelOutput",
    "Past",
    "check_layers",
    "check_model",
    "open_model",
    "outline_model",
    "read_tokenizer",
]
