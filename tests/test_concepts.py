"""The vocabulary of concepts: what it says of a token is what a reader would say, in any text; user predicates; coverage."""

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

import oracles
from builders import make_codes
from throughline.errors import InputError
from throughline.labelers import LayerText
from throughline.labelers.choosing import CAUTION, MIN_MASS, choose_predicates, lowest_f1
from throughline.labelers.concepts import Concepts, find_concepts
from throughline.labelers.lexical import add_classes
from throughline.labelers.numbers import digit_sets, read_numbers, sum_sets, value_sets
from throughline.labelers.scoring import THRESHOLDS, maxima_of
from throughline.labelers.viewing import View
from throughline.labelers.vocabulary import FAMILIES, NOWHERE, Builder, Places, Predicates, ValueSet
from throughline.records import COVERAGE_COLUMNS, FAMILY_COLUMNS, Document, best_of_families


@pytest.fixture(autouse=True)
def _any_word(monkeypatch):
    """Codes of texts of any words: builders number only a dozen."""
    import builders

    monkeypatch.setattr(builders, "WORDS", _AnyWord())


class _AnyWord:
    def index(self, word: str) -> int:
        return sum(map(ord, word)) % 1000


def sums(num: int, seed: int, form: str = "{a} + {b} = {c}") -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num):
        a, b = (int(v) for v in rng.integers(10, 50, 2))
        text = form.format(a=a, b=b, c=a + b)
        documents.append(Document(text, answer_start=text.rindex(" ")))
    return documents


def truth_of(predicates: Predicates, words: str) -> np.ndarray:
    return predicates.truths(np.array([predicates.words.index(words)])).toarray()[:, 0].astype(bool)


def told(codes, test) -> list[bool]:
    """`test(tokens of the document, place of the token in it)` for each token."""
    return [
        bool(test(document.text.split(), i)) for document in codes.documents for i in range(len(document.text.split()))
    ]


@pytest.fixture
def equals_too(monkeypatch):
    """Keeps predicates that hold on the same tokens as another, so that each can be looked at."""
    monkeypatch.setattr("throughline.labelers.vocabulary._first_of_equals", lambda found: np.arange(len(found.words)))


@pytest.mark.usefixtures("equals_too")
@pytest.mark.parametrize(
    ("words", "test"),
    [
        ("units of both numbers sum = 12, at the end of the prompt", lambda t, i: i == 3 and _units(t) == 12),
        ("units of both numbers carry, at number 2", lambda t, i: i == 2 and _units(t) >= 10),
        ("units of the last number in 7-9", lambda t, i: t[i if t[i].isdigit() else i - 1][-1] in "789"),
        ("units of the last number odd, at number 1", lambda t, i: i == 0 and int(t[0]) % 2),
        ("tens of both numbers sum in 5,6, at number 2", lambda t, i: i == 2 and int(t[0][0]) + int(t[2][0]) in (5, 6)),
        ("sum in 60-69, at the end of the prompt", lambda t, i: i == 3 and 60 <= int(t[4]) < 70),
        ("the answer mod 3 = 1, at the end of the prompt", lambda t, i: i == 3 and int(t[4]) % 3 == 1),
        ("the number before is larger than the last, at number 2", lambda t, i: i == 2 and int(t[0]) > int(t[2])),
        ("token, at '+' after number 1", lambda t, i: i == 1),
        ("token number 2 of the text", lambda t, i: i == 1),
        ("token number 4 of the text or later", lambda t, i: i >= 3),
        ("two digits", lambda t, i: len(t[i]) == 2),
        ("the last number in 21-27", lambda t, i: 21 <= int(t[i if t[i].isdigit() else i - 1]) < 28),
    ],
)
def test_numbers_of_any_text(words, test):
    """No facts: what is said is read off the text."""
    codes = make_codes(sums(300, 0))
    found, held = find_concepts(codes, make_codes(sums(200, 1)))
    assert truth_of(found, words).tolist() == told(codes, test)
    assert 10 <= truth_of(found, words).sum() < 0.9 * codes.num_tokens
    assert truth_of(held, words).tolist() == told(make_codes(sums(200, 1)), test)


def _units(tokens: list[str]) -> int:
    return int(tokens[0][-1]) + int(tokens[2][-1])


@pytest.mark.usefixtures("equals_too")
def test_words_of_any_text():
    texts = ["Ann's cat — it sat .", 'THE long internationalisation ( "x" ) , $5'] * 12
    codes = make_codes([Document(t) for t in texts])
    found, _ = find_concepts(codes, codes)
    expected = {
        "capitalised word": {"Ann's", "THE"},
        "word in capitals": {"THE"},
        "long word (8 letters or more)": {"internationalisation"},
        "short word (1 to 3 letters)": {"cat", "it", "sat", "THE"},
        "quotation mark": {'"x"'},
        "bracket": {"(", ")"},
        "hyphen or dash": {"—"},
        "comma, colon or semicolon": {","},
        "end of a sentence": {"."},
        "apostrophe": {"Ann's"},
        "currency or math sign": {"$5"},
    }
    for word, tokens in expected.items():
        assert {codes.token_texts[n] for n in np.flatnonzero(truth_of(found, word))} == tokens, word


def test_words_go_on():
    document = Document("sun+42moons")
    ends = np.array([2, 3, 4, 5, 6, 9, 11])
    view = View([document], ["su", "n", "+", "4", "2", "moo", "ns"], np.zeros(7, int), np.arange(7),
                np.r_[0, ends[:-1]], ends, np.array([1, 1, 2, 0, 0, 1, 1]))  # fmt: skip
    builder = Builder(7, lambda cells, unions: np.ones(unions.shape[1], dtype=bool))
    add_classes(builder, view)
    found = builder.build()
    assert truth_of(found, "begins a word").tolist() == [True, False, False, False, False, False, False]
    assert truth_of(found, "continues a word").tolist() == [False, True, False, False, False, True, True]


def test_digit_tokens_have_places():
    """A model with one token a digit: the units digit's token knows the number, the tens digit's only that digit."""
    document = Document("15+27=42", answer_start=6)
    spans = np.array([(i, i + 1) for i in range(8)])
    kinds = np.array([0, 0, 2, 0, 0, 2, 0, 0])
    view = View([document], list(document.text), np.zeros(8, int), np.arange(8), spans[:, 0], spans[:, 1], kinds)
    found = read_numbers(view)
    assert found.last_N.tolist() == [NOWHERE, 15, 15, 15, 27, 27, 27, 42]
    assert found.previous_N.tolist() == [NOWHERE] * 4 + [15, 15, 15, 27]
    assert found.digit_N.tolist() == [1, 5, NOWHERE, 2, 7, NOWHERE, 4, 2]
    assert found.answer_N.tolist() == [NOWHERE] * 4 + [42] * 4
    division, phrases = found.places.divisions[2]
    assert [phrases[division[p]] for p in found.places.fine_N] == [
        ", at the tens of number 1",
        ", at the units of number 1",
        ", at '+' after number 1",
        ", at the tens of number 2",
        ", at the units of number 2",
        ", at the end of the prompt",
        ", at the tens of the answer",
        ", at the units of the answer",
    ]


@pytest.mark.parametrize("sets", [list(digit_sets()), list(sum_sets()), list(value_sets(np.arange(0, 200)))])
def test_sets_hold_what_they_say(sets):
    """Read back from the words alone."""
    assert len({s.words for s in sets}) == len(sets)
    for said, values in sets:
        bounds = [int(n) for n in re.findall(r"\d+", said)]
        every = range(10) if sets[0].words == "= 0" and len(sets) < 80 else range(19) if len(sets) < 200 else range(200)
        if said.startswith("= ") or (said.startswith("in ") and "," in said):
            right = set(bounds)
        elif said.startswith("in "):
            right = set(range(bounds[0], bounds[1] + 1))
        elif said.startswith("mod "):
            right = {v for v in every if v % bounds[0] == bounds[1]}
        elif said[0] in "≥≤<":
            right = {v for v in every if (v >= bounds[0] if said[0] == "≥" else v < bounds[0] + (said[0] == "≤"))}
        elif said in ("odd", "even"):
            right = {v for v in every if v % 2 == (said == "odd")}
        else:
            right = {v for v in every if len(str(v)) == bounds[0]}
        assert set(map(int, values)) & set(every) == right & set(every), said


def test_no_predicate_that_its_place_alone_would_be():
    """At a place a set with most of its values is left out, its rare complement is kept."""
    found, _ = find_concepts(*(make_codes(sums(300, s)) for s in (0, 1)))
    assert "units of both numbers sum ≥ 14, at number 2" in found.words
    assert "units of both numbers sum ≤ 13, at number 2" not in found.words


# ---- cells


def test_unions_count_as_their_truths_do():
    found, _ = find_concepts(make_codes(sums(60, 0)), make_codes(sums(60, 1)))
    rng = np.random.default_rng(0)
    active = sp.csr_array((rng.random((found.cells_NA.shape[0], 4)) < 0.3).astype(np.float32))
    truths_NC = found.truths(np.arange(len(found.words))).toarray()
    assert set(np.unique(truths_NC)) == {0, 1}  # no token is in two cells of a predicate
    assert np.array_equal(found.overlap(active), active.toarray().T @ truths_NC)
    assert np.array_equal(found.count(), truths_NC.sum(0))


def test_equal_predicates_are_named_once():
    builder = Builder(40, lambda cells, unions: np.ones(unions.shape[1], dtype=bool))
    on = np.arange(0, 40, 2)
    builder.add_truths({"first": on, "second": on, "third": on + 1})
    builder.add("value", np.arange(40) % 2, [ValueSet("= 0", [0]), ValueSet("= 1", [1])], Places.everywhere(40))
    assert builder.build().words == ["first", "third"]


# ---- choosing


def layer_text(documents, features, untrained=None, layer=2):
    codes = make_codes(documents, features, layer)
    residual_ND = np.random.default_rng(len(documents)).normal(size=(codes.num_tokens, 3)).astype(np.float32)
    blank = np.zeros((codes.num_tokens, 2)) if untrained is None else untrained
    return LayerText(codes, layer, codes.layers[layer], sp.csr_array(blank.astype(np.float32)), residual_ND)


def carrying(documents) -> np.ndarray:
    """Feature 0: carry at the second number. 1: sum in 60-69 at '='. 2: the units sum is 12 there. 3: noise."""
    rng = np.random.default_rng(len(documents))
    rows = []
    for document in documents:
        t = document.text.split()
        for i in range(5):
            at = i == 3
            rows.append(
                [i == 2 and _units(t) >= 10, at and 60 <= int(t[4]) < 70, at and _units(t) == 12, rng.random() < 0.2]
            )
    return np.array(rows) * rng.uniform(1, 2, (len(rows), 4))


def test_planted_number_concepts_are_named():
    selection, heldout = (layer_text(d, carrying(d)) for d in (sums(400, 0), sums(300, 1)))
    labels = Concepts().label(selection, heldout)
    assert labels["label"].to_list()[:3] == [
        "units of both numbers carry, at number 2",
        "tens of the answer = 6, at the end of the prompt",
        "units of both numbers sum = 12, at the end of the prompt",
    ]
    assert labels["f1"].to_list()[:3] == [1, 1, 1]
    assert labels["f1"][3] < 0.5


def test_search_finds_what_trying_all_finds():
    documents = sums(80, 3)
    rng = np.random.default_rng(5)
    f_NF = np.hstack([carrying(documents), rng.exponential(size=(400, 3)) * (rng.random((400, 3)) < 0.3)])
    text = layer_text(documents, f_NF)
    found, _ = find_concepts(text.codes, text.codes)
    maxima, dense = maxima_of(text.features), text.features.toarray()
    truths_NC = found.truths(np.arange(len(found.words))).toarray()
    scores = np.full((7, len(THRESHOLDS), len(found.words)), -1.0)
    for f in range(7):
        for i, share in enumerate(THRESHOLDS):
            on = dense[:, f] > np.float32(share) * maxima[f]
            if dense[on, f].sum() >= MIN_MASS * dense[:, f].sum():
                scores[f, i] = [
                    lowest_f1(t, on.sum(), c) for t, c in zip(on @ truths_NC, truths_NC.sum(0), strict=True)
                ]
    by_feature, by_family = choose_predicates(text.features, found, maxima)
    assert by_feature.low == pytest.approx(scores.max((1, 2)))
    for f in range(7):
        assert scores[f, THRESHOLDS.index(by_feature.threshold[f]), by_feature.predicate[f]] == by_feature.low[f]
    for g in range(len(FAMILIES)):
        mine = scores[:, :, found.families_C == g]
        assert by_family.low[g] == pytest.approx(mine.max() if mine.size else -1)
        assert mine.size == 0 or found.families_C[by_family.predicate[g]] == g


@pytest.mark.parametrize(
    ("together", "num_active", "num_positive"), [(0, 5, 9), (3, 5, 4), (8, 10, 9), (200, 210, 205)]
)
def test_lowest_f1_is_wilsons_bound(together, num_active, num_positive):
    """The share J at which what was counted lies CAUTION standard deviations above what is expected; F1 = 2 J / (1 + J)."""
    low, either = lowest_f1(together, num_active, num_positive), num_active + num_positive - together
    share = low / (2 - low)
    assert together / either - share == pytest.approx(CAUTION * np.sqrt(share * (1 - share) / either))
    assert low <= 2 * together / (num_active + num_positive)


def test_many_tokens_outweigh_a_lucky_few():
    """Of a family the feature that has 390 tokens of 400 right is named, not the one with ten of ten."""
    truths_NC = np.zeros((1000, 2), dtype=np.float32)
    truths_NC[:10, 0], truths_NC[100:500, 1] = 1, 1
    f_NF = truths_NC.copy()
    f_NF[100:110, 1] = 0
    found = replace(Predicates.of(["few", "many"], sp.csr_array(truths_NC)), families_C=np.zeros(2, dtype=int))
    features = sp.csr_array(f_NF)
    by_feature, by_family = choose_predicates(features, found, maxima_of(features))
    assert by_feature.predicate.tolist() == [0, 1]
    assert by_family.predicate[0] == by_family.feature[0] == 1


def test_a_label_speaks_for_most_of_what_a_feature_does():
    """Highest on one kind of token, but most of its activation is elsewhere: the peak is no label of it."""
    documents = sums(200, 0)
    faint = np.array(
        [[1.0 if i in (0, 2) else 9 if i == 1 and n % 10 == 0 else 0] for n in range(200) for i in range(5)]
    )
    text = layer_text(documents, faint)
    [row] = Concepts().label(text, text).to_dicts()
    assert row["threshold"] == 0
    found, _ = find_concepts(text.codes, text.codes)
    truth = truth_of(found, row["label"])
    assert row["f1"] == pytest.approx(oracles.precision_recall_f1((faint[:, 0] > 0).tolist(), truth.tolist())[2])


# ---- coverage


def test_coverage_of_a_known_dictionary():
    """Three of four features have a name; of two untrained ones neither has; swapped, the shares are swapped."""
    rng = np.random.default_rng(0)
    texts = []
    for documents in (sums(400, 0), sums(300, 1)):
        noise = rng.random((5 * len(documents), 2)) * (rng.random((5 * len(documents), 2)) < 0.2)
        texts.append(layer_text(documents, carrying(documents), noise))
    coverage, families = Concepts().cover(*texts)
    assert dict(coverage.schema) == COVERAGE_COLUMNS and dict(families.schema) == FAMILY_COLUMNS
    trained, untrained = coverage.to_dicts()
    assert trained == {"layer": 2, "dictionary": "trained", "num_live": 4, "over_07": 0.75, "over_09": 0.75,
                       "num_labels": 3, "num_tokens": 1500}  # fmt: skip
    assert (untrained["num_live"], untrained["over_07"], untrained["num_labels"]) == (2, 0, 0)
    best = {row["family"]: row for row in families.to_dicts()}
    assert set(best) == {"units", "tens", "carry", "sum"}
    assert (best["carry"]["feature"], best["carry"]["f1"]) == (0, 1)
    assert (best["sum"]["feature"], best["sum"]["label"]) == (1, "sum in 60-69, at the end of the prompt")
    assert best["units"]["f1"] == 1 and best["carry"]["neuron_f1"] < 0.5
    swapped = [replace(t, features=t.untrained, untrained=t.features) for t in texts]
    coverage, _ = Concepts().cover(*swapped)
    assert coverage["over_07"].to_list() == [0, 0.75]


def test_best_layer_of_a_family_owes_nothing_to_the_heldout_text():
    common = {"family": "sum", "feature": 1, "num_positive": 9, "base_f1": 0.1, "neuron_f1": 0.2, "untrained_f1": 0.3}
    rows = [
        {"layer": 0, "label": "a", "selection_f1": 0.9, "f1": 0.5, **common},
        {"layer": 1, "label": "b", "selection_f1": 0.8, "f1": 0.7, **common},
    ]
    assert best_of_families(pl.DataFrame(rows, schema=FAMILY_COLUMNS))["label"].to_list() == ["a"]


# ---- user predicates


def shouted(document, spans):
    """Spans of characters, and truths by token."""
    return {
        "after a plus": [(m.end() + 1, m.end() + 2) for m in re.finditer(r"\+", document.text)],
        "third of three": [i % 3 == 2 for i in range(len(spans))],
    }


@pytest.mark.usefixtures("equals_too")
def test_user_predicates_name_features():
    documents = sums(200, 0), sums(200, 1)
    texts = [
        layer_text(d, np.array([[i == 2 and n % 2, i == 2] for n in range(200) for i in range(5)]) * 1.0)
        for d in documents
    ]
    labels = Concepts([f"{__name__}:shouted"]).label(*texts)
    assert (
        labels["label"].to_list()[1] == "after a plus"
    )  # equal to others of the vocabulary; the user's words come first
    found, _ = find_concepts(texts[0].codes, texts[1].codes, [("shouted", shouted)])
    assert truth_of(found, "third of three").tolist() == [i == 2 for _ in range(200) for i in range(5)]


WRONG = {
    "no dict": lambda document, spans: [True],
    "too short": lambda document, spans: {"x": [True] * (len(spans) - 1)},
    "mixed": lambda document, spans: {"x": [(0, 1), True]},
    "text": lambda document, spans: {"x": "yes"},
    "failing": lambda document, spans: {}[document],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_user_predicates_are_named(name):
    codes = make_codes(sums(20, 0))
    with pytest.raises(InputError, match=r"features\.predicates: mine:it") as error:
        find_concepts(codes, codes, [("mine:it", WRONG[name])])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nobody:it", "predicate 'nobody:it' cannot be loaded"),
        ("json:nothing", "cannot be loaded from json:nothing"),
        ("it", "predicate 'it' is unknown"),
        ("string:digits", "string:digits should be a function, found str"),
    ],
)
def test_missing_user_predicates_are_named(path, words):
    assert json  # the module that one of the paths names
    with pytest.raises(InputError, match=re.escape(words)):
        Concepts([path])
