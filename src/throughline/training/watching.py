"""A training that notices when it goes wrong: back to the last good state with a lower rate, and after two such setbacks the end.

A layer has gone wrong when its loss is not finite, when it reconstructs worse than its mean would (FVU above 1), when its FVU is
JUMP times its best at two looks in a row (one may see features that have just got new directions), or when nearly all features
have died. What is good is kept as bfloat16, a sixth of what training holds of a layer; Adam's moments are not kept: they are part
of what went wrong.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from throughline.training.group import Group, Measures

EVERY_STEPS = 16  # a look, by trainers that are free to choose
MOST_SETBACKS = 2
SLOWER = 0.25  # the rate after each setback
# Times the best FVU, and by so much; only where k is fixed: a penalty raises FVU as it sets in.
JUMP, LEAST_JUMP = 3.0, 0.1
DYING = 0.95  # share of dead features
STILL_GOOD = 1.25  # times the best FVU: such a state is kept


class Watch:
    """Looks after one layer. `group` is of that layer alone and shares the trainer's memory."""

    def __init__(self, group: "Group") -> None:
        self._group = group
        self._best_fvu, self._least_dead = math.inf, 1.0
        self._has_jumped = False  # at the look before
        self._good: dict[str, Tensor] = {}
        self._good_measures = dict.fromkeys(("loss", "fvu"), 1.0) | {"dead": 0.0}  # nothing explained, nothing dead
        self._keep()

    @property
    def has_failed(self) -> bool:
        """True once the layer is given up."""
        return int(self._group.setbacks_L[0]) > MOST_SETBACKS

    def look(self, step: int, latest: "Measures") -> bool:
        """Compare the latest measures with the best ones; True if the layer was sent back. `step` steps are done."""
        group = self._group
        loss, fvu, dead = (float(m[0]) for m in (latest.loss, latest.fvu, latest.dead))
        what = self._find_fault(loss, fvu, dead)
        if what is None:
            self._best_fvu, self._least_dead = min(self._best_fvu, fvu), min(self._least_dead, dead)
            if fvu <= STILL_GOOD * self._best_fvu:
                self._good_measures = {"loss": loss, "fvu": fvu, "dead": dead}
                self._keep()
            return False
        self._go_back()
        self._has_jumped = False
        for name, value in self._good_measures.items():
            getattr(latest, name)[0] = value
        group.setbacks_L += 1
        group.slowed_L *= SLOWER
        rate = group.learning_rate * float(group.slowed_L[0])
        end = "given up" if self.has_failed else f"back to the last good state, with a learning rate of {rate:.2g}"
        twin = f" seed {group.twin}" if group.twin else ""
        group.events.append((group.layers[0], f"layer {group.layers[0]}{twin}: {what} at step {step}: {end}"))
        return True

    def _find_fault(self, loss: float, fvu: float, dead: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(fvu)):
            return f"the loss is {loss}"
        if fvu > 1:
            return f"FVU is {fvu:.3g}"
        far_off = fvu > JUMP * self._best_fvu and fvu > self._best_fvu + LEAST_JUMP
        before, self._has_jumped = self._has_jumped, far_off and self._group.k is not None
        if before and self._has_jumped:
            return f"FVU jumped from {self._best_fvu:.3g} to {fvu:.3g}"
        if dead > DYING and self._least_dead < DYING / 2:
            return f"{dead:.0%} of the features are dead"
        return None

    @torch.no_grad()
    def _keep(self) -> None:
        for name, tensor in self._state().items():
            if name not in self._good:
                self._good[name] = torch.empty_like(tensor, dtype=_kept_as(tensor))
            self._good[name].copy_(tensor)

    @torch.no_grad()
    def _go_back(self) -> None:
        for name, tensor in self._state().items():
            tensor.copy_(self._good[name])
        self._group.idle_tokens_LF.zero_()
        for moments in self._group.moments.values():
            for moment in moments:
                moment.zero_()

    def _state(self) -> dict[str, Tensor]:
        return {**self._group.stack.tensors(), **self._group.controller.tensors()}


def _kept_as(tensor: Tensor) -> torch.dtype:
    """Matrices are rounded; the rest is small."""
    return torch.bfloat16 if tensor.ndim == 3 else tensor.dtype
