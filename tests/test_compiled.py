"""The compiled way of training: as the plain one in every weight, and each kernel against dense torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from builders import planted_layers
from throughline.dictionaries import Dictionary
from throughline.study import DictionaryOverride, DictionarySpec, TrainingSpec
from throughline.training import Progress, chunks, compiled, engine, train
from throughline.training import kernels as compiled_kernels
from throughline.training.chunks import Chunk, read_chunks
from throughline.training.compiled import CompiledTrainer
from throughline.training.group import BETAS, EPSILON, Course, Group
from throughline.training.sources import ArraySource

N, D, F, K = 64, 16, 96, 4
kernels: Any = compiled_kernels  # pyright does not know how many arguments a tuple brings
SPECS = {name: DictionarySpec(architecture=name, d_sae=F, k=K, l1=0.3) for name in compiled.ARCHITECTURES}
every_architecture = pytest.mark.parametrize("name", compiled.ARCHITECTURES)


# ---- whole trainings


@pytest.fixture
def way(monkeypatch) -> Callable[[str, bool], None]:
    """Set whether training is compiled (small layers many steps a call, or step by step) or plain, and whether features die."""

    def choose(which: str, dead: bool = True) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(chunks, "MOST_TOKENS", 16 * N)
        monkeypatch.setattr(engine, "DEAD_AFTER_SHARE", 0.02 if dead else 1e9)
        monkeypatch.setattr(engine, "DEAD_AFTER_BATCHES", 1)
        if not dead:
            monkeypatch.setattr(Course, "dead_after_of", lambda self, group: self.dead_after)
        if which == "plain":
            monkeypatch.setattr(compiled, "ARCHITECTURES", ())
        if which == "step by step":
            monkeypatch.setattr(compiled, "SMALL_PRODUCT", 0)

    return choose


def run(specs: dict[int, DictionarySpec], num_steps: int, reports: list[Progress] | None = None, **training: Any):
    x_LND = planted_layers(num_steps * N, len(specs), num_features=40, d_model=D)
    spec = TrainingSpec.model_validate({"tokens": num_steps * N, "batch_tokens": N, "precision": "float32"} | training)
    heard = (reports if reports is not None else []).append
    return train(ArraySource(x_LND), specs, spec, model="planted", num_layers=len(specs), report=heard).own


def weights(one: Dictionary) -> dict[str, Tensor]:
    return {name: getattr(one, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | one.extra


def difference(a: Dictionary, b: Dictionary) -> float:
    """Largest relative difference of a weight: |a - b| / |b|."""
    pairs = [(x, weights(b)[name]) for name, x in weights(a).items()]
    return max(float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs)


def identical(a: Dictionary, b: Dictionary) -> bool:
    return all(torch.equal(x, weights(b)[name]) for name, x in weights(a).items())


@every_architecture
@pytest.mark.parametrize("dead", [False, True], ids=["none_dead", "some_dead"])
def test_compiled_and_plain_training_give_the_same_weights(way, name, dead):
    """After sixty steps of four layers; with dead features AuxK and resampling are at work.

    A pre-activation within rounding of a limit may fall on either side of it, and everything after differs: in one layer at most.
    """
    specs, results, reports = dict.fromkeys(range(4), SPECS[name]), {}, {}
    for which in ("plain", "compiled", "step by step"):
        way(which, dead)
        reports[which] = []
        results[which] = run(specs, 60, reports[which])
    expected = reports["plain"][-1]
    if name != "relu":  # has no AuxK, and hardly any feature dies
        assert all((share > 0) == dead for share in expected.dead)
    for which in ("compiled", "step by step"):
        for measure in ("loss", "l0", "fvu"):
            pairs = zip(getattr(reports[which][-1], measure), getattr(expected, measure), strict=True)
            off = sorted(abs(found / value - 1) for found, value in pairs)
            assert off[2] < 1e-4 and off[3] < 1e-2, (which, measure, off)
        assert all(results[which][layer].options == results["plain"][layer].options for layer in specs)
        differences = sorted(difference(results[which][layer], results["plain"][layer]) for layer in specs)
        assert differences[2] < 1e-5 and differences[3] < 1e-2, (which, differences)


@every_architecture
def test_resampling_points_features_the_same_way(way, monkeypatch, name):
    """Both ways resample, at the same steps, and end with the same weights; with no rate nothing else moves."""
    results = {}
    for which in ("compiled", "plain"):
        way(which, True)
        monkeypatch.setattr(Course, "rate", lambda self, step: 0.0)
        resampled = []

        def watched(group, x_LND, error_LND, step, course, resampled=resampled, inner=engine):
            before = group.stack.W_dec_LFD.detach().clone()
            from throughline.training.resampling import resample_

            resample_(group, x_LND, error_LND, step, course)
            turned = (group.stack.W_dec_LFD.detach() != before).any(-1)
            resampled.extend((layer, step, n) for layer, n in zip(group.layers, turned.sum(1).tolist(), strict=True))

        for module in ("compiled", "plain"):
            monkeypatch.setattr(f"throughline.training.{module}.resample_", watched)
        results[which] = run(dict.fromkeys(range(6), SPECS[name]), 60), sorted(r for r in resampled if r[2])
    (fast, when), (slow, expected) = results.values()
    assert when == expected
    if name != "relu":
        assert len({layer for layer, _, _ in when}) > 1
    assert all(difference(fast[layer], slow[layer]) < 1e-5 for layer in range(6))


def test_groups_of_several_shapes_in_one_run(way):
    """Widths, k and architectures mixed, plain ones too: each layer as in a run of its own kind."""
    changes = {
        0: {},
        1: {"d_sae": 40},
        2: {"architecture": "batch_topk"},
        3: {"architecture": "gated"},
        4: {"architecture": "matryoshka", "k": 6},
        5: {"architecture": "relu", "l1": 0.5},
        6: {"k": 7},
    }
    specs = {i: SPECS["topk"].overridden(DictionaryOverride.model_validate(c)) for i, c in changes.items()}
    results = {}
    for which in ("compiled", "plain"):
        way(which)
        results[which] = run(specs, 40)
    for layer in specs:
        assert difference(results["compiled"][layer], results["plain"][layer]) < 1e-5, layer


@every_architecture
def test_bfloat16_products_train_to_nearly_the_same(way, name):
    """By their error on the data, with the weights that come out."""
    x_LND = planted_layers(400 * N, 2, num_features=40, d_model=D)
    fvu = {}
    for precision in ("float32", "bfloat16"):
        way("step by step", False)
        trained = run({0: SPECS[name], 1: SPECS[name]}, 400, precision=precision)
        fvu[precision] = [
            float((x - one.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())
            for x, one in zip(x_LND, trained.values(), strict=True)
        ]
    assert fvu["bfloat16"] != fvu["float32"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.1)


def test_small_layers_are_trained_in_float32_anyhow(way):
    """Where the encoder's product takes no time."""
    way("compiled")
    single, half = (run({0: SPECS["topk"]}, 20, precision=p)[0] for p in ("float32", "bfloat16"))
    assert identical(single, half)


# ---- threads


def first_chunk(specs: dict[int, DictionarySpec], training: TrainingSpec) -> tuple[Chunk, list[Group]]:
    x_LND = planted_layers(training.tokens, len(specs), num_features=40, d_model=D)
    chunk = next(read_chunks(ArraySource(x_LND), training.batch_tokens, training.tokens, len(specs), 0))
    return chunk, engine._make_groups(chunk, specs, training, len(specs), "planted")


@pytest.mark.parametrize(("bfloat16", "small"), [(False, 5e7), (False, 0), (True, 0)])
def test_threads_change_nothing(monkeypatch, bfloat16, small):
    """Five layers of four kinds, to the bit, whatever number of threads takes turns with them."""
    monkeypatch.setattr(compiled, "SMALL_PRODUCT", small)
    names = ("topk", "batch_topk", "topk", "matryoshka", "relu")
    specs = {layer: SPECS[name] for layer, name in enumerate(names)}
    training = TrainingSpec(tokens=40 * N, batch_tokens=N)
    course = Course(40, N, 0, dead_after=2 * N, bfloat16=bfloat16)
    found = []
    for num_threads in (1, 2, 3):
        chunk, groups = first_chunk(specs, training)
        CompiledTrainer(groups, course, num_threads).train(chunk, 0, 40, lambda steps: None)
        found.append({f"{g.layers}{n}": t.nan_to_num() for g in groups for n, t in g.tensors().items()})
        found[-1] |= {f"{g.layers}{n}": t.clone() for g in groups for n, t in vars(g.latest).items()}
    for other in found[1:]:
        assert [name for name, tensor in found[0].items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize("small", [5e7, 0])
def test_blocks_of_steps_change_nothing(monkeypatch, small):
    """How long a thread stays with a layer, and chunks trained in two parts."""
    monkeypatch.setattr(compiled, "SMALL_PRODUCT", small)
    specs = {0: SPECS["topk"], 1: SPECS["batch_topk"]}
    training, course = TrainingSpec(tokens=20 * N, batch_tokens=N), Course(20, N, 0, 2 * N, False)
    found = []
    for block in (1, 7, 100):
        monkeypatch.setattr(compiled, "BLOCK_STEPS", block)
        chunk, groups = first_chunk(specs, training)
        ticks: list[float] = []
        CompiledTrainer(groups, course, 2).train(chunk, 0, 20, ticks.append)
        found.append([t.nan_to_num() for g in groups for t in g.tensors().values()])
    chunk, groups = first_chunk(specs, training)
    CompiledTrainer(groups, course, 1).train(chunk, 0, 11, lambda steps: None)
    rest = chunk._replace(order_C=chunk.order_C[11 * N :])
    CompiledTrainer(groups, course, 1).train(rest, 11, 9, lambda steps: None)  # what it guesses begins anew
    found.append([t.nan_to_num() for g in groups for t in g.tensors().values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


TRAINING = """
import hashlib
from test_compiled import SPECS, engine, run, weights
engine.DEAD_AFTER_SHARE, engine.DEAD_AFTER_BATCHES = 0.02, 1
one = run({0: SPECS["topk"]}, 200)[0]
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights(one).values())).hexdigest())
"""


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("kept_at", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"])
def test_bits_do_not_depend_on_which_process_compiled(tmp_path, kept_at):
    """The first one compiles, the second reads what the first left; features die, so that every kernel is at work."""
    environment = os.environ | {kept_at: str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", TRAINING]  # fresh interpreters: where numba keeps kernels is read at import
    found = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert list(tmp_path.rglob("kernels.steps_topk-*.nbc"))
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize(("small", "at"), [(5e7, 0), (0, 0), (5e7, 7), (0, 7)])
def test_a_layer_that_fails_does_not_stop_the_others(monkeypatch, small, at):
    """It is given up after three bad looks at it."""
    monkeypatch.setattr(compiled, "SMALL_PRODUCT", small)
    specs = dict.fromkeys(range(4), SPECS["topk"])
    training, course = TrainingSpec(tokens=200 * N, batch_tokens=N), Course(200, N, 0, 1e9, False)
    chunk, groups = first_chunk(specs, training)
    chunk.x_LCD[2, chunk.order_C[at * N + 3]] = torch.nan
    chunk = chunk._replace(order_C=chunk.order_C[:N].repeat(200) if at == 0 else chunk.order_C)
    CompiledTrainer(groups, course, 2).train(chunk, 0, 200, lambda steps: None)
    [group] = groups
    assert group.setbacks_L.tolist() == [0, 0, 3 if at == 0 else 1, 0]
    assert [at for at, _ in group.events] == [2] * int(group.setbacks_L[2])
    assert all(tensor.isfinite().all() for name, tensor in group.tensors().items() if "l0" not in name)


# ---- kernels


def codes(num_rows: int, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Empty codes, filled with what must not be seen."""
    numbers = np.full(num_rows, -7, np.int64), np.full(num_rows, -7, np.int64)
    return *numbers, np.full(room, -7, np.int32), np.full(room, np.nan, np.float32)


def dense(
    num_features: int, starts: np.ndarray, counts: np.ndarray, features: np.ndarray, values: np.ndarray
) -> Tensor:
    """Codes as a matrix [rows, F]; features of a row must be ascending."""
    f_RF = torch.zeros(len(starts), num_features)
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        mine = features[start : start + count]
        assert (np.diff(mine) > 0).all()
        f_RF[row, torch.from_numpy(mine).long()] = torch.from_numpy(values[start : start + count])
    return f_RF


def largest(row_F: np.ndarray, k: int) -> np.ndarray:
    """The k largest positive entries, the earlier among equals; NaN is not positive."""
    row_F = np.nan_to_num(row_F, nan=0.0, posinf=np.inf, neginf=-np.inf)
    order = np.argsort(-row_F, kind="stable")[:k]
    kept = np.zeros_like(row_F)
    kept[order] = np.maximum(row_F[order], 0)
    return kept


SOME = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 1e-30, 1e-6, 3e4, float("nan")])
ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.one_of(SOME, st.floats(-10, 10, width=32), st.floats(0, 2.0**-60, width=32), st.floats(1, 2, width=32)),
)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.integers(1, 12), st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30, float("inf"), float("nan")]))
@example(np.linspace(1e-20, 2e-20, 40, dtype=np.float32)[None], 3, 0.0)  # far below where the search begins
@example(np.linspace(1e10, 2e10, 40, dtype=np.float32)[None], 3, 1e-30)
@example(np.full((2, 40), 0.5, np.float32), 3, 0.0)
def test_select_topk(rows_NF, k, guess):
    """Ties, negatives, NaN and fewer than k positives; wherever the search begins."""
    num_tokens, num_features = rows_NF.shape
    k = min(k, num_features)
    found = codes(num_tokens, num_tokens * k)
    bias_F = np.zeros(num_features, np.float32)
    kernels.select_topk(np.ascontiguousarray(rows_NF), bias_F, k, np.float32(guess), *found)
    expected = np.stack([largest(row_F, k) for row_F in rows_NF])
    assert np.array_equal(dense(num_features, *found).numpy(), expected)
    assert found[1].tolist() == (expected > 0).sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 32, 200])
def test_select_topk_is_torch_s(dtype, k):
    """Of normally distributed pre-activations with biases, in both dtypes."""
    generator = torch.Generator().manual_seed(k)
    pre_NF = torch.randn(50, 200, generator=generator).to(dtype)
    b_enc_F = torch.randn(200, generator=generator)
    found = codes(50, 50 * k)
    given_pre = pre_NF.view(torch.int16).numpy() if dtype == torch.bfloat16 else pre_NF.numpy()
    guess = kernels.select_topk(given_pre, b_enc_F.numpy(), k, np.float32(0), *found)
    top = (pre_NF.float() + b_enc_F).topk(k)
    assert torch.equal(dense(200, *found), torch.zeros(50, 200).scatter(1, top.indices, top.values.relu()))
    assert guess >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 0.7, 100.0])
def test_select_above(dtype, limit):
    generator = torch.Generator().manual_seed(1)
    pre_NF = torch.randn(20, 50, generator=generator).to(dtype)
    b_enc_F = torch.randn(50, generator=generator)
    arguments = (
        pre_NF.view(torch.int16).numpy() if dtype == torch.bfloat16 else pre_NF.numpy(),
        b_enc_F.numpy(),
        np.float32(limit),
    )
    all_NF = pre_NF.float() + b_enc_F
    expected = torch.where(all_NF > limit, all_NF, 0)
    num = int((all_NF > limit).sum())
    found = codes(20, max(num, 1))
    assert kernels.select_above(*arguments, *found) == num
    assert torch.equal(dense(50, *found), expected)
    if num > 1:  # too little room: how much is needed is said, and nothing is written beyond
        starts, counts, features, values = codes(20, num)
        assert kernels.select_above(*arguments, starts, counts, features[: num - 1], values) == num
        assert features[num - 1] == -7


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 96), st.booleans())
def test_keep_largest_keeps_so_many(num_rows, num_features, wanted, tied):
    """The largest of the whole batch, exactly as many as wanted, the earlier among equals."""
    generator = torch.Generator().manual_seed(num_rows * num_features)
    all_NF = torch.rand(num_rows, num_features, generator=generator)
    if tied:
        all_NF = (3 * all_NF).ceil()
    num = all_NF.numel()
    wanted = min(max(wanted, 1), num - 1)
    if wanted < 1:
        return
    found = codes(num_rows, num)
    kernels.select_above(all_NF.numpy(), np.zeros(num_features, np.float32), np.float32(0), *found)
    starts, counts, features, values = found
    smallest = kernels.keep_largest(num, wanted, starts, counts, num_rows, features, values)
    expected = torch.from_numpy(largest(all_NF.flatten().numpy(), wanted)).view_as(all_NF)
    assert torch.equal(dense(num_features, *found), expected)
    assert counts.sum() == wanted and smallest == expected[expected > 0].min()


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.uint32, 64))
def test_rounding_to_bfloat16_is_torch_s(bits):
    """Bit for bit: negatives, ties, subnormal numbers, infinity, and what rounds to it."""
    special = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0xBF808000,
        0xBF818000,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x80000001,
    ]
    numbers = np.concatenate([bits, np.array(special, np.uint32)])
    x_1D = torch.from_numpy(numbers.view(np.float32).copy())[None]
    x_1D = torch.where(x_1D.isnan(), 0, x_1D)
    out = torch.empty_like(x_1D)
    rounded = torch.empty(x_1D.shape, dtype=torch.bfloat16)
    zero_D = np.zeros(x_1D.shape[1], np.float32)
    views = out.numpy(), rounded.view(torch.int16).numpy()
    kernels.gather(x_1D.numpy(), np.array([0]), zero_D, np.ones_like(zero_D), *views)
    expected = x_1D.bfloat16().view(torch.int16)
    assert torch.equal(torch.where(x_1D == 0, 0, rounded.view(torch.int16)), torch.where(x_1D == 0, 0, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather(dtype):
    generator = torch.Generator().manual_seed(2)
    chunk_CD = torch.randn(30, 8, generator=generator).to(dtype)
    mean_D, order_N = torch.randn(8, generator=generator), torch.randperm(30, generator=generator)[:12]
    scale_D = 0.5 + torch.rand(8, generator=generator)
    x_ND, rounded_ND = torch.empty(12, 8), torch.empty(12, 8, dtype=torch.bfloat16)
    kernels.gather(
        chunk_CD.view(torch.int16).numpy() if dtype == torch.bfloat16 else chunk_CD.numpy(),
        order_N.numpy(),
        mean_D.numpy(),
        scale_D.numpy(),
        x_ND.numpy(),
        rounded_ND.view(torch.int16).numpy(),
    )
    torch.testing.assert_close(x_ND, scale_D * (chunk_CD[order_N].float() - mean_D))
    assert torch.equal(rounded_ND, x_ND.bfloat16())


def random_codes(num_rows: int, num_features: int, k: int, seed: int = 3):
    """Codes of random rows, some of them with nothing, and the same as a matrix."""
    pre_NF = torch.randn(num_rows, num_features, generator=torch.Generator().manual_seed(seed))
    pre_NF[:: max(2, num_rows // 3)] = -1
    found = codes(num_rows, num_rows * k)
    kernels.select_topk(pre_NF.numpy(), np.zeros(num_features, np.float32), k, np.float32(0), *found)
    return found, dense(num_features, *found)


def at_codes(matrix_NF: Tensor, found: tuple) -> np.ndarray:
    """Entries of a matrix at codes, in their places; NaN elsewhere."""
    starts, counts, features, values = found
    out = np.full(len(values), np.nan, np.float32)
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        out[start : start + count] = matrix_NF[row, torch.from_numpy(features[start : start + count]).long()].numpy()
    return out


def test_decode_is_autograd_s():
    generator = torch.Generator().manual_seed(4)
    x_ND, W_dec_FD = torch.randn(20, D, generator=generator), torch.randn(50, D, generator=generator)
    b_dec_D = torch.randn(D, generator=generator)
    found, f_NF = random_codes(20, 50, 6)
    G_ND, slopes_A = np.full((20, D), np.nan, np.float32), np.full(len(found[3]), np.nan, np.float32)
    factor, rounded_ND = np.float32(2 / (20 * D)), torch.empty(20, D, dtype=torch.bfloat16)
    out = (G_ND, rounded_ND.view(torch.int16).numpy(), slopes_A)
    error = kernels.decode(x_ND.numpy(), W_dec_FD.numpy(), b_dec_D.numpy(), *found, factor, *out)
    assert torch.equal(rounded_ND, torch.from_numpy(G_ND).bfloat16())
    f_NF.requires_grad_()
    x_hat_ND = f_NF @ W_dec_FD + b_dec_D
    x_hat_ND.retain_grad()
    (x_ND - x_hat_ND).square().mean().backward()
    assert x_hat_ND.grad is not None and f_NF.grad is not None
    assert error == pytest.approx((x_ND - x_hat_ND).square().sum().item(), rel=1e-5)
    np.testing.assert_allclose(G_ND, x_hat_ND.grad.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(slopes_A, at_codes(f_NF.grad, found), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ends", [[50], [7, 50], [1, 3, 20, 50], [20, 21, 22, 50]])
def test_nested_decode_is_autograd_s(ends):
    generator = torch.Generator().manual_seed(5)
    x_ND, W_dec_FD = torch.randn(20, D, generator=generator), torch.randn(50, D, generator=generator)
    b_dec_D = torch.randn(D, generator=generator)
    found, f_NF = random_codes(20, 50, 6)
    P = len(ends)
    error_ND, G_PND = np.full((20, D), np.nan, np.float32), np.full((P, 20, D), np.nan, np.float32)
    slopes_A = np.full(len(found[3]), np.nan, np.float32)
    factor = np.float32(2 / (20 * D * P))
    rounded_PND = torch.empty(P, 20, D, dtype=torch.bfloat16)
    out = (error_ND, G_PND, rounded_PND.view(torch.int16).numpy(), slopes_A)
    last, total = kernels.decode_nested(
        x_ND.numpy(), W_dec_FD.numpy(), b_dec_D.numpy(), np.array(ends), *found, factor, *out
    )
    assert torch.equal(rounded_PND, torch.from_numpy(G_PND).bfloat16())
    for tensor in (f_NF, b_dec_D, W_dec_FD):
        tensor.requires_grad_()
    errors = [x_ND - f_NF[:, :end] @ W_dec_FD[:end] - b_dec_D for end in ends]
    torch.stack([e.square().mean() for e in errors]).mean().backward()
    assert f_NF.grad is not None and b_dec_D.grad is not None and W_dec_FD.grad is not None
    assert last == pytest.approx(errors[-1].square().sum().item(), rel=1e-5)
    assert total == pytest.approx(sum(e.square().sum().item() for e in errors), rel=1e-5)
    np.testing.assert_allclose(error_ND, -errors[-1].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes_A, at_codes(f_NF.grad, found), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(G_PND[0].sum(0), b_dec_D.grad.numpy(), rtol=1e-4, atol=1e-6)
    prefix_F = np.searchsorted(ends, np.arange(50), side="right")
    by_feature = torch.stack([f_NF[:, f].detach() @ torch.from_numpy(G_PND[prefix_F[f]]) for f in range(50)])
    torch.testing.assert_close(by_feature, W_dec_FD.grad, rtol=1e-4, atol=1e-6)


def by_feature_of(found: tuple, slopes_A: np.ndarray, num_tokens: int, first_row_F: np.ndarray) -> tuple:
    """What `transpose` makes of codes: starts_F, token, row, value, slope."""
    room, num_features = len(found[3]), len(first_row_F)
    numbers = np.full(room, -7, np.int32), np.full(room, -7, np.int32)
    out = (np.full(num_features + 1, -7, np.int64), *numbers, *(np.full(room, np.nan, np.float32) for _ in range(2)))
    kernels.transpose(len(found[0]), num_tokens, *found, slopes_A, first_row_F, *out)
    return out


def test_transpose():
    """Codes by feature, in the order of rows; AuxK's rows are tokens once more, with rows of G after all others."""
    num_tokens, num_aux, num_features = 12, 4, 30
    found, f_RF = random_codes(num_tokens + num_aux, num_features, 5)
    slopes_A = np.arange(len(found[3]), dtype=np.float32)
    first_row_F = np.repeat([0, num_tokens, 2 * num_tokens], 10)
    starts_F, token, row, value, slope = by_feature_of(found, slopes_A, num_tokens, first_row_F)
    slope_RF = dense(num_features, *found[:3], slopes_A)
    assert starts_F[0] == 0 and starts_F[-1] == int((f_RF > 0).sum())
    for f in range(num_features):
        mine = slice(starts_F[f], starts_F[f + 1])
        rows = f_RF[:, f].nonzero()[:, 0]
        assert token[mine].tolist() == [int(r) - num_tokens * (int(r) >= num_tokens) for r in rows]
        expected = [2 * num_tokens + int(r) if r >= num_tokens else int(first_row_F[f] + r) for r in rows]
        assert row[mine].tolist() == expected
        assert torch.equal(torch.from_numpy(value[mine]), f_RF[rows, f])
        assert torch.equal(torch.from_numpy(slope[mine]), slope_RF[rows, f])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_torch_s_adam(dtype):
    """Three steps of Adam with gradients of codes; the decoder's without their part along its rows, which return to unit norm."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_features, rate = 50, 0.01
    W_enc, b_enc, W_dec = random(num_features, D), random(num_features), random(num_features, D)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    mine = [w.clone() for w in (W_enc, b_enc, W_dec)]
    bias, mine_bias = random(D), torch.empty(D)
    mine_bias.copy_(bias)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, bias], lr=rate, betas=BETAS, eps=EPSILON)
    moments = [torch.zeros_like(w) for w in mine for _ in "mv"]
    bias_moments = [torch.zeros(D), torch.zeros(D)]
    rounded = torch.empty(num_features, D, dtype=torch.bfloat16)
    idle_F = np.full(num_features, 100, np.int64)
    first_row_F = np.zeros(num_features, np.int64)
    for step in range(3):
        rows = (random(20, D).to(dtype), random(20, D).to(dtype))
        given = [r.view(torch.int16).numpy() if dtype == torch.bfloat16 else r.numpy() for r in rows]
        x_ND, G_ND = (r.float() for r in rows)
        found, f_NF = random_codes(20, num_features, 4, seed=step)
        slope_NF = torch.where(f_NF > 0, random(20, num_features), 0)
        grouped = by_feature_of(found, at_codes(slope_NF, found), 20, first_row_F)
        correction = [1 - beta ** (step + 1) for beta in BETAS]
        adam = np.array([rate / correction[0], correction[1] ** -0.5, *BETAS, EPSILON], np.float32)
        encoder = (mine[0].numpy(), rounded.view(torch.int16).numpy())
        arrays_ = (*encoder, mine[1].numpy(), mine[2].numpy(), *(m.numpy() for m in moments))
        kernels.update(*given, 20, *grouped, *arrays_, idle_F, adam)
        kernels.update_bias(G_ND.numpy(), mine_bias.numpy(), *(m.numpy() for m in bias_moments), adam)
        W_enc.grad, b_enc.grad, bias.grad = slope_NF.T @ x_ND, slope_NF.sum(0), G_ND.sum(0)
        gradient = f_NF.T @ G_ND
        W_dec.grad = gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        for found_w, expected in zip([*mine, mine_bias], [W_enc, b_enc, W_dec, bias], strict=True):
            torch.testing.assert_close(found_w, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(rounded, mine[0].bfloat16())
        fired = (f_NF > 0).any(0)
        assert (torch.from_numpy(idle_F)[fired] == 0).all() and (torch.from_numpy(idle_F)[~fired] >= 20).all()
    for weight, first, second in zip([W_enc, b_enc, W_dec], moments[::2], moments[1::2], strict=True):
        torch.testing.assert_close(first, optimizer.state[weight]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(second, optimizer.state[weight]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_auxk_selects_among_the_dead():
    generator = torch.Generator().manual_seed(7)
    pre_NF, b_enc_F = torch.randn(10, 40, generator=generator), torch.randn(40, generator=generator)
    dead_U = torch.randperm(40, generator=generator)[:15].sort().values
    found = codes(10, 100)
    end = kernels.select_dead(pre_NF.numpy(), b_enc_F.numpy(), dead_U.numpy().astype(np.int32), 6, 20, *found)
    only_NF = torch.full_like(pre_NF, -torch.inf)
    only_NF[:, dead_U] = (pre_NF + b_enc_F)[:, dead_U]
    top = only_NF.topk(6)
    assert torch.equal(dense(40, *found), torch.zeros(10, 40).scatter(1, top.indices, top.values.relu()))
    assert found[0][0] == 20 and end == 20 + found[1].sum()
