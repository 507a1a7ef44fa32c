"""Bring every layer to the same L0 by moving the coefficient of its sparsity penalty.

    log lambda += gain * sqrt(lr_factor) * e + DAMPING * (e - e of the step before)        e = log(L0 / target)

L0 is a running mean over batches. The first term finds the coefficient; the second keeps it from swinging around it while the
weights are still on their way (a PI controller in its velocity form). It slows down with the learning rate, as the weights that it
steers do. Layers do not see one another.

While the penalty still grows, the coefficient is lowered only: one that starts far too strong would leave so few features that L0
takes half the run to come back, and to raise it because the weak penalty has not yet worked would kill features for good.

Thresholds (jumprelu) and biases (relu) answer to the penalty too late once the learning rate is low. In the last tenth of the run
they are moved directly, all of a layer alike, by what `trim` returns: the logarithm of a factor for thresholds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOWERED_FROM_SHARE, RAISED_FROM_SHARE = 0.02, 0.1  # of the run; the latter is the penalty's own warm-up
DAMPING = 2.0
GAIN = 120.0  # a run, spread over its steps
FASTEST = 0.1  # per step, in short runs
MEAN_OVER = 0.01  # of the run
TRIM_FROM_SHARE, TRIM_GAIN, FASTEST_TRIM = 0.9, 50.0, 0.2
SMALLEST = 1e-4  # coefficient to start from: one of 0 would stay there
LARGEST_ERROR = 0.3  # of log L0: a jolt does not throw the coefficient away


@dataclass
class SparsityController:
    """What is remembered: tensors alone, [L] each."""

    target_L: Float[Tensor, "L"]  # nan where a layer's coefficient is to stay
    penalty_L: Float[Tensor, "L"]  # coefficients, changed in place
    log_l0_L: Float[Tensor, "L"]

    @classmethod
    def start(cls, penalty_L: Float[Tensor, "L"], target_L: Float[Tensor, "L"]) -> "SparsityController":
        """From first coefficients and wanted L0."""
        return cls(target_L, torch.where(target_L.isnan(), penalty_L, penalty_L.clamp_min(SMALLEST)), target_L.log())

    @torch.no_grad()
    def update_(self, l0_L: Float[Tensor, "L"], step: int, num_steps: int, lr_factor: float) -> None:
        """Take the L0 of one batch into account."""
        before_L = self._error()
        rate = max(1 / (step + 1), min(1.0, 1 / (MEAN_OVER * num_steps)))
        self.log_l0_L += rate * (l0_L.clamp_min(1e-3).log() - self.log_l0_L)
        if step < LOWERED_FROM_SHARE * num_steps:
            return
        gain = min(FASTEST, GAIN / num_steps) * lr_factor**0.5
        error_L = self._error()
        change_L = gain * error_L + DAMPING * (error_L - before_L)
        if step < RAISED_FROM_SHARE * num_steps:
            change_L = change_L.clamp_max(0.0)
        self.penalty_L *= change_L.nan_to_num(0.0).exp()

    def trim(self, step: int, num_steps: int) -> Float[Tensor, "L"]:
        """How far, in logarithms, thresholds are to rise after this step; 0 before the last tenth and without a target."""
        if step < TRIM_FROM_SHARE * num_steps:
            return torch.zeros_like(self.penalty_L)
        return min(FASTEST_TRIM, TRIM_GAIN / num_steps) * self._error().nan_to_num(0.0)

    def _error(self) -> Float[Tensor, "L"]:
        return (self.log_l0_L - self.target_L.log()).clamp(-LARGEST_ERROR, LARGEST_ERROR)

    def single(self, index: int) -> "SparsityController":
        """The controller of one layer, which shares this one's memory."""
        one = slice(index, index + 1)
        return SparsityController(self.target_L[one], self.penalty_L[one], self.log_l0_L[one])

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {"target_l0": self.target_L, "penalty": self.penalty_L, "log_l0": self.log_l0_L}
