"""Features set by hand: what the model says then, and what changes downstream.

A setting is written `layer=4,feature=237,off`, `layer=4,feature=237,x2` or `layer=4,feature=237,=1.5`, with `position=8` for one
position only. Without a position it holds wherever the feature is active, also in what the model goes on to write; "off" is the
trace's baseline, and beyond the traced text that of its last position.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from throughline.errors import InputError
from throughline.records import Change, Steering
from throughline.tracing.baselines import Baseline
from throughline.tracing.inputs import TraceInputs
from throughline.tracing.interventions import say_under
from throughline.tracing.texts import Subject

CHANGES_SHOWN = 3  # per layer
FORM = "layer=4,feature=237,off (or x2, or =1.5; position=8 for one position)"


@dataclass(frozen=True)
class Setting:
    """One feature set by hand: to its baseline (factor and value None), times a factor, or to a value."""

    text: str
    layer: int
    feature: int
    position: int | None = None
    factor: float | None = None
    value: float | None = None


def parse_setting(text: str) -> Setting:
    """A setting as it is written; InputError says what was expected."""
    found: dict[str, int] = {}
    how: tuple[float | None, float | None] | None = None
    for part in (piece.strip() for piece in text.split(",")):
        if named := re.fullmatch(r"(layer|feature|position)=(\d+)", part):
            found[named[1]] = int(named[2])
        elif part == "off":
            how = (None, None)
        elif times := re.fullmatch(r"x(-?\d+(?:\.\d+)?)", part):
            how = (float(times[1]), None)
        elif exact := re.fullmatch(r"=(-?\d+(?:\.\d+)?)", part):
            how = (None, float(exact[1]))
        else:
            raise InputError(f"--set {text!r}: {part!r} is not understood; expected {FORM}")
    missing = [name for name in ("layer", "feature") if name not in found]
    if missing or how is None:
        raise InputError(f"--set {text!r} lacks {', '.join(missing) or 'what to do'}; expected {FORM}")
    return Setting(text, found["layer"], found["feature"], found.get("position"), *how)


def check_settings(subject: Subject, settings: Sequence[Setting]) -> None:
    """InputError for a layer, feature or position that there is not."""
    for setting in settings:
        if setting.layer not in subject.dictionaries:
            known = ", ".join(map(str, subject.layers))
            raise InputError(f"--set {setting.text!r}: layer {setting.layer} has no dictionary; there are {known}")
        d_sae = subject.dictionaries[setting.layer].d_sae
        if setting.feature >= d_sae:
            raise InputError(
                f"--set {setting.text!r}: layer {setting.layer} has features 0-{d_sae - 1}, found {setting.feature}"
            )
        if setting.position is not None and setting.position >= len(subject.tokens):
            raise InputError(
                f"--set {setting.text!r}: the text has positions 0-{len(subject.tokens) - 1}, found {setting.position}"
            )


@torch.no_grad()
def steer(inputs: TraceInputs, subject: Subject, baseline: Baseline, settings: Sequence[Setting]) -> Steering:
    """The answer and the features downstream with the settings in force."""
    check_settings(subject, settings)
    model, answer = subject.model, subject.answer
    by_layer = {s.layer: [t for t in settings if t.layer == s.layer] for s in settings}
    edits = {layer: _edit(subject, baseline, mine) for layer, mine in by_layer.items()}
    ids = model.inputs(torch.tensor([answer.ids]))
    output = model.run(ids, edits=edits, capture=subject.layers, at=answer.read_P)
    assert output.logits is not None
    log_p_PV = output.logits[0].log_softmax(-1)
    said = torch.tensor(answer.answer_ids or [int(answer.tokens_C[0])], device=model.device)
    return Steering(
        settings=[s.text for s in settings],
        answer=say_under(subject, output.logits[0].argmax(-1), edits),
        probability=float(log_p_PV[torch.arange(len(said)), said].sum().exp()),
        scores=answer.scores(output.logits)[0].tolist(),
        changed=_changes(
            inputs, subject, {layer: x[0].float() for layer, x in output.residuals.items()}, min(by_layer)
        ),
    )


def _edit(subject: Subject, baseline: Baseline, settings: Sequence[Setting]) -> Callable[[Tensor], Tensor]:
    layer = settings[0].layer
    dictionary, off_TF, kept_T = subject.dictionaries[layer], baseline.features[layer], subject.kept_T

    def edit(x_BTD: Tensor) -> Tensor:
        num = x_BTD.shape[1]
        at = torch.arange(num, device=x_BTD.device).clamp_max(len(kept_T) - 1)
        f_BTF = dictionary.encode(x_BTD.flatten(0, 1).float()).view(*x_BTD.shape[:2], -1)
        out = x_BTD.clone()
        for setting in settings:
            own_BT = f_BTF[..., setting.feature]
            there_BT = kept_T[at] & (own_BT > 0)
            if setting.position is not None:
                there_BT = (torch.arange(num, device=x_BTD.device) == setting.position).expand_as(own_BT)
            new_BT = off_TF[at, setting.feature].expand_as(own_BT)
            if setting.factor is not None:
                new_BT = setting.factor * own_BT
            if setting.value is not None:
                new_BT = torch.full_like(own_BT, setting.value)
            step_BT = torch.where(there_BT, new_BT - own_BT, 0)
            out += (step_BT[..., None] * dictionary.W_dec[setting.feature]).to(out.dtype)
        return out

    return edit


def _changes(inputs: TraceInputs, subject: Subject, x: dict[int, Tensor], first: int) -> list[Change]:
    """The features that changed most in each layer from the first one set."""
    found = []
    for layer in (layer for layer in subject.layers if layer >= first):
        before_TF = subject.clean.features[layer]
        after_TF = subject.dictionaries[layer].encode(x[layer])
        change_TF = (after_TF - before_TF) * subject.kept_T[:, None]
        for flat in change_TF.abs().flatten().topk(min(CHANGES_SHOWN, change_TF.numel())).indices.tolist():
            position, feature = divmod(flat, change_TF.shape[1])
            before, after = float(before_TF[position, feature]), float(after_TF[position, feature])
            if before != after:
                place = (layer, position, feature)
                label = inputs.name_step([place], {place: max(before, after)})
                found.append(
                    Change(layer=layer, position=position, feature=feature, before=before, after=after, label=label)
                )
    return found
