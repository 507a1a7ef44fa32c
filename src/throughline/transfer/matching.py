"""Matching: which feature of another layer or model fires with this one.

    1. tokens of the two models are aligned where they end
    2. r[u, v] = Pearson's correlation of activations over the aligned tokens; the partner of u is argmax_v r[u, v]
    3. chance: the same with the target's tokens taken from another document, at the same place of it; calibrating.py makes a
       threshold of it
    4. null: the share that passes the threshold when nothing is known but the kind of position: tokens shuffled among those
       of the same role in both models (number in the question, word in the answer, …), in the mean over all shuffles
    5. ceiling: the share that passes the same threshold between the source layer and its twin, a dictionary of that layer from
       another seed; of several twins the mean. Twins are not matched with each other: it is the features of the layer's own
       dictionary that are looked for elsewhere, so the ceiling is how many of these another seed finds
    6. MPPC, across models: the partner of u in whichever layer of the other model correlates most

Features that fire on fewer than `min_count` aligned tokens are left out: two rare features that meet once correlate perfectly.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.errors import InputError
from throughline.records import NULL_QUANTILE, TransferInfo, TransferResult
from throughline.transfer.calibrating import Cell, Evidence, best_of_all_layers, judge, num_shifts
from throughline.transfer.cooccurrence import (
    Best,
    Grouped,
    Moments,
    SourceFeatures,
    TargetTokens,
    best_by_chance,
    best_by_groups,
    live_features,
    relate,
)
from throughline.transfer.decoders import compare_decoders
from throughline.transfer.gates import AND, OR, STRENGTH, find_gates
from throughline.transfer.pairs import Aligned, Side, align, shift_documents

MOST_ASSIGNED = 2048  # features of a layer up to which an optimal assignment is computed, in cubic time
OF_PAIRS = (
    *("value", "low", "high", "null", "threshold", "mutual", "strict", "assigned", "and_gates", "or_gates"),
    *("mean_correlation", "mean_low", "mean_high", "null_correlation"),
)
CEILINGS = ("ceiling", "ceiling_low", "ceiling_high", "ceiling_mutual", "ceiling_correlation")
SPREADS = ("num_twins", *(f"{name}_{end}" for name in (CEILINGS[0], *CEILINGS[3:]) for end in ("min", "max")))
OF_DECODERS = ("cosine_agrees", "folded_agrees", "mean_cosine", "pw_mcc", "pw_mcc_by_mass")
OF_FEATURES = ("correlation", "chance", "sufficiency", "necessity", "jaccard", "cosine")


class Found(NamedTuple):
    """One direction of a pair of layers: ids of the live source features; and if there are any on both sides what tells matches
    from chance, further numbers, arrays by live feature, and gates."""

    live: np.ndarray
    evidence: Evidence | None
    numbers: dict[str, float]
    arrays: dict[str, np.ndarray]
    gates: np.ndarray


class Matching:
    """Share of live source features whose best partner in the target layer is above the null."""

    name = "matching"
    across_models = True
    both_ways = True

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """Both directions. Arrays [Ls, Lt] named in OF_PAIRS, CEILINGS (with twins), SPREADS (with several of a layer) and
        OF_DECODERS (NaN across models);
        [Ls, Lt, F] in OF_FEATURES and `partner`; live [Ls, F]; gates [n, 6]: source layer, target layer, kind, target feature,
        its two parents; across models those of `best_of_all_layers`. docs/measures.md says what each is."""
        aligned = align(source.codes, target.codes)
        num_documents = len(np.unique(source.codes.documents_N[aligned.source_N]))
        if num_documents < 2:
            raise InputError(
                f"matching needs two held-out documents or more, found {num_documents}; raise evaluation.tokens, or give more text"
            )
        there, back = _Direction(source, target), _Direction(target, source)
        for i, j, forward, backward in _match_models(source, target, aligned, min_count):
            there.put(i, j, forward)
            back.put(j, i, backward)
            if source.model == target.model:
                there.put(j, i, backward)
        there.put_twins(aligned.source_N, min_count)
        if source.model == target.model:
            return [there.result(aligned, num_documents, min_count, seed)]
        back.put_twins(aligned.target_N, min_count)
        return [
            there.result(aligned, num_documents, min_count, seed),
            back.result(
                aligned.reversed(source.codes.num_tokens, target.codes.num_tokens), num_documents, min_count, seed
            ),
        ]


class _Direction:
    """The result of one direction while it is gathered."""

    def __init__(self, source: Side, target: Side) -> None:
        self._source, self._target = source, target
        self._gates: list[np.ndarray] = []
        self._evidence: dict[Cell, Evidence] = {}
        self._twins: dict[int, list[Evidence]] = {}
        shape = (len(source.dictionaries), len(target.dictionaries))
        width = max((d.d_sae for d in source.dictionaries.values()), default=0)
        self.arrays: dict[str, np.ndarray] = {
            name: np.full(shape, np.nan) for name in (*OF_PAIRS, *CEILINGS, *SPREADS, *OF_DECODERS)
        }
        for name in OF_FEATURES:
            self.arrays[name] = np.full((*shape, width), np.nan, dtype=np.float32)
        self.arrays["partner"] = np.full((*shape, width), -1, dtype=np.int32)
        self.arrays["live"] = np.zeros((shape[0], width), dtype=bool)

    def put(self, i: int, j: int, found: Found) -> None:
        """What was found of source layer i and target layer j."""
        self.arrays["live"][i, found.live] = True
        if found.evidence:
            self._evidence[i, j] = found.evidence
        for name, number in found.numbers.items():
            self.arrays[name][i, j] = number
        for name, array in found.arrays.items():
            self.arrays[name][i, j, found.live] = array
        self._gates.append(np.insert(found.gates, [0, 0], (i, j), axis=1))

    def put_twins(self, tokens_N: np.ndarray, min_count: int) -> None:
        """Each source layer against each of its twins."""
        twins, own = self._source.twins, self._source.codes
        if not twins:
            return
        meeting = _Meeting(own, own, Aligned(tokens_N, tokens_N, 1.0, np.ones(len(tokens_N), bool)))
        meeting.prepare(1)
        for i, layer in enumerate(self._source.dictionaries):
            mine = _Source.of(SourceFeatures.of(own.layers[layer], tokens_N, min_count), meeting, 1)
            for of_layers, codes in zip(twins, self._source.twin_codes, strict=True):
                if layer in of_layers:
                    live = live_features(codes.layers[layer], tokens_N, min_count)
                    other = _Target.of(codes.layers[layer], live, meeting, 1)
                    found, _ = _match_layers(mine, other, None, 1, min_count)
                    self._twins.setdefault(i, []).extend([found.evidence] if found.evidence else [])

    def result(self, aligned: Aligned, num_documents: int, min_count: int, seed: int) -> TransferResult:
        """With what the arrays mean."""
        source = self._source
        for (i, j), numbers in judge(self._evidence, self._twins, seed).items():
            for name, number in numbers.items():
                self.arrays[name][i, j] = number
        left_out = () if len(source.twins) > 1 else SPREADS if source.twins else (*CEILINGS, *SPREADS)
        self.arrays = {name: a for name, a in self.arrays.items() if name not in left_out}
        if not aligned.strict_N.any():
            self.arrays["strict"][:] = np.nan
        if source.model != self._target.model:
            self.arrays |= best_of_all_layers(self.arrays["correlation"], self.arrays["chance"])
        gates = np.concatenate(self._gates) if self._gates else np.zeros((0, 6), np.int32)
        self.arrays["gates"] = gates[np.lexsort(gates.T[::-1])].astype(np.int32)
        info = TransferInfo(
            metric=Matching.name,
            source=source.model,
            target=self._target.model,
            source_layers=list(source.dictionaries),
            target_layers=list(self._target.dictionaries),
            quantity="share of live source features with a partner in the target layer above the null",
            null="the same share if only the kind of position were known (number in the question, …)",
            ceiling="the share above the same threshold between the source layer and a dictionary of it from another seed"
            + (f", mean over {len(source.twins)} seeds" if len(source.twins) > 1 else "")
            if source.twins
            else None,
            num_tokens=len(aligned.source_N),
            num_documents=num_documents,
            coverage=aligned.coverage,
            seed=seed,
            details={
                "min_count": min_count,
                "threshold": f"{NULL_QUANTILE:.1%} quantile of best correlations with tokens of other documents, of these layers "
                "and those next to them",
                "interval": "bootstrap over features",
                "same tokens": int(aligned.strict_N.sum()),
            },
        )
        return TransferResult(info, self.arrays)


# ---- two models


def _match_models(
    source: Side, target: Side, aligned: Aligned, min_count: int
) -> Iterator[tuple[int, int, Found, Found]]:
    """Every pair of layers, in both directions; of one model with itself each pair once."""
    meeting, same = _Meeting(source.codes, target.codes, aligned), source.model == target.model
    decoders = list(source.dictionaries.values())
    from_layers, to_layers = ([side.codes.layers[n] for n in side.dictionaries] for side in (source, target))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiled functions let go of the interpreter lock
        features = list(pool.map(lambda layer: SourceFeatures.of(layer, meeting.source_N, min_count), from_layers))
        live = list(pool.map(lambda layer: live_features(layer, meeting.target_N, min_count), to_layers))
        shifts = num_shifts(
            {(i, j): (len(f.features), len(v)) for i, f in enumerate(features) for j, v in enumerate(live)}
        )
        most = max(shifts.values(), default=0)
        meeting.prepare(most)
        mine = list(pool.map(lambda of_layer: _Source.of(of_layer, meeting, most), features))

        def prepare(j: int) -> _Target:
            return _Target.of(to_layers[j], live[j], meeting, max(shifts[i, j] for i in range(len(mine))))

        def match(i: int, j: int, other: _Target, dictionary: Dictionary) -> tuple[Found, Found]:
            return _match_layers(mine[i], other, (decoders[i], dictionary) if same else None, shifts[i, j], min_count)

        # the next target is prepared while the last pairs of this one are matched, so two are held at a time
        coming, matched = pool.submit(prepare, 0), deque[list[Future[tuple[Found, Found]]]]()
        for j, dictionary in enumerate(target.dictionaries.values()):
            other = coming.result()
            pairs = []
            for i in (places := range(j + 1 if same else len(mine))):
                if i == max(0, len(places) - 2) and j + 1 < len(to_layers):
                    coming = pool.submit(prepare, j + 1)
                pairs.append(pool.submit(match, i, j, other, dictionary))
            del other
            matched.append(pairs)
            if j > 0:
                yield from ((i, j - 1, *pair.result()) for i, pair in enumerate(matched.popleft()))
        while matched:
            yield from ((i, len(to_layers) - 1, *pair.result()) for i, pair in enumerate(matched.popleft()))


class _Meeting:
    """The aligned tokens, those that are the same in both models first, and which token of the target each of the source meets.

    `shifted` are those met by chance, -1 where there is none, as far as they were prepared. `cuts` are how many tokens are the
    same, and all; all alone if these are no fewer. `roles_N` tells which of the roles in both models each has.
    """

    def __init__(self, source: Codes, target: Codes, aligned: Aligned) -> None:
        self._target, self._aligned, self._order = target, aligned, np.argsort(~aligned.strict_N, kind="stable")
        self.source_N, self.target_N = aligned.source_N[self._order], aligned.target_N[self._order]
        self.shifted: list[np.ndarray] = []
        cuts = np.unique([aligned.strict_N.sum(), len(self._order)])
        self.cuts = cuts[cuts > 0]
        roles = source.roles_N[self.source_N].astype(np.int64), target.roles_N[self.target_N].astype(np.int64)
        self.roles_N = np.unique(roles[0] * (roles[1].max(initial=0) + 1) + roles[1], return_inverse=True)[1]

    def prepare(self, num_shifts: int) -> None:
        """Shift by 1, 2, … documents."""
        for by in range(len(self.shifted) + 1, num_shifts + 1):
            other_N = shift_documents(self._target, self._aligned.target_N, by)
            self.shifted.append(np.where(other_N >= 0, self._aligned.target_N[other_N], -1)[self._order])


class _Source(NamedTuple):
    """A source layer, with its moments over all tokens, and over those that meet others by chance."""

    features: SourceFeatures
    moments: Moments
    by_chance: list[Moments]
    by_role: Grouped

    @classmethod
    def of(cls, features: SourceFeatures, meeting: _Meeting, num_shifts: int) -> "_Source":
        met = [meeting.target_N, *meeting.shifted[:num_shifts]]
        real, *by_chance = (features.moments(rows_N >= 0, meeting.cuts) for rows_N in met)
        return cls(features, real, by_chance, Grouped.of_source(features, real, meeting.roles_N))


class _Target(NamedTuple):
    """A target layer at the tokens that source tokens meet, and at those that they meet by chance."""

    real: TargetTokens
    by_chance: list[TargetTokens]
    by_role: Grouped

    @classmethod
    def of(cls, matrix_RF: sp.csr_array, live: np.ndarray, meeting: _Meeting, num_shifts: int) -> "_Target":
        met = [meeting.target_N, *meeting.shifted[:num_shifts]]
        real, *by_chance = (TargetTokens.of(matrix_RF, live, rows_N, meeting.cuts) for rows_N in met)
        return cls(real, by_chance, Grouped.of_target(real, meeting.roles_N))


# ---- two layers


def _match_layers(
    source: _Source, target: _Target, decoders: tuple[Dictionary, Dictionary] | None, num: int, min_count: int
) -> tuple[Found, Found]:
    """What is found of two layers in either direction, with `num` shifts; without live features on both sides, only which live."""
    features, real = source.features, target.real
    U, V = len(features.features), len(real.features)
    if not U or not V:
        nothing = np.zeros((0, 4), np.int32)
        return Found(features.features, None, {}, {}, nothing), Found(real.features, None, {}, {}, nothing)
    assigned = max(U, V) <= MOST_ASSIGNED
    related = relate(features, source.moments, real, strength=STRENGTH, with_matrix=assigned)
    ways = list(zip(source.by_chance, target.by_chance, strict=False))[:num]
    chances = [best_by_chance(features, *way) for way in ways]
    by_role = best_by_groups(source.by_role, target.by_role)
    bests = (related.source, related.target)
    numbers = [{"assigned": float(_assign(related.r_UV).mean())} if related.r_UV is not None else {}] * 2
    arrays = [_partners(bests[side][-1], bests[1 - side][-1], chances[0][side][-1]) for side in (0, 1)]
    if decoders:
        compared = compare_decoders(decoders, related, (source.moments, real.moments), assigned)
        numbers = [numbers[side] | compared[side].numbers for side in (0, 1)]
        arrays = [arrays[side] | {"cosine": compared[side].cosine} for side in (0, 1)]
    found = []
    for side, gates in enumerate(find_gates(features, real, related)):
        first, best, other = bests[side][0], bests[side][-1], bests[1 - side][-1]
        evidence = Evidence(
            best,
            is_mutual_U=other.partner[best.partner] == np.arange(len(best.partner)),
            strict_U=first.correlation[first.num_active >= min_count],
            by_role_U=by_role[side],
            chance_CM=np.concatenate([way[side] for way in chances], axis=1),
        )
        shares = {
            name: float((gates[:, 0] == kind).sum()) / (V, U)[side]
            for kind, name in ((AND, "and_gates"), (OR, "or_gates"))
        }
        found.append(Found(best.features, evidence, numbers[side] | shares, arrays[side], gates))
    return found[0], found[1]


def _assign(r_UV: np.ndarray) -> np.ndarray:
    """Correlations of the one-to-one assignment whose sum is the largest."""
    from scipy.optimize import linear_sum_assignment

    return r_UV[linear_sum_assignment(r_UV, maximize=True)]


def _partners(best: Best, other: Best, chance_U: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of each feature and its partner, which is given by its id."""
    partners = other.num_active[best.partner]
    return {
        "partner": other.features[best.partner],
        "correlation": best.correlation,
        "chance": chance_U,
        "sufficiency": best.both / best.num_active,
        "necessity": best.both / partners,
        "jaccard": best.both / (best.num_active + partners - best.both),
    }
