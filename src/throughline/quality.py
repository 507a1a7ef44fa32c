"""How well dictionaries stand in for the residual stream, on held-out text.

    1. some of the text as the model is, then for each layer the blocks after it with x_hat in place of x: CE, KL, answers kept
    2. the rest of it up to the last layer, for the mean of every layer
    3. reconstruction, of both: FVU = sum|x - x_hat|^2 / sum|x - mean|^2, L0, dead and dense features. The activations are kept from
       the passes before, or made again where they are too many
    4. for each layer zero and the mean in place of x, which few runs tell (`ablation.py`): CE

Attention sinks of a layer are counted and left out of all of it, the mean included; where something is put in the place of x they
stay as they are. FVU over all tokens, sinks too, stands beside the one without them.

CE recovered saturates (0.97 has been seen with three quarters of the answers lost), so it never stands alone.
Names follow SAEBench core; `explained_variance_legacy` is its per-token form.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from throughline.ablation import ablated_ce
from throughline.dictionaries import Dictionary
from throughline.harvesting import Harvested, harvest
from throughline.models import LanguageModel
from throughline.models.language_model import quiet_transformers
from throughline.pools import spread, threads_of
from throughline.records import TOKEN_KINDS, LayerQuality
from throughline.splicing import Scores, batch_rows, predicted_tokens, run_clean, run_spliced, score_streams
from throughline.study import GateSpec
from throughline.tokens import TokenRows

KEPT_BYTES = 2**30  # of activations of held-out text
NUM_POSITION_BINS = 8
DENSE = 0.1
SAY_SECONDS = 30.0


class _Spliced:
    """Sums over the predicted tokens of one way of running the model, and the documents whose answer went wrong."""

    def __init__(self) -> None:
        self.ce, self.kl, self.num_tokens = 0.0, 0.0, 0
        self.answered: set[int] = set()
        self.wrong: set[int] = set()

    def add(self, scores: Scores, rows: TokenRows) -> None:
        predicted = predicted_tokens(rows)
        self.num_tokens += len(scores.ce_N)
        self.ce += float(scores.ce_N.double().sum())
        self.kl += float(scores.kl_N.double().sum())
        answers_N, documents_N = (array[:, 1:][predicted] for array in (rows.answers, rows.documents))
        self.answered.update(documents_N[answers_N].tolist())
        self.wrong.update(documents_N[answers_N & ~scores.right_N.numpy()].tolist())


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    dictionaries: dict[int, Dictionary],
    spliced: TokenRows,
    rest: TokenRows,
    gate: GateSpec,
    say: Callable[[str], None] = lambda line: None,
) -> list[LayerQuality]:
    """Quality of each layer's dictionary: spliced into the model on `spliced`, reconstruction on these rows and the `rest`.

    `say` hears every half minute how far splicing and ablation are, which take most of the time.
    """
    layers = list(dictionaries)
    kept: list[Harvested] | None = []
    if 4 * (spliced.num_tokens + rest.num_tokens) * model.d_model * len(layers) > KEPT_BYTES:
        kept = None
    means = _Means(model, list(dictionaries.values()))

    def take(one: Harvested) -> None:
        means.add(one[1])
        if kept is not None:
            kept.append(one)

    progress = _ProgressLines(say, model.name)
    splices = _splice(model, dictionaries, spliced, take, progress)
    for one in _harvest(model, rest, layers):
        take(one)
    means_LD = means.result()
    sums = [_Sums(dictionaries[layer], means_LD[i]) for i, layer in enumerate(layers)]
    again = chain(_harvest(model, spliced, layers), _harvest(model, rest, layers)) if kept is None else kept
    width = max(spliced.width, rest.width)
    for rows, x_LND in again:
        positions, kinds = (torch.from_numpy(a[rows.keep].astype(np.int64)) for a in (rows.positions, rows.kinds))
        bins_N, kinds_N = (t.to(x_LND.device) for t in (positions * NUM_POSITION_BINS // width, kinds))
        each = partial(_add_layer, sums, x_LND, bins_N, kinds_N)
        list(spread(each, range(len(layers)), model.device))
    again = kept = None  # ablations need the memory now
    splice_measures = _measure_splices(model, dictionaries, means_LD, spliced, splices, progress)
    qualities = []
    for i, layer in enumerate(layers):
        fields = sums[i].result() | splice_measures[layer]
        qualities.append(
            LayerQuality(
                model=model.name,
                layer=layer,
                architecture=dictionaries[layer].architecture,
                d_model=dictionaries[layer].d_model,
                d_sae=dictionaries[layer].d_sae,
                setbacks=int(dictionaries[layer].metadata.get("setbacks") or 0),
                gate=failed_conditions(fields, dictionaries[layer], gate),
                **fields,
            )
        )
    return qualities


class _ProgressLines:
    """Says how far an evaluation is, no more than every SAY_SECONDS."""

    def __init__(self, say: Callable[[str], None], name: str) -> None:
        self._say, self._name, self._last = say, name, time.monotonic()

    def tick(self, doing: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self._last >= SAY_SECONDS:
            self._say(f"{self._name}: {doing} {done:,} of {of:,} tokens")
            self._last = now


def failed_conditions(measures: dict, dictionary: Dictionary, gate: GateSpec) -> list[str]:
    """The gate's conditions that do not hold, in words with the figures; empty if it passes."""
    max_l0 = min(gate.max_l0_share * dictionary.d_sae, dictionary.d_model)
    checks = (
        (measures["l0"] <= max_l0, f"L0 {measures['l0']:.1f} > {max_l0:.1f}"),
        (measures["fvu"] <= gate.max_fvu, f"FVU {measures['fvu']:.3f} > {gate.max_fvu}"),
        (
            measures["ce_loss_score"] >= gate.min_ce_recovered,
            f"CE recovered {measures['ce_loss_score']:z.3f} < {gate.min_ce_recovered}",
        ),
        (measures["dead"] <= gate.max_dead, f"dead {measures['dead']:.1%} > {gate.max_dead:.0%}"),
    )
    return [words for holds, words in checks if not holds]


@torch.no_grad()
def measure_means(
    model: LanguageModel, dictionaries: Mapping[int, Dictionary], rows: TokenRows
) -> Float[Tensor, "L D"]:
    """Mean residual stream of each layer over the kept tokens that are no sinks there."""
    means = _Means(model, list(dictionaries.values()))
    for _, x_LND in _harvest(model, rows, list(dictionaries)):
        means.add(x_LND)
    return means.result()


class _Means:
    """Sums of the residual stream of each layer over the tokens that are no sinks there."""

    def __init__(self, model: LanguageModel, dictionaries: list[Dictionary]) -> None:
        self._dictionaries, self._device = dictionaries, model.device
        self._total_LD = torch.zeros(len(dictionaries), model.d_model, dtype=torch.float64)
        self._count_L1 = torch.zeros(len(dictionaries), 1)

    def add(self, x_LND: Tensor) -> None:
        for i, (x_ND, dictionary) in enumerate(zip(x_LND, self._dictionaries, strict=True)):
            ordinary_ND = x_ND[~dictionary.is_sink(x_ND)]
            self._total_LD[i] += ordinary_ND.double().sum(0).cpu()
            self._count_L1[i] += len(ordinary_ND)

    def result(self) -> Float[Tensor, "L D"]:
        return (self._total_LD / self._count_L1.clamp_min(1)).float().to(self._device)


def _harvest(model: LanguageModel, rows: TokenRows, layers: list[int]) -> Iterator[Harvested]:
    batches = rows.batches(batch_rows(model, rows.width, len(layers)))
    return harvest(model, batches, layers, threads_of(model.device))


@torch.no_grad()
def _add_layer(sums: list["_Sums"], x_LND: Tensor, bins_N: Tensor, kinds_N: Tensor, i: int) -> None:
    sums[i].add(x_LND[i], bins_N, kinds_N)


class _Sums:
    """Streaming float64 sums of one layer, from which all reconstruction measures follow."""

    def __init__(self, dictionary: Dictionary, mean_D: Tensor):
        self.dictionary, self.mean_D = dictionary, mean_D
        self.everywhere = replace(dictionary, sink_norm=math.inf)
        double = {"dtype": torch.float64, "device": mean_D.device}
        self.residual_bins = torch.zeros(NUM_POSITION_BINS, **double)
        self.variance_bins = torch.zeros(NUM_POSITION_BINS, **double)
        self.residual_D, self.variance_D = torch.zeros(len(mean_D), **double), torch.zeros(len(mean_D), **double)
        self.kind_sums = torch.zeros(len(TOKEN_KINDS), len(mean_D), **double)
        self.kind_counts = torch.zeros(len(TOKEN_KINDS), **double)
        self.scalars = dict.fromkeys(("legacy", "cossim", "ratio", "x_hat_square", "product"), 0.0)
        self.fired_F = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=mean_D.device)
        self.count = 0
        # of sinks, about the others' mean: how many, sum of x, of |x|^2 and of the squared error
        self.num_sinks, self.sink_square, self.sink_residual = 0, 0.0, 0.0
        self.sink_sum_D = torch.zeros(len(mean_D), **double)

    def add(self, x_ND: Tensor, bins_N: Tensor, kinds_N: Tensor) -> None:
        sink_N = self.dictionary.is_sink(x_ND)
        if sink_N.any():
            self._add_sinks(x_ND[sink_N])
            x_ND, bins_N, kinds_N = x_ND[~sink_N], bins_N[~sink_N], kinds_N[~sink_N]
        f_NF = self.dictionary.encode(x_ND)
        x_hat_ND = self.dictionary.decode_few(f_NF)
        centred_ND = x_ND - self.mean_D
        error_ND, square_ND = (x_ND - x_hat_ND).square(), centred_ND.square()
        residual_N, variance_N = error_ND.sum(1).double(), square_ND.sum(1).double()
        self.residual_D += error_ND.sum(0).double()
        self.variance_D += square_ND.sum(0).double()
        self.residual_bins.index_add_(0, bins_N, residual_N)
        self.variance_bins.index_add_(0, bins_N, variance_N)
        self.kind_sums.index_add_(0, kinds_N, centred_ND.double())
        self.kind_counts += torch.bincount(kinds_N, minlength=len(TOKEN_KINDS))
        norm_N, hat_norm_N = x_ND.norm(dim=1), x_hat_ND.norm(dim=1)
        product_N = (x_ND * x_hat_ND).sum(1)
        self.scalars["legacy"] += float((1 - residual_N / variance_N.clamp_min(1e-12)).sum())
        self.scalars["cossim"] += float((product_N / (norm_N * hat_norm_N).clamp_min(1e-12)).double().sum())
        self.scalars["ratio"] += float((hat_norm_N / norm_N.clamp_min(1e-12)).double().sum())
        self.scalars["x_hat_square"] += float(hat_norm_N.double().square().sum())
        self.scalars["product"] += float(product_N.double().sum())
        self.fired_F += (f_NF > 0).sum(0)
        self.count += len(x_ND)

    def _add_sinks(self, x_ND: Tensor) -> None:
        centred_ND = (x_ND - self.mean_D).double()
        self.num_sinks += len(x_ND)
        self.sink_sum_D += centred_ND.sum(0)
        self.sink_square += float(centred_ND.square().sum())
        self.sink_residual += float((x_ND - self.everywhere.reconstruct(x_ND)).double().square().sum())

    def _fvu_with_sinks(self, variance: float, residual: float) -> float:
        """Over all tokens, about the mean of all."""
        total = self.count + self.num_sinks
        shift_D = self.sink_sum_D / max(1, total)  # of that mean; the others' deviations add up to zero
        return (residual + self.sink_residual) / max(
            variance + self.sink_square - total * float(shift_D.square().sum()), 1e-12
        )

    def result(self) -> dict:
        n, variance, residual = self.count, float(self.variance_bins.sum()), float(self.residual_bins.sum())
        between_kinds = float((self.kind_sums.square().sum(1) / self.kind_counts.clamp_min(1)).sum())
        density_F = self.fired_F.double() / n
        return {
            "num_tokens": n,
            "num_sinks": self.num_sinks,
            "fvu": residual / variance,
            "fvu_coordinate": float((self.residual_D / self.variance_D.clamp_min(1e-12)).mean()),
            "fvu_with_sinks": self._fvu_with_sinks(variance, residual),
            "fvu_by_position": (self.residual_bins / self.variance_bins.clamp_min(1e-12)).tolist(),
            "fvu_within_kind": residual / max(variance - between_kinds, 1e-12),
            "explained_variance": 1 - residual / variance,
            "explained_variance_legacy": self.scalars["legacy"] / n,
            "l0": float(density_F.sum()),
            "dead": float((self.fired_F == 0).double().mean()),
            "dense": float((density_F > DENSE).double().mean()),
            "cossim": self.scalars["cossim"] / n,
            "l2_ratio": self.scalars["ratio"] / n,
            "relative_reconstruction_bias": self.scalars["x_hat_square"] / max(self.scalars["product"], 1e-12),
        }


class _Splices(NamedTuple):
    """What splicing came to, and which tokens kept their stream: special ones, and each layer's sinks."""

    clean: _Spliced
    with_sae: dict[int, _Spliced]
    kept_LRT: Bool[np.ndarray, "L R T"]


def _splice(
    model: LanguageModel,
    dictionaries: dict[int, Dictionary],
    rows: TokenRows,
    take: Callable[[Harvested], None],
    progress: _ProgressLines,
) -> _Splices:
    """Run every batch clean, and on from each layer with x_hat in its place. `take` is given the activations of the clean pass."""
    num_rows = batch_rows(model, rows.width, 2 * len(dictionaries) + 2)
    for layer in (*dictionaries, model.num_layers - 1):
        model.after(layer)  # made before threads ask for it

    @torch.no_grad()
    def run(batch: TokenRows) -> tuple[list[Scores], list[np.ndarray], Tensor]:
        """Of one batch the scores, clean and from each layer, which tokens are sinks at each, and the kept activations."""
        clean = run_clean(model, batch, list(dictionaries))
        streams = [run_spliced(model, batch, clean, layer, d.reconstruct) for layer, d in dictionaries.items()]
        sinks = [
            d.is_sink(clean.residuals[layer].flatten(0, 1)).view(batch.ids.shape).cpu().numpy()
            for layer, d in dictionaries.items()
        ]
        keep = torch.from_numpy(batch.keep).to(model.device)
        x_LND = torch.stack([clean.residuals[layer][keep].float() for layer in dictionaries])
        return score_streams(model, batch, [clean.final_BTD, *streams]), sinks, x_LND

    splices = _Splices(
        _Spliced(), {layer: _Spliced() for layer in dictionaries}, np.repeat(rows.special[None], len(dictionaries), 0)
    )
    batches, num_predicted = list(rows.batches(num_rows)), int(predicted_tokens(rows).sum())
    with quiet_transformers():
        for i, (scores, sinks, x_LND) in enumerate(spread(run, batches, model.device)):
            take((batches[i], x_LND))
            for sums, of_one in zip((splices.clean, *splices.with_sae.values()), scores, strict=True):
                sums.add(of_one, batches[i])
            for kept_RT, sink_BT in zip(splices.kept_LRT, sinks, strict=True):
                kept_RT[i * num_rows :][: len(sink_BT), : sink_BT.shape[1]] |= sink_BT
            progress.tick("dictionaries spliced in on", splices.clean.num_tokens, num_predicted)
    return splices


def _measure_splices(
    model: LanguageModel,
    dictionaries: dict[int, Dictionary],
    means_LD: Tensor,
    rows: TokenRows,
    splices: _Splices,
    progress: _ProgressLines,
) -> dict[int, dict]:
    kept = dict(zip(dictionaries, splices.kept_LRT, strict=True))
    values = {layer: [torch.zeros_like(mean_D), mean_D] for layer, mean_D in zip(dictionaries, means_LD, strict=True)}
    ablated = ablated_ce(model, rows, kept, values, partial(progress.tick, "ablation, all layers together:"))
    return {layer: _splice_measures(splices.clean, splices.with_sae[layer], *ablated[layer]) for layer in dictionaries}


def _splice_measures(clean: _Spliced, with_sae: _Spliced, zeroed: float, averaged: float) -> dict:
    n = max(1, clean.num_tokens)
    ce_clean, ce_sae, ce_zero, ce_mean = (ce / n for ce in (clean.ce, with_sae.ce, zeroed, averaged))
    right = clean.answered - clean.wrong
    return {
        "num_spliced_tokens": clean.num_tokens,
        "ce_loss_without_sae": ce_clean,
        "ce_loss_with_sae": ce_sae,
        "ce_loss_with_ablation": ce_zero,
        "ce_loss_with_mean_ablation": ce_mean,
        "ce_loss_score": _recovered(ce_zero, ce_sae, ce_clean),
        "ce_loss_score_mean": _recovered(ce_mean, ce_sae, ce_clean),
        "delta_ce": ce_sae - ce_clean,
        "kl_div_with_sae": with_sae.kl / n,
        "num_answers": len(right),
        "answers_kept": len(right - with_sae.wrong) / len(right) if right else None,
    }


def _recovered(ablated: float, with_sae: float, clean: float) -> float:
    """Share of the damage done by ablation that the dictionary avoids; 0 where ablation does no damage."""
    return (ablated - with_sae) / (ablated - clean) if ablated > clean else 0.0
