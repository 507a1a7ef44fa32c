"""Two texts looked at as one, so that what is read off them means the same in both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from throughline.codes import Codes
from throughline.records import Document


@dataclass(frozen=True)
class View:
    """The N tokens of some texts, one text after the other; documents are numbered through."""

    documents: list[Document]
    token_texts: list[str]
    documents_N: np.ndarray
    positions_N: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray
    kinds_N: np.ndarray

    @staticmethod
    def of(texts: Sequence[Codes]) -> "View":
        """These texts, in this order."""
        before = np.cumsum([0, *(len(t.documents) for t in texts)])
        numbers = [t.documents_N + n for t, n in zip(texts, before, strict=False)]
        return View(
            [d for t in texts for d in t.documents],
            [word for t in texts for word in t.token_texts],
            np.concatenate(numbers),
            *(np.concatenate([getattr(t, f"{a}_N") for t in texts]) for a in ("positions", "starts", "ends", "kinds")),
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.documents_N)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Document d has the tokens bounds[d] to bounds[d + 1]."""
        return np.searchsorted(self.documents_N, np.arange(len(self.documents) + 1))

    def neighbour(self, values_N: np.ndarray, step: int, missing: Any) -> np.ndarray:
        """The value of the token `step` tokens on in the same document."""
        at = np.arange(self.num_tokens) + step
        inside = (at >= 0) & (at < self.num_tokens)
        at = np.where(inside, at, 0)
        inside &= self.documents_N[at] == self.documents_N
        return np.where(inside, values_N[at], missing)
