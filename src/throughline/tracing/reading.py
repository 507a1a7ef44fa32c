"""Read one prompt layer by layer: which features are active, what passes between layers, and what the answer owes to each.

1. the model answers; every token of the answer is a target (`answer`)
2. "off" is settled: a counterfactual prompt, the mean at the same kind of position, or zero (`baselines`)
3. the graph: predicted effects of all nodes on the targets, and edges between those that matter (`graph`, `linearizing`)
4. the nodes of largest influence are shown, and the strongest chains of them (`chains`)
5. verification: every shown node is switched off in the real model, as is a random one beside it; edges, chains and the
   faithfulness of the most influential nodes are measured too (`interventions`, `verifying`, `faithfulness`)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch

from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.models import LanguageModel
from throughline.records import ActiveFeature, Label, LayerReading, Place, Target, Trace, TraceEdge, Verification
from throughline.tokens import encode_prompt
from throughline.tracing.answer import find_answer, spell
from throughline.tracing.baselines import Baseline, OffKind, find_baseline
from throughline.tracing.faithfulness import RANDOM_DRAWS, measure_faithfulness
from throughline.tracing.graph import Graph, LayerNodes, build_graph, measure_scores
from throughline.tracing.interventions import Effects, Nodes, answers_if_off, switch_off
from throughline.tracing.linearizing import Linearization
from throughline.tracing.steering import Setting, check_settings, steer
from throughline.tracing.telling import tell_chains
from throughline.tracing.texts import Subject, find_subject
from throughline.tracing.verifying import NOTICEABLE, agree, draw_controls, split_edges

NUM_LABELLED = 2  # labelled features shown beyond the most influential ones
SURE = 0.9  # F1 from which a label is preferred there


@dataclass(frozen=True)
class TraceInputs:
    """What a trace is made with: the model, its dictionaries, and the tables of features and of labels that reached the bar.

    `throughlines` (columns layer, feature, throughline, birth, death) is None where the run has none.
    """

    model: LanguageModel
    dictionaries: dict[int, Dictionary]
    features: pl.DataFrame
    labels: pl.DataFrame
    throughlines: pl.DataFrame | None = None
    seed: int = 0
    forced: bool = False

    def role_means(self, layer: int) -> np.ndarray:
        """Mean activation of each feature over held-out tokens of each role, [F, roles]."""
        column = self.features.filter(pl.col("layer") == layer).sort("feature")["role_means"]
        return np.array(column.to_list())

    @cached_property
    def _labels(self) -> dict[int, dict[int, dict[str, Any]]]:
        found: dict[int, dict[int, dict[str, Any]]] = {}
        for row in self.labels.iter_rows(named=True):
            found.setdefault(row["layer"], {})[row["feature"]] = row
        return found

    def labels_of(self, layer: int) -> dict[int, dict[str, Any]]:
        """The label row of each feature of a layer that has one. It speaks only of activations above its threshold."""
        return self._labels.get(layer, {})

    @cached_property
    def top_tokens(self) -> dict[tuple[int, int], list[str]]:
        """By layer and feature."""
        columns = (self.features[c].to_list() for c in ("layer", "feature", "top_tokens"))
        return {(layer, feature): tokens for layer, feature, tokens in zip(*columns, strict=True)}

    def name_step(self, places: Sequence[Place], activations: Mapping[Place, float]) -> str:
        """Words for the features of one step of a chain: the first label that speaks, or the first feature's top tokens."""
        for place in places:
            label = find_label(self, place[0], place[2], activations[place])
            if label is not None:
                return label.text
        tokens = self.top_tokens.get((places[0][0], places[0][2]), [])
        return "unlabelled: " + ", ".join(map(repr, tokens[:3]))

    @cached_property
    def lives(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """By layer and feature: number, birth and death of its throughline."""
        if self.throughlines is None:
            return {}
        rows = self.throughlines.select("layer", "feature", "throughline", "birth", "death").iter_rows()
        return {(layer, feature): rest for layer, feature, *rest in rows}  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class TraceOptions:
    """How a prompt is traced."""

    num_features: int = 6  # shown per layer
    most_answer_tokens: int = 8
    off: OffKind | None = None  # None: a counterfactual where one can be made, or else the mean
    against: str | None = None  # a counterfactual prompt
    linearization: Linearization = "plain"
    share: float = 0.8  # of each layer's influence that the kept nodes carry
    most_nodes: int = 24  # kept per layer
    num_chains: int = 3  # per target
    verify: bool = True
    settings: tuple[Setting, ...] = ()  # features set by hand


@dataclass(frozen=True)
class Shown:
    """A layer's shown nodes (numbers in its nodes), the random ones beside them, and their effects; none if not verified."""

    numbers: torch.Tensor
    controls: torch.Tensor
    effects: Effects | None = None
    answers: list[str] = field(default_factory=list)


def trace_prompt(inputs: TraceInputs, prompt: str, options: TraceOptions, expected: str | None = None) -> Trace:
    """The layered reading of `prompt`.

    Special tokens are not read. Raises InputError if the prompt is empty or does not fit the model's context, or if the baseline
    asked for cannot be had.
    """
    model = inputs.model
    check_prompt(prompt)
    tokens = encode_prompt(model.tokenizer, prompt)
    answer = find_answer(model, [t.id for t in tokens], options.most_answer_tokens)
    subject = find_subject(model, inputs.dictionaries, prompt, tokens, answer)
    check_settings(subject, options.settings)
    baseline = find_baseline(subject, options.off, options.against, inputs.role_means)
    if baseline.others_C is not None:
        subject = subject.held_against(baseline.others_C)
    graph = build_graph(subject, baseline, options.linearization, options.share, options.most_nodes)
    shown = _choose_shown(inputs, subject, graph, options)
    if options.verify:
        shown = {layer: _measure(subject, graph, layer, mine) for layer, mine in shown.items()}
    scores = subject.scores
    text = spell(model, answer.prompt_ids, answer.answer_ids)
    return Trace(
        model=model.name,
        prompt=prompt,
        tokens=[(token.id, token.text, token.start, token.end) for token in subject.tokens],
        num_prompt_tokens=len(tokens),
        answer=text.strip(),
        answer_probability=answer.probability,
        complete=answer.complete,
        expected=expected,
        correct=None if expected is None else text.strip() == expected,
        score=float(np.mean(scores)),
        targets=_targets(subject, scores),
        off_kind=baseline.kind,
        off=baseline.words,
        against=baseline.prompt,
        linearization=options.linearization,
        layers=[_read_layer(inputs, subject, graph, layer, shown[layer]) for layer in subject.layers],
        edges=_list_edges(graph, shown),
        chains=tell_chains(inputs, subject, graph, options.num_chains, options.verify),
        verification=_verify(inputs, subject, baseline, graph, shown) if options.verify else None,
        steering=steer(inputs, subject, baseline, options.settings) if options.settings else None,
        forced=inputs.forced,
        notes=_notes(subject, text, expected),
    )


def _choose_shown(inputs: TraceInputs, subject: Subject, graph: Graph, options: TraceOptions) -> dict[int, Shown]:
    """Nodes with the largest predicted effects; then labelled ones, surely labelled first, one per feature."""
    rng = np.random.default_rng([inputs.seed, *subject.prompt.encode()])
    shown = {}
    for layer, mine in graph.layers.items():
        labels, nodes = inputs.labels_of(layer), mine.nodes
        order = mine.influence_N.argsort(descending=True, stable=True).tolist()
        features, own = nodes.features_N.tolist(), nodes.own_N.tolist()
        chosen = order[: options.num_features]
        there = {features[i] for i in chosen}
        labelled = [i for i in order if _speaks(labels.get(features[i]), own[i])]
        for i in sorted(labelled, key=lambda i: labels[features[i]]["f1"] < SURE):
            if len(chosen) < options.num_features + NUM_LABELLED and features[i] not in there:
                chosen.append(i)
                there.add(features[i])
        numbers = torch.tensor(chosen, dtype=torch.long, device=nodes.features_N.device)
        controls = draw_controls(nodes, numbers, rng) if options.verify else numbers[:0]
        shown[layer] = Shown(numbers, controls)
    return shown


def _speaks(label: dict[str, Any] | None, activation: float) -> bool:
    return label is not None and activation > label["threshold"]


def _measure(subject: Subject, graph: Graph, layer: int, shown: Shown) -> Shown:
    nodes = graph.layers[layer].nodes.select(torch.cat([shown.numbers, shown.controls]))
    effects = switch_off(subject, nodes, _next_kept(subject, graph, layer))
    mine = graph.layers[layer].nodes.select(shown.numbers)
    return Shown(shown.numbers, shown.controls, effects, answers_if_off(subject, mine, effects.preferred_NP))


def _next_kept(subject: Subject, graph: Graph, layer: int) -> Nodes | None:
    following = [other for other in subject.layers if other > layer][:1]
    return graph.layers[following[0]].kept if following else None


@torch.no_grad()
def _read_layer(inputs: TraceInputs, subject: Subject, graph: Graph, layer: int, shown: Shown) -> LayerReading:
    kept_T, x_TD = subject.kept_T, subject.clean.x[layer][subject.kept_T]
    error_TD, f_TF = subject.clean.errors[layer][kept_T], subject.clean.features[layer][kept_T]
    variance = float((x_TD - x_TD.mean(0)).square().sum())
    return LayerReading(
        layer=layer,
        features=[_describe(inputs, graph.layers[layer], i, shown) for i in range(len(shown.numbers))],
        num_active=float((f_TF > 0).sum(1).float().mean()),
        num_nodes=len(graph.layers[layer].nodes),
        fvu=float(error_TD.square().sum()) / max(variance, 1e-12),
        error_effect=None if shown.effects is None else _measure_error(subject, layer),
    )


@torch.no_grad()
def _measure_error(subject: Subject, layer: int) -> float:
    """Change of the answer score when the reconstruction takes the place of the stream."""
    x_TD = subject.clean.x[layer] - subject.clean.errors[layer] * subject.kept_T[:, None]
    suffix = subject.model.after(layer)
    inputs = suffix.inputs(torch.tensor([subject.answer.ids]))
    logits = suffix.run(inputs, edits={layer: lambda _: x_TD[None]}, at=subject.answer.read_P).logits
    assert logits is not None
    return float(subject.answer.scores(logits).mean()) - float(np.mean(subject.scores))


def _describe(inputs: TraceInputs, layer: LayerNodes, i: int, shown: Shown) -> ActiveFeature:
    nodes, number = layer.nodes, int(shown.numbers[i])
    feature, own = int(nodes.features_N[number]), float(nodes.own_N[number])
    effects = [] if shown.effects is None else shown.effects.scores_NC[i].tolist()
    predicted = layer.predicted_NC[number].tolist()
    life = inputs.lives.get((nodes.layer, feature))
    return ActiveFeature(
        layer=nodes.layer,
        position=int(nodes.positions_N[number]),
        feature=feature,
        activation=own,
        off_value=float(nodes.off_N[number]),
        effect=float(np.mean(effects)) if effects else None,
        predicted_effect=float(np.mean(predicted)),
        effects=effects,
        predicted_effects=predicted,
        answer_if_off=shown.answers[i] if shown.answers else None,
        label=find_label(inputs, nodes.layer, feature, own),
        top_tokens=inputs.top_tokens.get((nodes.layer, feature), []),
        lifetime=None if life is None else (life[1], life[2]),
    )


def find_label(inputs: TraceInputs, layer: int, feature: int, activation: float) -> Label | None:
    """The feature's label, if it has one that speaks of so large an activation."""
    row = inputs.labels_of(layer).get(feature)
    if row is None or not _speaks(row, activation):
        return None
    return Label(text=row["label"], **{name: row[name] for name in Label.model_fields if name != "text"})


def _list_edges(graph: Graph, shown: Mapping[int, Shown]) -> list[TraceEdge]:
    """Edges from shown nodes to shown nodes of the next layer, with what was measured."""
    edges = []
    for layer, boundary in graph.boundaries.items():
        below, above = graph.layers[layer], graph.layers[_after(graph, layer)]
        column = {int(n): i for i, n in enumerate(below.kept_M)}
        row = {int(n): i for i, n in enumerate(above.kept_M)}
        wanted = [n for n in shown[above.nodes.layer].numbers.tolist() if n in row]
        for i, source in enumerate(shown[layer].numbers.tolist()):
            for target in wanted if source in column else []:
                if below.nodes.positions_N[source] > above.nodes.positions_N[target]:
                    continue
                step = float(below.nodes.off_N[source] - below.nodes.own_N[source])
                effects = shown[layer].effects
                edges.append(
                    TraceEdge(
                        source=_place(below.nodes, source),
                        target=_place(above.nodes, target),
                        predicted=step * float(boundary.per_unit[row[target], column[source]]),
                        measured=None if effects is None else float(effects.linear_NM[i, row[target]]),
                        measured_activation=None if effects is None else float(effects.activation_NM[i, row[target]]),
                    )
                )
    return edges


def _after(graph: Graph, layer: int) -> int:
    return min(other for other in graph.layers if other > layer)


def _place(nodes: Nodes, number: int) -> tuple[int, int, int]:
    return nodes.layer, int(nodes.positions_N[number]), int(nodes.features_N[number])


def _verify(
    inputs: TraceInputs, subject: Subject, baseline: Baseline, graph: Graph, shown: Mapping[int, Shown]
) -> Verification:
    predicted, measured, random_predicted, random_measured = [], [], [], []
    for layer, mine in shown.items():
        assert mine.effects is not None
        effects, n = mine.effects.scores_NC.cpu().numpy(), len(mine.numbers)
        both = graph.layers[layer].predicted_NC[torch.cat([mine.numbers, mine.controls])].cpu().numpy()
        predicted.append(both[:n])
        random_predicted.append(both[n:])
        measured.append(effects[:n])
        random_measured.append(effects[n:])
    noticeable = NOTICEABLE * abs(float(np.mean(subject.scores)))
    within, across = _edges_of(graph, shown)
    by_chance = np.concatenate(random_measured).mean(1)
    points, num_candidates = measure_faithfulness(subject, baseline, inputs.seed)
    replacement, completeness = measure_scores(subject, graph)
    largest = [NOTICEABLE * float(np.abs(edges[1]).max(initial=0)) for edges in (within, across)]
    return Verification(
        nodes=agree("shown features", np.concatenate(predicted), np.concatenate(measured), noticeable, inputs.seed),
        controls=agree(
            "random features",
            np.concatenate(random_predicted),
            np.concatenate(random_measured),
            noticeable,
            inputs.seed,
        ),
        within=agree("edges within a position", within[0], within[1], largest[0], inputs.seed),
        across=agree("edges between positions", across[0], across[1], largest[1], inputs.seed),
        random_effect=float(np.abs(by_chance).mean()) if len(by_chance) else 0.0,
        num_random=len(by_chance),
        faithfulness=points,
        num_candidates=num_candidates,
        random_draws=RANDOM_DRAWS,
        replacement=replacement,
        completeness=completeness,
    )


def _edges_of(graph: Graph, shown: Mapping[int, Shown]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a measured node that is kept and a kept feature of the next layer, within and between positions."""
    none = np.zeros((2, 0))
    sources, targets, predicted, effects = {}, {}, {}, {}
    for layer, boundary in graph.boundaries.items():
        mine, column = shown[layer], {int(n): i for i, n in enumerate(graph.layers[layer].kept_M)}
        assert mine.effects is not None
        rows = [i for i, n in enumerate(mine.numbers.tolist()) if n in column]
        columns = [column[int(mine.numbers[i])] for i in rows]
        sources[layer] = graph.layers[layer].nodes.select(mine.numbers[rows])
        targets[layer] = graph.layers[_after(graph, layer)].kept
        steps = (sources[layer].off_N - sources[layer].own_N)[:, None]
        predicted[layer] = (steps * boundary.per_unit[:, columns].T).cpu().numpy()
        effects[layer] = mine.effects.select(rows)
    within, across = split_edges(sources, targets, predicted, effects)
    return np.concatenate([none, *within], axis=1), np.concatenate([none, *across], axis=1)


def _targets(subject: Subject, scores: list[float]) -> list[Target]:
    answer, decode = subject.answer, subject.model.tokenizer.decode
    positions = answer.read_P[answer.targets_C].tolist()
    each = zip(
        positions,
        answer.tokens_C.tolist(),
        answer.against_C.tolist(),
        answer.probabilities_C.tolist(),
        scores,
        strict=True,
    )
    return [Target(position=p, text=decode([t]), against=decode([o]), probability=q, score=s) for p, t, o, q, s in each]


def _notes(subject: Subject, text: str, expected: str | None) -> list[str]:
    answer, notes = subject.answer, []
    if expected is not None and text.strip() != expected:
        notes.append(f"the model's answer is wrong: {text.strip()!r}, right is {expected!r}")
    if not answer.complete:
        notes.append(f"the answer was cut after {len(answer.answer_ids)} tokens")
    if not answer.answer_ids:
        notes.append("the model ends the text at once; effects are on its choice of the end")
    return notes


def check_prompt(prompt: str) -> None:
    """InputError if there is nothing to trace."""
    if not prompt.strip():
        raise InputError('the prompt is empty; give one in quotes, such as "What is 15 + 27?"')
