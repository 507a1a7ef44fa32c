"""Effects of the strongest nodes of a layer by gradients on their own way to "off", many nodes in one copy of the text.

The answer's lead bends over the step that a large feature takes, so that a gradient at the text itself misjudges it. The mean
gradient at two points of the node's own way does not, but one copy of the text for every node costs more than measuring it. Here
one copy serves a whole group:

    1. order the nodes by |effect| as the plain gradient has it; the strongest, as many as there are groups, go one to each, so do
       the next as many, and so on: no two of the strongest share a copy
    2. of the groups left in a round, a node takes the first without a node at its position yet, or else the first left; rounds run
       from the first group to the last and back in turn
    3. a copy of the text for every group and each of the two Gauss points of [0, 1]: the stream after the layer with all members
       that share of their ways to "off"; the model runs on from there, and one backward pass for every target
    4. a node's effect is its own step times the mean over the points of the gradient at its position; nodes in no group keep theirs

What members do to each other is the error, small because a strong node's companions are weak; without steps 1 and 2 it is several
times as large. A node whose effect the plain gradient does not see at all is in no group. Copies are computed from their first
changed position on. The longer the text the fewer groups; where even the fewest cost too much, they are smaller, and it is the
middle of the way alone.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from throughline.tracing.interventions import Nodes, batch_by_position, run_copies
from throughline.tracing.texts import Subject

POINTS = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)
MOST_GROUPS, FEWEST_GROUPS = 16, 6
TOKENS_OF_A_LAYER = 256  # in all its copies at two points


class Plan(NamedTuple):
    """How many groups a layer has, of how many nodes, and at which points of their ways."""

    num: int
    size: int = 8
    points: tuple[float, ...] = POINTS


LONG = Plan(num=4, size=4, points=(0.5,))  # for texts of which even the fewest groups are too much


def plan_copies(num_tokens: int) -> Plan:
    """The groups of each layer for a text of so many tokens."""
    num = min(MOST_GROUPS, TOKENS_OF_A_LAYER // (len(POINTS) * num_tokens))
    return Plan(num) if num >= FEWEST_GROUPS else LONG


def deal_groups(strength_N: Float[Tensor, "N"], positions_N: Int[Tensor, "N"], num: int, size: int) -> list[list[int]]:
    """At most `num` groups of at most `size` nodes each, the strongest first (steps 1 and 2)."""
    order = strength_N.argsort(descending=True, stable=True)[: num * size].tolist()
    positions = positions_N.tolist()
    groups: list[list[int]] = [[] for _ in range(min(num, len(order)))]
    for turn, start in enumerate(range(0, len(order), num)):
        free = list(range(len(groups)))
        if turn % 2:
            free.reverse()
        for node in order[start : start + num]:
            apart = (g for g in free if all(positions[other] != positions[node] for other in groups[g]))
            chosen = next(apart, free[0])
            free.remove(chosen)
            groups[chosen].append(node)
    return groups


def refine_effects(subject: Subject, nodes: Nodes, plain_NC: Float[Tensor, "N C"], plan: Plan) -> Float[Tensor, "N C"]:
    """Effects of one layer's nodes on each target: by groups for the strongest, `plain_NC` for the others."""
    groups = deal_groups(plain_NC.abs().mean(1), nodes.positions_N, plan.num, plan.size)
    if not groups:
        return plain_NC
    begins_G = torch.stack([nodes.positions_N[group].min() for group in groups])
    refined_NC = plain_NC.clone()
    for batch in batch_by_position(subject, begins_G):
        some = [groups[g] for g in batch.tolist()]
        members_M = [node for group in some for node in group]
        rows_M = torch.tensor([row for row, group in enumerate(some) for _ in group], device=plain_NC.device)
        refined_NC[members_M] = _run_groups(
            subject, nodes.select(torch.tensor(members_M)), rows_M, len(some), plan.points
        )
    return refined_NC


def _run_groups(
    subject: Subject, members: Nodes, rows_M: Int[Tensor, "M"], num_rows: int, points: tuple[float, ...]
) -> Float[Tensor, "M C"]:
    """Effects of the members of some groups, one group a row (steps 3 and 4)."""
    begin, steps_MD = int(members.positions_N.min()), members.steps(subject)
    at = (rows_M, members.positions_N - begin)
    start_SBRD = subject.clean.x[members.layer][begin:].repeat(len(points), num_rows, 1, 1)  # S points
    for start_BRD, point in zip(start_SBRD, points, strict=True):
        start_BRD.index_put_(at, point * steps_MD, accumulate=True)
    start_SBRD.requires_grad_()
    with torch.enable_grad():
        copies = run_copies(subject, members.layer, begin, start_SBRD.flatten(0, 1))
        scores_C = subject.answer.scores(copies.logits_BPV).sum(0)
        by_target = [torch.autograd.grad(score, start_SBRD, retain_graph=True)[0].mean(0) for score in scores_C]
    return torch.stack([(gradient_BRD[at] * steps_MD).sum(1) for gradient_BRD in by_target], dim=1)
