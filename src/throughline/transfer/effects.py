"""What features of earlier layers do to one feature of a later layer: by gradient, and by switching them off in the model.

A context is a text up to a token at which feature b of layer j, its target, fires; b is read at that last token. "Off" is an
activation of zero: a feature's direction is taken out of the residual stream wherever in the context the feature is active, as
the features here are read as present or absent, and so that a feature carried on unchanged accounts for all of its successor.
(A trace asks about answers in one state of the model, and sets features to the mean of their role instead.)

    1. estimate   drop[c, a] = Σ_t f_a(t) · (W_dec_i[a] · ∂b / ∂x_i(t))       all a of all layers i < j by one backward pass
    2. measured   b − b', b' read again with f_a(t) · W_dec_i[a] taken out of x_i(t) at every t of c; what the dictionary of
                  layer i leaves out of x_i stays in it

A drop is what b loses when a is off: positive where a supports b. The gradient is of b's activation, which where b fires is that
of its pre-activation; that another feature then takes b's place among the k largest is measured, and not estimated.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from throughline.codes import Codes, reading_order
from throughline.dictionaries import Dictionary
from throughline.harvesting import tokens_of_a_pass
from throughline.models import LanguageModel


class Contexts(NamedTuple):
    """C texts, padded at the end to T tokens, each up to the token at which its target feature is read."""

    ids_CT: np.ndarray
    kept_CT: np.ndarray  # bool: neither padding nor a special token that is left out
    lengths_C: np.ndarray
    targets_C: np.ndarray

    def select(self, chosen: np.ndarray) -> "Contexts":
        """The contexts numbered `chosen`, as wide as the longest of them."""
        width = int(self.lengths_C[chosen].max(initial=0))
        return Contexts(
            self.ids_CT[chosen, :width], self.kept_CT[chosen, :width], self.lengths_C[chosen], self.targets_C[chosen]
        )


def cut_contexts(codes: Codes, tokens_C: np.ndarray, targets_C: np.ndarray) -> Contexts:
    """The contexts that end with tokens of `codes` (numbers in reading order), each from the beginning of its piece."""
    rows = codes.rows
    cells_C = np.flatnonzero(rows.keep)[reading_order(rows)][tokens_C]
    row_C, column_C = np.divmod(cells_C, rows.width)
    lengths_C = rows.positions[row_C, column_C] + 1
    times_T = np.arange(lengths_C.max(initial=0))
    inside_CT = times_T < lengths_C[:, None]
    columns_CT = np.where(inside_CT, (column_C - lengths_C + 1)[:, None] + times_T, 0)
    ids_CT, kept_CT = (array[row_C[:, None], columns_CT] for array in (rows.ids, rows.keep))
    return Contexts(np.where(inside_CT, ids_CT, 0), inside_CT & kept_CT, lengths_C, targets_C)


def estimate_drops(
    model: LanguageModel, dictionaries: Mapping[int, Dictionary], layer: int, contexts: Contexts
) -> tuple[np.ndarray, dict[int, sp.csr_array]]:
    """The targets' activations [C], and by earlier layer the drop of each by each feature, sparse [C, F].

    `contexts` have targets of `layer`. Entries are stored for the features that are active in a context, and for no others.
    """
    earlier = [i for i in dictionaries if i < layer]
    clean_C = np.zeros(len(contexts.targets_C))
    parts: dict[int, list[sp.csr_array]] = {i: [] for i in earlier}
    order = list(_batches(model, contexts))
    for chosen in order:
        batch = contexts.select(chosen)
        residuals, gradients, clean_C[chosen] = _differentiate(model, dictionaries[layer], layer, earlier, batch)
        for i in earlier:
            parts[i].append(_drops_of(dictionaries[i], residuals[i], gradients[i], batch))
    back = np.argsort(np.concatenate(order))
    return clean_C, {i: sp.csr_array(sp.vstack(part, format="csr"))[back] for i, part in parts.items()}


@torch.no_grad()
def switch_off(
    model: LanguageModel,
    source: tuple[int, Dictionary],
    target: tuple[int, Dictionary],
    contexts: Contexts,
    features_C: np.ndarray,
) -> np.ndarray:
    """The targets' activations [C] in the real model with feature `features_C[c]` of the source layer off throughout context c."""
    off_C = np.zeros(len(features_C))
    for chosen in _batches(model, contexts):
        batch = contexts.select(chosen)
        features_B = torch.from_numpy(features_C[chosen]).to(model.device)

        def edit(x_BTD: Tensor, batch=batch, features_B=features_B) -> Tensor:
            f_BT = _activations_of(source[1], x_BTD, batch, features_B)
            return x_BTD - f_BT[..., None] * source[1].W_dec[features_B][:, None]

        output = model.run(model.inputs(batch.ids_CT), capture=[target[0]], edits={source[0]: edit}, logits=False)
        off_C[chosen] = _read_targets(target[1], output.residuals[target[0]], batch).cpu().numpy()
    return off_C


def _batches(model: LanguageModel, contexts: Contexts) -> Iterator[np.ndarray]:
    """Numbers of contexts that go through the model together; alike in length, so that little of it is padding."""
    order, most = np.argsort(-contexts.lengths_C, kind="stable"), tokens_of_a_pass(model)
    while len(order):
        num_rows = max(1, most // int(contexts.lengths_C[order[0]]))
        yield order[:num_rows]
        order = order[num_rows:]


def _differentiate(
    model: LanguageModel, dictionary: Dictionary, layer: int, earlier: list[int], batch: Contexts
) -> tuple[dict[int, Tensor], dict[int, Tensor], np.ndarray]:
    """Residual stream and gradient of each row's target at every earlier layer [B, T, D], and the targets [B].

    Rows do not see one another, so the gradient of the sum over rows is that of each.
    """
    shape = (*batch.ids_CT.shape, model.d_model)
    nudges = {i: torch.zeros(shape, device=model.device, requires_grad=True) for i in earlier}
    edits = {i: (lambda x, nudge=nudge: x + nudge) for i, nudge in nudges.items()}
    with torch.enable_grad():
        output = model.run(model.inputs(batch.ids_CT), capture=[*earlier, layer], edits=edits, logits=False)
        target_B = _read_targets(dictionary, output.residuals[layer], batch)
        gradients = torch.autograd.grad(target_B.sum(), list(nudges.values()))
    residuals = {i: output.residuals[i].detach() for i in earlier}
    return residuals, dict(zip(earlier, gradients, strict=True)), target_B.detach().cpu().numpy()


def _read_targets(dictionary: Dictionary, x_BTD: Tensor, batch: Contexts) -> Tensor:
    """Each row's target feature at its last token, [B]."""
    rows_B = torch.arange(len(x_BTD), device=x_BTD.device)
    last_B, targets_B = (torch.from_numpy(a).to(x_BTD.device) for a in (batch.lengths_C - 1, batch.targets_C))
    x_BD = x_BTD[rows_B, last_B].float()
    f_B = [dictionary.encode(x)[range(len(x)), b] for x, b in _chunks(dictionary, x_BD, targets_B)]
    return torch.cat(f_B)


@torch.no_grad()
def _drops_of(dictionary: Dictionary, x_BTD: Tensor, gradient_BTD: Tensor, batch: Contexts) -> sp.csr_array:
    """Σ over kept tokens of activation · gradient along the decoder row, sparse [B, F]."""
    kept_BT = torch.from_numpy(batch.kept_CT).to(x_BTD.device)
    rows_N = kept_BT.nonzero()[:, 0]
    parts = []
    for x_ND, gradient_ND, of_N in _chunks(dictionary, x_BTD[kept_BT].float(), gradient_BTD[kept_BT], rows_N):
        f_NF = dictionary.encode(x_ND)
        tokens, features = f_NF.nonzero(as_tuple=True)
        drops = (f_NF * (gradient_ND @ dictionary.W_dec.T))[tokens, features]
        parts.append((of_N[tokens], features, drops.double()))
    rows, features, drops = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return sp.coo_array((drops, (rows, features)), shape=(len(x_BTD), dictionary.d_sae)).tocsr()  # tocsr adds up


def _activations_of(dictionary: Dictionary, x_BTD: Tensor, batch: Contexts, features_B: Tensor) -> Tensor:
    """Activation of each row's own feature at its kept tokens, 0 elsewhere, [B, T]."""
    kept_BT = torch.from_numpy(batch.kept_CT).to(x_BTD.device)
    own_N = features_B[kept_BT.nonzero()[:, 0]]
    f_N = [dictionary.encode(x)[range(len(x)), own] for x, own in _chunks(dictionary, x_BTD[kept_BT].float(), own_N)]
    f_BT = torch.zeros(kept_BT.shape, device=x_BTD.device)
    f_BT[kept_BT] = torch.cat(f_N)
    return f_BT


def _chunks(dictionary: Dictionary, x_ND: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of x as `Dictionary.chunks` cuts them, with the same tokens of what lies beside it."""
    start = 0
    for x in dictionary.chunks(x_ND):
        yield x, *(array[start : start + len(x)] for array in beside)
        start += len(x)
