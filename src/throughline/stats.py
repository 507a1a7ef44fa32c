"""Intervals by resampling, and correlation."""

import numpy as np

NUM_RESAMPLES = 1000
FEWEST = 3  # pairs of numbers from which a correlation is taken


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean, resampling `values`; NaN if there are none."""
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    if np.isin(values, (0, 1)).all():
        means = rng.binomial(len(values), values.mean(), NUM_RESAMPLES) / len(values)
    else:
        means = values[rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r, of ranks Spearman's; NaN of fewer than FEWEST pairs, or where one side does not vary."""
    if len(a) < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
