"""The analysis as a page of text."""

from throughline.records import Analysis, Curve

KINDS = {
    "divergence": ("Divergence", "relative depth", "share of a layer's features found in the other model's best layer"),
    "decay": ("Decay with distance", "layers apart", "mean over pairs of layers of one model"),
    "persistence": ("Persistence", "layers later", "share of features whose throughline is alive"),
}


def write_markdown(analysis: Analysis, name: str) -> str:
    """All sentences by topic, then the curves as tables."""
    lines = [f"# Analysis of {name}", "", f"{analysis.num_tokens:,} held-out tokens at most, seed {analysis.seed}.", ""]
    for topic in dict.fromkeys(finding.topic for finding in analysis.findings):
        lines += [f"## {topic[:1].upper()}{topic[1:]}", ""]
        lines += [f"- {_escaped(finding.sentence)}" for finding in analysis.findings if finding.topic == topic]
        lines.append("")
    for kind, (title, x, what) in KINDS.items():
        curves = [curve for curve in analysis.curves if curve.kind == kind]
        if curves:
            twins = max(curve.num_twins for curve in curves)
            seeds = f"; ceilings are means of {twins} seeds, least and most behind them" if twins else ""
            lines += [
                f"## {title}: numbers",
                "",
                f"{what[:1].upper()}{what[1:]}; 95 % intervals in brackets{seeds}.",
                "",
            ]
            lines += [f"| | {x} | value | null | ceiling | n |", "|---|---|---|---|---|---|"]
            lines += [row for curve in curves for row in _rows(curve)]
            lines.append("")
    return "\n".join(lines)


def _rows(curve: Curve) -> list[str]:
    pair = curve.source if curve.source == curve.target else f"{curve.source} → {curve.target}"
    named, rows = f"{curve.metric}, {_escaped(pair)}", []
    for i, x in enumerate(curve.x):
        value = _number(curve.value, i)
        interval = f" [{_number(curve.low, i)}, {_number(curve.high, i)}]" if curve.low else ""
        n = f"{curve.num[i]:,}" if curve.num else ""
        least, most = _number(curve.ceiling_min, i), _number(curve.ceiling_max, i)
        spread = f" ({least} to {most})" if least else ""
        rows.append(
            f"| {named} | {x:.3g} | {value}{interval} | {_number(curve.null, i)} | {_number(curve.ceiling, i)}{spread} | {n} |"
        )
    return rows


def _number(values: list[float | None], place: int) -> str:
    value = values[place] if place < len(values) else None
    return "" if value is None else f"{value:.2f}"


def _escaped(text: str) -> str:
    """Labels are made of people's text: nothing of it is to become markup, or another line."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
