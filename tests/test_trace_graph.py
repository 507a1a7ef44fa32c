"""Graphs of prompts: a model whose weights are set by hand and whose graph is known, and every number measured another way."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from torch import Tensor

from builders import identity_dictionary, random_dictionary, tiny_model, word_tokenizer
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.models import LanguageModel, open_model
from throughline.models.freezing import frozen
from throughline.records import FEATURE_COLUMNS, LABEL_COLUMNS, Trace
from throughline.study import ModelSpec
from throughline.tokens import encode_prompt
from throughline.tracing import TraceInputs, TraceOptions, trace_prompt
from throughline.tracing.answer import find_answer
from throughline.tracing.baselines import find_baseline
from throughline.tracing.chains import find_paths, join_steps
from throughline.tracing.faithfulness import Candidates
from throughline.tracing.graph import Graph, build_graph, choose_share
from throughline.tracing.interventions import keep_only, switch_off
from throughline.tracing.linearizing import LINEARIZATIONS
from throughline.tracing.steering import parse_setting
from throughline.tracing.texts import Subject, find_subject
from throughline.zoo.texts import key_fact, recognize, solve
from throughline.zoo.variations import vary_numbers, vary_one_digit

RED, BLUE, SUN, EQUALS, SEEN_RED, SEEN_BLUE, RED_WRITTEN, CONSTANT = 0, 1, 2, 3, 4, 5, 6, 15
SIZE = 1000.0  # of the constant coordinate, which makes the norms' divisors the same everywhere


@pytest.fixture(scope="module")
def planted() -> LanguageModel:
    """Two blocks, by hand. Block 0: attention, uniform over the past, writes how much of it is `red`. Block 1: attention does the
    same for `blue`, and the MLP copies what block 0 wrote. The unembedding says `sea` for the copy and `sky` for blue."""
    tokenizer = word_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=24, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config)
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for word, coordinate in (("red", RED), ("blue", BLUE), ("sun", SUN), ("=", EQUALS)):
            hf.model.embed_tokens.weight[ids[word], coordinate] = 1
        hf.model.embed_tokens.weight[:, CONSTANT] = SIZE
        norms = [hf.model.norm, *(n for b in hf.model.layers for n in (b.input_layernorm, b.post_attention_layernorm))]
        for norm in norms:
            norm.weight.fill_(SIZE / 4)  # the root mean square of a stream whose one large coordinate is SIZE
        for block, source, target in ((hf.model.layers[0], RED, SEEN_RED), (hf.model.layers[1], BLUE, SEEN_BLUE)):
            block.self_attn.v_proj.weight[0, source] = 1
            block.self_attn.o_proj.weight[target, 0] = 1
        mlp = hf.model.layers[1].mlp
        mlp.gate_proj.weight[0, CONSTANT] = 1.278464542761074 / SIZE  # SiLU of it is 1
        mlp.up_proj.weight[0, SEEN_RED] = 1
        mlp.down_proj.weight[RED_WRITTEN, 0] = 1
        hf.lm_head.weight[ids["sea"], RED_WRITTEN] = 10
        hf.lm_head.weight[ids["sky"], SEEN_BLUE] = 5
    return LanguageModel("planted", hf, tokenizer)


def coordinates() -> Dictionary:
    """One feature for each of the first seven coordinates; the constant is the bias."""
    rows = torch.eye(16)[:7]
    return Dictionary("relu", rows.T.contiguous(), torch.zeros(7), rows, SIZE * torch.eye(16)[CONSTANT])


def subject_of(model: LanguageModel, dictionaries: dict[int, Dictionary], prompt: str, most: int = 6) -> Subject:
    tokens = encode_prompt(model.tokenizer, prompt)
    return find_subject(model, dictionaries, prompt, tokens, find_answer(model, [t.id for t in tokens], most))


def no_means(layer: int) -> np.ndarray:
    raise AssertionError("means by role were not asked for")


def graph_of(subject: Subject, off: Any = "zero", how: Any = "plain", most: int = 10_000) -> Graph:
    """With all nodes kept, those without influence too."""
    return build_graph(subject, find_baseline(subject, off, None, no_means), how, 2.0, most)


# ---- the planted circuit


@pytest.mark.parametrize("how", LINEARIZATIONS)
def test_the_planted_graph_is_found_and_nothing_else(planted, how):
    subject = subject_of(planted, {0: coordinates(), 1: coordinates()}, "red sun blue =", most=1)
    assert planted.tokenizer.decode(subject.answer.answer_ids) == "sea"
    graph = graph_of(subject, how=how)
    below, above = graph.layers[0].kept, graph.layers[1].kept
    found = {
        ((int(p), int(f)), (int(q), int(g))): float(graph.boundaries[0].per_unit[j, i])
        for i, (p, f) in enumerate(zip(below.positions_N, below.features_N, strict=True))
        for j, (q, g) in enumerate(zip(above.positions_N, above.features_N, strict=True))
    }
    true: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
    for position, own in enumerate((RED, SUN, BLUE, EQUALS, SEEN_RED)):  # the answer has no coordinate of its own
        true[(position, own), (position, own)] = 1  # the residual stream
        true[(position, SEEN_RED), (position, SEEN_RED)] = 1
        true[(position, SEEN_RED), (position, RED_WRITTEN)] = 1  # the MLP
        if position >= 2:
            true[(2, BLUE), (position, SEEN_BLUE)] = 1 / (position + 1)  # uniform attention
    if how == "frozen":  # of a product of two factors each takes a half
        true |= {edge: 0.5 for edge in true if edge[1][1] == RED_WRITTEN}
    assert true.keys() <= found.keys() and len(found) > 2 * len(true)
    largest = max(abs(weight) for weight in found.values())
    for edge, weight in found.items():
        assert weight == pytest.approx(true.get(edge, 0.0), abs=0.01 * largest), edge


@pytest.mark.parametrize("how", ["plain", "grouped"])
def test_the_planted_answer_is_explained(planted, how):
    """Everything the answer owes to each node, against switching it off; and the chains are the two that were built."""
    subject = subject_of(planted, {0: coordinates(), 1: coordinates()}, "red sun blue =", most=1)
    graph = graph_of(subject, how=how)
    last = graph.layers[1]
    per_unit = {
        (int(p), int(f)): float(w)
        for p, f, w in zip(last.nodes.positions_N, last.nodes.features_N, last.per_unit_NC, strict=True)
    }
    largest = max(abs(w) for w in per_unit.values())
    for place, weight in per_unit.items():
        assert weight == pytest.approx({(3, RED_WRITTEN): 10, (3, SEEN_BLUE): -5}.get(place, 0), abs=0.01 * largest)
    for layer in (0, 1):
        nodes = graph.layers[layer]
        measured = switch_off(subject, nodes.nodes).scores_NC
        assert torch.allclose(measured, nodes.predicted_NC, atol=0.01 * float(measured.abs().max()))
    trace = trace_planted(planted)
    assert trace.answer == "sea" and trace.targets[0].against == "sky"
    by_start = {chain.steps[0].features[0][1:]: chain for chain in trace.chains}
    written, rival = by_start[3, SEEN_RED], by_start[2, BLUE]
    assert written.steps[-1].features[-1] == (1, 3, RED_WRITTEN) and rival.steps[-1].features[-1] == (1, 3, SEEN_BLUE)
    assert (written.predicted, rival.predicted) == pytest.approx((-2.5, 1.25), rel=0.01)
    assert (written.measured, rival.measured) == pytest.approx((-2.5, 1.25), rel=0.01)
    assert trace.verification is not None
    assert trace.verification.replacement == pytest.approx(1, abs=1e-3)  # dictionaries without error


def trace_planted(model: LanguageModel) -> Trace:
    rows = [(layer, f, 0.1, 1, 9, 1.0, 1.0, ["x"], 1.0, [], [], [0.0] * 10) for layer in (0, 1) for f in range(7)]
    inputs = TraceInputs(
        model,
        {0: coordinates(), 1: coordinates()},
        pl.DataFrame(rows, schema=FEATURE_COLUMNS, orient="row"),
        pl.DataFrame(schema=LABEL_COLUMNS),
    )
    return trace_prompt(inputs, "red sun blue =", TraceOptions(off="zero", most_answer_tokens=1, share=1.0))


# ---- edges, chains and sets against the model


@pytest.fixture(scope="module")
def tiny() -> Subject:
    dictionaries = {layer: random_dictionary(16, 32, k=5, seed=layer) for layer in range(3)}
    return subject_of(tiny_model(), dictionaries, "red 7 + 42 =", most=2)


def test_edges_are_derivatives(tiny):
    """Central differences of the next layer's reading direction, in float64 by hooks of transformers' own blocks."""
    graph = graph_of(tiny)
    rng = np.random.default_rng(0)
    for layer, boundary in graph.boundaries.items():
        below, above = graph.layers[layer].kept, graph.layers[layer + 1].kept
        for _ in range(20):
            i, j = int(rng.integers(len(below))), int(rng.integers(len(above)))
            step_D = tiny.dictionaries[layer].W_dec[below.features_N[i]]
            read_D = tiny.dictionaries[layer + 1].W_enc[:, above.features_N[j]]
            p, q = int(below.positions_N[i]), int(above.positions_N[j])
            around = [float(moved(tiny, layer, p, sign * 1e-2 * step_D)[q] @ read_D) for sign in (1, -1)]
            assert float(boundary.per_unit[j, i]) == pytest.approx((around[0] - around[1]) / 2e-2, rel=0.02, abs=2e-3)


@torch.no_grad()
def moved(subject: Subject, layer: int, position: int, step_D: Tensor) -> Tensor:
    """The stream after the next block when a vector is added after `layer`."""

    def edit(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[:, position] += step_D
        return out

    ids = subject.model.inputs(torch.tensor([subject.answer.ids]))
    return subject.model.run(ids, edits={layer: edit}, capture=[layer + 1], logits=False).residuals[layer + 1][0]


def test_no_edge_goes_back_in_the_text(tiny):
    for layer, boundary in graph_of(tiny).boundaries.items():
        below, above = graph_of(tiny).layers[layer].kept, graph_of(tiny).layers[layer + 1].kept
        backwards = below.positions_N[None] > above.positions_N[:, None]
        assert backwards.any() and not boundary.per_unit[backwards].any()


def test_watched_features_change_as_in_a_rerun(tiny):
    graph = graph_of(tiny)
    nodes, watched = graph.layers[0].kept, graph.layers[1].kept
    effects = switch_off(tiny, nodes, watched)
    steps_ND, dictionary = nodes.steps(tiny), tiny.dictionaries[1]
    for i in range(0, len(nodes), 7):
        x_TD = moved(tiny, 0, int(nodes.positions_N[i]), steps_ND[i])
        change = (x_TD - tiny.clean.x[1])[watched.positions_N] * dictionary.readers(watched.features_N)
        torch.testing.assert_close(effects.linear_NM[i], change.sum(1), atol=1e-4, rtol=1e-3)
        f_TF = dictionary.encode(x_TD) - tiny.clean.features[1]
        torch.testing.assert_close(
            effects.activation_NM[i], f_TF[watched.positions_N, watched.features_N], atol=1e-4, rtol=1e-3
        )


def test_a_model_without_its_first_blocks_goes_on_as_the_whole(tiny):
    model = tiny.model
    ids = model.inputs(torch.tensor([tiny.answer.ids]))
    whole = model.run(ids, capture=[0, 1, 2])
    assert whole.logits is not None
    for layer in range(3):
        suffix = model.after(layer)
        found = suffix.run(ids, edits={layer: lambda _, x=whole.residuals[layer]: x}, capture=[2])
        assert found.logits is not None
        torch.testing.assert_close(found.logits, whole.logits)
        torch.testing.assert_close(found.residuals[2], whole.residuals[2])
    at = torch.tensor([1, 4])
    some = model.run(ids, at=at).logits
    assert some is not None
    torch.testing.assert_close(some, whole.logits[:, at])
    assert [type(b).__name__ for b in model.structure.blocks] == ["GPT2Block"] * 3  # the model itself is as it was


def test_frozen_gradients_add_up():
    """With patterns and divisors held still a model without biases is linear: the score is its inputs' contributions."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    subject = subject_of(model, {0: identity_dictionary(16)}, "red 7 + 42 =", most=1)
    x_TD, suffix = subject.clean.x[0], model.after(0)

    def gradient() -> Tensor:
        start = x_TD[None].clone().requires_grad_()
        inputs = suffix.inputs(torch.tensor([subject.answer.ids]))
        logits = suffix.run(inputs, edits={0: lambda _: start}, at=subject.answer.read_P).logits
        assert logits is not None
        torch.testing.assert_close(subject.answer.scores(logits)[0].tolist(), subject.scores)  # values stay
        return torch.autograd.grad(subject.answer.scores(logits).sum(), start)[0][0]

    plain = float((gradient() * x_TD).sum())
    with frozen(model):
        linear = float((gradient() * x_TD).sum())
    assert linear == pytest.approx(sum(subject.scores), rel=1e-3)
    assert plain != pytest.approx(sum(subject.scores), rel=1e-2)


def test_frozen_leaves_the_model_as_it_was(planted):
    before = planted.hf.config._attn_implementation
    with pytest.raises(RuntimeError), frozen(planted):
        raise RuntimeError
    assert planted.hf.config._attn_implementation == before
    assert not any(module._forward_hooks for module in planted.hf.modules())


def test_paths_are_the_strongest(tiny):
    """All paths by enumeration."""
    rng = np.random.default_rng(3)
    sizes = (4, 5, 3)
    per_unit = [rng.normal(size=(b, a)) for a, b in pairwise(sizes)]
    steps, last = rng.normal(size=4), rng.normal(size=3)
    every = {
        (a, b, c): steps[a] * per_unit[0][b, a] * per_unit[1][c, b] * last[c]
        for a in range(4) for b in range(5) for c in range(3)
    }  # fmt: skip
    ranked = sorted(every, key=lambda nodes: -abs(every[nodes]))
    shown: list[tuple[int, ...]] = []
    for nodes in ranked:
        if len(shown) < 3 and not any(sum(x == y for x, y in zip(nodes, other, strict=True)) > 1.5 for other in shown):
            shown.append(nodes)
    found = find_paths(steps, per_unit, last, 3)
    assert [path.nodes for path in found] == shown
    for path in found:
        assert path.predicted == pytest.approx(every[path.nodes])
    alike = [
        n for n in ranked
        if n != shown[0] and sum(x == y for x, y in zip(n, shown[0], strict=True)) > 1.5
        and abs(every[n]) >= 0.8 * abs(every[shown[0]])
    ]  # fmt: skip
    assert found[0].num_alternatives == len(alike)


def test_runs_of_one_throughline_are_one_step():
    places = [(0, 3, 7), (1, 3, 9), (2, 3, 4), (3, 5, 4), (4, 5, 1)]
    lines = {(0, 7): 11, (1, 9): 11, (2, 4): 11, (3, 4): 11, (4, 1): 12}
    assert join_steps(places, lines) == [[(0, 3, 7), (1, 3, 9), (2, 3, 4)], [(3, 5, 4)], [(4, 5, 1)]]
    assert join_steps(places, {}) == [[place] for place in places]


def test_the_share_kept_is_the_fewest_that_reach_it():
    influence = torch.tensor([1.0, 5.0, 0.5, 3.0, 0.5])
    assert choose_share(influence, 0.8, 99).tolist() == [1, 3]
    assert choose_share(influence, 0.81, 99).tolist() == [1, 3, 0]
    assert choose_share(influence, 1.0, 2).tolist() == [1, 3]
    assert choose_share(torch.zeros(3), 0.8, 9).tolist() == []


# ---- off


@pytest.fixture(scope="module")
def pythia() -> Subject:
    model = open_model(ModelSpec(path="zoo/pythia"))
    dictionaries = {layer: random_dictionary(model.d_model, 200, k=40, seed=layer) for layer in range(6)}
    return subject_of(model, dictionaries, "What is 15 + 27?")


def test_a_counterfactual_is_made_that_differs_in_one_digit(pythia):
    made = find_baseline(pythia, None, None, no_means)
    assert (made.kind, made.prompt) == ("counterfactual", "What is 15 + 24?") and "carry: 1 becomes 0" in made.words
    assert [pythia.model.tokenizer.decode([int(t)]) for t in made.others_C] == ["3", "9"]
    ids = [t.id for t in encode_prompt(pythia.model.tokenizer, "What is 15 + 24?")] + pythia.answer.answer_ids
    run = pythia.model.run(pythia.model.inputs(torch.tensor([ids])), capture=[3], logits=False)
    torch.testing.assert_close(made.features[3], pythia.dictionaries[3].encode(run.residuals[3][0]))
    for layer in pythia.layers:  # nothing differs before the digit that does
        assert not made.differing(pythia, layer)[:8].any() and made.differing(pythia, layer)[8:].any()


def test_means_are_over_problems_of_the_same_form(pythia):
    found = find_baseline(pythia, "mean", None, no_means)
    problems = vary_numbers("What is 15 + 27?", 200)
    rows = [[t.id for t in encode_prompt(pythia.model.tokenizer, d.text)] for d in problems]
    rows = [ids for ids in rows if len(ids) == len(pythia.answer.ids)]
    assert f"of {len(rows)} problems" in found.words and len(rows) > 100
    total = torch.zeros_like(found.features[2])
    for ids in rows:
        x = pythia.model.run(pythia.model.inputs(torch.tensor([ids])), capture=[2], logits=False).residuals[2][0]
        total += pythia.dictionaries[2].encode(x)
    torch.testing.assert_close(found.features[2], total / len(rows), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "off, against, words",
    [
        (None, "What is 15 + 4?", "tokens"),
        (None, "What is 15 + 27?", "the prompt itself"),
        ("zero", "What is 15 + 24?", "leave out one"),
    ],
)
def test_baselines_that_do_not_fit_are_refused(pythia, off, against, words):
    with pytest.raises(InputError, match=words):
        find_baseline(pythia, off, against, no_means)


def test_what_no_counterfactual_is_known_for_says_so(tiny):
    with pytest.raises(InputError, match="--against"):
        find_baseline(tiny, "counterfactual", None, no_means)


@pytest.mark.parametrize(
    "prompt", ["What is 15 + 27?", "What is 43 - 17?", "Which is larger, 45 or 37?", "What is 15 + 27 + 11?"]
)
def test_variations_change_what_the_answer_turns_on(prompt):
    found = recognize(prompt)
    assert found is not None
    variations = list(vary_one_digit(prompt))
    assert variations
    for variation in variations:
        other = recognize(variation.prompt)
        assert other is not None and other[0] == found[0]
        assert sum(a != b for a, b in zip(prompt, variation.prompt, strict=True)) == 1
        assert key_fact(*other) != key_fact(*found) and solve(variation.prompt) is not None
    for document in vary_numbers(prompt, 20):
        answer = solve(document.text[: document.answer_start])
        assert answer == document.text[document.answer_start :].strip() and len(answer) == len(solve(prompt) or "")


# ---- sets


def test_keeping_all_or_nothing(pythia):
    """Nothing kept: the counterfactual's own run. Everything kept, with the text's own errors: the model's."""
    baseline = find_baseline(pythia, "counterfactual", None, no_means)
    all_of_it = {layer: torch.ones_like(f, dtype=torch.bool)[None] for layer, f in pythia.clean.features.items()}
    logits = keep_only(pythia, all_of_it, baseline.features, pythia.clean.errors)
    torch.testing.assert_close(pythia.answer.scores(logits)[0].tolist(), pythia.scores, atol=1e-3, rtol=1e-3)
    nothing = {layer: torch.zeros_like(mask) for layer, mask in all_of_it.items()}
    logits = keep_only(pythia, nothing, baseline.features, baseline.errors)
    assert baseline.prompt is not None
    ids = [t.id for t in encode_prompt(pythia.model.tokenizer, baseline.prompt)] + pythia.answer.answer_ids
    own = pythia.model.run(pythia.model.inputs(torch.tensor([ids])), at=pythia.answer.read_P).logits
    assert own is not None
    torch.testing.assert_close(logits, own, atol=1e-3, rtol=1e-3)
    candidates = Candidates(pythia, baseline)
    none = candidates.run(torch.zeros(1, candidates.num, dtype=torch.bool))
    torch.testing.assert_close(none, own, atol=1e-3, rtol=1e-3)


# ---- features set by hand


def test_settings_are_read_as_written():
    assert parse_setting("layer=4,feature=237,off") == replace(
        parse_setting("layer=4, feature=237, off"), text="layer=4,feature=237,off"
    )
    assert parse_setting("layer=1,feature=2,x2").factor == 2
    assert parse_setting("layer=1,feature=2,position=3,=-1.5").value == -1.5
    for text in ("layer=1,off", "layer=1,feature=2", "layer=1,feature=2,twice", "", "layer=a,feature=2,off"):
        with pytest.raises(InputError, match="expected layer=4,feature=237,off"):
            parse_setting(text)
