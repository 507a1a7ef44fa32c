"""Which nodes of a graph are shown, with random ones beside them as the control, and what switching them off really does."""

from dataclasses import dataclass, field

import numpy as np
import torch

from throughline.tracing.graph import Graph
from throughline.tracing.inputs import TraceInputs, speaks
from throughline.tracing.interventions import Effects, Nodes, answers_if_off, switch_off
from throughline.tracing.texts import Subject

NUM_LABELLED = 2  # labelled features shown beyond the most influential ones
SURE = 0.9  # F1 from which a label is preferred there


@dataclass(frozen=True)
class Shown:
    """A layer's shown nodes (numbers in its nodes), the random ones beside them, and their effects; none if not verified."""

    numbers: torch.Tensor
    controls: torch.Tensor
    effects: Effects | None = None
    answers: list[str] = field(default_factory=list)


def choose_shown(inputs: TraceInputs, prompt: str, graph: Graph, num_features: int, control: bool) -> dict[int, Shown]:
    """By layer: nodes with the largest predicted effects; then labelled ones, surely labelled first, one per feature."""
    rng = np.random.default_rng([inputs.seed, *prompt.encode()])
    shown = {}
    for layer, mine in graph.layers.items():
        labels, nodes = inputs.labels_of(layer), mine.nodes
        order = mine.influence_N.argsort(descending=True, stable=True).tolist()
        features, own = nodes.features_N.tolist(), nodes.own_N.tolist()
        chosen = order[:num_features]
        there = {features[i] for i in chosen}
        labelled = [i for i in order if speaks(labels.get(features[i]), own[i])]
        for i in sorted(labelled, key=lambda i: labels[features[i]]["f1"] < SURE):
            if len(chosen) < num_features + NUM_LABELLED and features[i] not in there:
                chosen.append(i)
                there.add(features[i])
        numbers = torch.tensor(chosen, dtype=torch.long, device=nodes.features_N.device)
        controls = _draw_controls(nodes, numbers, rng) if control else numbers[:0]
        shown[layer] = Shown(numbers, controls)
    return shown


def _draw_controls(nodes: Nodes, shown: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """For each node shown a random other one of the layer, at its position if there is one not shown; numbers in `nodes`."""
    taken = set(shown.tolist())
    picks = []
    for node in shown.tolist():
        same = (nodes.positions_N == nodes.positions_N[node]).nonzero()[:, 0].tolist()
        free = [i for i in same if i not in taken] or [i for i in range(len(nodes)) if i not in taken]
        if free:
            picks.append(int(rng.choice(free)))
            taken.add(picks[-1])
    return torch.tensor(picks, dtype=torch.long, device=nodes.features_N.device)


def measure_shown(subject: Subject, graph: Graph, layer: int, shown: Shown) -> Shown:
    """The same with what switching each off does, in the real model."""
    nodes = graph.layers[layer].nodes.select(torch.cat([shown.numbers, shown.controls]))
    boundary = graph.boundaries.get(layer)
    effects = switch_off(subject, nodes, None if boundary is None else graph.layers[boundary.to].kept)
    mine = graph.layers[layer].nodes.select(shown.numbers)
    return Shown(shown.numbers, shown.controls, effects, answers_if_off(subject, mine, effects.preferred_NP))
