"""A trace as the graph file of circuit-tracer, which its viewer and Neuronpedia's open.

    1. nodes: the features shown, the reconstruction errors that edges name, every token (type "embedding"), every target ("logit")
    2. links: what the source's own value, against that when off, gives to the target: minus the predicted change when it is
       switched off. Between features those of the trace; from features of the last traced layer to the targets, their effects
    3. chains: their nodes are pinned, their steps of several layers are supernodes

Layers are residual streams after a block, not MLPs: the file has no type of its own for that, so features are called "cross layer
transcoder" and errors "mlp reconstruction error", the only types its viewers draw. A trace has no links from tokens to features of
the first layer, and names no errors that it has no links of.
(Fields: circuit_tracer/frontend/graph_models.py of decoderesearch/circuit-tracer, schema version 1.)
"""

import re
from collections.abc import Iterator
from typing import Any

from throughline.records import ActiveFeature, Place, Target, Trace

ERROR = -1  # the feature number of a reconstruction error, here as in the records


def write_circuit_tracer(trace: Trace) -> dict[str, Any]:
    """The graph file's JSON value: `metadata`, `qParams`, `nodes` and `links`.

    A link's `weight` is positive where the source supports the target, in units of the target's activation, or in logits. A node's
    `influence` is the share of all nodes' |predicted effects| that it and the stronger ones have, so that the viewer's threshold
    keeps the strongest. The viewer asks for examples of features by the name in `scan`; what it does not find it leaves out.
    """
    nodes = [*_feature_nodes(trace), *_error_nodes(trace), *_token_nodes(trace), *_target_nodes(trace)]
    name = _slug(trace.model)
    return {
        "metadata": {
            "slug": f"{name}-{_slug(trace.prompt)}"[:80].rstrip("-"),
            "scan": name,
            "transcoder_list": [],
            "prompt_tokens": [text for _, text, _, _ in trace.tokens],
            "prompt": trace.prompt,
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": _selection(trace, {node["node_id"] for node in nodes}),
        "nodes": nodes,
        "links": [*_links(trace), *_target_links(trace)],
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "trace"


def _node(node_id: str, feature: int, layer: str, position: int, kind: str, js_id: str, **more: Any) -> dict[str, Any]:
    """One node; fields that its kind does not use have the values that the format gives them."""
    usual = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": ""}
    named = {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind}
    return named | usual | {"jsNodeId": js_id, "influence": None, "activation": None} | more


def _name(place: Place) -> str:
    layer, position, feature = place
    return f"{layer}_{feature}_{position}"


def _feature_nodes(trace: Trace) -> Iterator[dict[str, Any]]:
    carried = _carried(trace.features)
    for f in trace.features:
        yield _node(
            _name((f.layer, f.position, f.feature)),
            _pair(f.layer, f.feature),
            str(f.layer),
            f.position,
            "cross layer transcoder",
            f"{f.layer}_{f.feature}-0",  # the same wherever the feature is active
            clerp=f.label.text if f.label else "unlabelled: " + " ".join(map(repr, f.top_tokens[:3])),
            influence=carried[(f.layer, f.position, f.feature)],
            activation=f.activation,
        )


def _pair(x: int, y: int) -> int:
    """Cantor's number of a pair, which the format has for a layer's feature."""
    return (x + y) * (x + y + 1) // 2 + y


def _carried(features: list[ActiveFeature]) -> dict[Place, float]:
    """By place, the share of the sum of mean |predicted effect| over targets that it and all stronger ones have."""
    strength = {(f.layer, f.position, f.feature): sum(map(abs, f.predicted_effects)) for f in features}
    total, so_far, carried = sum(strength.values()) or 1.0, 0.0, {}
    for place in sorted(strength, key=lambda place: (-strength[place], place)):
        so_far += strength[place]
        carried[place] = min(1.0, so_far / total)
    return carried


def _error_nodes(trace: Trace) -> Iterator[dict[str, Any]]:
    ends = {end for edge in trace.edges for end in (edge.source, edge.target) if end[2] == ERROR}
    for layer, position, feature in sorted(ends):
        name = _name((layer, position, feature))
        kind = "mlp reconstruction error"
        yield _node(name, ERROR, str(layer), position, kind, f"{layer}_{ERROR}-{position}")


def _token_nodes(trace: Trace) -> Iterator[dict[str, Any]]:
    for position, (number, text, _, _) in enumerate(trace.tokens):
        js_id = f"E_{number}-{position}"
        yield _node(f"E_{number}_{position}", position, "E", position, "embedding", js_id, clerp=text)


def _target_nodes(trace: Trace) -> Iterator[dict[str, Any]]:
    for i, target in enumerate(trace.targets):
        number = _token_of(trace, target, i)
        yield _node(
            _target_name(trace, i),
            number,
            _target_layer(trace),
            target.position,
            "logit",
            f"L_{number}-{target.position}",
            clerp=f'Output "{target.text}" (p={target.probability:.3f})',
            token_prob=target.probability,
            is_target_logit=True,
        )


def _target_layer(trace: Trace) -> str:
    """One more than the number of layers, which is what viewers expect of logits."""
    return str(trace.layers[-1].layer + 2)


def _target_name(trace: Trace, i: int) -> str:
    target = trace.targets[i]
    return f"{_target_layer(trace)}_{_token_of(trace, target, i)}_{target.position}"


def _token_of(trace: Trace, target: Target, i: int) -> int:
    """The id of a target's token: that after its position; a number below zero for the end of the text, which is not shown."""
    following = trace.tokens[target.position + 1 :][:1]
    return following[0][0] if following else -1 - i


def _links(trace: Trace) -> Iterator[dict[str, Any]]:
    known = {(f.layer, f.position, f.feature) for f in trace.features}
    for edge in trace.edges:
        ends = (edge.source, edge.target)
        if edge.predicted and all(end in known or end[2] == ERROR for end in ends):
            yield {"source": _name(edge.source), "target": _name(edge.target), "weight": -edge.predicted}


def _target_links(trace: Trace) -> Iterator[dict[str, Any]]:
    for f in trace.layers[-1].features:
        for i, predicted in enumerate(f.predicted_effects):
            if predicted:  # nothing goes to a target before the feature
                source = _name((f.layer, f.position, f.feature))
                yield {"source": source, "target": _target_name(trace, i), "weight": -predicted}


def _selection(trace: Trace, known: set[str]) -> dict[str, Any]:
    """What the viewer opens with: nodes of chains pinned, those of one step together under its label."""
    pinned, together = dict[str, None](), dict[tuple[str, ...], str]()
    for chain in trace.chains:
        for step in chain.steps:
            names = tuple(name for name in map(_name, step.features) if name in known)
            pinned |= dict.fromkeys(names)
            if len(names) > 1:
                together.setdefault(names, step.label)
        pinned[_target_name(trace, chain.target)] = None
    seen, supernodes = set[str](), []
    for names, label in together.items():
        if seen.isdisjoint(names):  # a node can be in one supernode only
            seen.update(names)
            supernodes.append([label, *names])
    return {"pinnedIds": list(pinned), "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}
