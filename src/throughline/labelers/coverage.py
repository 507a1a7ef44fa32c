"""How much of a dictionary has a good label, beside an untrained dictionary that is labelled in the same way."""

import numpy as np
import scipy.sparse as sp

from throughline.labelers.choosing import Choice
from throughline.labelers.scoring import f1, measure_pairs
from throughline.labelers.vocabulary import Predicates
from throughline.records import COVERAGE_COLUMNS

BARS = (0.7, 0.9)  # held-out F1 that a good label exceeds


def count_on(
    features: sp.csr_array, truths_NC: sp.csr_array, at: np.ndarray, choice: Choice, maxima_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, active tokens and tokens of which the label is true, of chosen labels; `at` are columns of the truths."""
    maxima = maxima_F[choice.feature]
    true_positive, num_active = measure_pairs(features[:, choice.feature], truths_NC, at, choice.threshold, maxima)
    return true_positive, num_active, np.bincount(truths_NC.indices, minlength=truths_NC.shape[1])[at]


def held_f1(features: sp.csr_array, held: Predicates, choice: Choice, maxima_F: np.ndarray) -> np.ndarray:
    """F1 of chosen labels on the held-out text."""
    used, at = np.unique(choice.predicate, return_inverse=True)
    return f1(*count_on(features, held.truths(used), at, choice, maxima_F))


def count_covered(layer: int, dictionary: str, labels_F: np.ndarray, f1_F: np.ndarray, num_tokens: int) -> dict:
    """A row of COVERAGE_COLUMNS from the label of every live feature, as words or numbers, and its held-out F1."""
    shares = [float((f1_F > bar).mean()) if len(f1_F) else 0.0 for bar in BARS]
    num_labels = len(np.unique(labels_F[f1_F > BARS[0]]))
    values = (layer, dictionary, len(f1_F), *shares, num_labels, num_tokens)
    return dict(zip(COVERAGE_COLUMNS, values, strict=True))
