"""What a training says to the other processes that train the same layers, a device each; alone there is nobody to tell.

Each of W ranks holds all weights and goes through the same chunks. Of a batch it computes every W-th token: rank r the tokens
r, r + W, r + 2W, … in the order in which they are drawn. What comes of a whole batch is the same on every rank, to the bit, so
all take the same step and the same decisions.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from throughline.dictionaries.share import WHOLE, Share
from throughline.training.checkpoints import Checkpoint
from throughline.training.sources import ActivationSource


class Ranks:
    """One process, which has everything; `processes.Processes` are several."""

    rank: int = 0
    size: int = 1

    def share_of(self, batch_tokens: int) -> Share:
        """What this rank has of a batch, for the losses."""
        return WHOLE

    def sum_(self, *tensors: Tensor) -> None:
        """Each tensor becomes the sum of all ranks'."""

    def minimum_(self, tensor: Tensor) -> None:
        """The tensor becomes the smallest of all ranks', entry by entry."""

    def gather_batch(self, x_LND: Float[Tensor, "L n D"], batch_tokens: int) -> Float[Tensor, "L N D"]:
        """A whole batch in its order, from each rank's tokens."""
        return x_LND

    def gather_objects(self, given: object) -> list:
        """What each rank gives, in order; small, and to be pickled."""
        return [given]

    def take_(self, tensor: Tensor, owner: int) -> None:
        """The tensor, which is contiguous, becomes that of the rank `owner`."""

    def divide(self, source: ActivationSource) -> ActivationSource:
        """The same batches, each of which one rank makes."""
        return source

    def load(self, load: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What rank 0 loads."""
        return load()


ALONE = Ranks()
