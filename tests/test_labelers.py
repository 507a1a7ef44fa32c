"""Labels: planted facts are found, scores are those of counting on text that chose nothing, baselines are real."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

import oracles
from builders import make_codes, marked, random_documents
from throughline.labelers import LayerText, concepts, scoring, vocabulary
from throughline.labelers.choosing import MIN_MASS, choose_predicates
from throughline.labelers.concepts import Concepts
from throughline.labelers.scoring import NEURON_QUANTILES, THRESHOLDS, active_above, maxima_of
from throughline.labelers.tokens import Tokens
from throughline.records import LABEL_COLUMNS, TOKEN_KINDS, Document, Fact, best_labels
from throughline.registry import LABELERS
from throughline.study import ASKING

D = 5
FREE = [name for name in LABELERS.names() if name != ASKING]  # test_llm.py has the laws of the one that asks
MEASURED = [name for name in LABEL_COLUMNS if name not in ("balanced_accuracy", "fuzzing")]  # of tokens
Make = Callable[[np.ndarray, list[str], np.random.Generator], np.ndarray]


def layer_text(seed: int, make: Make, num_documents: int = 60, untrained: Make | None = None) -> LayerText:
    """A text whose features `make` gives from where `mark` holds and the tokens."""
    documents = random_documents(num_documents, seed)
    rng = np.random.default_rng(seed + 1000)
    bare = make_codes(documents)
    on, texts = marked(bare), bare.token_texts
    f_NF = make(on, texts, rng)
    codes = make_codes(documents, f_NF, layer=3)
    u_NF = (untrained or (lambda *_: rng.random((len(texts), 4)) * (rng.random((len(texts), 4)) < 0.3)))(on, texts, rng)
    residual_ND = rng.normal(size=(len(texts), D)).astype(np.float32)
    return LayerText(codes, 3, codes.layers[3], sp.csr_array(u_NF.astype(np.float32)), residual_ND)


def both(make: Make, **options) -> tuple[LayerText, LayerText]:
    return layer_text(1, make, **options), layer_text(2, make, **options)


def row_of(table: pl.DataFrame, feature: int) -> dict:
    return table.row(by_predicate=pl.col("feature") == feature, named=True)


SIMPLE = re.compile(r"mark = 1|mark|start of text|[a-z]+ token|(token|after|before) '[^']*'")  # what `holds` can read


def holds(label: str, text: LayerText) -> list[bool]:
    """Where a label is true, token by token."""
    codes = text.codes
    texts, documents = codes.token_texts, codes.documents_N.tolist()
    N = len(texts)
    if label in ("mark = 1", "mark = 1, no operation asked"):
        return marked(codes).tolist()
    if label == "mark":  # only in texts that have it once
        return [bool(on) and len(codes.documents[d].facts) == 1 for on, d in zip(marked(codes), documents, strict=True)]
    if label == "start of text":
        return [i == 0 or documents[i] != documents[i - 1] for i in range(N)]
    if label.removesuffix(" token") in TOKEN_KINDS:
        return [TOKEN_KINDS[kind] == label.removesuffix(" token") for kind in codes.kinds_N]
    if label.startswith("tokens "):
        return [repr(t) in label.removeprefix("tokens ").split(", ") for t in texts]
    way, _, word = label.partition(" ")
    step = {"token": 0, "after": -1, "before": 1}[way]
    near = [i + step if 0 <= i + step < N and documents[i + step] == documents[i] else None for i in range(N)]
    return [j is not None and repr(texts[j]) == word for j in near]


def strong_on_mark(on, texts, rng):
    """0: exactly on the mark. 1: on most of the mark and on some other tokens. 2: never. 3: on "sky" and "sea"."""
    f_NF = np.zeros((len(on), 4))
    f_NF[:, 0] = on * rng.uniform(1, 2, len(on))
    f_NF[:, 1] = ((on & (rng.random(len(on)) < 0.8)) | (~on & (rng.random(len(on)) < 0.03))) * 1.0
    f_NF[:, 3] = [float(text in ("sky", "sea")) for text in texts]
    return f_NF


# ---- concepts


def test_planted_fact_is_found():
    table = Concepts().label(*both(strong_on_mark))
    row = row_of(table, 0)
    assert row["label"] == "mark = 1"
    assert (row["f1"], row["precision"], row["recall"]) == (1, 1, 1)
    assert max(row["neuron_f1"], row["untrained_f1"]) < 0.6
    assert row_of(table, 1)["label"] == "mark = 1" and 0.7 < row_of(table, 1)["f1"] < 0.95
    assert 2 not in table["feature"]  # it never fires


@pytest.mark.parametrize("labeler", [Concepts, Tokens])
def test_every_score_is_by_counting_on_heldout_text(labeler):
    def make(on, texts, rng):
        more = rng.uniform(0, 3, (len(on), 8)) * (rng.random((len(on), 8)) < 0.3)
        more[:, 0] += on * rng.uniform(0, 2, len(on))
        return np.hstack([strong_on_mark(on, texts, rng), more])

    selection, heldout = both(make)
    table = labeler().label(selection, heldout)
    assert len(table) == 11
    f_NF = heldout.features.toarray()
    _, held = concepts.find_concepts(selection.codes, heldout.codes)
    for row in table.iter_rows(named=True):
        said = [float(v) > row["threshold"] for v in f_NF[:, row["feature"]]]
        if labeler is Tokens or SIMPLE.fullmatch(row["label"]):
            true = holds(row["label"], heldout)
        else:  # of what it says tests/test_concepts.py knows
            true = held.truths(np.array([held.words.index(row["label"])])).toarray()[:, 0].tolist()
        precision, recall, f1 = oracles.precision_recall_f1(said, true)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1)), row["label"]
        assert (row["num_positive"], row["num_tokens"]) == (sum(true), len(true))
        rate = sum(true) / len(true)
        assert row["base_f1"] == pytest.approx(2 * rate / (1 + rate))
        assert row["base_f1"] == pytest.approx(oracles.precision_recall_f1([True] * len(true), true)[2])


def test_choice_is_the_best_there_is():
    selection, heldout = both(strong_on_mark)
    select, held = concepts.find_concepts(selection.codes, heldout.codes)
    simple = np.array([c for c, word in enumerate(select.words) if SIMPLE.fullmatch(word)])
    words = [select.words[c] for c in simple]
    assert len(words) > 40
    for text, truth in ((selection, select.truths(simple)), (heldout, held.truths(simple))):
        for column, word in enumerate(words):
            assert truth.toarray()[:, column].astype(bool).tolist() == holds(word, text), word
    f_NF = selection.features.toarray()
    maxima = maxima_of(selection.features)
    choice, _ = choose_predicates(selection.features, select.select(simple), maxima)
    for feature in (0, 1, 3):
        scores = {
            (column, share): oracles.precision_recall_f1(
                f_NF[:, feature] > np.float32(share * maxima[feature]), holds(word, selection)
            )[2]
            for column, word in enumerate(words)
            for share in THRESHOLDS
            if f_NF[f_NF[:, feature] > np.float32(share * maxima[feature]), feature].sum()
            >= MIN_MASS * f_NF[:, feature].sum()
        }
        chosen = (int(choice.predicate[feature]), float(choice.threshold[feature]))
        assert scores[chosen] == pytest.approx(max(scores.values()))


def test_label_speaks_above_its_threshold():
    """Faint everywhere, strong on the mark: the threshold must lie between."""

    def make(on, texts, rng):
        faint = rng.uniform(0.1, 1.5, len(on)) * (rng.random(len(on)) < 0.7)
        return np.where(on, rng.uniform(4, 5, len(on)), faint)[:, None]

    row = row_of(Concepts().label(*both(make)), 0)
    assert row["label"] == "mark = 1" and row["f1"] == 1
    assert 1.5 < row["threshold"] < 4


def test_overfitting_the_selection_text_does_not_pay():
    selection = layer_text(1, lambda on, texts, rng: on[:, None] * 1.0)
    heldout = layer_text(2, lambda on, texts, rng: (rng.random((len(on), 1)) < on.mean()) * 1.0)
    row = row_of(Concepts().label(selection, heldout), 0)
    assert row["label"] == "mark = 1"
    assert row["f1"] < 0.4
    swapped = row_of(Concepts().label(selection, selection), 0)
    assert swapped["f1"] == 1


def test_one_labeler_serves_other_texts_too():
    first, second = both(strong_on_mark)
    third = layer_text(7, strong_on_mark, num_documents=30)
    labeler = Concepts()
    labeler.label(first, second)
    assert labeler.label(first, third).equals(Concepts().label(first, third))
    assert labeler.label(third, second).equals(Concepts().label(third, second))


def test_facts_become_predicates(monkeypatch):
    """A fact holds where it overlaps; a name stands for itself where a text has it once; texts have kinds."""
    monkeypatch.setattr(vocabulary, "_first_of_equals", lambda found: np.arange(len(found.words)))
    document = Document(
        "7 + 42 = 7", facts=(Fact("digit", 7, 0, 1), Fact("digit", 42, 4, 6), Fact("carry", False, 2, 6)), kind="sum"
    )
    other = Document("red sun", kind="words")
    codes = make_codes([document, other] * 12)
    select, _ = concepts.find_concepts(codes, codes)
    truths_NC = select.truths(np.arange(len(select.words))).tocsc()
    found = {
        word: np.sort(truths_NC.indices[slice(*truths_NC.indptr[c : c + 2])]).tolist()
        for c, word in enumerate(select.words)
    }
    starts = [7 * i for i in range(12)]
    assert found["digit = 7"] == starts
    assert found["digit = 42"] == [s + 2 for s in starts]
    assert "digit" not in found  # twice in a text
    assert found["carry = no"] == [s + i for s in starts for i in (1, 2)] == found["carry"]
    assert not any(word.startswith("carry = no, at number 2") for word in found)  # it is never otherwise there
    assert found["text of kind 'words'"] == [s + i for s in starts for i in (5, 6)]
    assert found["number token"] == [s + i for s in starts for i in (0, 2, 4)]
    assert found["after '='"] == [s + 4 for s in starts]
    assert found["before '='"] == [s + 2 for s in starts]
    assert found["start of text"] == sorted(s + i for s in starts for i in (0, 5))


# ---- baselines


def test_planted_neuron_is_found():
    selection, heldout = both(strong_on_mark)
    for sign in (1, -1):
        texts = []
        for text in (selection, heldout):
            x_ND = text.residual_ND.copy()
            x_ND[:, 2] = sign * marked(text.codes)
            texts.append(replace(text, residual_ND=x_ND))
        row = row_of(Concepts().label(*texts), 0)
        assert row["label"] == "mark = 1" and row["neuron_f1"] == pytest.approx(1)


def test_neuron_that_fits_by_chance_is_scored_on_heldout_text():
    selection, heldout = both(strong_on_mark)
    x_ND = selection.residual_ND.copy()
    x_ND[:, 2] = marked(selection.codes)
    row = row_of(Concepts().label(replace(selection, residual_ND=x_ND), heldout), 0)
    assert row["neuron_f1"] < 0.5


def test_planted_untrained_feature_is_found():
    table = Concepts().label(*both(strong_on_mark, untrained=strong_on_mark))
    assert row_of(table, 0)["untrained_f1"] == 1


def test_baselines_are_the_oracles():
    selection, heldout = both(strong_on_mark, num_documents=25)
    select, held = concepts.find_concepts(selection.codes, heldout.codes)
    simple = np.array([c for c, word in enumerate(select.words) if SIMPLE.fullmatch(word)])
    words, select_NC, held_NC = [select.words[c] for c in simple], select.truths(simple), held.truths(simple)
    found = scoring.measure_baselines(selection, heldout, select_NC, held_NC)
    maxima = selection.untrained.toarray().max(0)
    for column, word in enumerate(words[:12]):
        true, held_true = holds(word, selection), holds(word, heldout)
        neuron = best_of(
            (
                (sign * selection.residual_ND[:, d] > level, sign * heldout.residual_ND[:, d] > level)
                for sign in (1, -1)
                for q in NEURON_QUANTILES
                for d in range(D)
                for level in [np.quantile(sign * selection.residual_ND[:, d], q)]
            ),
            true,
            held_true,
        )
        untrained = best_of(
            (
                tuple(t.untrained.toarray()[:, u] > share * maxima[u] for t in (selection, heldout))
                for share in THRESHOLDS
                for u in range(4)
            ),
            true,
            held_true,
        )
        assert found.neuron[column] == pytest.approx(neuron), word
        assert found.untrained[column] == pytest.approx(untrained), word


def best_of(ways, true, held_true) -> float:
    """Held-out F1 of the way that is best on the selection text, the first of equals."""
    best, scored = -1.0, 0.0
    for said, held_said in ways:
        score = oracles.precision_recall_f1(said, true)[2]
        if score > best + 1e-12:
            best, scored = score, oracles.precision_recall_f1(held_said, held_true)[2]
    return scored


# ---- tokens


def test_planted_token_set_is_found():
    table = Tokens().label(*both(strong_on_mark))
    row = row_of(table, 3)
    assert sorted(row["label"].removeprefix("tokens ").split(", ")) == ["'sea'", "'sky'"]
    assert (row["f1"], row["threshold"]) == (1, 0)


def test_tokens_of_one_text_only_do_no_harm():
    """A word that only one of the texts has: the set is chosen without it, and its tokens count as wrong."""

    def make(on, texts, rng):
        return np.array([[float(text in ("sky", "+"))] for text in texts])

    selection = layer_text(1, lambda on, texts, rng: np.array([[float(text == "sky")] for text in texts]))
    heldout = layer_text(2, make)
    row = row_of(Tokens().label(selection, heldout), 0)
    assert row["label"] == "tokens 'sky'"
    assert row["recall"] == 1 and 0.3 < row["precision"] < 0.7


# ---- thresholds


def test_active_is_above_the_threshold_not_at_it():
    features = sp.csr_array(np.array([[5, 0], [1, 3], [1.01, 0.6]], dtype=np.float32))
    active = active_above(features, 0.2, maxima_of(features)).toarray()
    assert active.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_active_above_leaves_its_input_alone():
    features = layer_text(1, strong_on_mark).features
    before = features.copy()
    dense = features.toarray()
    maxima = maxima_of(features)
    for share in THRESHOLDS:
        above = active_above(features, share, maxima)
        assert (above.toarray() == (dense > np.float32(share) * maxima)).all()
        above.data[:] = 7
        above.indices[:] = 0
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(features, name), getattr(before, name)), name


# ---- contract


@pytest.mark.parametrize("name", FREE)
def test_every_labeler(name):
    selection, heldout = both(strong_on_mark)
    labeler = LABELERS.load(name)()
    assert labeler.name == name
    before = [part.copy() for text in (selection, heldout) for part in (text.features.data, text.residual_ND)]
    table = labeler.label(selection, heldout)
    assert dict(table.schema) == LABEL_COLUMNS
    assert table["feature"].is_unique().all() and set(table["feature"]) == {0, 1, 3}
    assert set(table["layer"]) == {3} and set(table["source"]) == {name}
    assert table.select(MEASURED).null_count().sum_horizontal().item() == 0
    assert set(table["measure"]) == {"tokens"}
    for column in ("f1", "precision", "recall", "base_f1", "neuron_f1", "untrained_f1"):
        assert table[column].is_between(0, 1).all(), column
    assert (table["threshold"] >= 0).all() and (table["label"].str.len_chars() > 0).all()
    assert (table["num_positive"] <= table["num_tokens"]).all()
    assert labeler.label(selection, heldout).equals(table)
    after = [part for text in (selection, heldout) for part in (text.features.data, text.residual_ND)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", FREE)
def test_nothing_active_gives_no_labels(name):
    texts = both(lambda on, texts, rng: np.zeros((len(on), 3)))
    table = LABELERS.load(name)().label(*texts)
    assert table.is_empty() and dict(table.schema) == LABEL_COLUMNS


def test_best_labels_reach_the_bar():
    texts = both(strong_on_mark)
    table = pl.concat([Concepts().label(*texts), Tokens().label(*texts)])
    best = best_labels(table, 0.9)
    assert dict(zip(best["feature"], best["source"], strict=True)) == {0: "concepts", 3: "tokens"}
    assert best_labels(table, 0.0)["feature"].to_list() == [0, 1, 3]
