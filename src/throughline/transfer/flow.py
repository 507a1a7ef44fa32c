"""Flow: which features of layer i cause those of layer j, in one model.

    1. targets: the NUM_TARGETS live features of layer j with the largest activation mass on the held-out sample, each with
       NUM_CONTEXTS contexts, the tokens on which it fires at even quantiles of its activation
    2. estimate: what each target would lose without each feature of each earlier layer, by one backward pass (`effects`)
    3. four predecessors of each target in layer i are switched off in the real model: its `cause`, the feature with the largest
       estimated drop; `matched`, with the highest correlation on the sample; `cosine`, with the most similar decoder row; and
       `random`, in each context any feature that is active at the target's token
    4. estimates, and the model-wide weights TWERA[a, b] = E[f_a f_b] / E[f_b] · (W_dec_i[a] · W_enc_j[:, b]), are held against
       measured drops of features drawn in each context: NUM_STRONGEST with the largest estimates, NUM_DRAWN at random

A predecessor's drop is Σ (b − b') / Σ b over contexts: the share of b that goes when it is off. It succeeds if that is more than
SUCCESS. Drops are measured on every third context, and causes are chosen on the others, so a cause is not rewarded for its luck.
Beside it, what a linear map of layer i tells of b anyway (`transport`). Literature: Laptev et al. 2025 (arXiv 2502.03032) for
switching matched predecessors off, Ameisen et al. 2025 ("Circuit Tracing: Methods") for TWERA.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from throughline.codes import Codes
from throughline.errors import InputError
from throughline.records import TransferInfo, TransferResult
from throughline.stats import NUM_RESAMPLES, bootstrap_interval, pearson
from throughline.transfer.effects import Contexts, cut_contexts, estimate_drops, switch_off
from throughline.transfer.pairs import Columns, Side, prepare
from throughline.transfer.predecessors import (
    NUM_CONTEXTS,
    NUM_EDGES,
    NUM_TARGETS,
    Checked,
    Entries,
    choose_best,
    choose_causes,
    choose_targets,
    compare_features,
    draw_active,
    draw_checked,
    spread_tokens,
    strongest_edges,
)
from throughline.transfer.transport import transport_features

CHECKED = 3  # every third context is measured; causes are chosen on the others
SUCCESS = 0.5
PREDECESSORS = ("cause", "matched", "cosine", "random")
CELL_NAMES = (
    *("value", "low", "high", "null", "n"),
    *(f"{kind}_{part}" for kind in PREDECESSORS for part in ("drop", "low", "high", "success")),
    *("num_checked", "rank_correlation", "pearson", "twera_rank_correlation"),
    *("drawn_rank_correlation", "null_rank_correlation", "transport_r2", "transport_r2_all"),
)

Found: TypeAlias = dict[str, float | np.ndarray]


class Flow:
    """Share of the target layer's features that goes when their strongest cause in the source layer is off."""

    name = "flow"
    across_models = False
    both_ways = False

    def compute(self, source: Side, target: Side, *, seed: int, min_count: int) -> list[TransferResult]:
        """Arrays [Ls, Lt] value, low, high, null and the rest of CELL_NAMES, NaN unless the source layer is the earlier.

        By target feature [Ls, Lt, NUM_TARGETS]: target, cause, matched, cosine (features, -1 where there is none);
        cause_estimate; {cause, matched, cosine, random}_measured; transport, transport_all. Its strongest edges
        [Ls, Lt, NUM_TARGETS, NUM_EDGES]: edge_source (-1: no more) and edge_estimate. Estimates and measured drops are shares
        of the target's activation, positive where it falls.
        """
        if source.model != target.model:
            raise InputError(f"flow follows causes within one model, found {source.model} and {target.model}")
        sample, dictionaries = source.sample, source.dictionaries
        layers = list(dictionaries)
        targets = {j: choose_targets(sample.layers[j], min_count) for j in layers}
        transported = transport_features(source.fit, sample, dictionaries, targets)
        columns = {i: prepare(sample.layers[i]) for i in layers}
        arrays = _empty_arrays(len(layers))
        for c, j in enumerate(layers):
            if c == 0 or not len(targets[j]):
                continue
            later = _Later.of(source, j, targets[j])
            for r, i in enumerate(layers[:c]):
                rng = np.random.default_rng([seed, i, j])
                found = _relate(source, later, i, columns, min_count, rng, seed)
                firing_G, everywhere_G = transported.firing[i, j], transported.everywhere[i, j]
                found |= {"transport": firing_G, "transport_all": everywhere_G}
                found |= {"transport_r2": _mean(firing_G), "transport_r2_all": _mean(everywhere_G)}
                for name, value in found.items():
                    arrays[name][(r, c, *map(slice, np.shape(value)))] = value
        return [TransferResult(self._info(source, sample, seed, min_count), arrays)]

    def _info(self, source: Side, sample: Codes, seed: int, min_count: int) -> TransferInfo:
        return TransferInfo(
            metric=self.name,
            source=source.model,
            target=source.model,
            source_layers=list(source.dictionaries),
            target_layers=list(source.dictionaries),
            quantity="share of a target feature that goes when its strongest cause in the source layer is off",
            null="the same for a random source feature that is active at the target's token",
            ceiling=None,
            num_tokens=sample.num_tokens,
            num_documents=len(np.unique(sample.documents_N)),
            coverage=1.0,
            seed=seed,
            details={
                "min_count": min_count,
                "off": "an activation of zero at all tokens of the context",
                "targets": f"up to {NUM_TARGETS} features of each layer, those with the largest activation mass",
                "contexts": f"{NUM_CONTEXTS} of each; every third is measured, and the others choose the causes",
                "success": f"a drop of more than {SUCCESS:.0%}",
                "interval": f"bootstrap over target features, {NUM_RESAMPLES} resamples",
            },
        )


class _Later(NamedTuple):
    """The targets of a layer, read and differentiated: choosing contexts give the causes, checking contexts the drops."""

    layer: int
    targets_G: np.ndarray
    owners_K: np.ndarray  # for each checking context the number of its target
    tokens_K: np.ndarray  # and the token of the sample with which it ends
    checking: Contexts
    clean_K: np.ndarray
    drops: dict[int, sp.csr_array]  # [K, F], by source layer
    shares: dict[int, sp.csr_array]  # [G, F], from the choosing contexts

    @classmethod
    def of(cls, side: Side, layer: int, targets_G: np.ndarray) -> "_Later":
        tokens_C = spread_tokens(side.sample, layer, targets_G)
        owners_C = np.repeat(np.arange(len(targets_G)), NUM_CONTEXTS)
        contexts = cut_contexts(side.sample, tokens_C, targets_G[owners_C])
        clean_C, drops = estimate_drops(side.language_model, side.dictionaries, layer, contexts)
        checks_C = np.arange(len(tokens_C)) % CHECKED == CHECKED // 2
        choosing_GC = sp.csr_array((~checks_C * 1.0, (owners_C, np.arange(len(owners_C)))))
        weights_GC = sp.diags_array(_inverse(choosing_GC @ clean_C)) @ choosing_GC
        return cls(
            layer,
            targets_G,
            owners_C[checks_C],
            tokens_C[checks_C],
            contexts.select(np.flatnonzero(checks_C)),
            clean_C[checks_C],
            {i: drop_CF[checks_C] for i, drop_CF in drops.items()},
            {i: sp.csr_array(weights_GC @ drop_CF) for i, drop_CF in drops.items()},
        )


def _relate(
    side: Side,
    later: _Later,
    layer: int,
    columns: Mapping[int, Columns],
    min_count: int,
    rng: np.random.Generator,
    seed: int,
) -> Found:
    """The arrays of `Flow.compute` for source layer `layer` and the targets of `later`, but for transport."""
    source, target = side.dictionaries[layer], side.dictionaries[later.layer]
    at_once, r, cosine = compare_features(columns[layer], columns[later.layer], source, target, later.targets_G)
    live = columns[layer].moments.num_active >= min_count
    chosen_G = {
        "cause": choose_causes(later.shares[layer]),
        "matched": choose_best(r, live),
        "cosine": choose_best(cosine, live),
    }
    predecessors = {kind: found[later.owners_K] for kind, found in chosen_G.items()}
    predecessors["random"] = draw_active(side.sample.layers[layer], later.tokens_K, rng)
    checked = draw_checked(later.drops[layer], rng)
    estimated = Entries.of(later.drops[layer])
    everyone = np.arange(len(later.owners_K))
    wanted = [estimated.key(everyone, feature_K) for feature_K in predecessors.values()]
    measured = _measure(side, later, layer, estimated, [*wanted, estimated.key(checked.contexts, checked.features)])
    shares = Entries.of(later.shares[layer])
    cause_estimate_G = shares.at(shares.key(np.arange(len(later.targets_G)), chosen_G["cause"]))
    found: Found = {"target": later.targets_G, "cause_estimate": cause_estimate_G, **chosen_G}
    found |= strongest_edges(later.shares[layer])
    for kind, keys in zip(PREDECESSORS, wanted, strict=True):
        found |= _summarize(kind, later, measured.at(keys), seed)
    found |= {"value": found["cause_drop"], "low": found["cause_low"], "high": found["cause_high"]}
    found |= {"null": found["random_drop"], "n": np.isfinite(found["cause_measured"]).sum()}
    return found | _check(checked, later, estimated, measured, at_once)


def _measure(side: Side, later: _Later, layer: int, active: Entries, wanted: list[np.ndarray]) -> Entries:
    """The measured drops of the wanted pairs (context, feature), each pair once; what is not active is off already."""
    keys = np.intersect1d(np.concatenate(wanted), active.keys)
    contexts, features = np.divmod(keys, active.width)
    off = switch_off(
        side.language_model,
        (layer, side.dictionaries[layer]),
        (later.layer, side.dictionaries[later.layer]),
        later.checking.select(contexts),
        features,
    )
    return Entries(active.width, keys, later.clean_K[contexts] - off)


def _summarize(kind: str, later: _Later, drop_K: np.ndarray, seed: int) -> Found:
    """The drop of each target, and over targets its mean with interval and the share of successes."""
    num_targets = len(later.targets_G)
    clean_G = np.bincount(later.owners_K, later.clean_K, num_targets)
    measured_G = np.bincount(later.owners_K, drop_K, num_targets) * _inverse(clean_G)
    known = measured_G[np.isfinite(measured_G)]
    low, high = bootstrap_interval(known, seed)
    return {
        f"{kind}_measured": measured_G,
        f"{kind}_drop": _mean(known),
        f"{kind}_low": low,
        f"{kind}_high": high,
        f"{kind}_success": _mean(known > SUCCESS),
    }


def _check(
    checked: Checked, later: _Later, estimated: Entries, measured: Entries, twera_FG: np.ndarray
) -> dict[str, float]:
    """How well estimates and TWERA rank and predict the measured drops of the checked features."""
    keys = estimated.key(checked.contexts, checked.features)
    drops, estimates = measured.at(keys), estimated.at(keys)
    others = estimated.at(estimated.key(checked.contexts, checked.others))
    twera = twera_FG[checked.features, later.owners_K[checked.contexts]]
    return {
        "num_checked": len(keys),
        "rank_correlation": pearson(rankdata(estimates), rankdata(drops)),
        "pearson": pearson(estimates, drops),
        "drawn_rank_correlation": pearson(rankdata(estimates[checked.drawn]), rankdata(drops[checked.drawn])),
        "null_rank_correlation": pearson(rankdata(others), rankdata(drops)),
        "twera_rank_correlation": pearson(rankdata(twera), rankdata(drops)),
    }


def _empty_arrays(num_layers: int) -> dict[str, np.ndarray]:
    cells = (num_layers, num_layers)
    arrays: dict[str, np.ndarray] = {name: np.full(cells, np.nan) for name in CELL_NAMES}
    numbers = ("cause_estimate", *(f"{kind}_measured" for kind in PREDECESSORS), "transport", "transport_all")
    arrays |= {name: np.full((*cells, NUM_TARGETS), np.nan) for name in numbers}
    arrays |= {name: np.full((*cells, NUM_TARGETS), -1, np.int32) for name in ("target", *PREDECESSORS[:3])}
    arrays["edge_source"] = np.full((*cells, NUM_TARGETS, NUM_EDGES), -1, np.int32)
    arrays["edge_estimate"] = np.full((*cells, NUM_TARGETS, NUM_EDGES), np.nan)
    return arrays


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values; NaN where a target no longer fires when its contexts are read again."""
    return np.divide(1, values, out=np.full(len(values), np.nan), where=values > 0)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
