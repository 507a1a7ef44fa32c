"""Grouped gradients against gradients taken one node at a time, and against what switching off really does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import random_dictionary, tiny_model
from throughline.models import open_model
from throughline.study import ModelSpec
from throughline.tokens import encode_prompt
from throughline.tracing import TraceOptions
from throughline.tracing.answer import find_answer
from throughline.tracing.baselines import find_baseline
from throughline.tracing.graph import Graph, build_graph
from throughline.tracing.grouping import (
    FEWEST_GROUPS,
    LONG,
    MOST_GROUPS,
    POINTS,
    Plan,
    deal_groups,
    plan_copies,
    refine_effects,
)
from throughline.tracing.interventions import Nodes, switch_off
from throughline.tracing.texts import Subject, find_subject


def no_means(layer: int) -> np.ndarray:
    raise AssertionError("means by role were not asked for")


@pytest.fixture(scope="module")
def tiny() -> Subject:
    model = tiny_model()
    tokens = encode_prompt(model.tokenizer, "red 7 + 42 =")
    answer = find_answer(model, [t.id for t in tokens], 3)
    dictionaries = {layer: random_dictionary(16, 32, k=5, seed=layer) for layer in range(3)}
    return find_subject(model, dictionaries, "red 7 + 42 =", tokens, answer)


@pytest.fixture(scope="module")
def pythia() -> Subject:
    """The trained model with random dictionaries."""
    model, prompt = open_model(ModelSpec(path="zoo/pythia")), "What is 15 + 27?"
    tokens = encode_prompt(model.tokenizer, prompt)
    answer = find_answer(model, [t.id for t in tokens], 6)
    dictionaries = {layer: random_dictionary(model.d_model, 200, k=10, seed=layer) for layer in range(6)}
    return find_subject(model, dictionaries, prompt, tokens, answer)


def graph_of(subject: Subject, how: Any, off: Any = "zero") -> Graph:
    """With all nodes kept."""
    return build_graph(subject, find_baseline(subject, off, None, no_means), how, 2.0, 10_000)


def gradient_at(subject: Subject, nodes: Nodes, i: int, point: float) -> Tensor:
    """The effect [C] of one node by the gradient at a share of its way to off, through the whole text."""
    step_D = nodes.steps(subject)[i]
    x_TD = subject.clean.x[nodes.layer].clone()
    x_TD[nodes.positions_N[i]] += point * step_D
    x_TD.requires_grad_()
    inputs = subject.model.inputs(torch.tensor([subject.answer.ids]))
    with torch.enable_grad():
        edits = {nodes.layer: lambda _: x_TD[None]}
        logits = subject.model.run(inputs, edits=edits, at=subject.answer.read_P).logits
        assert logits is not None
        scores_C = subject.answer.scores(logits)[0]
        grads = [torch.autograd.grad(score, x_TD, retain_graph=True)[0] for score in scores_C]
    return torch.stack([g[nodes.positions_N[i]] @ step_D for g in grads])


def error_of(predicted_NC: Tensor, subject: Subject, nodes: Nodes) -> float:
    """Root of the mean squared error, in units of what is measured."""
    measured_NC = switch_off(subject, nodes).scores_NC
    return float((predicted_NC - measured_NC).square().mean().sqrt() / measured_NC.square().mean().sqrt())


@pytest.mark.parametrize("layer", range(3))
def test_groups_of_one_take_each_nodes_own_gradient(tiny, layer):
    mine = graph_of(tiny, "plain").layers[layer]
    found = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(10**6, 1, (0.5,)))
    two = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(10**6, 1))
    for i in range(len(mine.nodes)):
        torch.testing.assert_close(found[i], gradient_at(tiny, mine.nodes, i, 0.5), atol=1e-4, rtol=1e-3)
        each = [gradient_at(tiny, mine.nodes, i, point) for point in (0.2113249, 0.7886751)]
        torch.testing.assert_close(two[i], (each[0] + each[1]) / 2, atol=1e-4, rtol=1e-3)
    at_the_text = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(3, points=(0.0,)))
    torch.testing.assert_close(at_the_text, mine.predicted_NC, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", range(3))
def test_many_points_of_ones_own_way_are_the_measurement(tiny, layer):
    mine = graph_of(tiny, "plain").layers[layer]
    points = tuple((i + 0.5) / 64 for i in range(64))
    found = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(10**6, 1, points))
    torch.testing.assert_close(found, switch_off(tiny, mine.nodes).scores_NC, atol=2e-3, rtol=2e-3)


def test_only_the_strongest_are_in_groups(tiny):
    mine = graph_of(tiny, "plain").layers[0]
    found = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(3, 2))
    order = mine.influence_N.argsort(descending=True, stable=True)
    assert torch.equal(found[order[6:]], mine.predicted_NC[order[6:]])
    assert (found[order[:6]] != mine.predicted_NC[order[:6]]).any(1).all()
    none = mine.nodes.select(order[:0])
    assert refine_effects(tiny, none, mine.predicted_NC[:0], Plan(3)).shape == (0, mine.predicted_NC.shape[1])


def test_companions_are_moved_too(tiny):
    """Two nodes in one copy: the gradient is taken where both are halfway."""
    mine = graph_of(tiny, "plain").layers[1]
    order = mine.influence_N.argsort(descending=True, stable=True)
    a, b = int(order[0]), int(order[1])
    found = refine_effects(tiny, mine.nodes, mine.predicted_NC, Plan(1, 2, (0.5,)))
    other = mine.nodes.select(torch.tensor([b]))
    x_TD = tiny.clean.x[1].clone()
    x_TD[other.positions_N[0]] += 0.5 * other.steps(tiny)[0]
    moved = replace(tiny, clean=replace(tiny.clean, x={**tiny.clean.x, 1: x_TD}))
    torch.testing.assert_close(found[a], gradient_at(moved, mine.nodes, a, 0.5), atol=1e-4, rtol=1e-3)


def test_grouped_predicts_better_than_plain(pythia):
    plain, grouped, again = (graph_of(pythia, how, "mean") for how in ("plain", "grouped", "grouped"))
    for layer, mine in grouped.layers.items():
        assert torch.equal(mine.predicted_NC, again.layers[layer].predicted_NC)
        assert torch.equal(mine.per_unit_NC, plain.layers[layer].per_unit_NC)
        errors = [error_of(g.layers[layer].predicted_NC, pythia, mine.nodes) for g in (plain, grouped)]
        assert errors[1] < errors[0], (layer, errors)


def test_edges_are_those_of_the_plain_gradient(tiny):
    plain, grouped = graph_of(tiny, "plain"), graph_of(tiny, "grouped")
    for layer, boundary in grouped.boundaries.items():
        rows, columns = (grouped.layers[at].kept_M.argsort() for at in (boundary.to, layer))
        others = (plain.layers[at].kept_M.argsort() for at in (boundary.to, layer))
        mine = boundary.per_unit[rows][:, columns]
        torch.testing.assert_close(mine, plain.boundaries[layer].per_unit[next(others)][:, next(others)])


def test_strong_nodes_are_dealt_apart():
    strength = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0.5])
    positions = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
    groups = deal_groups(strength, positions, num=3, size=3)
    assert groups == deal_groups(strength, positions, num=3, size=3)
    assert [group[0] for group in groups] == [0, 2, 4]  # the strongest, one to each
    assert sorted(node for group in groups for node in group) == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # 9 is the weakest of ten
    assert all(len({int(positions[node]) for node in group}) == 3 for group in groups)
    alone = deal_groups(strength, torch.zeros_like(positions), num=4, size=2)
    assert sorted(map(len, alone)) == [2, 2, 2, 2]  # where positions cannot differ they need not
    assert deal_groups(strength[:2], positions[:2], num=4, size=2) == [[0], [1]]
    assert deal_groups(strength[:0], positions[:0], num=4, size=2) == []


def test_long_texts_have_fewer_groups():
    plans = [plan_copies(tokens) for tokens in (2, 7, 16, 21, 22, 64, 1024)]
    counts = [plan.num for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == MOST_GROUPS and counts[3] == FEWEST_GROUPS
    assert plans[4:] == [LONG] * 3 and all(plan.points == POINTS for plan in plans[:4])


def test_traces_are_by_grouped_gradients():
    assert TraceOptions().linearization == "grouped"
