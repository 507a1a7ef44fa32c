"""Whether the nodes of largest influence are enough: the model with these alone, and the model without them.

    1. candidates: all features of all traced layers, at positions that are read, whose value differs from the baseline's
    2. rank: |sum over targets of (off - own) * W_dec . gradient|, the gradient integrated from text to baseline (`linearizing`)
    3. keep n of them; all other features take the baseline's values and the errors too; kept features are recomputed from what
       reaches them.   faithfulness(n) = (m(n) - m(0)) / (m(model) - m(0)), m the mean score of targets that the baseline changes
    4. the same for n nodes drawn at random; and completeness(n), the faithfulness of all candidates but these n
    (Marks et al. 2025, arXiv 2403.19647, sections 3 and 4; m(0) here is the baseline's own score, not an ablation of all there is)

With a counterfactual as the baseline n = 0 is the counterfactual's own run. "Active features at their mean" would leak which are
active: 44 % of the score with no node at all (so with the mean as the baseline all features take it, active or not).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.records import FaithfulnessPoint
from throughline.tracing.baselines import Baseline
from throughline.tracing.interventions import keep_only
from throughline.tracing.linearizing import answer_gradients
from throughline.tracing.texts import Subject

SIZES = (0, 4, 16, 64, 256)
SHARE_ACTIVE = 0.2  # of the active features: one more size
RANDOM_DRAWS = 3
LEAST_CHANGE = 0.5  # logits that the baseline has to cost a target, if faithfulness is to be a fraction of anything
ROWS_OF_A_PASS = 16

Masks = dict[int, Bool[Tensor, "B T F"]]


class Candidates:
    """The nodes of all layers in one order, and what keeping some of them does."""

    def __init__(self, subject: Subject, baseline: Baseline) -> None:
        """Rank the candidates by their integrated effects."""
        self.subject, self.baseline = subject, baseline
        self.places = {layer: baseline.differing(subject, layer).nonzero() for layer in subject.layers}  # [N, 2]
        self.counts = [len(places) for places in self.places.values()]
        gradients = answer_gradients(subject, baseline, "integrated")
        parts = []
        for layer, places in self.places.items():
            t, f = places.unbind(1)
            change_N = baseline.features[layer][t, f] - subject.clean.features[layer][t, f]
            along_CN = (gradients[layer][:, t] * subject.dictionaries[layer].W_dec[f]).sum(-1)
            parts.append((along_CN.mean(0) * change_N).abs())
        self.order = torch.cat(parts).argsort(descending=True, stable=True)

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.order)

    def run(self, chosen_BN: Bool[Tensor, "B N"]) -> Float[Tensor, "B P V"]:
        """The logits with only the chosen candidates kept, row by row."""
        parts = []
        for rows in chosen_BN.split(ROWS_OF_A_PASS):
            masks: Masks = {}
            for layer, mine in zip(self.places, rows.split(self.counts, dim=1), strict=True):
                masks[layer] = torch.zeros(len(rows), *self.subject.clean.features[layer].shape, dtype=torch.bool)
                masks[layer] = masks[layer].to(rows.device)
                t, f = self.places[layer].unbind(1)
                masks[layer][:, t, f] = mine
            parts.append(keep_only(self.subject, masks, self.baseline.features, self.baseline.errors))
        return torch.cat(parts)

    def first(self, num: int) -> Bool[Tensor, "N"]:
        """The `num` of highest rank."""
        chosen_N = torch.zeros(self.num, dtype=torch.bool, device=self.order.device)
        chosen_N[self.order[:num]] = True
        return chosen_N


def measure_faithfulness(subject: Subject, baseline: Baseline, seed: int) -> tuple[list[FaithfulnessPoint], int]:
    """The curves over sizes, n = 0 first and all candidates last, and how many candidates there are.

    [] if the baseline changes no target by LEAST_CHANGE logits: then there is nothing to explain.
    """
    candidates = Candidates(subject, baseline)
    active = sum(int((subject.clean.features[layer][subject.kept_T] > 0).sum()) for layer in subject.layers)
    sizes = sorted({n for n in (*SIZES, int(SHARE_ACTIVE * active)) if n < candidates.num} | {candidates.num})
    generator = torch.Generator().manual_seed(seed)
    drawn_sizes = sizes[1:-1]  # of none and of all there is one draw, which is the ranked one
    ranked = torch.stack([candidates.first(n) for n in sizes])
    drawn = [_draw(candidates.num, n, generator) for n in drawn_sizes for _ in range(RANDOM_DRAWS)]
    chosen = [ranked, ~ranked[1:-1], *(row[None].to(ranked.device) for row in drawn)]
    logits_BPV = candidates.run(torch.cat(chosen))
    answer = subject.answer
    scores_BC = answer.scores(logits_BPV)
    clean_C, none_C = torch.tensor(subject.scores, device=ranked.device), scores_BC[0]
    contested_C = clean_C - none_C >= LEAST_CHANGE
    if not bool(contested_C.any()):
        return [], candidates.num
    whole, none = clean_C[contested_C].mean(), none_C[contested_C].mean()
    part_B = ((scores_BC[:, contested_C].mean(1) - none) / (whole - none)).tolist()
    kept_B = answer.keeps(logits_BPV).float().tolist()
    k = len(sizes)
    without = [k - 1, *range(k, 2 * k - 2), 0]  # all but none is all, all but all is none
    points = []
    for i, n in enumerate(sizes):
        start = 2 * k - 2 + (i - 1) * RANDOM_DRAWS
        rows = [i] if i in (0, k - 1) else list(range(start, start + RANDOM_DRAWS))
        points.append(
            FaithfulnessPoint(
                num=n,
                faithfulness=part_B[i],
                completeness=part_B[without[i]],
                answer_kept=bool(kept_B[i]),
                random=sum(part_B[row] for row in rows) / len(rows),
                random_kept=sum(kept_B[row] for row in rows) / len(rows),
            )
        )
    return points, candidates.num


def _draw(num: int, size: int, generator: torch.Generator) -> Bool[Tensor, "N"]:
    chosen_N = torch.zeros(num, dtype=torch.bool)
    chosen_N[torch.randperm(num, generator=generator)[:size]] = True
    return chosen_N
