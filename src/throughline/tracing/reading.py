"""Read one prompt layer by layer: which features are active, what passes between layers, and what the answer owes to each.

1. the model answers; every token of the answer is a target, or the next token where it is no answer (`answer`)
2. "off" is settled: a counterfactual prompt, the mean at the same kind of position, or zero (`baselines`)
3. the graph: predicted effects of all nodes on the targets, and edges between those that matter (`graph`, `linearizing`,
   `grouping`)
4. the nodes of largest influence are shown, and the strongest chains of them (`chains`)
5. verification: every shown node is switched off in the real model, as is a random one beside it; edges, chains and the
   faithfulness of the most influential nodes are measured too (`interventions`, `verifying`, `faithfulness`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from throughline.errors import InputError
from throughline.models import LanguageModel
from throughline.records import ActiveFeature, LayerReading, Target, Trace, TraceEdge
from throughline.text import check_prompt
from throughline.tokens import encode_prompt
from throughline.tracing.answer import Answer, find_answer, name_answer, next_token, spell
from throughline.tracing.baselines import OffKind, find_baseline
from throughline.tracing.graph import Graph, LayerNodes, build_graph
from throughline.tracing.inputs import TraceInputs
from throughline.tracing.interventions import Nodes
from throughline.tracing.linearizing import Linearization
from throughline.tracing.showing import Shown, choose_shown, measure_shown
from throughline.tracing.steering import Setting, check_settings, steer
from throughline.tracing.telling import tell_chains
from throughline.tracing.texts import Subject, find_subject
from throughline.tracing.verifying import verify


@dataclass(frozen=True)
class TraceOptions:
    """How a prompt is traced."""

    num_features: int = 6  # shown per layer
    most_answer_tokens: int = 8
    off: OffKind | None = None  # None: a counterfactual where one can be made, or else the mean
    against: str | None = None  # a counterfactual prompt
    linearization: Linearization = "grouped"
    share: float = 0.8  # of each layer's influence that the kept nodes carry
    most_nodes: int = 24  # kept per layer
    num_chains: int = 3  # per target
    verify: bool = True
    settings: tuple[Setting, ...] = ()  # features set by hand
    whole: bool = True  # explain all of the answer, if the model ends it by itself; False: the next token
    chat: bool = False  # the prompt is put into the model's chat template
    answer: str | None = None  # the answer to explain, whether the model gives it or not
    rival: str | None = None  # what it is held against


Tell = Callable[[str, int, int], None]  # what is done now, the number of that step, and how many there are


def tell_nobody(doing: str, step: int, num_steps: int) -> None:
    """Take no notice."""


def trace_prompt(
    inputs: TraceInputs, prompt: str, options: TraceOptions, expected: str | None = None, tell: Tell = tell_nobody
) -> Trace:
    """The layered reading of `prompt`.

    Special tokens are not read. `tell` is told of each step before it begins; what it raises ends the trace. Raises InputError if
    the prompt is empty or does not fit the model's context, or if the baseline asked for cannot be had.
    """
    model = inputs.model
    check_prompt(prompt)
    asked, prompt = prompt, put_in_chat(model, prompt) if options.chat else prompt
    tokens = encode_prompt(model.tokenizer, prompt)
    said = find_answer(model, [t.id for t in tokens], options.most_answer_tokens)
    explains, answer = _choose_answer(model, prompt, said, options)
    subject = find_subject(model, inputs.dictionaries, prompt, tokens, answer)
    check_settings(subject, options.settings)
    baseline = find_baseline(subject, options.off, options.against, inputs.role_means)
    if baseline.others_C is not None and options.rival is None:
        subject = subject.held_against(baseline.others_C)
    num_steps = 2 + (len(subject.layers) + 1 if options.verify else 0)
    tell("predicting effects", 1, num_steps)
    graph = build_graph(subject, baseline, options.linearization, options.share, options.most_nodes)
    shown = choose_shown(inputs, prompt, graph, options.num_features, options.verify)
    if options.verify:
        for step, layer in enumerate(subject.layers, 2):
            tell(f"switching features of layer {layer} off", step, num_steps)
            shown[layer] = measure_shown(subject, graph, layer, shown[layer])
        tell("measuring how faithful the strongest nodes are", num_steps - 1, num_steps)
        verification = verify(subject, baseline, graph, shown, inputs.seed)
    else:
        verification = None
    tell("following chains", num_steps, num_steps)
    scores = subject.scores
    text = spell(model, answer.prompt_ids, answer.answer_ids).strip()
    says = spell(model, said.prompt_ids, said.answer_ids).strip()
    correct = None if expected is None else is_answer(says, expected, said.complete)
    return Trace(
        model=model.name,
        prompt=prompt,
        tokens=[(token.id, token.text, token.start, token.end) for token in subject.tokens],
        num_prompt_tokens=len(tokens),
        asked=asked if options.chat else None,
        answer=text,
        explains=explains,
        says=says if says != text else None,
        answer_probability=answer.probability,
        complete=answer.complete,
        expected=expected,
        correct=correct,
        score=float(np.mean(scores)),
        targets=_targets(subject, scores),
        off_kind=baseline.kind,
        off=baseline.words,
        against=baseline.prompt,
        linearization=options.linearization,
        layers=[_read_layer(inputs, subject, graph, layer, shown[layer]) for layer in subject.layers],
        edges=_list_edges(graph, shown),
        chains=tell_chains(inputs, subject, graph, options.num_chains, options.verify),
        verification=verification,
        steering=steer(inputs, subject, baseline, options.settings) if options.settings else None,
        forced=inputs.forced,
        notes=_notes(said, says, expected if correct is False else None, explains, options.whole),
    )


def put_in_chat(model: LanguageModel, prompt: str) -> str:
    """The text that the model's chat template makes of a user's words; InputError if it has none."""
    if not model.tokenizer.chat_template:
        raise InputError(f"{model.name} has no chat template; trace the prompt as it is, without --chat")
    words = [{"role": "user", "content": prompt}]
    return model.tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)


def is_answer(says: str, expected: str, complete: bool) -> bool:
    """Whether what the model says is the expected answer, or begins with it where the model was cut short."""
    if complete or not says.startswith(expected):
        return says == expected
    return not says[len(expected) :][:1].isalnum()


def _choose_answer(
    model: LanguageModel, prompt: str, said: Answer, options: TraceOptions
) -> tuple[Literal["answer", "next token", "named"], Answer]:
    if options.answer is not None or options.rival is not None:
        return "named", name_answer(model, prompt, said, options.answer, options.rival)
    return ("answer", said) if options.whole and said.complete else ("next token", next_token(model, said))


@torch.no_grad()
def _read_layer(inputs: TraceInputs, subject: Subject, graph: Graph, layer: int, shown: Shown) -> LayerReading:
    read_T = subject.ordinary_T(layer)
    x_TD, error_TD, f_TF = (
        part[layer][read_T] for part in (subject.clean.x, subject.clean.errors, subject.clean.features)
    )
    variance = float((x_TD - x_TD.mean(0)).square().sum())
    return LayerReading(
        layer=layer,
        features=[_describe(inputs, graph.layers[layer], i, shown) for i in range(len(shown.numbers))],
        num_active=float((f_TF > 0).sum(1).float().mean()),
        num_sinks=int(subject.sinks_T(layer).sum()),
        num_nodes=len(graph.layers[layer].nodes),
        fvu=float(error_TD.square().sum()) / max(variance, 1e-12),
        error_effect=None if shown.effects is None else _measure_error(subject, layer),
    )


@torch.no_grad()
def _measure_error(subject: Subject, layer: int) -> float:
    """Change of the answer score when the reconstruction takes the place of the stream."""
    x_TD = subject.clean.x[layer] - subject.clean.errors[layer] * subject.ordinary_T(layer)[:, None]
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
        label=inputs.find_label(nodes.layer, feature, own),
        top_tokens=inputs.top_tokens.get((nodes.layer, feature), []),
        lifetime=None if life is None else (life[1], life[2]),
    )


def _list_edges(graph: Graph, shown: Mapping[int, Shown]) -> list[TraceEdge]:
    """Edges from shown nodes to shown nodes of the next layer, with what was measured."""
    edges = []
    for layer, boundary in graph.boundaries.items():
        below, above = graph.layers[layer], graph.layers[boundary.to]
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


def _place(nodes: Nodes, number: int) -> tuple[int, int, int]:
    return nodes.layer, int(nodes.positions_N[number]), int(nodes.features_N[number])


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


def _notes(said: Answer, says: str, missed: str | None, explains: str, whole: bool) -> list[str]:
    """`missed` is the right answer, if the model does not give it; `whole` says whether all of an answer was wanted."""
    notes = []
    if missed is not None:
        notes.append(f"the model's answer is wrong: {says!r}, right is {missed!r}")
    if whole and not said.complete and explains == "next token":
        notes.append(
            f"the model had not ended its answer after {len(said.answer_ids)} tokens, so the next token is explained"
        )
    if not said.answer_ids and explains != "named":
        notes.append("the model ends the text at once; effects are on its choice of the end")
    return notes
