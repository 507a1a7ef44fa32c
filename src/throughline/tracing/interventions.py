"""What really happens when features take other values: the model run on from the layer that was changed, many changes at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from throughline.pools import spread
from throughline.tracing.answer import Edit, answer_under, spell
from throughline.tracing.texts import Subject

TOKENS_OF_A_PASS = 1024


@dataclass(frozen=True)
class Nodes:
    """Some features of one layer at some positions, with their own value and that when off."""

    layer: int
    positions_N: Int[Tensor, "N"]
    features_N: Int[Tensor, "N"]
    own_N: Float[Tensor, "N"]
    off_N: Float[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.features_N)

    def select(self, chosen: Tensor) -> "Nodes":
        """The nodes numbered `chosen`."""
        return Nodes(self.layer, *(t[chosen] for t in (self.positions_N, self.features_N, self.own_N, self.off_N)))

    def steps(self, subject: Subject) -> Float[Tensor, "N D"]:
        """What switching each off adds to the residual stream at its position."""
        return (self.off_N - self.own_N)[:, None] * subject.dictionaries[self.layer].W_dec[self.features_N]


class Effects(NamedTuple):
    """What each of N changes does: to the targets' scores, and to features of the next traced layer ([N, M], if asked for)."""

    scores_NC: Float[Tensor, "N C"]
    preferred_NP: Int[Tensor, "N P"]  # the preferred token at each position that is read
    linear_NM: Float[Tensor, "N M"]
    activation_NM: Float[Tensor, "N M"]


def batch_copies(subject: Subject, num: int) -> tuple[Int[Tensor, "B"], ...]:
    """Numbers 0 to `num` in batches, for so many copies of the text as go through the model at once."""
    return torch.arange(num, device=subject.model.device).split(max(1, TOKENS_OF_A_PASS // len(subject.answer.ids)))


class Copies(NamedTuple):
    """Copies of the text, each changed from `begin` on: the logits at all positions that are read, and what was captured."""

    begin: int
    logits_BPV: Float[Tensor, "B P V"]
    residuals: Mapping[int, Float[Tensor, "B R D"]]  # of the R positions from `begin` on


def run_copies(
    subject: Subject,
    layer: int,
    begin: int,
    start_BRD: Float[Tensor, "B R D"],
    capture: Sequence[int] = (),
    edits: Mapping[int, Edit] | None = None,
    logits: bool = True,
) -> Copies:
    """Run the model on from the streams after `layer`, of the positions from `begin` on; those before are the text's own.

    A later position changes nothing of an earlier one, so nothing before `begin` is computed anew.
    """
    answer, suffix = subject.answer, subject.model.after(layer)
    late_P = answer.read_P[answer.read_P >= begin]
    output = suffix.run(
        suffix.inputs(torch.tensor([answer.ids[begin:]] * len(start_BRD))),
        edits={layer: lambda _: start_BRD, **(edits or {})},
        capture=capture,
        logits=logits,
        at=late_P - begin,
        past=subject.past.before(begin) if begin else None,
    )
    early_BPV = subject.logits_PV[: len(answer.read_P) - len(late_P)].expand(len(start_BRD), -1, -1)
    logits_BPV = early_BPV if output.logits is None else torch.cat([early_BPV, output.logits], dim=1)
    return Copies(begin, logits_BPV, output.residuals)


def batch_by_position(subject: Subject, positions_N: Int[Tensor, "N"]) -> list[Int[Tensor, "B"]]:
    """The numbers 0 to N in batches of copies changed at these positions, for a pass each.

    Those of a batch have about as much of the text after them, within a factor of two, so that little is computed in vain.
    """
    total = len(subject.answer.ids)
    if not len(positions_N):
        return [torch.zeros_like(positions_N)]
    by_rest: dict[int, list[int]] = {}
    for number, position in enumerate(positions_N.tolist()):
        by_rest.setdefault((total - position).bit_length(), []).append(number)
    return [
        batch
        for bits, numbers in sorted(by_rest.items())
        for batch in torch.tensor(numbers, device=positions_N.device).split(max(1, TOKENS_OF_A_PASS >> bits))
    ]


@torch.no_grad()
def switch_off(subject: Subject, nodes: Nodes, watched: Nodes | None = None) -> Effects:
    """The effects of each node alone, measured; `watched` are features of a later layer whose change is read too."""
    answer, device = subject.answer, subject.model.device
    steps_ND, capture = nodes.steps(subject), [] if watched is None else [watched.layer]
    clean_C = torch.tensor(subject.scores, device=device)
    _ = subject.past  # found here once, not by each thread

    def measure(chosen_B: Tensor) -> Effects:
        some = nodes.select(chosen_B)
        begin = int(some.positions_N.min()) if len(some) else 0
        copies = run_copies(subject, nodes.layer, begin, _moved(subject, some, steps_ND[chosen_B], begin), capture)
        empty = torch.zeros(len(chosen_B), 0, device=device)
        seen = (empty, empty) if watched is None else _watch(subject, watched, copies)
        return Effects(answer.scores(copies.logits_BPV) - clean_C, copies.logits_BPV.argmax(-1), *seen)

    batches = batch_by_position(subject, nodes.positions_N)
    parts = list(spread(measure, batches, device))
    order_N = torch.cat(batches).argsort()
    return Effects(*(torch.cat(part)[order_N] for part in zip(*parts, strict=True)))


@torch.no_grad()
def switch_together(subject: Subject, by_layer: Sequence[Nodes]) -> Effects:
    """The effects of N sets of nodes, each with one node in every layer, all of a set off at once."""
    answer, first, later = subject.answer, by_layer[0], by_layer[1:]
    begin = min(int(nodes.positions_N.min()) for nodes in by_layer)
    rows_N = torch.arange(len(first), device=subject.model.device)

    def edit_of(nodes: Nodes) -> Edit:
        def edit(x_NRD: Tensor) -> Tensor:
            out = x_NRD.clone()
            out[rows_N, nodes.positions_N - begin] += nodes.steps(subject).to(out.dtype)
            return out

        return edit

    start_NRD = _moved(subject, first, first.steps(subject), begin)
    copies = run_copies(subject, first.layer, begin, start_NRD, edits={n.layer: edit_of(n) for n in later})
    none = torch.zeros(len(first), 0, device=rows_N.device)
    clean_C = torch.tensor(subject.scores, device=rows_N.device)
    return Effects(answer.scores(copies.logits_BPV) - clean_C, copies.logits_BPV.argmax(-1), none, none)


def _watch(subject: Subject, watched: Nodes, copies: Copies) -> tuple[Tensor, Tensor]:
    """Changes of the watched features, by their reading direction and after the dictionary's selection, each [B, M]."""
    x_BRD, begin = copies.residuals[watched.layer], copies.begin
    dictionary, clean_RD = subject.dictionaries[watched.layer], subject.clean.x[watched.layer][begin:]
    linear_BM, gated_BM = (torch.zeros(len(x_BRD), len(watched), device=x_BRD.device) for _ in range(2))
    late_M = (watched.positions_N >= begin).nonzero()[:, 0]  # of earlier ones nothing changes
    late = watched.select(late_M)
    at_M = late.positions_N - begin
    readers_MD = dictionary.readers(late.features_N)
    linear_BM[:, late_M] = torch.einsum("bmd,md->bm", (x_BRD.float() - clean_RD)[:, at_M], readers_MD)
    places_Q, which_M = torch.unique(at_M, return_inverse=True)
    at_BQD = x_BRD[:, places_Q].float()
    f_BQF = dictionary.encode(at_BQD.flatten(0, 1)).view(*at_BQD.shape[:2], dictionary.d_sae)
    gated_BM[:, late_M] = f_BQF[:, which_M, late.features_N] - late.own_N
    return linear_BM, gated_BM


def answers_if_off(subject: Subject, nodes: Nodes, preferred_NP: Tensor) -> list[str]:
    """What the model says with each node off, given the tokens that it preferred then."""
    steps_ND = nodes.steps(subject)
    return [
        say_under(subject, preferred_NP[i], {nodes.layer: add_at(int(nodes.positions_N[i]), steps_ND[i])})
        for i in range(len(nodes))
    ]


def say_under(subject: Subject, preferred_P: Tensor, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> str:
    """The answer of the edited model, given the tokens it preferred over prompt and answer."""
    said = answer_under(subject.model, subject.answer, preferred_P.tolist(), edits)
    return spell(subject.model, subject.answer.prompt_ids, said).strip()


def add_at(position: int, step_D: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that adds a vector at one position, and nothing before the text gets there."""

    def edit(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[:, position : position + 1] += step_D.to(out.dtype)
        return out

    return edit


@torch.no_grad()
def follow_paths(subject: Subject, first: Nodes, paths: Sequence[Nodes]) -> Float[Tensor, "N C"]:
    """Effects on the targets' scores along N paths alone.

    `first` holds the features switched off, `paths[i]` each path's feature in the next traced layers. Between layers only the
    change of that feature's activation is passed on, as the real block and dictionary make it.
    """
    rows_N = torch.arange(len(first), device=subject.model.device)
    here, step_ND = first, first.steps(subject)
    for following in paths:
        begin = int(here.positions_N.min())
        start_NRD = _moved(subject, here, step_ND, begin)
        copies = run_copies(subject, here.layer, begin, start_NRD, [following.layer], logits=False)
        dictionary = subject.dictionaries[following.layer]
        at_ND = copies.residuals[following.layer][rows_N, following.positions_N - begin].float()
        change_N = dictionary.encode(at_ND)[rows_N, following.features_N] - following.own_N
        here, step_ND = following, change_N[:, None] * dictionary.W_dec[following.features_N]
    begin = int(here.positions_N.min())
    copies = run_copies(subject, here.layer, begin, _moved(subject, here, step_ND, begin))
    return subject.answer.scores(copies.logits_BPV) - torch.tensor(subject.scores, device=rows_N.device)


def _moved(subject: Subject, nodes: Nodes, step_ND: Tensor, begin: int) -> Float[Tensor, "N R D"]:
    """The stream after the nodes' layer from position `begin` on, a copy for each node, with its step added."""
    start_NRD = subject.clean.x[nodes.layer][begin:].repeat(len(nodes), 1, 1)
    start_NRD[torch.arange(len(nodes), device=step_ND.device), nodes.positions_N - begin] += step_ND
    return start_NRD


@torch.no_grad()
def keep_only(
    subject: Subject,
    kept: Mapping[int, Bool[Tensor, "B T F"]],
    off: Mapping[int, Float[Tensor, "T F"]],
    errors: Mapping[int, Float[Tensor, "T D"]],
) -> Float[Tensor, "B P V"]:
    """The logits when at every traced layer features outside `kept` take the values `off`, and the errors are `errors`.

    Kept features are recomputed from what reaches them, never clamped: the stream after the last layer alone would otherwise
    give the answer away. Special tokens and sinks stay as they are.
    """

    def edit_of(layer: int) -> Callable[[Tensor], Tensor]:
        dictionary, ordinary_T = subject.dictionaries[layer], subject.ordinary_T(layer)[:, None]

        def edit(x_BTD: Tensor) -> Tensor:
            f_BTF = dictionary.encode(x_BTD.flatten(0, 1).float()).view(*x_BTD.shape[:2], -1)
            f_BTF = torch.where(kept[layer], f_BTF, off[layer])
            new_BTD = dictionary.decode(f_BTF.flatten(0, 1)).view(x_BTD.shape) + errors[layer]
            return torch.where(ordinary_T, new_BTD.to(x_BTD.dtype), x_BTD)

        return edit

    first = subject.layers[0]
    num = len(kept[first])
    suffix = subject.model.after(first)
    edits = {layer: edit_of(layer) for layer in subject.layers}
    begin, clean_TD = edits[first], subject.clean.x[first]
    edits[first] = lambda _: begin(clean_TD.expand(num, -1, -1))
    logits = suffix.run(
        suffix.inputs(torch.tensor([subject.answer.ids] * num)), edits=edits, at=subject.answer.read_P
    ).logits
    assert logits is not None
    return logits
