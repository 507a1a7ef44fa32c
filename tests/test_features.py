"""Codes and features: packed text read as if alone and in order; statistics by loops; contexts that show what they claim."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch

from builders import CONTEXT, WORDS, make_codes, random_dictionary, random_documents, tiny_model, word_pieces
from throughline.codes import Codes, encode_text
from throughline.features import QUANTILES, describe_features
from throughline.models import LanguageModel
from throughline.records import EXAMPLE_COLUMNS, FEATURE_COLUMNS, NUM_ROLES, PARTS, TOKEN_KINDS, Document
from throughline.tokens import TokenRows, collect_rows, encode_documents, pack

F = 12


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


# ---- codes


@torch.no_grad()
def direct(model: LanguageModel, ids: np.ndarray, layer: int) -> torch.Tensor:
    """The stream of one text alone."""
    return model.run(model.inputs(ids[None]), capture=[layer], logits=False).residuals[layer][0]


def test_codes_are_those_of_each_document_alone(model):
    short, long = (random_documents(12, seed=2, num_words=n, answers=True) for n in (3, 15))
    documents = [d for pair in zip(short, long, strict=True) for d in pair]
    dictionaries = {layer: random_dictionary(model.d_model, F, 3, seed=layer) for layer in (0, 2)}
    pieces = word_pieces(documents)
    rows = TokenRows.concatenate(list(pack(pieces, CONTEXT, 2)))
    assert (np.diff(rows.documents[rows.keep]) < 0).any()  # row by row they are out of order
    codes = encode_text(model, dictionaries, rows, documents, keep_residuals=True)
    assert codes.residual_LND is not None
    for column, (layer, one) in enumerate(dictionaries.items()):
        x_ND = torch.cat([direct(model, piece.ids, layer) for piece in pieces])
        torch.testing.assert_close(torch.from_numpy(codes.residual_LND[column]), x_ND, rtol=1e-4, atol=1e-4)
        expected = one.encode(torch.from_numpy(codes.residual_LND[column]))
        np.testing.assert_allclose(codes.layers[layer].toarray(), expected.numpy(), rtol=1e-4, atol=1e-5)
        assert (codes.columns[layer].toarray() == codes.layers[layer].toarray()).all()
    same = make_codes(documents)
    for name in ("ids_N", "documents_N", "positions_N", "starts_N", "ends_N", "kinds_N", "roles_N"):
        assert getattr(codes, name).tolist() == getattr(same, name).tolist(), name
    assert codes.token_texts == [word for d in documents for word in d.text.split()]
    assert codes.num_tokens == sum(len(piece.ids) for piece in pieces)


@pytest.mark.parametrize("keep_special_tokens", [False, True])
def test_long_documents_are_read_in_order(model, keep_special_tokens):
    documents = random_documents(6, seed=3, num_words=60) + random_documents(6, seed=4, num_words=CONTEXT)
    documents += [Document(WORDS[0])]
    rows = collect_rows(documents, model.tokenizer, CONTEXT, keep_special_tokens)
    one = random_dictionary(model.d_model, F, 3)
    codes = encode_text(model, {1: one}, rows, documents, keep_residuals=True)
    pieces = list(encode_documents(documents, model.tokenizer, CONTEXT, keep_special_tokens))
    assert len(pieces) > len(documents)
    assert codes.ids_N.tolist() == [i for p in pieces for i in p.ids[~p.special]]
    assert codes.documents_N.tolist() == [p.document for p in pieces for _ in p.ids[~p.special]]
    assert codes.residual_LND is not None
    x_ND = torch.cat([direct(model, p.ids, 1)[torch.from_numpy(~p.special)] for p in pieces])
    torch.testing.assert_close(torch.from_numpy(codes.residual_LND[0]), x_ND, rtol=1e-4, atol=1e-4)


def test_the_answers_part_begins_with_the_token_before_it():
    codes = make_codes([Document("red + blue = sky sea", answer_start=len("red + blue =")), Document("sun = moon")])
    parts = [PARTS[role // len(TOKEN_KINDS)] for role in codes.roles_N]
    assert parts == ["question"] * 3 + ["answer"] * 3 + ["question"] * 3
    assert [TOKEN_KINDS[role % len(TOKEN_KINDS)] for role in codes.roles_N[:4]] == ["word", "punctuation"] * 2


# ---- statistics


@pytest.fixture(scope="module")
def codes() -> Codes:
    """Feature 0 never fires, 1 once, 2 on every token, 3 on one word; the others at random."""
    documents = random_documents(40, seed=5, answers=True)
    texts = make_codes(documents).token_texts
    rng = np.random.default_rng(6)
    f_NF = rng.uniform(0.1, 3, (len(texts), F)) * (rng.random((len(texts), F)) < 0.15)
    f_NF[:, 0] = 0
    f_NF[:, 1] = 0
    f_NF[17, 1] = 2.5
    f_NF[:, 2] = rng.uniform(0.5, 1, len(texts))
    f_NF[:, 3] = [1.0 + i / 1000 if text == "moon" else 0 for i, text in enumerate(texts)]
    return make_codes(documents, f_NF, layer=1)


@pytest.fixture(scope="module")
def tables(model, codes) -> tuple[pl.DataFrame, pl.DataFrame]:
    return describe_features(model, {1: random_dictionary(model.d_model, F)}, codes, num_contexts=4)


def test_statistics_by_loops(codes, tables):
    features, _ = tables
    assert dict(features.schema) == FEATURE_COLUMNS and len(features) == F
    f_NF = codes.layers[1].toarray()
    for row in features.iter_rows(named=True):
        values = [float(v) for v in f_NF[:, row["feature"]]]
        active = [v for v in values if v > 0]
        assert (row["layer"], row["num_active"], row["num_tokens"]) == (1, len(active), len(values))
        assert row["density"] == pytest.approx(len(active) / len(values))
        assert row["mean_active"] == pytest.approx(sum(active) / len(active) if active else 0, rel=1e-5)
        assert row["max"] == pytest.approx(max(values))
        mass, roles = defaultdict(float), defaultdict(list)
        for value, text, role in zip(values, codes.token_texts, codes.roles_N, strict=True):
            mass[text] += value
            roles[role].append(value)
        best = sorted((text for text in mass if mass[text] > 0), key=lambda text: -mass[text])[:5]
        assert row["top_tokens"] == best
        assert row["top_token_share"] == pytest.approx(mass[best[0]] / sum(values) if best else 0, rel=1e-5)
        overall = sum(values) / len(values)
        expected = [np.mean(roles[role]) if role in roles else overall for role in range(NUM_ROLES)]
        assert row["role_means"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert features["top_tokens"].to_list()[3] == ["moon"] and features["top_token_share"].to_list()[3] == 1
    assert features["num_active"].to_list()[:3] == [0, 1, codes.num_tokens]


def test_promoted_tokens_are_what_the_decoder_row_raises(model, codes):
    one = random_dictionary(model.d_model, F)
    wanted = model.tokenizer.convert_tokens_to_ids("sky")
    W_dec = one.W_dec.clone()
    W_dec[4], W_dec[5] = model.unembedding()[wanted], -model.unembedding()[wanted]
    features, _ = describe_features(model, {1: replace(one, W_dec=W_dec)}, codes, num_contexts=1)
    assert features["promoted"].to_list()[4][0] == "sky" == features["suppressed"].to_list()[5][0]
    logits_V = model.unembedding() @ W_dec[7]
    order = logits_V.argsort(descending=True).tolist()
    assert features["promoted"].to_list()[7] == [model.tokenizer.decode([i]) for i in order[:5]]
    assert features["suppressed"].to_list()[7] == [model.tokenizer.decode([i]) for i in order[:-6:-1]]


# ---- contexts


def test_contexts_show_the_text_around_a_true_focus(codes, tables):
    _, examples = tables
    assert dict(examples.schema) == EXAMPLE_COLUMNS
    f_NF = codes.layers[1].toarray()
    for row in examples.iter_rows(named=True):
        text = [i for i, d in enumerate(codes.documents_N) if d == row["document"]]
        found = [
            i
            for i in text
            if f_NF[i, row["feature"]] == np.float32(row["value"])
            and codes.token_texts[i] == row["tokens"][row["focus"]]
        ]
        assert found, "the focus has that value in that document"
        places = [  # the window, found by its values alone, is the text before and after one of these
            range(i - row["focus"], i - row["focus"] + len(row["tokens"]))
            for i in found
            if i - row["focus"] >= text[0] and i - row["focus"] + len(row["tokens"]) <= text[-1] + 1
        ]
        assert any(
            [codes.token_texts[i] for i in place] == row["tokens"]
            and np.allclose([f_NF[i, row["feature"]] for i in place], row["values"], atol=6e-5)
            for place in places
        )
        assert row["value"] == pytest.approx(row["values"][row["focus"]], abs=6e-5)


def test_top_contexts_are_the_best_of_each_document(codes, tables):
    _, examples = tables
    f_NF = codes.layers[1].toarray()
    for feature in range(F):
        top = examples.filter((pl.col("feature") == feature) & (pl.col("stratum") == "top"))
        best = defaultdict(float)
        for document, value in zip(codes.documents_N.tolist(), f_NF[:, feature].tolist(), strict=True):
            best[document] = max(best[document], value)
        expected = sorted((v for v in best.values() if v > 0), reverse=True)[:4]
        assert top["value"].to_list() == expected
        assert top["rank"].to_list() == list(range(len(expected)))
        assert top["document"].n_unique() == len(expected)
        assert [best[d] for d in top["document"]] == expected
        assert all(a > b for a, b in pairwise(expected))
    assert examples.filter(pl.col("feature") == 0).is_empty()


def test_quantile_contexts_stand_where_they_say(codes, tables):
    _, examples = tables
    f_NF = codes.layers[1].toarray()
    for feature in range(1, F):
        active = np.sort(f_NF[:, feature][f_NF[:, feature] > 0])
        rows = examples.filter((pl.col("feature") == feature) & (pl.col("stratum") != "top"))
        assert rows["stratum"].to_list() == [f"{q:.2f}" for q in QUANTILES[:4]]
        for quantile, value in zip(QUANTILES, rows["value"], strict=False):
            lower, upper = (np.quantile(active, quantile, method=side) for side in ("lower", "higher"))
            assert lower <= np.float32(value) <= upper or value in (pytest.approx(lower), pytest.approx(upper))


def test_quantiles_of_eleven_values_are_exact(model):
    """Ten steps: every quantile is one of the values, also where (1 - 0.9) * 10 is a hair below 1."""
    documents = [Document(" ".join(WORDS[:11]))]
    codes = make_codes(documents, np.arange(1.0, 12.0)[:, None], layer=1)
    _, examples = describe_features(model, {1: random_dictionary(model.d_model, 1)}, codes, num_contexts=5)
    rows = examples.filter(pl.col("stratum") != "top")
    assert dict(zip(rows["stratum"], rows["value"], strict=True)) == {
        "0.90": 10.0,
        "0.70": 8.0,
        "0.50": 6.0,
        "0.30": 4.0,
        "0.10": 2.0,
    }


def test_windows_stay_within_their_document(model):
    texts = (WORDS[:4], (WORDS * 2)[:18], (WORDS * 2)[6:], WORDS[4:8])
    f_N1 = np.zeros((44, 1))
    f_N1[[0, 3, 4, 24, 39, 43], 0] = [6, 5, 4, 3, 2, 1]
    codes = make_codes([Document(" ".join(words)) for words in texts], f_N1, layer=1)
    _, examples = describe_features(model, {1: random_dictionary(model.d_model, 1)}, codes, num_contexts=6)
    for row in examples.filter(pl.col("stratum") == "top").iter_rows(named=True):
        assert " ".join(row["tokens"]) in codes.documents[row["document"]].text
        assert row["focus"] <= 12 and len(row["tokens"]) - row["focus"] - 1 <= 6
