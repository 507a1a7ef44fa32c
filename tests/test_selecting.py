"""The k largest of each row: what sorting says, whatever the rows are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from throughline.dictionaries import kernels, selecting
from throughline.dictionaries.selecting import keep_top

LOOKED_FOR = selecting.KERNELS  # before a test puts something else there
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, 1e-38, 1e-45, 3e38]), st.floats(-10, 10, width=32)
)


@pytest.fixture(
    autouse=True, scope="module", params=[kernels.__name__, "no module of this name"], ids=["compiled", "of few"]
)
def _both_ways(request):
    """Every test for the compiled loops, and for what takes their place where there are few entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting, "KERNELS", request.param)
        patch.setattr(selecting, "FEW_ENTRIES", 2**30)
        yield


def test_what_is_looked_for_is_the_module_of_the_compiled_loop():
    assert kernels.__name__ == LOOKED_FOR


def test_both_ways_agree_to_the_bit_also_where_numbers_are_missing():
    pre_NF = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    pre_NF[::7, 3], pre_NF[::5, 9] = torch.nan, -0.0
    few, compiled = selecting._keep_top_of_few(pre_NF, 5), selecting._keep_top_compiled(pre_NF, 5)
    assert torch.equal(few.view(torch.int32), compiled.view(torch.int32))


def sorted_top(pre_NF: np.ndarray, k: int) -> np.ndarray:
    """The same by sorting: stable, so that of equal entries the first are kept."""
    out_NF = np.zeros_like(pre_NF)
    for n, row_F in enumerate(pre_NF):
        for f in np.argsort(-row_F, kind="stable")[:k]:
            out_NF[n, f] = max(row_F[f], 0)
    return out_NF


@settings(deadline=None, max_examples=400)
@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=NUMBERS), st.integers(1, 45))
def test_is_what_sorting_says(pre_NF, k):
    np.testing.assert_array_equal(keep_top(torch.from_numpy(pre_NF), k).numpy(), sorted_top(pre_NF, k))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_is_torch_s(scale):
    pre_NF = scale * torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    values, features = pre_NF.topk(32, dim=1)
    assert torch.equal(keep_top(pre_NF, 32), torch.zeros_like(pre_NF).scatter_(1, features, values.relu()))


def test_not_a_number_stays():
    pre_NF = torch.tensor([[1.0, float("nan"), 3.0, 2.0], [4.0, 1.0, 2.0, 3.0]])
    kept = keep_top(pre_NF, 2)
    assert kept[0].isnan().any()
    assert kept[1].tolist() == [4, 0, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_a_gradient_is_wanted_and_in_other_precisions(dtype):
    pre_NF = torch.tensor([[1.0, -2, 3, 2], [-4, -1, -2, -3]], dtype=dtype, requires_grad=True)
    keep_top(pre_NF, 2).sum().backward()
    assert pre_NF.grad is not None
    assert pre_NF.grad.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert keep_top(pre_NF.detach(), 2).tolist() == [[0, 0, 3, 2], [0, 0, 0, 0]]
