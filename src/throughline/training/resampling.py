"""Give dead features new directions: those of tokens that are badly reconstructed (Bricken et al. 2023, "Neuron Resampling").

    1. tokens are drawn with probability proportional to |x - x_hat|^4
    2. decoder row = (x - x_hat) of the token, unit
    3. encoder row = the same direction whitened by the batch, so that it does not see what all tokens have in common, and so long
       that its projections are seven tenths of those of living rows. Rows of the error itself, as long as the living ones, had the
       watch send a layer back three times in four runs on the gpt2 zoo model and left five times as many dead (docs/quality.md)
    4. with a sparsity penalty, the bias lets the feature fire where the projection is more than half the token's, so that L0
       does not leap; where k is chosen the bias is 0
    5. what the optimizer remembers of these rows is forgotten; an architecture's own weights start anew

Generators are made from seed, layer, twin and step, so that there is no state.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from throughline.dictionaries.stack import whiten
from throughline.training.group import Course, Group, seed_of

FROM_SHARE = 0.1  # of the run
UNTIL_SHARE, UNTIL_SHARE_WITH_PENALTY = 0.8, 0.7  # a penalty needs longer to settle what a new feature did to L0
EVERY_SHARE = 0.05  # of the run
# A short run needs its second half for new directions to settle: with 4 steps between and no such limit 117 steps on the zoo's gpt2
# ended at FVU 0.22 and 0.43, with these at 0.017 and 0.044.
FEWEST_STEPS, UNTIL_SHARE_OF_SHORT = 24, 0.5
LOUDNESS = 0.7  # root mean square of a new encoder row's projections, beside the median of the living ones'
LARGEST_SHARE = 0.25  # of a batch's tokens: no more features get a new direction at once


def is_due(step: int, num_steps: int, k: int | None) -> bool:
    """True at the first step after another twentieth of the run, until eight tenths of it (seven where there is a penalty).

    In a run of fewer than 480 steps, at every 24th until half of it.
    """
    now, before = step / num_steps, (step - 1) / num_steps
    until = UNTIL_SHARE if k is not None else UNTIL_SHARE_WITH_PENALTY
    every = FEWEST_STEPS / num_steps
    if every > EVERY_SHARE:
        until = UNTIL_SHARE_OF_SHORT
    every = max(EVERY_SHARE, every)
    return FROM_SHARE <= now <= until + 1 / num_steps and int(now / every) > int(before / every)


@torch.no_grad()
def resample_(
    group: Group, x_LND: Float[Tensor, "L N D"], error_LND: Float[Tensor, "L N D"], step: int, course: Course
) -> None:
    """Give the dead features of a group new directions; `error_LND` is x - x_hat of the batch `x_LND`."""
    for index, layer in enumerate(group.layers):
        dead_F = group.idle_tokens_LF[index] >= course.dead_after
        error_ND = error_LND[index]
        weight_N = error_ND.square().sum(1).square()
        dead = dead_F.nonzero()[: int(LARGEST_SHARE * len(weight_N)), 0]
        if not len(dead) or int((weight_N > 0).sum()) < len(dead):
            continue
        generator = torch.Generator().manual_seed(seed_of(course.seed, layer, group.twin) * 1_000_003 + step)
        tokens = torch.multinomial(weight_N.cpu(), len(dead), generator=generator).to(error_ND.device)
        _point_(group, index, dead, normalize(error_ND[tokens]), tokens, x_LND[index], ~dead_F)
        group.idle_tokens_LF[index, dead] = 0


def _point_(
    group: Group, index: int, dead: Tensor, rows_AD: Tensor, tokens: Tensor, x_ND: Tensor, alive_F: Tensor
) -> None:
    """Features `dead` of one layer look along `rows_AD`, the errors of `tokens`."""
    stack = group.stack
    encoder_AD = normalize(whiten(rows_AD, x_ND))
    if alive_F.any():
        living = _loudness(stack.W_enc_LFD[index, alive_F], x_ND).median()
        encoder_AD *= (LOUDNESS * living / _loudness(encoder_AD, x_ND).clamp_min(1e-12))[:, None]
    stack.W_dec_LFD[index, dead] = rows_AD
    stack.W_enc_LFD[index, dead] = encoder_AD
    projection_A = (x_ND[tokens] * encoder_AD).sum(1)
    stack.b_enc_LF[index, dead] = -0.5 * projection_A.clamp_min(0) if group.k is None else 0.0
    _, F, D = stack.W_dec_LFD.shape
    fresh = group.architecture.extra((1, F, D))
    for name, tensor_LF in stack.extra_LF.items():
        if tensor_LF.requires_grad:
            tensor_LF[index, dead] = fresh[name][0, dead.to(fresh[name].device)].to(tensor_LF)
    for name, moments in group.moments.items():
        if name != "b_dec":
            for moment in moments:
                moment[index, dead] = 0


def _loudness(rows_AD: Tensor, x_ND: Tensor) -> Tensor:
    """Root mean square of the projections of a batch on each row."""
    return (x_ND @ rows_AD.T).square().mean(0).sqrt()
