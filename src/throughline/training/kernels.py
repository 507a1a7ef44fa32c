"""One layer's training step on sparse codes, compiled for CPUs: what `compiled.py` calls, and nothing else.

A batch of N tokens has *codes*: for row r the active features `features[starts[r] : starts[r] + counts[r]]`, ascending, and
their `values`. Every product but the encoder's reads active features alone, and each feature's gradient is gathered,
used by Adam and forgotten row by row, so that no gradient of the size of the weights is ever written:

    1. `gather`       the batch's tokens, centred and scaled
       (the encoder's product is torch's, in bfloat16 or float32)
    2. `select_*`     codes from pre-activations
    3. `decode`       x_hat, the error's gradient G = dL/dx_hat, and dL/dvalue of every active feature
    4. `transpose`    codes by feature
    5. `update`       for each feature: gradients of its two rows, Adam, unit norm of the decoder's row

All functions release the interpreter's lock and use one thread; layers run beside each other. Sums are in a fixed order,
so results depend on neither threads nor timing. NaN and infinity keep their meaning.
"""

from typing import Any

import numpy as np

from throughline.kernel_cache import njit
from throughline.training.lanes import COMPILED, LANES, count_above, entries_above, keep_above, narrow, number

MOST_GUESSES = 12  # of the limit of a row; what is too much then goes one by one


@njit(**COMPILED)
def gather(chunk_CD: Any, order_N: Any, mean_D: Any, scale_D: Any, x_ND: Any, rounded_ND: Any) -> None:
    """x = scale * (chunk[order] - mean), coordinate by coordinate, and the same as bfloat16 if `rounded_ND` has rows."""
    for n in range(len(order_N)):
        given_D, x_D = chunk_CD[order_N[n]], x_ND[n]
        for d in range(len(x_D)):
            x_D[d] = scale_D[d] * (number(given_D[d]) - mean_D[d])
        if len(rounded_ND):
            _round(x_D, rounded_ND[n])


@njit(**COMPILED, inline="always")
def _round(from_D: Any, to_D: Any) -> None:
    """Numbers as bfloat16."""
    for d in range(len(from_D)):
        to_D[d] = narrow(from_D[d])


# ---- codes


@njit(**COMPILED)
def _top_of_row(
    row_F: Any, bias_F: Any, k: int, guess: Any, index_A: Any, value_A: Any, features_K: Any, values_K: Any
) -> Any:
    """The k largest positive entries of row + bias, by ascending feature; how many there are, and a guess for the next row.

    Entries above a limit are taken out, some times as many as wanted if the guess was good; a higher limit is then moved
    until k lie above it, or nearly; the surplus goes smallest first (the later feature first among equals). The result does
    not depend on `guess`, only the time does.
    """
    zero, infinity = np.float32(0), np.float32(np.inf)
    limit = guess if guess > zero and guess < infinity else zero
    num = entries_above(row_F, bias_F, limit, index_A, value_A)
    while num < k and limit > zero:
        limit = limit * np.float32(0.7) if limit > np.float32(1e-3) else zero
        num = entries_above(row_F, bias_F, limit, index_A, value_A)
    for a in range(LANES):
        value_A[num + a] = zero
    low, high = limit, infinity
    step = limit * np.float32(1.25) if limit > zero else np.float32(1e-3)
    found = num  # above `low`, at least k if there are so many
    for _ in range(MOST_GUESSES):
        if found <= k:
            break
        count = count_above(value_A, num, step)
        if count >= k:
            low, found = step, count
            step = step * np.float32(1.25) if high == infinity else np.float32(0.5) * (step + high)
        else:
            high = step
            step = np.float32(0.5) * (low + step)
        if step >= high or step <= low:  # equal entries lie between
            break
    num = keep_above(index_A, value_A, num, low)
    for _ in range(num - k):
        least = value_A[0]
        for a in range(1, num):
            least = value_A[a] if value_A[a] < least else least
        last = num - 1
        while value_A[last] != least:
            last -= 1
        value_A[last] = infinity
    kept, least = 0, infinity
    for a in range(num):
        value = value_A[a]
        if value < infinity and kept < k:
            features_K[kept], values_K[kept] = index_A[a], value
            least = value if value < least else least
            kept += 1
    return kept, (least if kept == k else zero)


@njit(**COMPILED, inline="always")
def _follow(guess: Any, least: Any) -> Any:
    """Where the next row begins to look: well below where rows end, for one that ends too low is looked at twice."""
    wanted = np.float32(0.7) * least
    return wanted if guess == np.float32(0) or wanted < guess else guess + np.float32(0.1) * (wanted - guess)


@njit(**COMPILED)
def select_topk(
    pre_NF: Any, b_enc_F: Any, k: int, guess: Any, starts_R: Any, counts_R: Any, features_A: Any, values_A: Any
) -> Any:
    """Codes of the k largest positive pre-activations of each token; returns a guess for the next batch."""
    room = len(b_enc_F) + LANES
    value_F, index_F = np.empty(room, np.float32), np.empty(room, np.int32)
    for n in range(len(pre_NF)):
        start = n * k
        starts_R[n] = start
        counts_R[n], least = _top_of_row(
            pre_NF[n], b_enc_F, k, guess, index_F, value_F, features_A[start : start + k], values_A[start : start + k]
        )
        guess = _follow(guess, least)
    return guess


@njit(**COMPILED)
def select_dead(
    pre_NF: Any,
    b_enc_F: Any,
    dead_U: Any,
    k_aux: int,
    start: int,
    starts_N: Any,
    counts_N: Any,
    features_A: Any,
    values_A: Any,
) -> int:
    """AuxK: the k_aux largest positive pre-activations of each token among the dead features `dead_U`.

    Codes are written from `start` on; returns where they end.
    """
    num_dead = len(dead_U)
    row_U, bias_U = np.empty(num_dead, pre_NF.dtype), np.empty(num_dead, np.float32)
    value_U, index_U = np.empty(num_dead + LANES, np.float32), np.empty(num_dead + LANES, np.int32)
    chosen_K = np.empty(k_aux, np.int32)
    for u in range(num_dead):
        bias_U[u] = b_enc_F[dead_U[u]]
    guess = np.float32(0)
    for n in range(len(pre_NF)):
        for u in range(num_dead):
            row_U[u] = pre_NF[n, dead_U[u]]
        count, least = _top_of_row(
            row_U, bias_U, k_aux, guess, index_U, value_U, chosen_K, values_A[start : start + k_aux]
        )
        guess = _follow(guess, least)
        starts_N[n], counts_N[n] = start, count
        for i in range(count):
            features_A[start + i] = dead_U[chosen_K[i]]
        start += count
    return start


@njit(**COMPILED)
def select_above(
    pre_NF: Any, b_enc_F: Any, limit: Any, starts_R: Any, counts_R: Any, features_A: Any, values_A: Any
) -> int:
    """Codes of all pre-activations above `limit`; how many there are, also if that is more than fit into `features_A`."""
    room = len(features_A)
    value_F, index_F = np.empty(len(b_enc_F) + LANES, np.float32), np.empty(len(b_enc_F) + LANES, np.int32)
    start = 0
    for n in range(len(pre_NF)):
        num = entries_above(pre_NF[n], b_enc_F, limit, index_F, value_F)
        starts_R[n], counts_R[n] = start, num
        if start + num <= room:
            features_A[start : start + num], values_A[start : start + num] = index_F[:num], value_F[:num]
        start += num
    return start


@njit(**COMPILED)
def keep_largest(
    num: int, wanted: int, starts_R: Any, counts_R: Any, num_rows: int, features_A: Any, values_A: Any
) -> Any:
    """Of `num` codes keep the `wanted` largest of the whole batch, the earlier among equals; returns the smallest kept."""
    limit = np.partition(values_A[:num], num - wanted)[num - wanted]
    above = 0
    for a in range(num):
        above += 1 if values_A[a] > limit else 0
    equals, end = wanted - above, 0
    for n in range(num_rows):
        first, last = starts_R[n], starts_R[n] + counts_R[n]
        starts_R[n] = end
        for a in range(first, last):
            value = values_A[a]
            keep = value > limit
            if value == limit and equals > 0:
                keep = True
                equals -= 1
            if keep:
                features_A[end], values_A[end] = features_A[a], value
                end += 1
        counts_R[n] = end - starts_R[n]
    return limit


# ---- gradients


@njit(**COMPILED, inline="always")
def _add_rows(out_D: Any, rows: Any, index_A: Any, weight_A: Any, first: int, last: int) -> None:
    """out += sum of weight * row over entries first to last, four rows at a time: fewer reads and writes of `out`."""
    a = first
    while a + 4 <= last:
        row0, row1, row2, row3 = rows[index_A[a]], rows[index_A[a + 1]], rows[index_A[a + 2]], rows[index_A[a + 3]]
        w0, w1, w2, w3 = weight_A[a], weight_A[a + 1], weight_A[a + 2], weight_A[a + 3]
        for d in range(len(out_D)):
            first_two = w0 * number(row0[d]) + w1 * number(row1[d])
            out_D[d] += first_two + (w2 * number(row2[d]) + w3 * number(row3[d]))
        a += 4
    while a < last:
        row, w = rows[index_A[a]], weight_A[a]
        for d in range(len(out_D)):
            out_D[d] += w * number(row[d])
        a += 1


@njit(**COMPILED, inline="always")
def _dot(a_D: Any, b_D: Any) -> Any:
    total = np.float32(0)
    for d in range(len(a_D)):
        total += a_D[d] * b_D[d]
    return total


@njit(**COMPILED, inline="always")
def _dots(a_D: Any, rows: Any, index_A: Any, first: int, last: int, out_A: Any) -> None:
    """out = <a, row> for entries first to last, four at a time: fewer reads of `a`, and sums that do not wait for each other."""
    a = first
    while a + 4 <= last:
        row0, row1, row2, row3 = rows[index_A[a]], rows[index_A[a + 1]], rows[index_A[a + 2]], rows[index_A[a + 3]]
        sum0 = sum1 = sum2 = sum3 = np.float32(0)
        for d in range(len(a_D)):
            sum0 += a_D[d] * row0[d]
            sum1 += a_D[d] * row1[d]
            sum2 += a_D[d] * row2[d]
            sum3 += a_D[d] * row3[d]
        out_A[a], out_A[a + 1], out_A[a + 2], out_A[a + 3] = sum0, sum1, sum2, sum3
        a += 4
    while a < last:
        out_A[a] = _dot(a_D, rows[index_A[a]])
        a += 1


@njit(**COMPILED)
def decode(
    x_ND: Any,
    W_dec_FD: Any,
    b_dec_D: Any,
    starts_N: Any,
    counts_N: Any,
    features_A: Any,
    values_A: Any,
    factor: Any,
    G_ND: Any,
    rounded_ND: Any,
    slopes_A: Any,
) -> float:
    """G = factor * (x_hat - x), slopes = <G, W_dec> of active features; returns the sum of squared errors.

    If `rounded_ND` has rows, it receives G as bfloat16.
    """
    total = 0.0
    for n in range(len(x_ND)):
        first, last = starts_N[n], starts_N[n] + counts_N[n]
        G_D, x_D = G_ND[n], x_ND[n]
        for d in range(len(x_D)):
            G_D[d] = b_dec_D[d] - x_D[d]
        _add_rows(G_D, W_dec_FD, features_A, values_A, first, last)
        total += _dot(G_D, G_D)
        for d in range(len(x_D)):
            G_D[d] *= factor
        if len(rounded_ND):
            _round(G_D, rounded_ND[n])
        _dots(G_D, W_dec_FD, features_A, first, last, slopes_A)
    return total


@njit(**COMPILED)
def decode_nested(
    x_ND: Any,
    W_dec_FD: Any,
    b_dec_D: Any,
    ends_P: Any,
    starts_R: Any,
    counts_R: Any,
    features_A: Any,
    values_A: Any,
    factor: Any,
    error_ND: Any,
    G_PND: Any,
    rounded_PND: Any,
    slopes_A: Any,
) -> Any:
    """Matryoshka: features before ends[p] make reconstruction p on their own; the loss adds up over p.

    G[p] = factor * sum over q >= p of (x_hat_q - x): what a feature first used in prefix p sees. `error_ND` receives
    x_hat - x of the whole dictionary, `rounded_PND`, if it has rows, G as bfloat16. Returns the squared errors of the last
    prefix and of all.
    """
    num_prefixes, last_total, total = len(ends_P), 0.0, 0.0
    cuts_P = np.empty(num_prefixes + 1, np.int64)
    for n in range(len(x_ND)):
        x_D, error_D = x_ND[n], error_ND[n]
        first, last = starts_R[n], starts_R[n] + counts_R[n]
        for d in range(len(x_D)):
            error_D[d] = b_dec_D[d] - x_D[d]
        a = first
        cuts_P[0] = first
        for p in range(num_prefixes):
            begin = a
            while a < last and features_A[a] < ends_P[p]:
                a += 1
            cuts_P[p + 1] = a
            _add_rows(error_D, W_dec_FD, features_A, values_A, begin, a)
            G_D = G_PND[p, n]
            for d in range(len(x_D)):
                G_D[d] = factor * error_D[d]
            last_total_n = _dot(error_D, error_D)
            total += last_total_n
        last_total += last_total_n
        for back in range(1, num_prefixes):
            p = num_prefixes - 1 - back
            for d in range(len(x_D)):
                G_PND[p, n, d] += G_PND[p + 1, n, d]
        for p in range(num_prefixes):
            if len(rounded_PND):
                _round(G_PND[p, n], rounded_PND[p, n])
            _dots(G_PND[p, n], W_dec_FD, features_A, cuts_P[p], cuts_P[p + 1], slopes_A)
    return last_total, total


@njit(**COMPILED)
def transpose(
    num_rows: int,
    num_tokens: int,
    starts_R: Any,
    counts_R: Any,
    features_A: Any,
    values_A: Any,
    slopes_A: Any,
    first_row_F: Any,
    starts_F: Any,
    token_A: Any,
    row_A: Any,
    value_A: Any,
    slope_A: Any,
) -> None:
    """Codes by feature: feature f has the entries starts_F[f] to starts_F[f + 1], in the order of their rows.

    Rows from `num_tokens` on are AuxK's: tokens once more, with rows of G after all others. `first_row_F` is the row of
    G at which the gradients that a feature sees begin: 0, or its prefix's in a matryoshka.
    """
    num_features = len(first_row_F)
    aux_row = first_row_F[num_features - 1]  # AuxK's rows of G lie behind those of the last prefix
    starts_F[:] = 0
    for r in range(num_rows):
        for a in range(starts_R[r], starts_R[r] + counts_R[r]):
            starts_F[features_A[a] + 1] += 1
    for f in range(num_features):
        starts_F[f + 1] += starts_F[f]
    next_F = starts_F[:num_features].copy()
    for r in range(num_rows):
        is_aux = r >= num_tokens
        for a in range(starts_R[r], starts_R[r] + counts_R[r]):
            f = features_A[a]
            to = next_F[f]
            next_F[f] = to + 1
            token_A[to] = r - num_tokens if is_aux else r
            row_A[to] = aux_row + r if is_aux else first_row_F[f] + r
            value_A[to], slope_A[to] = values_A[a], slopes_A[a]


# ---- Adam


@njit(**COMPILED, inline="always")
def _descend(g_D: Any, w_D: Any, m_D: Any, v_D: Any, adam: Any) -> None:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= rate * m / (sqrt(v) * root + epsilon), in place.

    `rate` and `root` carry Adam's bias corrections.
    """
    rate, root, beta1, beta2, epsilon = adam[0], adam[1], adam[2], adam[3], adam[4]
    new1, new2 = np.float32(1) - beta1, np.float32(1) - beta2
    for d in range(len(w_D)):
        m = beta1 * m_D[d] + new1 * g_D[d]
        v = beta2 * v_D[d] + new2 * g_D[d] * g_D[d]
        m_D[d], v_D[d] = m, v
        w_D[d] -= rate * m / (np.sqrt(v) * root + epsilon)


@njit(**COMPILED)
def update(
    x_ND: Any,
    G_RD: Any,
    aux_row: int,
    starts_F: Any,
    token_A: Any,
    row_A: Any,
    value_A: Any,
    slope_A: Any,
    W_enc_FD: Any,
    rounded_FD: Any,
    b_enc_F: Any,
    W_dec_FD: Any,
    m_enc_FD: Any,
    v_enc_FD: Any,
    m_bias_F: Any,
    v_bias_F: Any,
    m_dec_FD: Any,
    v_dec_FD: Any,
    idle_F: Any,
    adam: Any,
) -> None:
    """Gradients and Adam for every feature; the decoder's row loses the gradient along it and returns to unit norm.

    `x_ND` and `G_RD` are float32, or bfloat16 both. `adam` is rate, root (both with bias correction), beta1, beta2, epsilon.
    `rounded_FD` receives W_enc as bfloat16, if it has rows. Rows of G from `aux_row` on are AuxK's. `idle_F` counts the
    tokens since a feature last fired.
    """
    num_tokens = len(x_ND)
    one, tiny = np.float32(1), np.float32(1e-8)
    to_enc_D, to_dec_D = np.empty(x_ND.shape[1], np.float32), np.empty(x_ND.shape[1], np.float32)
    to_bias_F = np.empty(len(b_enc_F), np.float32)
    for f in range(len(b_enc_F)):
        first, last = starts_F[f], starts_F[f + 1]
        to_enc_D[:] = np.float32(0)
        to_dec_D[:] = np.float32(0)
        _add_rows(to_enc_D, x_ND, token_A, slope_A, first, last)
        _add_rows(to_dec_D, G_RD, row_A, value_A, first, last)
        to_bias = np.float32(0)
        for a in range(first, last):
            to_bias += slope_A[a]
        fired = first < last and row_A[first] < aux_row  # entries are in the order of rows, AuxK's last
        idle_F[f] = 0 if fired else idle_F[f] + num_tokens

        _descend(to_enc_D, W_enc_FD[f], m_enc_FD[f], v_enc_FD[f], adam)
        if len(rounded_FD):
            _round(W_enc_FD[f], rounded_FD[f])
        to_bias_F[f] = to_bias

        W_dec_D = W_dec_FD[f]
        along = _dot(to_dec_D, W_dec_D)
        for d in range(len(W_dec_D)):
            to_dec_D[d] -= along * W_dec_D[d]
        _descend(to_dec_D, W_dec_D, m_dec_FD[f], v_dec_FD[f], adam)
        to_unit = one / max(np.sqrt(_dot(W_dec_D, W_dec_D)), tiny)
        for d in range(len(W_dec_D)):
            W_dec_D[d] *= to_unit
    _descend(to_bias_F, b_enc_F, m_bias_F, v_bias_F, adam)


@njit(**COMPILED)
def update_bias(G_ND: Any, b_dec_D: Any, m_D: Any, v_D: Any, adam: Any) -> None:
    """Adam for b_dec, whose gradient is the sum of G over the batch."""
    gradient_D = np.zeros(len(b_dec_D), np.float32)
    for n in range(len(G_ND)):
        for d in range(len(gradient_D)):
            gradient_D[d] += G_ND[n, d]
    _descend(gradient_D, b_dec_D, m_D, v_D, adam)


# ---- many steps in one call


@njit(**COMPILED)
def _dead_features(idle_F: Any, dead_after: float) -> Any:
    """Features that have not fired for so many tokens, ascending."""
    found = np.empty(len(idle_F), np.int32)
    num = 0
    for f in range(len(idle_F)):
        found[num] = f
        num += 1 if idle_F[f] >= dead_after else 0
    return found[:num]


@njit(**COMPILED)
def _auxiliary_errors(G_ND: Any, factor: Any, error_AD: Any) -> float:
    """Errors x - x_hat = -G / factor of the first tokens; their summed squared distance from their mean."""
    A, D = error_AD.shape
    total_D = np.zeros(D, np.float32)
    squares = 0.0
    for n in range(A):
        for d in range(D):
            error_AD[n, d] = -G_ND[n, d] / factor
            total_D[d] += error_AD[n, d]
        squares += _dot(error_AD[n], error_AD[n])
    return max(squares - _dot(total_D, total_D) / A, 1e-12 * A * D)


@njit(**COMPILED)
def steps_topk(
    chunk_CD: Any,
    order_C: Any,
    mean_D: Any,
    scale_D: Any,
    k: int,
    aux_weight: float,
    dead_after: float,
    adam_S: Any,
    guess: Any,
    tokens: Any,
    pre_NF: Any,
    codes: Any,
    by_feature: Any,
    G_RD: Any,
    error_AD: Any,
    trained: Any,
    bias: Any,
    idle_F: Any,
) -> Any:
    """TopK: all steps of a block without returning to the interpreter, for layers so small that calling costs more than computing.

    `tokens`, `codes`, `by_feature`, `trained` and `bias` are tuples of the arrays that the functions above take, in their order.
    Returns the steps done (fewer if a loss is not finite), loss and squared error of the last, its active features, and the
    next guess.
    """
    x_ND, rounded_ND = tokens
    starts_R, counts_R, features_A, values_A, slopes_A = codes
    starts_F, token_A, row_A, value_A, slope_A = by_feature
    W_enc_FD, rounded_FD, b_enc_F, W_dec_FD, m_enc, v_enc, m_bias, v_bias, m_dec, v_dec = trained
    b_dec_D, m_b_dec_D, v_b_dec_D = bias
    N, D = x_ND.shape
    A = len(error_AD)
    first_row_F = np.zeros(len(b_enc_F), np.int64)
    zero_D = np.zeros(D, np.float32)
    none_ND = np.empty((0, D), np.int16)
    factor = np.float32(2 / (N * D))
    loss, error, num_codes = 0.0, 0.0, 0
    for step in range(len(adam_S)):
        gather(chunk_CD, order_C[step * N : (step + 1) * N], mean_D, scale_D, x_ND, rounded_ND)
        np.dot(x_ND, W_enc_FD.T, pre_NF)
        guess = select_topk(pre_NF, b_enc_F, k, guess, starts_R, counts_R, features_A, values_A)
        error = decode(
            x_ND, W_dec_FD, b_dec_D, starts_R, counts_R, features_A, values_A, factor, G_RD, none_ND, slopes_A
        )
        loss = error / (N * D)
        num_codes = counts_R[:N].sum()
        if not np.isfinite(loss):
            return step, loss, error, num_codes, guess
        num_rows = N
        dead_U = _dead_features(idle_F, dead_after)
        if len(dead_U):
            variance = _auxiliary_errors(G_RD, factor, error_AD)
            starts_A, counts_A = starts_R[N:], counts_R[N:]
            k_aux = min(D // 2, len(dead_U))
            select_dead(pre_NF[:A], b_enc_F, dead_U, k_aux, N * k, starts_A, counts_A, features_A, values_A)
            push = np.float32(2 * aux_weight / variance)
            rest = decode(
                error_AD, W_dec_FD, zero_D, starts_A, counts_A, features_A, values_A, push, G_RD[N:], none_ND, slopes_A
            )
            loss += aux_weight * rest / variance
            num_rows += A
        transpose(
            num_rows, N, starts_R, counts_R, features_A, values_A, slopes_A,
            first_row_F, starts_F, token_A, row_A, value_A, slope_A,
        )  # fmt: skip
        adam = adam_S[step]
        update(
            x_ND, G_RD, N, starts_F, token_A, row_A, value_A, slope_A, W_enc_FD, rounded_FD, b_enc_F,
            W_dec_FD, m_enc, v_enc, m_bias, v_bias, m_dec, v_dec, idle_F, adam,
        )  # fmt: skip
        update_bias(G_RD[:N], b_dec_D, m_b_dec_D, v_b_dec_D, adam)
    return len(adam_S), loss, error, num_codes, guess
