"""Quality: every measure against plain loops on a tiny model, and dictionaries whose quality is known beforehand."""

import copy
import math
import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import CONTEXT, identity_dictionary, random_dictionary, random_documents, tiny_model, word_pieces
from throughline import ablation
from throughline import quality as quality_module
from throughline.dictionaries import Dictionary
from throughline.harvesting import harvest
from throughline.models import LanguageModel
from throughline.quality import evaluate, failed_conditions, measure_means
from throughline.records import LayerQuality
from throughline.study import GateSpec
from throughline.tokens import Piece, TokenRows, pack

LAYERS = (0, 2)
SPLICED_FIELDS = {
    "num_spliced_tokens", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score", "delta_ce",
    "kl_div_with_sae", "num_answers", "answers_kept",
}  # fmt: skip
OPEN_GATE = GateSpec(max_l0_share=1.0, max_fvu=1.0, min_ce_recovered=-1e9, max_dead=1.0)


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def model(request) -> LanguageModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def pieces(model) -> list[Piece]:
    """Texts of which every third word is random, the others what the model itself would say: so it knows something.

    A special token stands in front of some; the last two tokens are the answer, which the model gives in two cases of
    three.
    """
    made = []
    for piece in word_pieces(random_documents(24, seed=1)):
        ids = piece.ids.copy()
        special, answers = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
        answers[-2:] = True
        if piece.document % 4 == 0:
            ids[0], special[0] = 0, True
        for t in range(1, len(ids)):
            if t % 3 or t >= len(ids) - 2:
                ids[t] = int(logits_alone(model, ids[:t])[-1].argmax())
        if piece.document % 3 == 0:
            ids[-1] = 2 + (ids[-1] - 1) % 12
        kinds = np.where(special, -1, piece.kinds).astype(np.int8)
        made.append(replace(piece, ids=ids, special=special, answers=answers, kinds=kinds))
    return made


@pytest.fixture(scope="module")
def rows(pieces) -> TokenRows:
    return TokenRows.concatenate(list(pack(pieces, CONTEXT, 3)))


@torch.no_grad()
def logits_alone(
    model: LanguageModel, ids: np.ndarray, layer: int | None = None, new_TD: Tensor | None = None
) -> Tensor:
    """Logits [T, V] of one text alone, the stream after a block replaced by a plain hook."""
    handle = None
    if layer is not None:
        block = model.structure.blocks[layer]
        handle = block.register_forward_hook(
            lambda module, args, out: (new_TD[None], *out[1:]) if isinstance(out, tuple) else new_TD[None]
        )
    logits = model.hf(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    if handle:
        handle.remove()
    return logits


@torch.no_grad()
def residual_alone(model: LanguageModel, ids: np.ndarray, layer: int) -> Tensor:
    seen = []
    block = model.structure.blocks[layer]
    handle = block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.hf(torch.from_numpy(ids)[None], use_cache=False)
    handle.remove()
    return seen[0].reshape(len(ids), -1)


def oracle(model: LanguageModel, one: Dictionary, layer: int, pieces: list[Piece]) -> dict:
    """All measures of one layer, text by text and token by token, in float64."""
    texts = [residual_alone(model, p.ids, layer) for p in pieces]
    whole = [(x, t, p) for p, x_TD in zip(pieces, texts, strict=True) for t, x in enumerate(x_TD) if not p.special[t]]
    kept = [(x, t, p) for x, t, p in whole if x.norm() <= one.sink_norm]
    x_ND = torch.stack([x for x, _, _ in kept])
    all_ND = torch.stack([x for x, _, _ in whole])
    all_error_ND = (all_ND - replace(one, sink_norm=torch.inf).reconstruct(all_ND)).double()
    all_variance = (all_ND.double() - all_ND.double().mean(0)).square().sum()
    f_NF, x_hat_ND = one.encode(x_ND).numpy(), one.reconstruct(x_ND).double().numpy()
    x_ND = x_ND.double().numpy()
    mean_D = x_ND.mean(0)
    by_kind = defaultdict(list)
    for x, (_, t, p) in zip(x_ND, kept, strict=True):
        by_kind[p.kinds[t]].append(x)
    within = sum(np.square(np.array(group) - np.mean(group, axis=0)).sum() for group in by_kind.values())
    residual = [np.square(x - y).sum() for x, y in zip(x_ND, x_hat_ND, strict=True)]
    variance = [np.square(x - mean_D).sum() for x in x_ND]
    bins = [[0.0, 1e-12] for _ in range(8)]
    for r, v, (_, t, _) in zip(residual, variance, kept, strict=True):
        bins[t * 8 // CONTEXT][0] += r
        bins[t * 8 // CONTEXT][1] += v
    norms = np.linalg.norm(x_ND, axis=1), np.linalg.norm(x_hat_ND, axis=1)
    products = (x_ND * x_hat_ND).sum(1)
    density_F = (f_NF > 0).mean(0)
    measures = {
        "num_tokens": len(x_ND),
        "num_sinks": len(whole) - len(kept),
        "fvu_coordinate": float(
            np.mean(np.square(x_ND - x_hat_ND).sum(0) / np.square(x_ND - mean_D).sum(0).clip(min=1e-12))
        ),
        "fvu_with_sinks": float(all_error_ND.square().sum() / all_variance),
        "fvu": sum(residual) / sum(variance),
        "fvu_by_position": [r / v for r, v in bins],
        "fvu_within_kind": sum(residual) / within,
        "explained_variance": 1 - sum(residual) / sum(variance),
        "explained_variance_legacy": float(np.mean([1 - r / v for r, v in zip(residual, variance, strict=True)])),
        "l0": float((f_NF > 0).sum(1).mean()),
        "dead": float((density_F == 0).mean()),
        "dense": float((density_F > 0.1).mean()),
        "cossim": float((products / np.maximum(norms[0] * norms[1], 1e-12)).mean()),
        "l2_ratio": float((norms[1] / norms[0]).mean()),
        "relative_reconstruction_bias": (norms[1] ** 2).sum() / max(products.sum(), 1e-12),
    }
    return measures | splice_oracle(model, one, layer, pieces, texts, torch.from_numpy(mean_D).float())


def splice_oracle(
    model: LanguageModel, one: Dictionary, layer: int, pieces: list[Piece], texts: list[Tensor], mean_D: Tensor
) -> dict:
    sums, answered, wrong = defaultdict(float), set(), defaultdict(set)
    for p, x_TD in zip(pieces, texts, strict=True):
        replacements = {"sae": one.reconstruct(x_TD), "zero": 0 * x_TD, "mean": mean_D.expand_as(x_TD)}
        special_T1 = (torch.from_numpy(p.special) | (x_TD.norm(dim=1) > one.sink_norm))[:, None]
        logits = {"clean": logits_alone(model, p.ids)}
        for way, new_TD in replacements.items():
            logits[way] = logits_alone(model, p.ids, layer, torch.where(special_T1, x_TD, new_TD))
        log_p = {way: log_softmax(values.double().numpy()) for way, values in logits.items()}
        for t in range(1, len(p.ids)):
            sums["n"] += 1
            for way, values in log_p.items():
                sums[way] -= values[t - 1, p.ids[t]]
                if p.answers[t] and values[t - 1].argmax() != p.ids[t]:
                    wrong[way].add(p.document)
            clean, spliced = log_p["clean"][t - 1], log_p["sae"][t - 1]
            sums["kl"] += (np.exp(clean) * (clean - spliced)).sum()
            if p.answers[t]:
                answered.add(p.document)
    right = answered - wrong["clean"]
    ce = {way: sums[way] / sums["n"] for way in ("clean", "sae", "zero", "mean")}
    return {
        "num_spliced_tokens": sums["n"],
        "ce_loss_without_sae": ce["clean"],
        "ce_loss_with_sae": ce["sae"],
        "ce_loss_with_ablation": ce["zero"],
        "ce_loss_with_mean_ablation": ce["mean"],
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_loss_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "delta_ce": ce["sae"] - ce["clean"],
        "kl_div_with_sae": sums["kl"] / sums["n"],
        "num_answers": len(right),
        "answers_kept": len(right - wrong["sae"]) / len(right) if right else None,
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def close_dictionary(model: LanguageModel, rows: TokenRows, layer: int, k: int | None) -> Dictionary:
    """Not perfect, not useless: the identity with noise, a dead feature, and fewer active than needed if `k` is given."""
    one, noise = identity_dictionary(model.d_model), random_dictionary(model.d_model, 2 * model.d_model, seed=layer)
    b_enc = one.b_enc.clone()
    b_enc[3] = -1e6
    options = {} if k is None else {"k": k}
    W_enc = one.W_enc + 0.03 * noise.W_enc
    return replace(one, architecture="relu" if k is None else "topk", W_enc=W_enc, b_enc=b_enc, options=options)


def assess(model: LanguageModel, one: Dictionary | dict, rows: TokenRows, gate: GateSpec = OPEN_GATE) -> LayerQuality:
    return evaluate(model, one if isinstance(one, dict) else {1: one}, rows, nothing(rows), gate)[0]


def nothing(rows: TokenRows) -> TokenRows:
    return TokenRows.padding(0, rows.width)


@pytest.mark.parametrize(("k", "share_of_sinks"), [(None, 0), (6, 0), (6, 0.05)])
def test_every_measure_is_the_oracles(model, rows, pieces, k, share_of_sinks):
    dictionaries = {layer: close_dictionary(model, rows, layer, k) for layer in LAYERS}
    if share_of_sinks:
        [(_, x_LND)] = harvest(model, [rows], LAYERS)
        limits = x_LND.norm(dim=2).quantile(1 - share_of_sinks, dim=1).tolist()
        dictionaries = {a: replace(d, sink_norm=n) for (a, d), n in zip(dictionaries.items(), limits, strict=True)}
    found = evaluate(model, dictionaries, rows, nothing(rows), OPEN_GATE)
    assert [quality.layer for quality in found] == list(LAYERS)
    for quality in found:
        expected = oracle(model, dictionaries[quality.layer], quality.layer, pieces)
        assert set(expected) | {"model", "layer", "architecture", "d_model", "d_sae", "setbacks", "gate"} == set(
            LayerQuality.model_fields
        )
        for name, value in expected.items():
            assert getattr(quality, name) == pytest.approx(value, rel=2e-3, abs=2e-5), name
        assert (quality.num_sinks > 0) == (share_of_sinks > 0)
        assert 0 < quality.fvu < 1 and 0 < quality.dead < 1 and quality.num_answers >= 8
        assert quality.fvu < quality.fvu_within_kind  # the mean of each kind is given away


def test_answers_lost_are_counted(model, rows):
    """A middling dictionary keeps some answers and loses others, so that the oracle's comparison meant something."""
    kept = [
        assess(model, {layer: close_dictionary(model, rows, layer, k)}, rows).answers_kept
        for layer in LAYERS
        for k in (2, 6, 12)
    ]
    assert any(0 < share < 1 for share in kept if share is not None), kept


def test_perfect_dictionary_costs_nothing(model, rows):
    quality = assess(model, identity_dictionary(model.d_model), rows, GateSpec(max_l0_share=0.5))
    assert quality.fvu < 1e-9 and max(quality.fvu_by_position) < 1e-9 and quality.fvu_within_kind < 1e-9
    assert abs(quality.delta_ce) < 1e-5 and abs(quality.kl_div_with_sae) < 1e-5
    assert quality.ce_loss_score == pytest.approx(1, abs=1e-4) == quality.ce_loss_score_mean
    assert quality.cossim == pytest.approx(1) and quality.l2_ratio == pytest.approx(1)
    assert quality.relative_reconstruction_bias == pytest.approx(1)
    assert quality.answers_kept == 1.0 and quality.num_answers >= 8
    assert quality.l0 == pytest.approx(model.d_model)
    assert quality.passed
    assert assess(model, identity_dictionary(model.d_model), rows, GateSpec()).gate == ["L0 16.0 > 3.2"]


def test_zero_dictionary_is_zero_ablation(model, rows):
    one = identity_dictionary(model.d_model)
    quality = assess(model, replace(one, W_enc=0 * one.W_enc, W_dec=0 * one.W_dec), rows, GateSpec())
    assert quality.ce_loss_with_sae == pytest.approx(quality.ce_loss_with_ablation)
    assert quality.ce_loss_score == pytest.approx(0, abs=1e-6) and quality.l0 == 0 and quality.dead == 1
    assert [words.split()[0] for words in quality.gate] == ["FVU", "CE", "dead"]


@pytest.mark.parametrize("kept_bytes", [2**30, 0])
def test_reconstruction_is_of_what_is_spliced_and_the_rest(model, rows, kept_bytes, monkeypatch):
    """However the rows are divided, and whether activations are kept or made again."""
    monkeypatch.setattr(quality_module, "KEPT_BYTES", kept_bytes)
    dictionaries = {layer: close_dictionary(model, rows, layer, 6) for layer in LAYERS}
    some, rest = rows.select(slice(2)), rows.select(slice(2, None))
    whole = evaluate(model, dictionaries, rows, nothing(rows), OPEN_GATE)
    parts = evaluate(model, dictionaries, some, rest, OPEN_GATE)
    alone = evaluate(model, dictionaries, some, nothing(rows), OPEN_GATE)
    for a, b, spliced in zip(whole, parts, alone, strict=True):
        of_mean = {"ce_loss_with_mean_ablation", "ce_loss_score_mean"}  # whose mean is of more text
        for name, value in b.model_dump().items():
            same_as = spliced if name in SPLICED_FIELDS else a
            if name not in of_mean:
                expected = getattr(same_as, name)
                is_number = isinstance(expected, float | list)
                assert value == (pytest.approx(expected, rel=1e-4, abs=1e-6) if is_number else expected), name


def test_one_piece_is_run_for_all_that_begin_alike(model, rows, monkeypatch):
    run = []
    lay_out = ablation._lay_out
    monkeypatch.setattr(ablation, "_lay_out", lambda pieces: run.append(len(pieces)) or lay_out(pieces))
    quality = assess(model, close_dictionary(model, rows, 1, 6), rows)
    beginnings = 2  # with a special token in front and without
    assert (
        sum(run) == 2 + beginnings and quality.ce_loss_with_ablation > quality.ce_loss_without_sae
    )  # 2: the comparison


@pytest.mark.parametrize("copies", [0, 3])
def test_blocks_that_see_the_tokens_are_noticed(model, pieces, copies, monkeypatch):
    """A later block that adds something of the token itself: what one text predicts then speaks for no other but its copies."""
    pieces = pieces + [max(pieces, key=lambda piece: len(piece.ids))] * copies
    rows = TokenRows.concatenate(list(pack(pieces, CONTEXT, 3)))
    model, seen = LanguageModel("tiny", copy.deepcopy(model.hf), model.tokenizer), {}
    model.hf.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.update(x=out))
    model.structure.blocks[-1].register_forward_pre_hook(lambda module, args: (args[0] + 3 * seen["x"], *args[1:]))
    run = []
    lay_out = ablation._lay_out
    monkeypatch.setattr(ablation, "_lay_out", lambda pieces: run.append(len(pieces)) or lay_out(pieces))
    one = close_dictionary(model, rows, 1, 6)
    quality = assess(model, one, rows)
    texts = [residual_alone(model, p.ids, 1) for p in pieces]
    mean_D = measure_means(model, {1: one}, rows)[0]
    for name, value in splice_oracle(model, one, 1, pieces, texts, mean_D).items():
        assert getattr(quality, name) == pytest.approx(value, rel=2e-3, abs=2e-5), name
    assert sum(run) == 2 + len(pieces)


def test_mean_dictionary_is_mean_ablation(model, rows):
    one = identity_dictionary(model.d_model)
    mean_D = measure_means(model, {1: one}, rows)[0]
    quality = assess(model, replace(one, W_enc=0 * one.W_enc, b_dec=mean_D), rows)
    assert quality.fvu == pytest.approx(1, abs=1e-5)
    assert quality.ce_loss_score_mean == pytest.approx(0, abs=1e-5)


def test_bad_dictionary_fails_on_all_four_counts_in_words(model, rows):
    one = identity_dictionary(model.d_model)
    b_enc = torch.where(torch.arange(one.d_sae) % 2 == 0, 1.0, -1.0)  # half always on, half never
    quality = assess(model, replace(one, W_enc=0 * one.W_enc, b_enc=b_enc, W_dec=0 * one.W_dec), rows, GateSpec())
    assert not quality.passed
    assert quality.gate == [
        "L0 16.0 > 3.2",
        f"FVU {quality.fvu:.3f} > 0.5",
        "CE recovered 0.000 < 0.8",
        "dead 50.0% > 30%",
    ]


def test_gate_holds_at_its_bounds():
    one = random_dictionary(16, 100)
    at_bounds = {"l0": 10.0, "fvu": 0.5, "ce_loss_score": 0.8, "dead": 0.3}
    assert failed_conditions(at_bounds, one, GateSpec()) == []
    assert failed_conditions(at_bounds | {"l0": 10.01}, one, GateSpec()) == ["L0 10.0 > 10.0"]
    wide = random_dictionary(16, 1000)  # no more than d_model, however wide
    assert failed_conditions(at_bounds | {"l0": 17.0}, wide, GateSpec()) == ["L0 17.0 > 16.0"]
    for name in at_bounds:
        assert (
            len(failed_conditions(at_bounds | {name: float("nan")}, one, GateSpec())) == 1
        )  # nothing passes by being NaN


def test_how_far_it_is_is_said(model, rows, monkeypatch):
    said: list[str] = []
    one = close_dictionary(model, rows, 1, 6)
    monkeypatch.setattr(quality_module, "SAY_SECONDS", math.inf)
    evaluate(model, {0: one, 1: one}, rows, nothing(rows), OPEN_GATE, said.append)
    assert not said
    monkeypatch.setattr(quality_module, "SAY_SECONDS", 0.0)
    evaluate(model, {0: one, 1: one}, rows, nothing(rows), OPEN_GATE, said.append)
    for doing in ("dictionaries spliced in on", "ablation, all layers together:"):
        told = [
            [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", line.partition(doing)[2])]
            for line in said
            if doing in line
        ]
        dones, totals = zip(*told, strict=True)
        assert sorted(dones) == list(dones) and dones[-1] == totals[-1] > 0 and len(set(totals)) == 1
    assert said[0].startswith(f"{model.name}: dictionaries spliced in on ") and said[-1].endswith(" tokens")


def test_text_without_answers_has_none(model, rows):
    bare = replace(rows, answers=np.zeros_like(rows.answers))
    quality = assess(model, identity_dictionary(model.d_model), bare)
    assert quality.num_answers == 0 and quality.answers_kept is None


def test_measures_do_not_depend_on_packing(model, pieces, rows):
    one = {1: close_dictionary(model, rows, 1, 6)}
    alone = TokenRows.concatenate([part for p in pieces for part in pack([p], CONTEXT, 1)])
    a, b = (assess(model, one, r).model_dump() for r in (rows, alone))
    for name, value in a.items():
        assert b[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float | list) else value), name
