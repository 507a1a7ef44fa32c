"""The graph file has circuit-tracer's fields and types, and says what the trace says."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from synthetic_run import MODELS, make_trace
from throughline.circuit_tracer import write_circuit_tracer
from throughline.records import Trace, TraceEdge


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: int


class _Selection(_Strict):
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class _Node(_Strict):
    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    jsNodeId: str
    clerp: str
    influence: float | None
    activation: float | None


class _Link(_Strict):
    source: str
    target: str
    weight: float


class _GraphFile(_Strict):
    """The fields of circuit-tracer's file, schema version 1, each with its type and no other."""

    metadata: _Metadata
    qParams: _Selection
    nodes: list[_Node]
    links: list[_Link]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(MODELS[0])


@pytest.fixture(scope="module")
def graph(trace: Trace) -> _GraphFile:
    return _GraphFile.model_validate_json(json.dumps(write_circuit_tracer(trace), allow_nan=False))


def _of(graph: _GraphFile, kind: str) -> list[_Node]:
    return [node for node in graph.nodes if node.feature_type == kind]


def test_every_link_joins_two_nodes_and_no_node_is_there_twice(graph: _GraphFile):
    names = [node.node_id for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert {end for link in graph.links for end in (link.source, link.target)} <= set(names)
    assert set(graph.qParams.pinnedIds) <= set(names)
    together = [name for _, *members in graph.qParams.supernodes for name in members]
    assert together and len(set(together)) == len(together) and set(together) <= set(names)


def test_nodes_are_the_features_tokens_and_targets(graph: _GraphFile, trace: Trace):
    kinds = {node.feature_type for node in graph.nodes}
    assert kinds == {"cross layer transcoder", "embedding", "logit"}
    shown = _of(graph, "cross layer transcoder")
    assert [(n.layer, n.ctx_idx, n.activation) for n in shown] == [
        (str(f.layer), f.position, f.activation) for f in trace.features
    ]
    for node, f in zip(shown, trace.features, strict=True):
        assert node.node_id == f"{f.layer}_{f.feature}_{f.position}"
        assert node.feature == (f.layer + f.feature) * (f.layer + f.feature + 1) // 2 + f.feature  # Cantor's pairing
        assert node.clerp == (f.label.text if f.label else "unlabelled: ' 1' '5' '$'")
    assert [n.clerp for n in _of(graph, "embedding")] == graph.metadata.prompt_tokens
    logits = _of(graph, "logit")
    assert [n.clerp for n in logits] == ['Output " 4" (p=0.990)', 'Output "2" (p=0.970)']
    assert [n.feature for n in logits] == [trace.tokens[t.position + 1][0] for t in trace.targets]
    assert {n.layer for n in logits} == {str(MODELS[0].num_layers + 1)}


def test_links_are_what_a_source_gives(graph: _GraphFile, trace: Trace):
    weights = {(link.source, link.target): link.weight for link in graph.links}
    edge = trace.edges[0]
    name = "{0}_{2}_{1}".format
    assert weights[name(*edge.source), name(*edge.target)] == -edge.predicted
    last = trace.layers[-1].features[1]
    for node, predicted in zip(_of(graph, "logit"), last.predicted_effects, strict=True):
        assert weights[f"{last.layer}_{last.feature}_{last.position}", node.node_id] == -predicted
    assert len(weights) == len(trace.edges) + 2 * len(trace.layers[-1].features)


def test_influence_keeps_the_strongest_under_a_threshold(graph: _GraphFile, trace: Trace):
    strength = [sum(map(abs, f.predicted_effects)) for f in trace.features]
    shares = [node.influence for node in _of(graph, "cross layer transcoder")]
    strongest = max(range(len(strength)), key=strength.__getitem__)
    assert shares[strongest] == pytest.approx(strength[strongest] / sum(strength)) == min(shares, key=lambda s: s or 0)
    assert max(share or 0 for share in shares) == pytest.approx(1)


def test_errors_named_by_edges_are_nodes_of_their_own(trace: Trace):
    to = trace.edges[0].target
    edges = [*trace.edges, TraceEdge(source=(0, to[1], -1), target=to, predicted=0.5)]
    changed = trace.model_copy(update={"edges": edges})
    graph = _GraphFile.model_validate(write_circuit_tracer(changed))
    (error,) = _of(graph, "mlp reconstruction error")
    assert (error.node_id, error.feature, error.layer, error.ctx_idx) == (f"0_-1_{to[1]}", -1, "0", to[1])
    assert graph.links[len(trace.edges)].weight == -0.5


def test_a_trace_that_was_not_verified_and_ends_at_once_has_a_graph_too(trace: Trace):
    bare: dict[str, Any] = {"tokens": trace.tokens[:8], "chains": [], "edges": []}
    graph = _GraphFile.model_validate(
        write_circuit_tracer(make_trace(MODELS[0], verified=False).model_copy(update=bare))
    )
    # What follows is no token of the trace; each has a number of its own, which no token has.
    assert [(node.feature, node.ctx_idx) for node in _of(graph, "logit")] == [(-1, 7), (-2, 8)]
    assert graph.qParams.pinnedIds == []
