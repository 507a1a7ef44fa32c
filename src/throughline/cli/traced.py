"""What `throughline trace` prints: the answer, the features of every layer, the chains, and what of it was verified."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from throughline.cli.render import console, explain, label_score, shorten
from throughline.records import ActiveFeature, Agreement, Chain, Steering, Trace, Verification, span

NARROW, WIDE = 18, 46  # characters of a label on the narrowest and on a wide terminal
FIXED = 62  # characters of a line beside the label
SIZES_SHOWN = 5
AGREEMENT_WORDS = (  # docs/measures.md has the formulas
    ("n", "features × tokens of the answer; of edges, each once"),
    ("r", "correlation of measured with predicted; shuffled: with predictions in random order, so by chance"),
    ("slope", "of measured on predicted, through the origin; 1: sizes are right"),
    (
        "sign",
        "share with the same sign, of those whose measured effect is above 2 % of the lead (edges: of the largest change)",
    ),
    ("–", "none: fewer than 3 pairs, all alike, or for sign all too small"),
)
GRAPH_WORDS = (
    "replacement: share of the influence on the answer that, followed down to the first layer, comes from features; completeness: "
    "the same of a feature's own, on average. The rest comes from what dictionaries leave out (docs/measures.md)"
)


def trace(found: Trace) -> None:
    """The layered reading of one prompt: the answer first, then layers, chains and verification."""
    out = console()
    out.print(Text(f'Input: "{found.prompt}"   model {found.model}'), soft_wrap=True)
    _say_answer(out, found)
    if found.forced:
        out.print("Dictionaries failed the quality gate; this was made with --force.")
    room = min(WIDE, max(NARROW, out.width - FIXED))
    for reading in found.layers:
        out.print()
        head = f"Layer {reading.layer}".ljust(9)
        for feature in reading.features:
            out.print(Text(head + feature_line(found, feature, room).rstrip()), soft_wrap=True)
            head = " " * 9
        if not reading.features:
            out.print(head + "no feature differs from its value when off")
    _say_chains(out, found)
    if found.steering is not None:
        _say_steering(out, found, found.steering)
    out.print()
    explain(
        out,
        "rows",
        "of each layer: the features of largest predicted effect, the largest first; then up to two labelled ones that are "
        "not among them",
    )
    explain(out, "off", f"at its token, a feature takes {found.off}")
    explain(
        out, "if off", "measured change of the answer's lead (logits) in the real model, mean over the answer's tokens"
    )
    explain(out, "predicted", f"the same by the {found.linearization} gradient")
    if found.chains:
        _explain_chains(out)
    if found.verification is None:
        explain(out, "note", "nothing here was measured in the model (--no-verify); effects are predictions")
    else:
        _say_verification(out, found.verification)
    for note in found.notes:
        explain(out, "note", note)


def first_look(found: Trace) -> list[str]:
    """A trace in a line for the answer and one for each layer: its feature of the largest effect."""
    right = {True: " (right)", False: " (wrong)", None: ""}[found.correct]
    lines = [
        f'{found.model} is ready. "{found.prompt}" → "{found.reply}"{right}; of each layer the feature that matters most:'
    ]
    for reading in found.layers:
        strongest = max(reading.features, key=_size_of_effect, default=None)
        lines += [f"  layer {reading.layer}  {feature_line(found, strongest).rstrip()}"] if strongest else []
    return lines


def _size_of_effect(feature: ActiveFeature) -> float:
    return abs(feature.predicted_effect if feature.effect is None else feature.effect)


def _say_answer(out: Console, found: Trace) -> None:
    if found.correct is False:
        out.print(Text(f'The answer is wrong: "{found.reply}", right is "{found.expected}".', style="bold red"))
    right = " (right)" if found.correct and found.explains == "answer" else ""
    what = {"answer": "Answer", "next token": "Next token", "named": "Named answer"}[found.explains]
    goes_on = "" if found.says is None else f'; the model says "{found.says}"'
    out.print(Text(f'{what} "{found.answer}"{right}  p = {found.answer_probability:.2f}{goes_on}'), soft_wrap=True)
    for target in found.targets:
        line = f"  {target.text!r} against {target.against!r}: lead {target.score:+.1f} logits, p = {target.probability:.2f}"
        out.print(Text(line), soft_wrap=True)


def feature_line(found: Trace, feature: ActiveFeature, room: int = WIDE) -> str:
    """`#45    at " 15"   operand 1 tens = 1     0.85  F1 0.97  if off -0.02 (predicted -0.03)`."""
    token = shorten(repr(found.tokens[feature.position][1]), 10)
    if feature.label is None:
        words, score = "unlabelled: " + ", ".join(map(repr, feature.top_tokens[:3])), ""
    else:
        words, score = feature.label.text, label_score(feature.label)
    if feature.effect is None:
        effect = f"predicted {feature.predicted_effect:+.2f}"
    else:
        effect = f"if off {feature.effect:+6.2f} (predicted {feature.predicted_effect:+.2f})"
    said = feature.answer_if_off
    says = f'  answers "{said}"' if said is not None and said != found.answer else ""
    words = shorten(words, room).ljust(room)
    return f"#{feature.feature:<5} {token:<10} {words} {feature.activation:6.2f}  {score:<7}  {effect}{says}"


def _say_chains(out: Console, found: Trace) -> None:
    for number, chain in enumerate(found.chains, start=1):
        out.print()
        target = found.targets[chain.target]
        out.print(Text(f"Chain {number}  {describe_chain(found, chain)} → {target.text!r}"), soft_wrap=False)
        says = "" if chain.answer_if_off in (None, found.answer) else f', answers "{chain.answer_if_off}"'
        both = ("all of it off", chain.predicted_together, chain.measured_together, says)
        alone = ("along this path alone", chain.predicted, chain.measured, "")
        for what, predicted, measured, then in (both, alone):
            checked = "" if measured is None else f", measured {measured:+.2f}{then}"
            out.print(Text(f"         {what}: predicted {predicted:+.2f}{checked}"), soft_wrap=True)
        if chain.num_alternatives:
            paths = "path is" if chain.num_alternatives == 1 else "paths are"
            out.print(
                Text(f"         {chain.num_alternatives} other {paths} of much the same strength"), soft_wrap=True
            )


def _explain_chains(out: Console) -> None:
    """What the numbers of a chain are; docs/measures.md has the formulas."""
    explain(
        out,
        "chain",
        "its numbers are of the lead of the token that it ends in, not of the mean over the answer's tokens",
    )
    explain(
        out,
        "",
        "all of it off: all its features at once; along this path alone: its first feature, when each layer passes on no change "
        "but that of the chain's next feature",
    )
    explain(
        out,
        "",
        "of much the same strength: at least 80 % of it, and more than half of the features are the same; only the strongest is "
        "shown",
    )


def describe_chain(found: Trace, chain: Chain) -> str:
    """`#45 (layers 0-3) carry → #301 (layer 4) tens digit = 4`, each with the token it stands at."""
    parts = []
    for step in chain.steps:
        layer, position, feature = step.features[0]
        layers = sorted({place[0] for place in step.features})
        where = f"layer {layer}" if len(layers) == 1 else f"layers {span(layers)}"
        parts.append(f"#{feature} at {found.tokens[position][1]!r} ({where}) {shorten(step.label, 40)}")
    return " → ".join(parts)


def _say_steering(out: Console, found: Trace, steering: Steering) -> None:
    out.print()
    out.print(Text(f"Set by hand: {'; '.join(steering.settings)}", style="bold"), soft_wrap=True)
    said = f'answer stays "{found.answer}"'
    if steering.answer != found.answer:
        said = f'answer "{found.answer}" becomes "{steering.answer}"'
    out.print(Text(f"  the {said}"))
    out.print(
        Text(f"  probability of the undisturbed answer {found.answer_probability:.3f} → {steering.probability:.3f}")
    )
    for target, score in zip(found.targets, steering.scores, strict=True):
        out.print(Text(f"  lead of {target.text!r} over {target.against!r} {target.score:+.1f} → {score:+.1f}"))
    for change in steering.changed:
        token = shorten(repr(found.tokens[change.position][1]), 10)
        moved = f"{change.before:.2f} → {change.after:.2f}"
        out.print(
            Text(f"  layer {change.layer:<2} #{change.feature:<5} {token:<10} {moved:<16} {shorten(change.label, 40)}")
        )


def _say_verification(out: Console, checked: Verification) -> None:
    out.print()
    out.print(Text("Predicted against measured"))
    table = Table.grid(padding=(0, 2))
    for column in ("", "n", "r", "slope", "sign", "r shuffled"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("", "n", "r", "slope", "sign", "r shuffled")
    for agreement in (checked.nodes, checked.controls, checked.within, checked.across):
        table.add_row(*_agreement_cells(agreement))
    out.print(table)
    for word, meaning in AGREEMENT_WORDS:
        explain(out, word, meaning)
    explain(
        out,
        "by chance",
        f"a random feature, switched off, changes the lead by {checked.random_effect:.2f} (n = {checked.num_random})",
    )
    if checked.replacement is not None and checked.completeness is not None:
        explain(out, "graph", f"replacement {checked.replacement:.2f}, completeness {checked.completeness:.2f}")
        explain(out, "", GRAPH_WORDS)
    if not checked.faithfulness:
        explain(out, "faithful", "the baseline costs the answer less than half a logit, so there is nothing to explain")
        return
    out.print()
    out.print(Text(f"Share of the lead that n of {checked.num_candidates} nodes keep by themselves"))
    table = Table.grid(padding=(0, 2))
    rows = [p for p in checked.faithfulness if p.num != checked.num_candidates][:SIZES_SHOWN]
    table.add_row("n", *(str(p.num) for p in rows))
    table.add_row("most influential", *(f"{p.faithfulness:.2f}{'' if p.answer_kept else '*'}" for p in rows))
    table.add_row("random", *(f"{p.random:.2f}{'' if p.random_kept else '*'}" for p in rows))
    table.add_row("all but these", *(f"{p.completeness:.2f}" for p in rows))
    out.print(table)
    draws = f"in all {checked.random_draws} draws" if checked.random_draws > 1 else "in the one draw"
    out.print(Text(f"* the answer changes; random: {draws}. It is not looked at for all but these"))


def _agreement_cells(found: Agreement) -> list[str]:
    numbers = (found.pearson, found.slope, found.sign, found.shuffled)
    return [found.what, str(found.num), *("–" if value is None else f"{value:.2f}" for value in numbers)]
