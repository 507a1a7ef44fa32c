"""Both ways of taking out what is above a limit, whichever of them this machine uses."""

import numpy as np
import pytest
import torch

from throughline.training import lanes

ENTRIES = [lanes.entries_above_by_words, *([lanes.entries_above_by_lanes] if lanes.HAS_AVX512 else [])]
KEEP = [lanes.keep_above_one_by_one, *([lanes.keep_above_by_lanes] if lanes.HAS_AVX512 else [])]


@pytest.mark.parametrize("entries_above", ENTRIES, ids=lambda f: f.py_func.__name__)
@pytest.mark.parametrize("num_features", [1, 7, 16, 37, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 1.0, 100.0])
def test_entries_above(entries_above, num_features, dtype, limit):
    """numpy's answer, with NaN and infinity among the entries, which lie above no limit and above all."""
    generator = torch.Generator().manual_seed(num_features)
    row_F = torch.randn(num_features, generator=generator).to(dtype)
    row_F[0], row_F[-1] = torch.nan, torch.inf
    bias_F = torch.randn(num_features, generator=generator).numpy()
    index_A, value_A = np.zeros(num_features + lanes.LANES, np.int32), np.zeros(num_features + lanes.LANES, np.float32)
    given = row_F.view(torch.int16).numpy() if dtype == torch.bfloat16 else row_F.numpy()
    num = entries_above(given, bias_F, np.float32(limit), index_A, value_A)
    sums_F = row_F.float().numpy() + bias_F
    expected = np.flatnonzero(sums_F > limit)
    assert num == len(expected)
    assert (index_A[:num] == expected).all() and (value_A[:num] == sums_F[expected]).all()


@pytest.mark.parametrize("keep_above", KEEP, ids=lambda f: f.py_func.__name__)
@pytest.mark.parametrize("num", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0])
def test_keep_above(keep_above, num, limit):
    """What is left, in order, with zeros behind it; counted beforehand by `count_above`."""
    generator = torch.Generator().manual_seed(num)
    value_A = np.zeros(num + lanes.LANES, np.float32)
    value_A[:num] = torch.rand(num, generator=generator).numpy()
    index_A = np.arange(num + lanes.LANES, dtype=np.int32)[::-1].copy()
    wanted = value_A[:num] > limit
    expected_index, expected_value = index_A[:num][wanted].copy(), value_A[:num][wanted].copy()
    assert lanes.count_above(value_A, num, np.float32(limit)) == wanted.sum()
    kept = keep_above(index_A, value_A, num, np.float32(limit))
    assert kept == wanted.sum()
    assert (index_A[:kept] == expected_index).all() and (value_A[:kept] == expected_value).all()
    assert (value_A[kept : kept + lanes.LANES] == 0).all()
