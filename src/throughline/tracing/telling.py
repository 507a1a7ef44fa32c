"""Chains of a graph in words: found, collapsed to one step for each throughline, and measured in the real model."""

from collections.abc import Sequence

import torch

from throughline.records import Chain, ChainStep
from throughline.tracing.chains import Path, find_paths, join_steps
from throughline.tracing.graph import Graph
from throughline.tracing.inputs import TraceInputs
from throughline.tracing.interventions import Nodes, add_at, follow_paths, say_under, switch_together
from throughline.tracing.texts import Subject


def tell_chains(inputs: TraceInputs, subject: Subject, graph: Graph, num_chains: int, measure: bool) -> list[Chain]:
    """The strongest chains to each target, strongest first by target."""
    layers = list(graph.layers)
    first, last = graph.layers[layers[0]], graph.layers[layers[-1]]
    steps_M = (first.kept.off_N - first.kept.own_N).cpu().numpy()
    per_unit = [graph.boundaries[layer].per_unit.cpu().numpy() for layer in layers[:-1]]
    found = [
        (target, path)
        for target in range(last.per_unit_NC.shape[1])
        for path in find_paths(steps_M, per_unit, last.per_unit_NC[last.kept_M, target].cpu().numpy(), num_chains)
    ]
    if not found:
        return []
    effects = [_predict(graph, layer, i, found) for i, layer in enumerate(layers)]
    by_layer = [_gather(graph, layer, [path.nodes[i] for _, path in found]) for i, layer in enumerate(layers)]
    each = list(zip(enumerate(found), zip(*effects, strict=True), strict=True))
    if not measure:
        return [_tell(inputs, by_layer, i, target, path, e) for (i, (target, path)), e in each]
    along = follow_paths(subject, by_layer[0], by_layer[1:])
    together = switch_together(subject, by_layer)
    chains = []
    for (i, (target, path)), predicted in each:
        edits = {n.layer: add_at(int(n.positions_N[i]), n.steps(subject)[i]) for n in by_layer}
        measured = {
            "measured": float(along[i, target]),
            "measured_together": float(together.scores_NC[i, target]),
            "answer_if_off": say_under(subject, together.preferred_NP[i], edits),
        }
        chains.append(_tell(inputs, by_layer, i, target, path, predicted).model_copy(update=measured))
    return chains


def _gather(graph: Graph, layer: int, numbers: list[int]) -> Nodes:
    """The chains' nodes in one layer, one for each chain."""
    kept = graph.layers[layer].kept
    return kept.select(torch.tensor(numbers, device=kept.features_N.device))


def _predict(graph: Graph, layer: int, i: int, found: Sequence[tuple[int, Path]]) -> list[float]:
    """The predicted effect of each chain's node in a layer on the chain's target."""
    mine = graph.layers[layer]
    return [float(mine.predicted_NC[mine.kept_M[path.nodes[i]], target]) for target, path in found]


def _tell(
    inputs: TraceInputs, by_layer: Sequence[Nodes], i: int, target: int, path: Path, predicted: Sequence[float]
) -> Chain:
    places = [(n.layer, int(n.positions_N[i]), int(n.features_N[i])) for n in by_layer]
    activation = {place: float(n.own_N[i]) for place, n in zip(places, by_layer, strict=True)}
    numbers = {place: life[0] for place, life in inputs.lives.items()}
    steps = []
    for step in join_steps(places, numbers):
        layer, _, feature = step[0]
        life = inputs.lives.get((layer, feature))
        steps.append(
            ChainStep(
                features=step,
                label=inputs.name_step(step, activation),
                activation=activation[step[0]],
                lifetime=None if life is None else (life[1], life[2]),
            )
        )
    return Chain(
        steps=steps,
        target=target,
        predicted=path.predicted,
        measured=None,
        predicted_together=sum(predicted),
        measured_together=None,
        answer_if_off=None,
        num_alternatives=path.num_alternatives,
    )
