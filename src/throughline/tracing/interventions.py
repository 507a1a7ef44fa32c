"""What really happens when features take other values: the model run on from the layer that was changed, many changes at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from throughline.pools import spread
from throughline.tracing.answer import answer_under, spell
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


@torch.no_grad()
def switch_off(subject: Subject, nodes: Nodes, watched: Nodes | None = None) -> Effects:
    """The effects of each node alone, measured; `watched` are features of a later layer whose change is read too."""
    model, answer, layer = subject.model, subject.answer, nodes.layer
    suffix, steps_ND = model.after(layer), nodes.steps(subject)
    clean_C = torch.tensor(subject.scores, device=model.device)

    def measure(chosen_B: Tensor) -> Effects:
        start_BTD = _moved(subject, nodes.select(chosen_B), steps_ND[chosen_B])
        output = suffix.run(
            suffix.inputs(torch.tensor([answer.ids] * len(chosen_B))),
            edits={layer: lambda _: start_BTD},
            capture=[] if watched is None else [watched.layer],
            at=answer.read_P,
        )
        assert output.logits is not None
        empty = torch.zeros(len(chosen_B), 0, device=model.device)
        seen = (empty, empty) if watched is None else _watch(subject, watched, output.residuals[watched.layer])
        return Effects(answer.scores(output.logits) - clean_C, output.logits.argmax(-1), *seen)

    parts = list(spread(measure, batch_copies(subject, len(nodes)), model.device))
    return Effects(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def switch_together(subject: Subject, by_layer: Sequence[Nodes]) -> Effects:
    """The effects of N sets of nodes, each with one node in every layer, all of a set off at once."""
    model, answer, num = subject.model, subject.answer, len(by_layer[0])
    rows_N = torch.arange(num, device=model.device)

    def edit_of(nodes: Nodes) -> Callable[[Tensor], Tensor]:
        def edit(x_NTD: Tensor) -> Tensor:
            out = x_NTD.clone()
            out[rows_N, nodes.positions_N] += nodes.steps(subject).to(out.dtype)
            return out

        return edit

    output = model.run(
        model.inputs(torch.tensor([answer.ids] * num)), edits={n.layer: edit_of(n) for n in by_layer}, at=answer.read_P
    )
    assert output.logits is not None
    none = torch.zeros(num, 0, device=model.device)
    clean_C = torch.tensor(subject.scores, device=model.device)
    return Effects(answer.scores(output.logits) - clean_C, output.logits.argmax(-1), none, none)


def _watch(subject: Subject, watched: Nodes, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of the watched features, by their reading direction and after the dictionary's selection, each [B, M]."""
    dictionary, clean_TD = subject.dictionaries[watched.layer], subject.clean.x[watched.layer]
    change_BTD = x_BTD.float() - clean_TD
    readers_MD = dictionary.readers(watched.features_N)
    linear_BM = torch.einsum("bmd,md->bm", change_BTD[:, watched.positions_N], readers_MD)
    places_Q, which_M = torch.unique(watched.positions_N, return_inverse=True)
    at_BQD = x_BTD[:, places_Q].float()
    f_BQF = dictionary.encode(at_BQD.flatten(0, 1)).view(*at_BQD.shape[:2], -1)
    return linear_BM, f_BQF[:, which_M, watched.features_N] - watched.own_N


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
    model, answer = subject.model, subject.answer
    rows_N = torch.arange(len(first), device=model.device)
    inputs = model.inputs(torch.tensor([answer.ids] * len(first)))
    here, step_ND = first, first.steps(subject)
    for following in paths:
        start_NTD = _moved(subject, here, step_ND)
        output = model.after(here.layer).run(
            inputs, edits={here.layer: lambda _, s=start_NTD: s}, capture=[following.layer], logits=False
        )
        dictionary = subject.dictionaries[following.layer]
        at_ND = output.residuals[following.layer][rows_N, following.positions_N].float()
        change_N = dictionary.encode(at_ND)[rows_N, following.features_N] - following.own_N
        here, step_ND = following, change_N[:, None] * dictionary.W_dec[following.features_N]
    start_NTD = _moved(subject, here, step_ND)
    logits = model.after(here.layer).run(inputs, edits={here.layer: lambda _: start_NTD}, at=answer.read_P).logits
    assert logits is not None
    return answer.scores(logits) - torch.tensor(subject.scores, device=model.device)


def _moved(subject: Subject, nodes: Nodes, step_ND: Tensor) -> Tensor:
    start_NTD = subject.clean.x[nodes.layer].repeat(len(nodes), 1, 1)
    start_NTD[torch.arange(len(nodes), device=step_ND.device), nodes.positions_N] += step_ND
    return start_NTD


@torch.no_grad()
def keep_only(
    subject: Subject,
    kept: Mapping[int, Bool[Tensor, "B T F"]],
    off: Mapping[int, Float[Tensor, "T F"]],
    errors: Mapping[int, Float[Tensor, "T D"]],
) -> Float[Tensor, "B P V"]:
    """The logits when at every traced layer features outside `kept` take the values `off`, and the errors are `errors`.

    Kept features are recomputed from what reaches them, never clamped: the stream after the last layer alone would otherwise
    give the answer away. Special tokens stay as they are.
    """
    kept_T = subject.kept_T[:, None]

    def edit_of(layer: int) -> Callable[[Tensor], Tensor]:
        dictionary = subject.dictionaries[layer]

        def edit(x_BTD: Tensor) -> Tensor:
            f_BTF = dictionary.encode(x_BTD.flatten(0, 1).float()).view(*x_BTD.shape[:2], -1)
            f_BTF = torch.where(kept[layer], f_BTF, off[layer])
            new_BTD = dictionary.decode(f_BTF.flatten(0, 1)).view(x_BTD.shape) + errors[layer]
            return torch.where(kept_T, new_BTD.to(x_BTD.dtype), x_BTD)

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
