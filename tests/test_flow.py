"""Flow on models whose causes are known: written by hand, linear, or measured again with hooks of this file's own."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import transformers
from torch import Tensor, nn

import throughline
from builders import CONTEXT, GivenSide, random_dictionary, random_documents, tiny_model, word_tokenizer
from throughline.codes import Codes, encode_text
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.models import LanguageModel, open_model
from throughline.records import Document
from throughline.study import ModelSpec
from throughline.tokens import collect_rows
from throughline.transfer.effects import Contexts, cut_contexts, estimate_drops, switch_off
from throughline.transfer.flow import Flow
from throughline.transfer.matching import Matching
from throughline.transfer.pairs import prepare
from throughline.transfer.predecessors import (
    NUM_CONTEXTS,
    NUM_TARGETS,
    choose_targets,
    compare_features,
    draw_active,
    draw_checked,
    spread_tokens,
    strongest_edges,
)
from throughline.transfer.transport import transport_features
from throughline.zoo.texts import sample_problems

DOCUMENTS = random_documents(120, seed=0)


def read(
    model: LanguageModel, dictionaries: dict[int, Dictionary], documents: Sequence[Document] = tuple(DOCUMENTS)
) -> GivenSide:
    rows = collect_rows(documents, model.tokenizer, model.context)
    codes = encode_text(model, dictionaries, rows, documents, keep_residuals=True)
    return GivenSide(model.name, dictionaries, codes, codes, codes, language_model=model)


# ---- models written by hand


def bare_llama(embedding_VD: Tensor, mlps: list[nn.Module], mix: float = 0.0) -> LanguageModel:
    """Blocks without norms: x + mix · (mean over the positions so far) + mlp of that. Linear where the mlps are."""
    V, D = embedding_VD.shape
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=len(mlps),
        num_attention_heads=1,
        intermediate_size=1,
        max_position_embeddings=CONTEXT,
    )
    hf = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(embedding_VD)
        for block, mlp in zip(hf.model.layers, mlps, strict=True):
            block.input_layernorm, block.post_attention_layernorm, block.mlp = nn.Identity(), nn.Identity(), mlp
            for part, weight in (("q", 0.0), ("k", 0.0), ("v", mix), ("o", 1.0)):
                getattr(block.self_attn, f"{part}_proj").weight.copy_(weight * torch.eye(D))
    return LanguageModel("bare", hf, word_tokenizer())


class Writing(nn.Module):
    """Each rule (a, b, h) writes relu(x · a − h) along direction b."""

    def __init__(self, *rules: tuple[Tensor, Tensor, float]) -> None:
        super().__init__()
        self.read, self.write = (nn.Parameter(torch.stack(part)) for part in list(zip(*rules, strict=True))[:2])
        self.threshold = nn.Parameter(torch.tensor([rule[2] for rule in rules]))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.read.T - self.threshold).relu() @ self.write


SEED, A, B, C, C2, FIRST_NOISE = range(6)
NUM_NOISE = 7
H = 0.5


@pytest.fixture(scope="module")
def chain() -> GivenSide:
    """A → B → C with a fork: block 0 writes A; block 1 writes B = relu(A − H); block 2 writes C = B, and C2 = relu(A − H).

    B, C and C2 are the same number on every token. Other directions carry noise from the embedding to the end.
    """
    generator = torch.Generator().manual_seed(1)
    D = FIRST_NOISE + NUM_NOISE
    d = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    amounts_VF = torch.zeros(len(word_tokenizer()), D)
    amounts_VF[::2, SEED] = 1 + torch.rand(len(amounts_VF[::2]), generator=generator)
    noise = torch.rand(len(amounts_VF), NUM_NOISE, generator=generator)
    amounts_VF[:, FIRST_NOISE:] = noise * (noise > 0.5)
    rules = [[(SEED, A, 0.0)], [(A, B, H)], [(B, C, 0.0), (A, C2, H)]]
    mlps = [Writing(*((d[a], d[b], h) for a, b, h in block)) for block in rules]
    model = bare_llama(amounts_VF @ d, mlps)
    dictionary = Dictionary("relu", d.T.contiguous(), torch.full((D,), -1e-4), d, torch.zeros(D))
    return read(model, dict.fromkeys(range(3), dictionary))


@pytest.fixture(scope="module")
def chain_flow(chain) -> dict[str, np.ndarray]:
    return Flow().compute(chain, chain, seed=0, min_count=20)[0].arrays


def edges_of(arrays: dict[str, np.ndarray], i: int, j: int, target: int) -> dict[int, float]:
    """Estimates by source feature."""
    here = arrays["target"][i, j].tolist().index(target)
    pairs = zip(arrays["edge_source"][i, j, here], arrays["edge_estimate"][i, j, here], strict=True)
    return {int(source): float(estimate) for source, estimate in pairs if source >= 0}


def number_of(arrays: dict[str, np.ndarray], name: str, i: int, j: int, target: int) -> float:
    return arrays[name][i, j, arrays["target"][i, j].tolist().index(target)]


def test_correlation_cannot_tell_cause_from_company(chain, chain_flow):
    features = chain.sample.layers
    r = np.corrcoef(features[1].toarray()[:, [A, B]].T, features[2].toarray()[:, [C, C2]].T)[:2, 2:]
    assert r[1].min() > 0.9999 > r[0].max() + 0.001, "B goes with C and with C2, closer than A does"
    matched = Matching().compute(chain, chain, seed=0, min_count=20)[0].arrays
    assert matched["correlation"][1, 2, B] > 0.9999
    for target in (C, C2):
        assert number_of(chain_flow, "matched", 1, 2, target) == B


def test_causes_are_told_from_company(chain_flow):
    for i, j, source, target in [(0, 1, A, B), (1, 2, B, C), (1, 2, A, C2), (0, 2, A, C), (0, 2, A, C2)]:
        assert number_of(chain_flow, "cause", i, j, target) == source
        assert number_of(chain_flow, "cause_measured", i, j, target) == pytest.approx(1, abs=1e-3)
        assert edges_of(chain_flow, i, j, target)[source] > 0.99
    for i, j, source, target in [(1, 2, B, C2), (1, 2, A, C), (0, 1, SEED, B), (0, 2, SEED, C)]:
        assert abs(edges_of(chain_flow, i, j, target)[source]) < 1e-5
    assert number_of(chain_flow, "matched_measured", 1, 2, C) == pytest.approx(1, abs=1e-3)
    assert abs(number_of(chain_flow, "matched_measured", 1, 2, C2)) < 1e-5, "the best correlated feature does nothing"
    assert chain_flow["cause_success"][1, 2] == 1 > chain_flow["matched_success"][1, 2]
    assert chain_flow["value"][1, 2] > chain_flow["matched_drop"][1, 2] + 0.05 > chain_flow["null"][1, 2] + 0.3


def test_only_earlier_layers_are_sources(chain_flow):
    upper = np.triu_indices(3, 1)
    for name, array in chain_flow.items():
        nothing = array == -1 if array.dtype == np.int32 else np.isnan(array)
        assert nothing[np.tril_indices(3)].all(), name
        assert not nothing[upper].all() and array.shape[:2] == (3, 3), name
    np.testing.assert_array_equal(chain_flow["n"][upper], NUM_NOISE + np.array([3, 5, 5]))


def test_estimates_go_with_measurements_and_those_of_others_do_not(chain_flow):
    upper = np.triu_indices(3, 1)
    assert chain_flow["pearson"][upper].min() > 0.95 and chain_flow["rank_correlation"][upper].min() > 0.8
    assert np.abs(chain_flow["null_rank_correlation"][upper]).max() < 0.5


# ---- estimates and measurements


@pytest.fixture(scope="module")
def linear() -> GivenSide:
    """Three linear blocks that mix positions; the features of the last layer are far from zero, so never cut off."""
    generator = torch.Generator().manual_seed(2)
    D = 12
    mlps: list[nn.Module] = [nn.Linear(D, D) for _ in range(3)]
    for mlp in mlps:
        mlp.load_state_dict(
            {"weight": 0.3 * torch.randn(D, D, generator=generator), "bias": torch.randn(D, generator=generator)}
        )
    model = bare_llama(torch.randn(len(word_tokenizer()), D, generator=generator), mlps, mix=0.7)
    dictionaries = {layer: random_dictionary(D, 20, seed=layer) for layer in range(3)}
    dictionaries[2].b_enc.add_(100)
    return read(model, dictionaries)


def some_contexts(side: GivenSide, layer: int, num_targets: int = 4) -> Contexts:
    targets_G = choose_targets(side.sample.layers[layer], 20)[:num_targets]
    return cut_contexts(side.sample, spread_tokens(side.sample, layer, targets_G), np.repeat(targets_G, NUM_CONTEXTS))


def read_alone(side: GivenSide, contexts: Contexts, c: int, edits: dict | None = None) -> float:
    """The target of one context in the last layer, without batch or padding."""
    model, last = side.language_model, max(side.dictionaries)
    inputs = model.inputs(contexts.ids_CT[c : c + 1, : contexts.lengths_C[c]])
    with torch.no_grad():
        x_D = model.run(inputs, capture=[last], edits=edits, logits=False).residuals[last][0, -1:]
    return float(side.dictionaries[last].encode(x_D)[0, contexts.targets_C[c]])


def without(
    dictionary: Dictionary, feature: int, positions: list[int], kept_T: np.ndarray
) -> Callable[[Tensor], Tensor]:
    """An edit that takes the feature's part out of the stream at some positions of a single text."""

    def edit(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        for t in positions:
            if kept_T[t]:
                out[0, t] -= dictionary.encode(x_BTD[0, t : t + 1])[0, feature] * dictionary.W_dec[feature]
        return out

    return edit


def test_a_context_is_the_text_up_to_its_token(linear):
    codes = linear.sample
    tokens = np.array([0, 5, 300, codes.num_tokens - 1])
    contexts = cut_contexts(codes, tokens, np.zeros(4, int))
    for c, token in enumerate(tokens):
        before = (codes.documents_N == codes.documents_N[token]) & (codes.positions_N <= codes.positions_N[token])
        length = contexts.lengths_C[c]
        np.testing.assert_array_equal(contexts.ids_CT[c, :length], codes.ids_N[before])
        assert contexts.kept_CT[c, :length].all() and not contexts.kept_CT[c, length:].any()


@pytest.mark.parametrize("layer", [0, 1])
def test_in_a_linear_model_the_estimate_is_the_ablation(linear, layer):
    """For every feature that is active in a context; the drop of each, and the sum over positions taken one by one."""
    contexts = some_contexts(linear, 2)
    clean_C, drops = estimate_drops(linear.language_model, linear.dictionaries, 2, contexts)
    entries = drops[layer].tocoo()
    assert len(entries.data) > 300 and np.abs(entries.data).max() > 0.1
    source, target = ((i, linear.dictionaries[i]) for i in (layer, 2))
    off = switch_off(linear.language_model, source, target, contexts.select(entries.row), entries.col)
    np.testing.assert_allclose(clean_C[entries.row] - off, entries.data, atol=1e-3)  # of activations near 100, float32
    for e in range(0, len(entries.data), 40):
        c, feature = int(entries.row[e]), int(entries.col[e])
        one_by_one = 0.0
        for t in range(contexts.lengths_C[c]):
            edit = without(source[1], feature, [t], contexts.kept_CT[c])
            one_by_one += clean_C[c] - read_alone(linear, contexts, c, {layer: edit})
        assert one_by_one == pytest.approx(entries.data[e], abs=2e-3)


@pytest.fixture(scope="module")
def special() -> GivenSide:
    """Random weights, and texts with a special token inside that no dictionary reads."""
    model = tiny_model()
    documents = [Document(d.text.replace("+", "<end>")) for d in DOCUMENTS]
    return read(model, {i: random_dictionary(16, 24, k=4, seed=i) for i in range(3)}, documents)


def test_switching_off_is_what_hooks_say(special):
    """Batched and padded, against one text at a time; special tokens keep their stream."""
    contexts = some_contexts(special, 2)
    assert not contexts.kept_CT[np.arange(contexts.kept_CT.shape[1]) < contexts.lengths_C[:, None]].all()
    clean_C, drops = estimate_drops(special.language_model, special.dictionaries, 2, contexts)
    entries = drops[0].tocoo()
    chosen = np.random.default_rng(0).permutation(len(entries.data))[:60]
    rows, features = entries.row[chosen], entries.col[chosen]
    sides = ((i, special.dictionaries[i]) for i in (0, 2))
    off = switch_off(special.language_model, *sides, contexts.select(rows), features)
    for c, feature, found in zip(rows, features, off, strict=True):
        everywhere = list(range(contexts.lengths_C[c]))
        edit = without(special.dictionaries[0], feature, everywhere, contexts.kept_CT[c])
        assert found == pytest.approx(read_alone(special, contexts, c, {0: edit}), abs=1e-4)
        assert clean_C[c] == pytest.approx(read_alone(special, contexts, c), abs=1e-4)
    assert (np.abs(clean_C[rows] - off) > 0.01).mean() > 0.3


def test_gradients_are_those_of_small_steps(special):
    """A hundredth of the feature is taken out, in float64, and the target's change is a hundredth of the estimate."""
    contexts = some_contexts(special, 2, num_targets=2)
    _, drops = estimate_drops(special.language_model, special.dictionaries, 2, contexts)
    entries = drops[1].tocoo()
    model = special.language_model.in_dtype(torch.float64)
    source, target = special.dictionaries[1], special.dictionaries[2]
    for e in range(0, len(entries.data), 60):
        c, feature = int(entries.row[e]), int(entries.col[e])
        length, b = contexts.lengths_C[c], contexts.targets_C[c]
        read_off = []
        for share in (0.0, 1e-4):

            def edit(x_BTD: Tensor, share=share, feature=feature, c=c, length=length) -> Tensor:
                f_T = source.encode(x_BTD[0].float())[:, feature] * torch.from_numpy(contexts.kept_CT[c, :length])
                return x_BTD - share * (f_T[:, None] * source.W_dec[feature]).double()

            with torch.no_grad():
                inputs = model.inputs(contexts.ids_CT[c : c + 1, :length])
                x_D = model.run(inputs, capture=[2], edits={1: edit}, logits=False).residuals[2][0, -1]
            read_off.append(float(x_D @ target.W_enc[:, b].double()))
        assert (read_off[0] - read_off[1]) / 1e-4 == pytest.approx(entries.data[e], rel=0.02, abs=1e-3)


def test_off_is_zero_and_nothing_else(chain):
    """The residual stream carries everything on: without A at layer 1 there is no A at layer 2, and all else is as it was."""
    carried = np.array([A, SEED, B, *range(FIRST_NOISE, FIRST_NOISE + NUM_NOISE)])
    tokens = spread_tokens(chain.sample, 2, carried)
    contexts = cut_contexts(chain.sample, tokens, np.repeat(carried, NUM_CONTEXTS))
    clean_C, _ = estimate_drops(chain.language_model, chain.dictionaries, 2, contexts)
    sides = ((i, chain.dictionaries[i]) for i in (1, 2))
    off_C = switch_off(chain.language_model, *sides, contexts, np.full(len(tokens), A))
    np.testing.assert_allclose(off_C, np.where(contexts.targets_C == A, 0, clean_C), atol=2e-4)
    assert clean_C.min() > 0.01


# ---- what is compared and drawn


def test_twera_and_cosine_are_those_of_loops(special):
    codes, (source, target) = special.sample, (special.dictionaries[0], special.dictionaries[2])
    columns = {i: prepare(codes.layers[i]) for i in (0, 2)}
    targets = choose_targets(codes.layers[2], 20)[:3]
    twera, r, cosine = compare_features(columns[0], columns[2], source, target, targets)
    f, g = (codes.layers[i].toarray().astype(np.float64) for i in (0, 2))
    for a in range(0, 24, 5):
        for column, b in enumerate(targets):
            weight = float(source.W_dec[a] @ target.W_enc[:, b])
            assert twera[a, column] == pytest.approx((f[:, a] * g[:, b]).mean() / g[:, b].mean() * weight, abs=1e-5)
            assert r[a, column] == pytest.approx(np.corrcoef(f[:, a], g[:, b])[0, 1], abs=1e-5)
            row, other = source.W_dec[a], target.W_dec[b]
            assert cosine[a, column] == pytest.approx(float(row @ other / row.norm() / other.norm()), abs=1e-5)


def test_targets_are_the_heaviest_live_features():
    heavy, light = np.full((100, 1), 2.0), np.full((100, 1), 1.0)
    rare = np.zeros((100, 1))
    rare[:3] = 1e6
    matrix = sp.csr_array(np.hstack([light, rare, heavy]).astype(np.float32))
    np.testing.assert_array_equal(choose_targets(matrix, 20), [2, 0])
    many = sp.csr_array(np.ones((20, NUM_TARGETS + 5), dtype=np.float32))
    np.testing.assert_array_equal(choose_targets(many, 1), np.arange(NUM_TARGETS))


def test_contexts_are_spread_over_the_activation(chain):
    column = chain.sample.layers[2][:, [C]].toarray()[:, 0]
    values = column[spread_tokens(chain.sample, 2, np.array([C]))]
    assert (np.diff(values) >= 0).all() and len(values) == NUM_CONTEXTS
    firing = np.sort(column[column > 0])
    assert values[0] <= np.quantile(firing, 0.1) and values[-1] >= np.quantile(firing, 0.9)


def test_edges_are_the_strongest_of_either_sign():
    edges = strongest_edges(sp.csr_array(np.array([[0.1, -0.9, 0, 0.5], [0, 0, 0, 0]])))
    np.testing.assert_array_equal(edges["edge_source"][:, :4], [[1, 3, 0, -1], [-1, -1, -1, -1]])
    np.testing.assert_array_equal(edges["edge_estimate"][0, :3], [-0.9, 0.5, 0.1])
    assert np.isnan(edges["edge_estimate"][0, 3:]).all()


def test_controls_are_drawn_from_what_is_active():
    rng = np.random.default_rng(0)
    matrix = sp.csr_array(np.array([[0, 1.0, 0, 2.0], [0, 0, 0, 0], [3.0, 0, 0, 0]]))
    drawn = np.array([draw_active(matrix, np.arange(3), rng) for _ in range(50)])
    assert set(drawn[:, 0]) == {1, 3} and set(drawn[:, 1]) == {-1} and set(drawn[:, 2]) == {0}
    assert (draw_active(sp.csr_array((3, 4)), np.arange(3), rng) == -1).all()
    checked = draw_checked(matrix, rng)
    assert checked.contexts.tolist() == [0, 0] and checked.features.tolist() == [
        3,
        1,
    ]  # alone in its context: no control
    assert checked.others.tolist() == [1, 3] and checked.drawn.tolist() == [False, True]


def test_transport_is_linear_regression(linear):
    """In a linear model of single tokens a later layer is a linear map of an earlier one; of a shuffled one it is nothing."""
    targets = {i: np.array([0, 3]) for i in range(3)}
    model = linear.language_model
    single = encode_text(
        model, linear.dictionaries, collect_rows(DOCUMENTS, model.tokenizer, 1), DOCUMENTS, keep_residuals=True
    )
    found = transport_features(single, single, linear.dictionaries, targets)
    assert set(found.everywhere) == {(0, 1), (0, 2), (1, 2)}
    assert min(a.min() for a in found.everywhere.values()) > 0.999
    half = linear.sample.num_tokens // 2
    fit, held = (part(linear.sample, s) for s in (slice(0, half), slice(half, None)))
    found = transport_features(fit, held, linear.dictionaries, targets)
    for (i, j), values in found.everywhere.items():
        x, y = (np.c_[fit.residual_LND[i], np.ones(half)], fit.residual_LND[j])
        d = linear.dictionaries[j].W_dec[targets[j]].numpy().T
        weights = np.linalg.lstsq(x.astype(np.float64), y @ d, rcond=None)[0]
        told, true = np.c_[held.residual_LND[i], np.ones(len(held.ids_N))] @ weights, held.residual_LND[j] @ d
        np.testing.assert_allclose(values, 1 - ((true - told) ** 2).sum(0) / true.var(0) / len(true), atol=2e-3)
        fires = held.layers[j][:, targets[j]].toarray() > 0
        for g in range(2):
            a, b = true[fires[:, g], g], told[fires[:, g], g]
            expected = 1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum()
            assert found.firing[i, j][g] == pytest.approx(expected, abs=3e-3)


def part(codes: Codes, tokens: slice) -> Codes:
    layers = {i: matrix[tokens] for i, matrix in codes.layers.items()}
    columns = {f.name: getattr(codes, f.name)[tokens] for f in fields(codes) if f.name.endswith("_N")}
    return replace(codes, **columns, layers=layers, residual_LND=codes.residual_LND[:, tokens])


# ---- the whole


def test_flow_is_within_one_model(chain, special):
    with pytest.raises(InputError, match=r"one model, found bare and tiny"):
        Flow().compute(chain, special, seed=0, min_count=1)


def test_without_live_features_there_is_nothing(special):
    arrays = Flow().compute(special, special, seed=0, min_count=10**6)[0].arrays
    assert np.isnan(arrays["value"]).all() and (arrays["target"] == -1).all()


def test_the_seed_draws_the_controls_alone(special):
    first, again, other = (Flow().compute(special, special, seed=s, min_count=20)[0].arrays for s in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    for name in ("value", "cause", "matched_drop", "cosine_drop", "edge_estimate", "transport_r2"):
        np.testing.assert_allclose(first[name], other[name], atol=1e-5)  # in batches of other companions
    assert all((first[name] != other[name]).any() for name in ("null", "drawn_rank_correlation"))


def test_a_trained_model():
    """zoo/gpt2 with small dictionaries trained for the purpose: estimates rank what the model does, and causes beat chance."""
    model = open_model(ModelSpec(path="zoo/gpt2"))
    documents = list(islice(sample_problems("train", 0), 900))
    plain = {layer: random_dictionary(model.d_model, 1, k=1) for layer in (1, 2)}
    x_LND = read(model, plain, documents).sample.residual_LND
    trained = throughline.train(
        activations=x_LND, dictionary={"d_sae": 96, "k": 8}, training={"batch_tokens": 64, "epochs": 2}
    )
    side = read(
        model, dict(zip(plain, trained.values(), strict=True)), list(islice(sample_problems("heldout", 0), 120))
    )
    arrays = {name: array[0, 1] for name, array in Flow().compute(side, side, seed=0, min_count=20)[0].arrays.items()}
    assert arrays["n"] >= 20 and arrays["num_checked"] > 100
    assert arrays["rank_correlation"] > 0.8 and arrays["pearson"] > 0.8 and arrays["drawn_rank_correlation"] > 0.7
    assert arrays["rank_correlation"] > arrays["twera_rank_correlation"] > arrays["null_rank_correlation"] + 0.2
    assert arrays["low"] > arrays["random_high"]
    assert arrays["value"] > arrays["cosine_drop"] > arrays["null"] and arrays["matched_drop"] > arrays["null"]
