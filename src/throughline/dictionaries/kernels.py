"""Compiled loops over features on a CPU. numba takes half a second to import, so this module is imported where one of them runs."""

from typing import Any

import numpy as np

from throughline.kernel_cache import njit

LARGEST = np.finfo(np.float32).max


@njit(nogil=True, error_model="numpy")
def keep_top(pre_NF: Any, k: int, out_NF: Any) -> None:
    """The k largest positive entries of each row into `out_NF`, zero elsewhere.

    A limit is moved until k entries lie above it; each look at a row is one pass without branches.
    """
    guess = np.float32(0)
    for n in range(len(pre_NF)):
        row_F, out_F = pre_NF[n], out_NF[n]
        limit, count = _limit(row_F, k, guess)
        guess = limit
        if count <= k:
            for f in range(len(row_F)):
                value = row_F[f]
                out_F[f] = np.float32(0) if value <= limit else value
            continue
        surplus = count - k  # those that equal the least above the limit
        least = np.float32(np.inf)
        for f in range(len(row_F)):
            least = row_F[f] if limit < row_F[f] < least else least
        for f in range(len(row_F) - 1, -1, -1):
            value = row_F[f]
            dropped = value <= limit or (value == least and surplus > 0)
            surplus -= value == least and surplus > 0
            out_F[f] = np.float32(0) if dropped else value


@njit(nogil=True, error_model="numpy", inline="always")
def _count(row_F: Any, limit: Any) -> Any:
    count = np.int32(0)
    for f in range(len(row_F)):
        count += np.int32(row_F[f] > limit)
    return count


@njit(nogil=True, error_model="numpy")
def _limit(row_F: Any, k: int, guess: Any) -> tuple[Any, int]:
    """A limit of at least 0 with k entries above it, or all positive ones if they are fewer; more only if they are equal."""
    zero, infinity = np.float32(0), np.float32(np.inf)
    low, high, count_low = zero, infinity, -1  # fewer than k lie above `high`, more above `low`; -1: not looked at
    limit, step = guess, np.float32(1.1)
    while True:
        count = _count(row_F, limit)
        if count == k or (count < k and limit == zero):
            return limit, count
        if count > k:
            low, count_low = limit, count
        else:
            high = min(limit, LARGEST)
        if high == infinity:  # away from the guess in growing steps, then halves
            limit = max(low * step, np.float32(1e-3))
            step *= step
        elif count_low < 0:
            limit = high / step if high > np.float32(1e-6) else zero
            step *= step
        else:
            limit = np.float32(0.5) * low + np.float32(0.5) * high
            if limit <= low or limit >= high:  # nothing lies between: equal entries
                return low, count_low


@njit(nogil=True)
def compress(f_NF: Any) -> tuple[Any, Any, Any]:
    """How many features are not zero at each token, which, and their values."""
    count_N = np.zeros(len(f_NF), np.int64)
    for n in range(len(f_NF)):
        row_F, count = f_NF[n], np.int32(0)
        for f in range(len(row_F)):
            count += np.int32(row_F[f] != 0)
        count_N[n] = count
    features, values, a = np.empty(count_N.sum(), np.int32), np.empty(count_N.sum(), f_NF.dtype), 0
    for n in range(len(f_NF)):
        row_F = f_NF[n]
        for f in range(len(row_F)):
            if row_F[f] != 0:
                features[a], values[a] = f, row_F[f]
                a += 1
    return count_N, features, values
