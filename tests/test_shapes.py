"""A wrong shape passed to a public function fails with the name of what has it; tests alone check that."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError

import shape_checks
from builders import make_codes, random_dictionary, random_documents, tiny_model
from throughline.dictionaries.batch_topk import keep_largest
from throughline.dictionaries.dictionary import Sparse
from throughline.models import LanguageModel, ModelOutput
from throughline.quality import measure_means
from throughline.splicing import predicted_tokens, run_replaced
from throughline.tracing.graph import choose_share
from throughline.training.sparsity import SparsityController
from throughline.transfer.maps import Affine

D, F = 8, 12
DICTIONARY, WIDE = random_dictionary(D, F), random_dictionary(16, F)  # WIDE for `tiny_model`
TESTS = Path(__file__).parent


def rows():
    return make_codes(random_documents(3, 0)).rows


WRONG = {
    "x_ND": [
        lambda: DICTIONARY.encode(torch.zeros(3, D + 1)),
        lambda: DICTIONARY.encode(torch.zeros(D)),
        lambda: DICTIONARY.encode(torch.zeros(3, D, dtype=torch.int64)),
        lambda: DICTIONARY.encode_sparse(torch.zeros(1, 3, D)),
        lambda: DICTIONARY.reconstruct(torch.zeros(3, F)),
        lambda: Affine(torch.zeros(D, 3), torch.zeros(3)).of(torch.zeros(D)),
    ],
    "f_NF": [lambda: DICTIONARY.decode(torch.zeros(3, D))],
    "features_C": [lambda: DICTIONARY.readers(torch.zeros(2, 2, dtype=torch.int64))],
    "pre_LNF": [lambda: keep_largest(torch.zeros(3, F), 2)],
    "influence_N": [lambda: choose_share(torch.zeros(3, 1), 0.5, 2)],
    "target_L": [lambda: SparsityController.start(torch.zeros(2), torch.zeros(3))],
    "W_dec": [lambda: replace(DICTIONARY, W_dec=DICTIONARY.W_dec.T)],  # a dataclass
    "extra": [lambda: replace(DICTIONARY, extra={"threshold": torch.zeros(D)})],
    "kinds": [lambda: replace(rows(), kinds=rows().kinds[:, 1:])],
    "roles_N": [lambda: replace(make_codes(random_documents(3, 0)), roles_N=np.zeros(2, np.int64))],
    "shift_E": [lambda: Affine(torch.zeros(D, 3), torch.zeros(D))],  # a named tuple
    "values": [lambda: Sparse(*(torch.zeros(2, dtype=torch.int64),) * 2, torch.zeros(3))],
}


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in WRONG.items() for call in calls])
def test_a_wrong_shape_fails_with_the_arrays_name(name: str, call: Callable[[], object]):
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{name}'"):
        call()


def test_a_wrong_shape_returned_fails_with_the_functions_name(monkeypatch):
    monkeypatch.setattr(
        LanguageModel, "run", lambda *_, **__: ModelOutput(None, {tiny_model().num_layers - 1: torch.zeros(3)})
    )
    with pytest.raises(TypeCheckError, match=r"return value of throughline\.splicing\.run_replaced"):
        run_replaced(tiny_model(), rows(), {})


def test_right_shapes_pass():
    means_LD = measure_means(tiny_model(), {0: WIDE, 1: WIDE}, rows())
    assert means_LD.ndim == 2 and predicted_tokens(rows()).any()
    assert DICTIONARY.reconstruct(torch.zeros(3, D)).shape == (3, D)


@pytest.mark.parametrize("name", shape_checks.annotated_modules())
def test_every_module_with_shapes_is_checked(name: str):
    module = import_module(name)
    assert module.check_shapes_of is shape_checks.check


def test_a_shape_in_a_string_is_refused():
    """`check` evaluates no strings, so the shape would go unnoticed."""

    def measure(x_ND: "Float[torch.Tensor, 'N D']") -> None: ...

    with pytest.raises(AssertionError, match=r"measure: a shape in a string is not checked: .*Float\[torch"):
        shape_checks.check(measure)


def test_shapes_are_checked_in_tests_alone():
    """The same call in two fresh processes, one as users start it."""
    call = """
import torch
from throughline.training.sparsity import SparsityController
SparsityController.start(torch.zeros(1), torch.zeros(3))
"""
    command = [sys.executable, "-c"]
    done = subprocess.run([*command, call], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*command, "import shape_checks" + call], capture_output=True, text=True, timeout=120, cwd=TESTS
    )
    assert done.returncode == 1 and "typechecking parameter 'target_L'" in done.stderr
