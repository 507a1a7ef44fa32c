"""How well dictionaries stand in for the residual stream, on held-out text.

    1. one pass for the mean of every layer, and for reconstruction: FVU = sum|x - x_hat|^2 / sum|x - mean|^2, L0, dead and dense
       features; a second pass where the activations are too many to be kept
    2. one pass as the model is, then for each layer the blocks after it with x_hat in place of x: CE, KL, answers kept
    3. for each layer zero and the mean in place of x, which few runs tell (`ablation.py`): CE

Attention sinks of a layer are counted and left out of all of it, the mean included; where something is put in the place of x they
stay as they are. FVU over all tokens, sinks too, stands beside the one without them.

CE recovered saturates (0.97 has been seen with three quarters of the answers lost), so it never stands alone.
Names follow SAEBench core; `explained_variance_legacy` is its per-token form.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from throughline.ablation import ablated_ce
from throughline.dictionaries import Dictionary
from throughline.harvesting import Harvested, harvest
from throughline.models import LanguageModel
from throughline.models.language_model import quiet_transformers
from throughline.pools import spread
from throughline.records import TOKEN_KINDS, LayerQuality
from throughline.splicing import Scores, batch_rows, predicted_tokens, run_clean, run_spliced, score_streams
from throughline.study import GateSpec
from throughline.tokens import TokenRows

KEPT_BYTES = 2**30  # of activations of held-out text
NUM_POSITION_BINS = 8
DENSE = 0.1


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
    heldout: TokenRows,
    spliced: TokenRows,
    gate: GateSpec,
) -> list[LayerQuality]:
    """Quality of each layer's dictionary: reconstruction on `heldout`, spliced into the model on `spliced`."""
    layers = list(dictionaries)
    harvested = _Harvested(model, heldout, layers)
    means_LD = _means(model, harvested, dictionaries)
    sums = [_Sums(dictionaries[layer], means_LD[i]) for i, layer in enumerate(layers)]
    for rows, x_LND in harvested:
        positions, kinds = (torch.from_numpy(a[rows.keep].astype(np.int64)) for a in (rows.positions, rows.kinds))
        for x_ND, one in zip(x_LND, sums, strict=True):
            one.add(x_ND, (positions * NUM_POSITION_BINS // heldout.width).to(x_ND.device), kinds.to(x_ND.device))
    harvested.forget()
    splice_measures = _splice(model, dictionaries, means_LD, spliced)
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


def failed_conditions(measures: dict, dictionary: Dictionary, gate: GateSpec) -> list[str]:
    """The gate's conditions that do not hold, in words with the figures; empty if it passes."""
    max_l0 = min(gate.max_l0_share * dictionary.d_sae, dictionary.d_model)
    checks = (
        (measures["l0"] <= max_l0, f"L0 {measures['l0']:.1f} > {max_l0:.1f}"),
        (measures["fvu"] <= gate.max_fvu, f"FVU {measures['fvu']:.3f} > {gate.max_fvu}"),
        (
            measures["ce_loss_score"] >= gate.min_ce_recovered,
            f"CE recovered {measures['ce_loss_score']:.3f} < {gate.min_ce_recovered}",
        ),
        (measures["dead"] <= gate.max_dead, f"dead {measures['dead']:.1%} > {gate.max_dead:.0%}"),
    )
    return [words for holds, words in checks if not holds]


@torch.no_grad()
def measure_means(
    model: LanguageModel, dictionaries: Mapping[int, Dictionary], rows: TokenRows
) -> Float[Tensor, "L D"]:
    """Mean residual stream of each layer over the kept tokens that are no sinks there."""
    return _means(model, _Harvested(model, rows, list(dictionaries)), dictionaries)


def _means(
    model: LanguageModel, harvested: Iterable[Harvested], dictionaries: Mapping[int, Dictionary]
) -> Float[Tensor, "L D"]:
    total_LD = torch.zeros(len(dictionaries), model.d_model, dtype=torch.float64)
    count_L1 = torch.zeros(len(dictionaries), 1)
    for _, x_LND in harvested:
        for i, dictionary in enumerate(dictionaries.values()):
            ordinary_ND = x_LND[i][~dictionary.is_sink(x_LND[i])]
            total_LD[i] += ordinary_ND.double().sum(0).cpu()
            count_L1[i] += len(ordinary_ND)
    return (total_LD / count_L1.clamp_min(1)).float().to(model.device)


class _Harvested:
    """Activations of rows, to be gone through more than once: kept from the first time if they are few, else made again."""

    def __init__(self, model: LanguageModel, rows: TokenRows, layers: list[int]) -> None:
        self._model, self._rows, self._layers = model, rows, layers
        self._kept: list[Harvested] | None = None

    def __iter__(self) -> Iterator[Harvested]:
        if self._kept is not None:
            yield from self._kept
            return
        model, rows = self._model, self._rows
        is_small = 4 * rows.num_tokens * model.d_model * len(self._layers) <= KEPT_BYTES
        threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        batches = rows.batches(batch_rows(model, rows.width, len(self._layers)))
        kept = []
        for one in harvest(model, batches, self._layers, threads):
            if is_small:
                kept.append(one)
            yield one
        self._kept = kept if is_small else None

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = None


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
        x_hat_ND = self.dictionary.decode(f_NF)
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


def _splice(
    model: LanguageModel, dictionaries: dict[int, Dictionary], means_LD: Tensor, rows: TokenRows
) -> dict[int, dict]:
    """Run every batch clean, and on from each layer with x_hat, zero and the mean in its place; measures by layer."""
    num_rows = batch_rows(model, rows.width, 2 * len(dictionaries) + 2)
    for layer in dictionaries:
        model.after(layer)  # made before threads ask for it

    @torch.no_grad()
    def run(batch: TokenRows) -> tuple[list[Scores], list[np.ndarray]]:
        """Of one batch the scores, clean and from each layer, and which tokens are sinks at each."""
        clean = run_clean(model, batch, list(dictionaries))
        streams = [run_spliced(model, batch, clean, layer, d.reconstruct) for layer, d in dictionaries.items()]
        sinks = [
            d.is_sink(clean.residuals[layer].flatten(0, 1)).view(batch.ids.shape).cpu().numpy()
            for layer, d in dictionaries.items()
        ]
        return score_streams(model, batch, [clean.final_BTD, *streams]), sinks

    clean, with_sae = _Spliced(), {layer: _Spliced() for layer in dictionaries}
    kept_LRT = np.repeat(rows.special[None], len(dictionaries), axis=0)
    batches = list(rows.batches(num_rows))
    with quiet_transformers():
        for i, (scores, sinks) in enumerate(spread(run, batches, model.device)):
            for sums, of_one in zip((clean, *with_sae.values()), scores, strict=True):
                sums.add(of_one, batches[i])
            for kept_RT, sink_BT in zip(kept_LRT, sinks, strict=True):
                kept_RT[i * num_rows :][: len(sink_BT), : sink_BT.shape[1]] |= sink_BT
    measures = {}
    for mean_D, kept_RT, (layer, spliced) in zip(means_LD, kept_LRT, with_sae.items(), strict=True):
        zero, average = ablated_ce(model, rows, kept_RT, layer, [torch.zeros_like(mean_D), mean_D])
        measures[layer] = _splice_measures(clean, spliced, zero, average)
    return measures


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
