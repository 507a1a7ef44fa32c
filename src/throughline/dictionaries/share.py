"""What a loss has to know of a batch whose tokens are divided among several devices.

A loss is the mean over the tokens at hand; whoever trains weighs those means. Only what couples the tokens of a batch asks its
share: which activations are the largest (batch_topk, matryoshka), and which tokens are the first (AuxK) and how much they vary.
"""

from jaxtyping import Float
from torch import Tensor


class Share:
    """The whole batch is at hand. `training.processes` has shares the rest of which others have."""

    def num_tokens(self, here: int) -> int:
        """Tokens of the whole batch, `here` of which are at hand."""
        return here

    def num_of_first(self, num_tokens: int) -> int:
        """How many of the batch's first `num_tokens` are at hand, where they come first too."""
        return num_tokens

    def weight_of_first(self, num_tokens: int) -> float:
        """Factor of a mean over those at hand that makes means weighed by all tokens at hand the mean over the first ones."""
        return 1.0

    def mean_of_first(self, x_LND: Float[Tensor, "L n D"], num_tokens: int, dim: tuple[int, ...]) -> Tensor:
        """Mean over tokens (and what else `dim` names) of the batch's first `num_tokens`, `x_LND` being those at hand.

        Axes are kept; nothing has a gradient.
        """
        return x_LND.mean(dim, keepdim=True)

    def keep_largest(self, values_LA: Float[Tensor, "L A"], num_kept: int) -> Float[Tensor, "L A"]:
        """A layer's `num_kept` largest of the whole batch stay, others become zero.

        `values_LA`, not negative, are the largest at hand: `num_kept` of them, or all if there are fewer.
        """
        return values_LA


WHOLE = Share()
