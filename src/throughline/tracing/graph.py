"""The graph of one prompt: which nodes matter, and what passes from each traced layer to the next.

    1. nodes of a layer: features at positions whose value differs from "off", and the reconstruction error at every position
    2. predicted effect of a node on each target: (off - own) * W_dec . gradient of the target's score (`linearizing`); with
       grouped gradients those of a layer's strongest nodes are taken on their own way to "off" (`grouping`)
    3. a layer keeps the nodes with the largest |effect| (mean over targets) that together carry the chosen share of the layer's
       sum, at most so many
    4. edge a -> b between kept nodes of consecutive traced layers: per unit of a, W_dec[a] . gradient of b's activation at a's
       position; times (off - own) of a it is the change of b's activation when a is off

Layer i + 1 depends on layer i alone, so features and errors of adjacent layers explain everything and no edge skips a layer. Memory
is that of one boundary at a time: gradients of the kept features of one layer, [kept, T, D].

    replacement    of the answer's influence followed down to the first traced layer, the share that arrives there through
                   features and not through errors
    completeness   the share of a node's incoming influence that is not from errors, weighted by the node's own
    (Ameisen et al. 2025, "Circuit Tracing: Methods"; influences are |activation * gradient|, normalised over each target's sources.
    What features that were not kept pass on is taken to be divided as with those that were.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.pools import spread
from throughline.tracing.baselines import Baseline
from throughline.tracing.grouping import plan_copies, refine_effects
from throughline.tracing.interventions import Nodes
from throughline.tracing.linearizing import Linearization, answer_gradients, feature_gradients
from throughline.tracing.texts import Subject


@dataclass(frozen=True)
class LayerNodes:
    """All nodes of a layer, their predicted effects on the targets, and which of them are kept, strongest first."""

    nodes: Nodes
    predicted_NC: Float[Tensor, "N C"]
    per_unit_NC: Float[Tensor, "N C"]  # for a step of one along each decoder row, by the gradient at the text
    errors_TC: Float[Tensor, "T C"]  # of the error nodes, if they took their baseline's values
    inputs_TC: Float[Tensor, "T C"]  # error times gradient, for the scores of the graph
    kept_M: Int[Tensor, "M"]

    @property
    def influence_N(self) -> Float[Tensor, "N"]:
        """Mean |effect| over targets."""
        return self.predicted_NC.abs().mean(1)

    @property
    def kept(self) -> Nodes:
        """The kept nodes."""
        return self.nodes.select(self.kept_M)


class Boundary(NamedTuple):
    """What passes from the kept nodes of a layer [M] to those of the next [M2]; rows are targets."""

    to: int  # the next layer
    per_unit: Float[Tensor, "M2 M"]
    share_features: Float[Tensor, "M2"]  # of |activation * gradient| over all sources; the rest comes from errors
    shares: Float[Tensor, "M2 M"]  # of the kept sources


@dataclass(frozen=True)
class Graph:
    """Nodes by layer, and boundaries by the layer below them."""

    layers: Mapping[int, LayerNodes]
    boundaries: Mapping[int, Boundary]


def build_graph(subject: Subject, baseline: Baseline, how: Linearization, share: float, most: int) -> Graph:
    """The graph of the subject, with at most `most` nodes kept by layer."""
    gradients = answer_gradients(subject, baseline, how)
    layers = {layer: _find_nodes(subject, baseline, layer, gradients[layer]) for layer in subject.layers}
    if how == "grouped":
        layers = _regroup(subject, layers)
    layers = {
        layer: replace(mine, kept_M=choose_share(mine.influence_N, share, most)) for layer, mine in layers.items()
    }
    pairs = zip(subject.layers, subject.layers[1:], strict=False)
    boundaries = {a: _connect(subject, baseline, how, layers[a], layers[b]) for a, b in pairs}
    return Graph(layers, boundaries)


@torch.no_grad()
def _find_nodes(subject: Subject, baseline: Baseline, layer: int, gradient_CTD: Tensor) -> LayerNodes:
    """The layer's nodes, all of them kept."""
    own_TF, off_TF = subject.clean.features[layer], baseline.features[layer]
    positions_N, features_N = baseline.nodes(subject, layer).nonzero(as_tuple=True)
    at = (positions_N, features_N)
    nodes = Nodes(layer, positions_N, features_N, own_TF[at], off_TF[at])
    rows_ND = subject.dictionaries[layer].W_dec[features_N]
    per_unit_NC = torch.einsum("nd,cnd->nc", rows_ND, gradient_CTD[:, positions_N])
    predicted_NC = (nodes.off_N - nodes.own_N)[:, None] * per_unit_NC
    error_TD = subject.clean.errors[layer] * subject.kept_T[:, None]
    change_TD = (baseline.errors[layer] - subject.clean.errors[layer]) * subject.kept_T[:, None]
    return LayerNodes(
        nodes,
        predicted_NC,
        per_unit_NC,
        torch.einsum("td,ctd->tc", change_TD, gradient_CTD),
        torch.einsum("td,ctd->tc", error_TD, gradient_CTD),
        torch.arange(len(nodes), device=positions_N.device),
    )


def _regroup(subject: Subject, layers: Mapping[int, LayerNodes]) -> dict[int, LayerNodes]:
    """The same with effects by grouped gradients."""
    plan = plan_copies(len(subject.answer.ids))
    _ = subject.past  # found here once, not by each thread

    def refine(mine: LayerNodes) -> LayerNodes:
        return replace(mine, predicted_NC=refine_effects(subject, mine.nodes, mine.predicted_NC, plan))

    return dict(zip(layers, spread(refine, layers.values(), subject.model.device), strict=True))


def choose_share(influence_N: Float[Tensor, "N"], share: float, most: int) -> Int[Tensor, "M"]:
    """The fewest entries that together have `share` of the sum, largest first, at most `most`."""
    order = influence_N.argsort(descending=True, stable=True)
    before = influence_N[order].cumsum(0) - influence_N[order]
    return order[before < share * influence_N.sum()][:most]


def _connect(
    subject: Subject, baseline: Baseline, how: Linearization, below: LayerNodes, above: LayerNodes
) -> Boundary:
    targets, sources = above.kept, below.kept
    gradients_NTD = feature_gradients(
        subject, baseline, how, sources.layer, targets.layer, targets.positions_N, targets.features_N
    )
    with torch.no_grad():
        W_dec = subject.dictionaries[sources.layer].W_dec
        per_unit = torch.einsum("md,nmd->nm", W_dec[sources.features_N], gradients_NTD[:, sources.positions_N])
        return Boundary(targets.layer, per_unit, *_divide(subject, sources, gradients_NTD, per_unit))


def _divide(subject: Subject, sources: Nodes, gradients_NTD: Tensor, per_unit: Tensor) -> tuple[Tensor, Tensor]:
    """How each target's incoming influence is divided: the share of all features, and that of each kept source."""
    layer, kept_T = sources.layer, subject.kept_T
    f_TF = subject.clean.features[layer]
    all_features_N = torch.zeros(len(gradients_NTD), device=f_TF.device)
    for t in kept_T.nonzero()[:, 0].tolist():
        active_K = (f_TF[t] > 0).nonzero()[:, 0]
        along_NK = gradients_NTD[:, t] @ subject.dictionaries[layer].W_dec[active_K].T
        all_features_N += (along_NK * f_TF[t, active_K]).abs().sum(1)
    errors_NT = torch.einsum("td,ntd->nt", subject.clean.errors[layer] * kept_T[:, None], gradients_NTD)
    total_N = (all_features_N + errors_NT.abs().sum(1)).clamp_min(1e-30)
    return all_features_N / total_N, (per_unit * sources.own_N).abs() / total_N[:, None]


@torch.no_grad()
def measure_scores(subject: Subject, graph: Graph) -> tuple[float, float]:
    """Replacement and completeness of the graph."""
    top = graph.layers[subject.layers[-1]]
    influence_N = (top.per_unit_NC * top.nodes.own_N[:, None]).abs().mean(1)
    errors = float(top.inputs_TC.abs().mean(1).sum())
    arrived = float(influence_N.sum())
    total = arrived + errors
    if total == 0:
        return 1.0, 1.0
    through, weights = arrived / total, [1.0]
    explained = [through]
    mass_M = influence_N[top.kept_M] / influence_N[top.kept_M].sum().clamp_min(1e-30) * through
    for layer in reversed(subject.layers[:-1]):
        boundary = graph.boundaries[layer]
        explained.append(float((mass_M * boundary.share_features).sum()))
        weights.append(float(mass_M.sum()))
        through = explained[-1]
        below_M = mass_M @ boundary.shares
        mass_M = below_M / below_M.sum().clamp_min(1e-30) * through
    return through, sum(explained) / sum(weights)
