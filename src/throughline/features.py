"""What each feature does on held-out text: how often and how strongly it fires, on what, and what it writes.

Contexts are taken from the top and spread over the quantiles of activation: top ones alone make labels too narrow
(Paulo et al. 2024, arXiv 2410.13928).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import scipy.sparse as sp
import torch

from throughline.codes import Codes
from throughline.dictionaries import Dictionary
from throughline.models import LanguageModel
from throughline.records import EXAMPLE_COLUMNS, FEATURE_COLUMNS, NUM_ROLES, TOKEN_KINDS

QUANTILES = (0.9, 0.7, 0.5, 0.3, 0.1)
WINDOW = 12  # tokens shown before the focus; half as many after
NUM_TOKENS_LISTED = 5


def describe_features(
    model: LanguageModel, dictionaries: dict[int, Dictionary], codes: Codes, num_contexts: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Statistics (FEATURE_COLUMNS) and contexts (EXAMPLE_COLUMNS) of every feature of every layer."""
    features, examples = [], []
    unembedding_VD = model.unembedding()
    for layer, dictionary in dictionaries.items():
        statistics = _statistics(codes, layer)
        statistics |= _written_tokens(model, dictionary, unembedding_VD)
        features.append(pl.DataFrame(statistics, schema=FEATURE_COLUMNS))
        rows = _contexts(codes, layer, num_contexts)
        examples.append(pl.DataFrame(rows, schema=EXAMPLE_COLUMNS, orient="row"))
    return pl.concat(features), pl.concat(examples)


def _statistics(codes: Codes, layer: int) -> dict:
    matrix = codes.columns[layer]
    num_features = matrix.shape[1]
    counts = np.diff(matrix.indptr)
    sums = np.asarray(matrix.sum(axis=0)).ravel()
    top_tokens, shares = _top_tokens(codes, layer)
    return {
        "layer": np.full(num_features, layer),
        "feature": np.arange(num_features),
        "density": counts / codes.num_tokens,
        "num_active": counts,
        "num_tokens": np.full(num_features, codes.num_tokens),
        "mean_active": sums / np.maximum(counts, 1),
        "max": matrix.max(axis=0).toarray().ravel(),
        "top_tokens": top_tokens,
        "top_token_share": shares,
        "role_means": _role_means(codes, layer).tolist(),
    }


def _role_means(codes: Codes, layer: int) -> np.ndarray:
    """Mean activation of each feature over the tokens of each role, [F, roles].

    Where no token has a role, it is the mean over the same kind in the other part; where there is none either, over all.
    """
    tokens = np.arange(codes.num_tokens)
    by_role = sp.csr_array((np.ones(len(tokens)), (codes.roles_N, tokens)), shape=(NUM_ROLES, len(tokens)))
    sums = (by_role @ codes.layers[layer]).toarray()
    counts = np.bincount(codes.roles_N, minlength=NUM_ROLES)[:, None]
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    other_part = np.roll(means, len(TOKEN_KINDS), axis=0)
    means = np.where(np.isnan(means), other_part, means)
    return np.where(np.isnan(means), sums.sum(0) / len(tokens), means).T


def _top_tokens(codes: Codes, layer: int) -> tuple[list[list[str]], list[float]]:
    """The tokens that carry most of each feature's activation, and the share of the first."""
    matrix = codes.columns[layer]
    vocabulary, token_of_N = np.unique(np.array(codes.token_texts, dtype=object), return_inverse=True)
    lists, shares = [], []
    for feature in range(matrix.shape[1]):
        at = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        mass = np.bincount(token_of_N[matrix.indices[at]], weights=matrix.data[at], minlength=1)
        best = np.argsort(-mass, kind="stable")[:NUM_TOKENS_LISTED]
        best = best[mass[best] > 0]
        lists.append([str(vocabulary[i]) for i in best])
        shares.append(float(mass[best[0]] / mass.sum()) if len(best) else 0.0)
    return lists, shares


def _written_tokens(model: LanguageModel, dictionary: Dictionary, unembedding_VD: torch.Tensor) -> dict:
    """Tokens each decoder row raises and lowers most through the centred unembedding with the final norm folded in."""
    raised, lowered = [], []
    for rows_FD in dictionary.W_dec.split(1024):
        logits_FV = rows_FD @ unembedding_VD.T
        raised += logits_FV.topk(NUM_TOKENS_LISTED).indices.tolist()
        lowered += (-logits_FV).topk(NUM_TOKENS_LISTED).indices.tolist()
    return {"promoted": _spell(model, raised), "suppressed": _spell(model, lowered)}


def _spell(model: LanguageModel, ids: Sequence[Sequence[int]]) -> list[list[str]]:
    known: dict[int, str] = {}
    for i in {i for row in ids for i in row}:
        known[i] = model.tokenizer.decode([i])
    return [[known[i] for i in row] for row in ids]


def _contexts(codes: Codes, layer: int, num_contexts: int) -> list[tuple]:
    matrix, found = codes.columns[layer], []
    dense_N = np.zeros(codes.num_tokens, dtype=np.float32)
    for feature in range(matrix.shape[1]):
        at = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        tokens, values = matrix.indices[at], matrix.data[at]
        if not len(tokens):
            continue
        dense_N[tokens] = values
        for stratum, rank, token in _choose(codes, tokens, values, num_contexts):
            start, stop, focus = _window(codes, token)
            found.append(
                (
                    layer,
                    feature,
                    stratum,
                    rank,
                    float(dense_N[token]),
                    int(codes.documents_N[token]),
                    codes.token_texts[start:stop],
                    np.round(dense_N[start:stop], 4).tolist(),
                    focus,
                )
            )
        dense_N[tokens] = 0
    return found


def _choose(codes: Codes, tokens: np.ndarray, values: np.ndarray, num_contexts: int) -> list[tuple[str, int, int]]:
    """Top tokens, one a document, and one token at each quantile of activation."""
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(codes.documents_N[tokens[order]], return_index=True)
    top = tokens[order[np.sort(first)[:num_contexts]]]
    chosen = [("top", rank, int(token)) for rank, token in enumerate(top)]
    for quantile in QUANTILES[:num_contexts]:
        token = int(tokens[order[round((1 - quantile) * (len(order) - 1))]])
        chosen.append((f"{quantile:.2f}", 0, token))
    return chosen


def _window(codes: Codes, token: int) -> tuple[int, int, int]:
    """Tokens of the same document around `token`: start, stop, and where it stands between them."""
    document = codes.documents_N[token]
    start, stop = token, token + 1
    while start > 0 and token - start < WINDOW and codes.documents_N[start - 1] == document:
        start -= 1
    while stop < codes.num_tokens and stop - token <= WINDOW // 2 and codes.documents_N[stop] == document:
        stop += 1
    return start, stop, token - start
