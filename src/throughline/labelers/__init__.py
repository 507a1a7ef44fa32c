"""Words for features, each with a held-out score and the baselines it has to beat."""

from throughline.labelers.scoring import Labeler, LayerText

__all__ = ["Labeler", "LayerText"]
