"""Traces against the model itself: every figure of a trace is measured again here, with hooks of this file's own."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import throughline.tracing.baselines as baselines
import throughline.tracing.interventions as interventions
import throughline.tracing.showing as showing
from builders import WORDS, random_dictionary, random_documents, tiny_model
from throughline.codes import Codes, encode_text
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.features import describe_features
from throughline.models import LanguageModel, open_model
from throughline.records import LABEL_COLUMNS, ActiveFeature, Document, Trace, Verification
from throughline.study import ModelSpec
from throughline.tokens import collect_rows
from throughline.tracing import TraceInputs, TraceOptions, check_prompt, trace_prompt
from throughline.tracing.answer import answer_under, find_answer
from throughline.tracing.reading import is_answer
from throughline.zoo.texts import sample_problems

pytestmark = pytest.mark.xdist_group("tracing")  # what it sets up takes long

NO_LABELS = pl.DataFrame(schema=LABEL_COLUMNS)


class Case(NamedTuple):
    inputs: TraceInputs
    prompt: str


def inputs_for(model: LanguageModel, dictionaries: dict[int, Dictionary], documents: list[Document]) -> TraceInputs:
    codes = encode_text(model, dictionaries, collect_rows(documents, model.tokenizer, model.context), documents)
    features, _ = describe_features(model, dictionaries, codes, num_contexts=1)
    return TraceInputs(model, dictionaries, features, NO_LABELS, seed=3)


@pytest.fixture(scope="module")
def tiny() -> TraceInputs:
    """Three layers of random weights."""
    dictionaries = {layer: random_dictionary(16, 32, k=5, seed=layer) for layer in range(3)}
    return inputs_for(tiny_model(), dictionaries, random_documents(60, seed=0, answers=True))


@pytest.fixture(scope="module")
def pythia() -> TraceInputs:
    """The trained model, with dictionaries whose directions are activations of its own text."""
    model, documents = open_model(ModelSpec(path="zoo/pythia")), list(islice(sample_problems("heldout", 0), 80))
    plain = {layer: random_dictionary(model.d_model, 1, k=1) for layer in (0, 2, 4, 5)}
    rows = collect_rows(documents, model.tokenizer, model.context)
    residual_LND = encode_text(model, plain, rows, documents, keep_residuals=True).residual_LND
    assert residual_LND is not None
    dictionaries = {}
    for layer, x_ND in zip(plain, torch.from_numpy(residual_LND), strict=True):
        mean_D = x_ND.mean(0)
        picks = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(layer))[:64]
        rows_FD = torch.nn.functional.normalize(x_ND[picks] - mean_D, dim=1)
        dictionaries[layer] = Dictionary(
            "topk", rows_FD.T.contiguous(), -(rows_FD @ mean_D), rows_FD, mean_D, options={"k": 4}
        )
    return inputs_for(model, dictionaries, documents)


CASES = {
    "random weights": ("tiny", "red 7 + 42 ="),
    "special token inside": ("tiny", "sun <end> 7 + 42 ="),
    "addition": ("pythia", "What is 15 + 27?"),
    "words": ("pythia", "Tom has 36 pens and Eva has 59. Who has more?"),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    fixture, prompt = CASES[request.param]
    return Case(request.getfixturevalue(fixture), prompt)


def read(inputs: TraceInputs, prompt: str, num_features: int = 3, expected: str | None = None, **options: Any) -> Trace:
    """A trace with means by role as "off", unless told otherwise."""
    given = {"num_features": num_features, "most_answer_tokens": 6, "off": "mean"} | options
    return trace_prompt(inputs, prompt, TraceOptions(**given), expected)


@pytest.fixture(autouse=True)
def means_by_role(request, monkeypatch):
    """The generator's problems are not used for means, so that they are those of the features' table."""
    if "similar_problems" not in request.fixturenames:
        monkeypatch.setattr(baselines, "FEWEST_SIMILAR", 10**9)


@pytest.fixture
def similar_problems():
    """Means over the generator's problems."""


def features_of(trace: Trace) -> list[ActiveFeature]:
    return trace.features


def checked(trace: Trace) -> Verification:
    assert trace.verification is not None
    return trace.verification


# ---- the same by hand: nothing below is shared with the package but the weights


@contextmanager
def hooked(model: LanguageModel, hf, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_module, _args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = hf.get_submodule(model.module_path(layer)).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits_of(hf, ids: list[int]) -> Tensor:
    return hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def say(hf, ids: list[int], ends: set[int], most: int) -> list[int]:
    """Greedy generation."""
    made: list[int] = []
    while len(made) < most and (token := int(logits_of(hf, ids + made)[-1].argmax())) not in ends:
        made.append(token)
    return made


class ByHand:
    """A trace's prompt in its model (or a copy in float64): the answer and its score, whatever is changed meanwhile."""

    def __init__(self, inputs: TraceInputs, trace: Trace, hf=None) -> None:
        self.model, self.hf = inputs.model, hf if hf is not None else inputs.model.hf
        self.ids = [token[0] for token in trace.tokens]
        self.first = trace.num_prompt_tokens
        clean = logits_of(self.hf, self.ids)
        places = range(self.first, len(self.ids))
        spelled = [i for i in places if self.model.tokenizer.decode([self.ids[i]]).strip()]
        self.rivals = {}
        for i in spelled or places:
            ranked = clean[i - 1].argsort(descending=True).tolist()
            assert ranked[0] == self.ids[i]
            self.rivals[i] = ranked[1]

    def score(self) -> float:
        """Mean of logit(token) - logit(runner-up), the runner-up of the undisturbed run."""
        logits = logits_of(self.hf, self.ids)
        return float(
            torch.stack([logits[i - 1, self.ids[i]] - logits[i - 1, r] for i, r in self.rivals.items()]).mean()
        )

    def answer(self) -> str:
        room = min(len(self.ids) + 2, self.model.context) - self.first
        said = say(self.hf, self.ids[: self.first], self.model.end_ids, room)
        return self.model.tokenizer.decode(said, skip_special_tokens=True).strip()


def step_of(inputs: TraceInputs, f: ActiveFeature) -> Tensor:
    return (f.off_value - f.activation) * inputs.dictionaries[f.layer].W_dec[f.feature]


def added(position: int, step_D: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(x_BTD: Tensor) -> Tensor:
        here_T1 = (torch.arange(x_BTD.shape[1]) == position)[:, None]
        return x_BTD + here_T1 * step_D.to(x_BTD.dtype)

    return edit


# ---- interventions


def test_answer_and_score_are_the_models(case):
    trace = read(*case)
    by_hand = ByHand(case.inputs, trace)
    tokenizer, ids = case.inputs.model.tokenizer, by_hand.ids
    assert say(by_hand.hf, ids[: by_hand.first], case.inputs.model.end_ids, 6) == ids[by_hand.first :]
    assert trace.answer == tokenizer.decode(ids[by_hand.first :]).strip() == by_hand.answer()
    assert trace.score == pytest.approx(by_hand.score(), abs=1e-4)
    log_p = logits_of(by_hand.hf, ids).log_softmax(-1)
    expected = sum(log_p[i - 1, ids[i]] for i in range(by_hand.first, len(ids))).exp()
    assert trace.answer_probability == pytest.approx(float(expected), abs=1e-5)
    assert trace.runner_up == tokenizer.decode([next(iter(by_hand.rivals.values()))]).strip()


def test_effects_are_those_of_reruns(case):
    trace = read(*case)
    by_hand = ByHand(case.inputs, trace)
    clean = by_hand.score()
    assert len(features_of(trace)) == 3 * len(case.inputs.dictionaries)
    assert checked(trace).nodes.num == len(features_of(trace)) * len(trace.targets)
    for f in features_of(trace):
        with hooked(case.inputs.model, by_hand.hf, f.layer, added(f.position, step_of(case.inputs, f))):
            assert f.effect == pytest.approx(by_hand.score() - clean, abs=1e-4)
            assert f.answer_if_off == by_hand.answer()
    assert max(abs(f.effect) for f in features_of(trace)) > 0.1


def test_predictions_are_derivatives(case):
    """Central difference of the score along the change, in float64."""
    trace = read(*case, linearization="plain")
    exact = ByHand(case.inputs, trace, deepcopy(case.inputs.model.hf).double())
    for f in features_of(trace):
        step_D, around, h = step_of(case.inputs, f).double(), [], 1e-5
        for sign in (1, -1):
            with hooked(case.inputs.model, exact.hf, f.layer, added(f.position, sign * h * step_D)):
                around.append(exact.score())
        assert f.predicted_effect == pytest.approx((around[0] - around[1]) / (2 * h), rel=1e-3, abs=1e-4)


def test_small_changes_do_what_is_predicted(pythia):
    """With means moved close to the activations, measured and predicted effects are the same."""
    prompt, full = "What is 15 + 27?", read(pythia, "What is 15 + 27?", linearization="plain")
    for f in features_of(full)[:2]:
        near = f.activation + 0.01 * (f.off_value - f.activation)
        means = pl.when((pl.col("layer") == f.layer) & (pl.col("feature") == f.feature)).then(
            pl.lit([near] * 10, dtype=pl.List(pl.Float64))
        )
        moved = replace(pythia, features=pythia.features.with_columns(role_means=means.otherwise("role_means")))
        small = [
            g
            for g in features_of(read(moved, prompt, 500, linearization="plain"))
            if g.feature == f.feature and g.layer == f.layer
        ]
        g = next(g for g in small if g.position == f.position)
        assert g.predicted_effect == pytest.approx(0.01 * f.predicted_effect, rel=0.01, abs=1e-5)
        assert g.effect == pytest.approx(g.predicted_effect, rel=0.1, abs=2e-4)


def test_error_effect_is_that_of_the_reconstruction(case):
    trace = read(*case)
    by_hand = ByHand(case.inputs, trace)
    special = torch.tensor([[token in case.inputs.model.tokenizer.all_special_ids] for token in by_hand.ids])
    clean = by_hand.score()
    for layer in trace.layers:
        dictionary = case.inputs.dictionaries[layer.layer]
        seen: list[Tensor] = []

        def edit(x_BTD: Tensor, dictionary=dictionary, seen=seen) -> Tensor:
            seen.append(x_BTD[0])
            return torch.where(special, x_BTD, dictionary.reconstruct(x_BTD[0])[None])

        with hooked(case.inputs.model, by_hand.hf, layer.layer, edit):
            assert layer.error_effect == pytest.approx(by_hand.score() - clean, abs=1e-3)
        x_TD = seen[0][~special[:, 0]]
        left, variance = (x_TD - dictionary.reconstruct(x_TD)).square().sum(), (x_TD - x_TD.mean(0)).square().sum()
        assert layer.fvu == pytest.approx(float(left / variance), rel=1e-3)
        assert layer.num_active == pytest.approx(float((dictionary.encode(x_TD) > 0).sum(1).float().mean()))


def test_activations_are_read_at_their_place(case):
    """All features of a prompt: those shown are the active ones, and special tokens have none."""
    inputs, trace = case.inputs, read(*case, num_features=10_000, verify=False)
    ids = [token[0] for token in trace.tokens]
    special = {i for i, token in enumerate(ids) if token in inputs.model.tokenizer.all_special_ids}
    with torch.no_grad():
        run = inputs.model.run(inputs.model.inputs(np.array([ids])), capture=list(inputs.dictionaries), logits=False)
    for layer in trace.layers:
        f_TF = inputs.dictionaries[layer.layer].encode(run.residuals[layer.layer][0])
        active = {(t, u) for t, u in f_TF.nonzero().tolist() if t not in special}
        assert {(f.position, f.feature) for f in layer.features} == active
        for f in layer.features:
            assert f.activation == pytest.approx(float(f_TF[f.position, f.feature]), abs=1e-4)
        sizes = [float(np.abs(f.predicted_effects).mean()) for f in layer.features]
        np.testing.assert_allclose(sizes, sorted(sizes, reverse=True), atol=1e-6)


def test_the_control_is_as_many_random_features(case, monkeypatch):
    switched: list[tuple[int, np.ndarray]] = []
    original = interventions.switch_off

    def spy(subject, nodes, watched=None):
        result = original(subject, nodes, watched)
        switched.append((len(nodes), result.scores_NC.mean(1).numpy()))
        return result

    monkeypatch.setattr(showing, "switch_off", spy)
    trace = read(*case)
    assert [n for n, _ in switched] == [2 * len(layer.features) for layer in trace.layers]
    random_effects = [abs(e) for n, effects in switched for e in effects[n // 2 :]]
    assert checked(trace).random_effect == pytest.approx(np.mean(random_effects))
    assert checked(trace).num_random == len(random_effects)
    assert checked(trace).random_effect < np.mean([abs(f.effect or 0) for f in features_of(trace)])


def test_many_at_once_are_as_one_at_a_time(case, monkeypatch):
    together = features_of(read(*case))
    monkeypatch.setattr(interventions, "TOKENS_OF_A_PASS", 1)
    alone = features_of(read(*case))
    for a, b in zip(together, alone, strict=True):
        assert (a.feature, a.answer_if_off) == (b.feature, b.answer_if_off)
        assert a.effect == pytest.approx(b.effect, abs=1e-4)


def test_agreement_is_pearsons_r(pythia):
    trace = read(pythia, "What is 15 + 27?")
    pairs = np.array([pair for f in features_of(trace) for pair in zip(f.predicted_effects, f.effects, strict=True)])
    assert checked(trace).nodes.pearson == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert checked(trace).nodes.slope == pytest.approx(pairs[:, 0] @ pairs[:, 1] / (pairs[:, 0] @ pairs[:, 0]))
    assert checked(trace).nodes.pearson > 0.5 > abs(checked(trace).nodes.shuffled)


# ---- what is said when something is off


@pytest.mark.parametrize("seed", range(12))
def test_answers_under_edits_are_what_the_edited_model_says(pythia, seed):
    model, rng = pythia.model, np.random.default_rng(seed)
    ids = model.tokenizer("How much is 59 plus 36?").input_ids
    answer = find_answer(model, ids, 6)
    layer, position = int(rng.integers(6)), int(rng.integers(len(ids) - 2, len(answer.ids)))
    edit = added(position, torch.from_numpy(rng.normal(size=model.d_model) * 6).float())
    with torch.no_grad():
        logits = model.run(model.inputs(np.array([answer.ids])), edits={layer: edit}).logits
    assert logits is not None
    said = answer_under(model, answer, logits[0, answer.read_P].argmax(-1).tolist(), {layer: edit})
    with hooked(model, model.hf, layer, edit):
        assert said == say(model.hf, ids, model.end_ids, len(answer.answer_ids) + 2)


@pytest.mark.parametrize("prompt, answer", [("What is 15 + 27?", "42"), ("What is 15 + 27? 42", "")])
def test_an_answer_that_no_longer_ends_is_another_answer(pythia, prompt, answer):
    """The end of the text is part of what an edit can change: here it becomes a digit."""
    model = pythia.model
    found = find_answer(model, model.tokenizer(prompt).input_ids, 6)
    assert model.tokenizer.decode(found.answer_ids).strip() == answer and found.complete
    seven = model.tokenizer("7").input_ids[0]
    edit = added(len(found.ids) - 1, 50 * torch.nn.functional.normalize(model.unembedding()[seven], dim=0))
    with torch.no_grad():
        logits = model.run(model.inputs(np.array([found.ids])), edits={5: edit}).logits
    assert logits is not None
    said = answer_under(model, found, logits[0, found.read_P].argmax(-1).tolist(), {5: edit})
    with hooked(model, model.hf, 5, edit):
        assert said == say(model.hf, found.prompt_ids, model.end_ids, len(found.answer_ids) + 2)
    assert model.tokenizer.decode(said).strip().startswith(answer + "7")


def test_some_features_change_the_answer(pythia):
    trace = read(pythia, "What is 15 + 27?", 12)
    assert {f.answer_if_off for f in features_of(trace)} > {"42"}


# ---- prompts and answers


def test_an_answer_has_several_tokens_and_one_score(pythia):
    trace = read(pythia, "What is 15 + 27?", expected="42")
    assert [token[1] for token in trace.tokens[trace.num_prompt_tokens :]] == [" ", "4", "2"]
    assert len(ByHand(pythia, trace).rivals) == 2  # the space says nothing
    assert trace.complete and trace.correct and trace.notes == []


def test_tokens_cover_prompt_and_answer(case):
    trace = read(*case)
    shown = [t for t in trace.tokens if t[2] < t[3]]
    assert trace.prompt[shown[0][2] : shown[0][3]] == shown[0][1]
    decode, ids = case.inputs.model.tokenizer.decode, [t[0] for t in trace.tokens]
    before = decode(ids[: trace.num_prompt_tokens], skip_special_tokens=True)
    whole = trace.prompt + decode(ids, skip_special_tokens=True)[len(before) :]
    for _, text, start, end in shown[: trace.num_prompt_tokens]:
        assert whole[start:end] == text
    assert shown[-1][3] == len(whole)


def test_of_a_cut_answer_the_next_token_is_explained(pythia):
    trace = read(pythia, "What is 15 + 27?", most_answer_tokens=2)
    assert (trace.explains, trace.complete, trace.answer) == ("next token", False, "4")
    assert trace.notes == ["the model had not ended its answer after 2 tokens, so the next token is explained"]
    whole = read(pythia, "What is 15 + 27?", most_answer_tokens=3)  # as long as allowed, and no longer
    assert whole.complete and whole.explains == "answer" and whole.says is None


def test_without_a_task_the_next_token_is_explained(pythia):
    whole, one = (read(pythia, "What is 15 + 27?", whole=is_whole) for is_whole in (True, False))
    assert (one.explains, one.answer, one.says, one.notes) == ("next token", "4", "42", [])
    assert len(one.targets) == 1 < len(whole.targets)
    assert one.targets[0].score == pytest.approx(whole.targets[0].score, abs=1e-4)
    effect = {(f.layer, f.position, f.feature): f.effects[0] for f in whole.features}
    same = [(f.effect, effect[key]) for f in one.features if (key := (f.layer, f.position, f.feature)) in effect]
    assert len(same) > 1 and all(a == pytest.approx(b, abs=1e-3) for a, b in same)


def test_an_answer_that_the_model_does_not_give_is_explained(pythia):
    trace = read(pythia, "What is 15 + 27?", answer="57")
    assert (trace.explains, trace.answer, trace.says) == ("named", "57", "42")
    assert (trace.targets[0].text, trace.targets[0].against) == ("5", "4") and trace.score < 0
    decide = trace.targets[0].position
    ids = torch.tensor([[row[0] for row in trace.tokens]])
    log_p_V = pythia.model.hf(ids).logits[0, decide].log_softmax(-1)
    token, other = (
        next(i for i in log_p_V.topk(50).indices if pythia.model.tokenizer.decode([i]).strip() == d) for d in "54"
    )
    assert trace.targets[0].score == pytest.approx(float(log_p_V[token] - log_p_V[other]), abs=1e-3)
    assert trace.verification is not None and trace.verification.nodes.pearson > 0.8
    assert any(f.answer_if_off not in (None, "57") for f in trace.features)  # what it says then is its own


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_named_answer_the_end_that_the_model_chose_is_not_said_to_be_explained(pythia, whole):
    trace = read(pythia, "What is 15 + 27? 42", answer="1", whole=whole)
    assert (trace.explains, trace.answer, trace.says, trace.notes) == ("named", "1", "", [])


def test_a_rival_is_held_against_the_answer_where_they_part(pythia):
    own = read(pythia, "What is 15 + 27?", rival="47")
    assert (own.explains, own.answer) == ("named", "42")
    assert [(t.text, t.against) for t in own.targets] == [("2", "7")] and own.score > 0
    both = read(pythia, "What is 15 + 27?", answer="47", rival="42")
    assert [(t.text, t.against) for t in both.targets] == [("7", "2")]
    assert both.targets[0].score == pytest.approx(-own.targets[0].score, abs=1e-3)
    assert len({trace.origin for trace in (own, both, read(pythia, "What is 15 + 27?"))}) == 3
    # the rival stays, whatever a counterfactual prompt would say
    other = read(pythia, "What is 15 + 27?", rival="47", off=None, against="What is 15 + 24?")
    assert [t.against for t in other.targets] == ["7"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answer": "42", "rival": "42"}, "the rival '42' and the answer '42' begin alike"),
        ({"answer": "42", "rival": "4"}, "begin alike to the end of one of them; name another"),
        ({"answer": " "}, "an answer or rival of ' ' says nothing; name some text"),
        ({"answer": "4" * 200}, "prompt and answer .* tokens; zoo/pythia sees"),
        ({"chat": True}, "zoo/pythia has no chat template; trace the prompt as it is, without --chat"),
    ],
)
def test_answers_that_cannot_be_explained_are_refused(pythia, options, said):
    with pytest.raises(InputError, match=said):
        read(pythia, "What is 15 + 27?", **options)


def test_a_chat_template_is_put_around_the_prompt(pythia, monkeypatch):
    monkeypatch.setattr(pythia.model.tokenizer, "chat_template", "What is {{ messages[0]['content'] }}?")
    chat, plain = read(pythia, "15 + 27", chat=True), read(pythia, "What is 15 + 27?")
    assert chat.asked == "15 + 27" and chat.model_copy(update={"asked": None}) == plain


def test_a_wrong_answer_comes_first(pythia):
    trace = read(pythia, "What is 15 + 27?", expected="43", most_answer_tokens=2)
    assert trace.correct is False and trace.expected == "43"
    assert trace.notes[0] == "the model's answer is wrong: '4', right is '43'" and len(trace.notes) == 2


def test_an_answer_that_goes_on_is_right_if_it_begins_right():
    assert is_answer("42", "42", True) and is_answer("42\n\nNow", "42", False) and is_answer("42.", "42", False)
    assert not is_answer("42.", "42", True) and not is_answer("421", "42", False) and not is_answer("4", "42", False)


def test_a_text_that_ends_at_once_is_noted(pythia):
    trace = read(pythia, "What is 15 + 27? 42")
    assert (trace.answer, trace.complete) == ("", True) and "ends the text at once" in trace.notes[0]
    assert trace.score > 0 and features_of(trace)


def test_prompts_that_cannot_be_traced_are_refused_in_one_line(tiny, pythia):
    too_long = "What is " + "15 + " * 40 + "27?"
    for inputs, prompt, words in (
        (pythia, too_long, r"the prompt has \d+ tokens; zoo/pythia sees 64"),
        (tiny, " ".join(["red"] * 24), "24 tokens; tiny sees 24"),
        (pythia, "", "the prompt is empty"),
        (pythia, " \n", "the prompt is empty"),
        (pythia, "<|endoftext|>", "no tokens but special ones"),
    ):
        with pytest.raises(InputError) as caught:
            read(inputs, prompt)
        assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)
    with pytest.raises(InputError):
        check_prompt("\t")


def test_a_prompt_may_fill_the_context_but_for_one_token(tiny):
    trace = read(tiny, " ".join([*WORDS, *WORDS][:23]))
    assert trace.num_prompt_tokens == 23 and len(trace.tokens) <= 24


@pytest.mark.parametrize("prompt", ["What is 15 + 27?", "Zoë adds 3 € 🙂", "What is 15 + 27 🙂", "red\n\n7 "])
def test_roles_are_those_of_held_out_text(pythia, prompt):
    """A feature's off value is its mean at the role that `Codes` gives the same token of the same text."""
    trace = read(pythia, prompt, 10_000, verify=False)
    model = pythia.model
    text = prompt + model.tokenizer.decode([t[0] for t in trace.tokens[trace.num_prompt_tokens :]])
    codes = codes_of(pythia, Document(text, answer_start=len(prompt)))
    assert codes.ids_N.tolist()[: trace.num_prompt_tokens] == [t[0] for t in trace.tokens][: trace.num_prompt_tokens]
    for f in features_of(trace):
        if f.position < trace.num_prompt_tokens or prompt == "What is 15 + 27?":
            means = pythia.role_means(f.layer)[f.feature]
            assert f.off_value == pytest.approx(means[codes.roles_N[f.position]])


def codes_of(inputs: TraceInputs, document: Document) -> Codes:
    model = inputs.model
    return encode_text(model, inputs.dictionaries, collect_rows([document], model.tokenizer, model.context), [document])


def test_role_means_are_means(pythia):
    """Of the answer's part, and of the question's, by loops."""
    documents = list(islice(sample_problems("heldout", 0), 80))
    codes = encode_text(
        pythia.model, pythia.dictionaries, collect_rows(documents, pythia.model.tokenizer, 64), documents
    )
    dense = codes.layers[4].toarray()
    for role in np.unique(codes.roles_N):
        rows = [f for f, r in zip(dense, codes.roles_N, strict=True) if r == role]
        np.testing.assert_allclose(pythia.role_means(4)[:, role], np.mean(rows, axis=0), atol=1e-5)


def test_the_same_call_gives_the_same_trace(case):
    trace = read(*case)
    assert read(*case) == trace
    assert Trace.model_validate_json(trace.model_dump_json()) == trace
    other_seed = read(replace(case.inputs, seed=4), case.prompt)
    assert [f.effect for f in features_of(other_seed)] == pytest.approx([f.effect for f in features_of(trace)])
    assert checked(other_seed).random_effect != checked(trace).random_effect


# ---- labels


def label(layer: int, feature: int, threshold: float, f1: float = 0.95) -> dict:
    numbers = {"precision": 0.9, "recall": 0.9, "num_positive": 9, "num_tokens": 99, "base_f1": 0.1, "neuron_f1": 0.2}
    return {"layer": layer, "feature": feature, "label": f"label of {feature}", "source": "concepts", "f1": f1,
            "threshold": threshold, "untrained_f1": 0.1} | numbers  # fmt: skip


def with_labels(inputs: TraceInputs, *rows: dict) -> TraceInputs:
    return replace(inputs, labels=pl.DataFrame(list(rows), schema=LABEL_COLUMNS))


def test_labels_speak_only_above_their_threshold(pythia):
    prompt = "What is 15 + 27?"
    shown = read(pythia, prompt, 4).layers[2].features
    low, high = min(shown, key=lambda f: f.activation), max(shown, key=lambda f: f.activation)
    assert low.feature != high.feature
    between = (low.activation + high.activation) / 2
    labelled = with_labels(pythia, *(label(4, f.feature, between) for f in (low, high)))
    for f in read(labelled, prompt, 4).layers[2].features:
        assert (f.label is not None) == (f.feature in (low.feature, high.feature) and f.activation > between)
        assert f.label is None or (f.label.text == f"label of {f.feature}" and f.label.neuron_f1 == 0.2)
        assert f.top_tokens == pythia.features.filter(layer=4, feature=f.feature)["top_tokens"].to_list()[0]
    assert all(f.label is None for f in read(labelled, prompt, 4).layers[1].features)  # labels of layer 4 only


def test_labelled_features_are_shown_beyond_the_strongest(pythia):
    """Two more a layer at most, sure labels first, each feature once."""
    prompt = "What is 15 + 27?"
    strongest = [f.feature for f in read(pythia, prompt, 3).layers[3].features]
    ranked = [f.feature for f in read(pythia, prompt, 10_000, verify=False).layers[3].features]
    others = list(dict.fromkeys(f for f in ranked if f not in strongest))
    unsure, silent, sure, late = others[:4]
    rows = [label(5, unsure, 0.0, 0.75), label(5, silent, 1e9), label(5, sure, 0.0), label(5, late, 0.0)]
    shown = read(with_labels(pythia, *rows), prompt, 3).layers[3].features
    assert [f.feature for f in shown] == [*strongest, sure, late]
    shown = read(with_labels(pythia, *rows[:3]), prompt, 3).layers[3].features
    assert [f.feature for f in shown] == [*strongest, sure, unsure]
