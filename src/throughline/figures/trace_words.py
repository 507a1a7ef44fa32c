"""What is written on and under the figure of a trace."""

from throughline.figures.style import shorten, show_token
from throughline.records import ActiveFeature, Agreement, Chain, FaithfulnessPoint, Trace, Verification


def name_feature(feature: ActiveFeature) -> str:
    """Its label, or that it has none and the tokens it is most active on."""
    if feature.label is not None:
        return feature.label.text
    return "unlabelled: " + " ".join(show_token(token) for token in feature.top_tokens[:3])


def describe_answer(trace: Trace) -> str:
    """The answer and its probability; if it is wrong, that comes first."""
    answer = f"“{trace.answer}” (p = {trace.answer_probability:.2f})"
    if trace.correct is False:
        return f"WRONG, expected “{trace.expected}”: {answer}"
    return answer


def describe_trace(trace: Trace, edges_of_a_boundary: int) -> list[str]:
    """What "off" means, what was verified and how well, and the strongest chain to each token, a sentence or two each."""
    lines = ["Dictionaries failed the quality gate (--force)."] if trace.forced else []
    lines.append(f"Off: {shorten(trace.off, 150)}.")
    if trace.verification is None:
        lines.append("Not verified (--no-verify): effects, edges and chains are predictions.")
    else:
        lines += _describe_verification(trace.verification)
    lines.append(
        f"Lines: the {edges_of_a_boundary} strongest edges of each boundary, blue where the source supports the target; dark: the "
        "strongest chain to each token."
    )
    return lines + [
        _describe_chain(trace, chain)
        for i in range(len(trace.targets))
        for chain in [c for c in trace.chains if c.target == i][:1]
    ]


def _describe_verification(found: Verification) -> list[str]:
    return [
        f"Predicted and measured: {_agreement(found.nodes)}, {_agreement(found.controls)}; random features change the answer score "
        f"by {found.random_effect:.2g} (mean of {found.num_random}).",
        f"Edges: {_agreement(found.within)}, {_agreement(found.across)}.",
        _describe_faithfulness(found),
    ]


def _agreement(found: Agreement) -> str:
    r = "no r" if found.pearson is None else f"r {found.pearson:.2f}"
    return f"{found.what} {r} (n = {found.num:,})"


def representative(points: list[FaithfulnessPoint]) -> FaithfulnessPoint | None:
    """The smallest set of nodes that keeps the answer; if none does, the largest one; None without a curve."""
    return next((point for point in points if point.answer_kept), points[-1] if points else None)


def _describe_faithfulness(found: Verification) -> str:
    point = representative(found.faithfulness)
    if point is None:
        return "Faithfulness: off changes no token's score enough for there to be something to explain."
    kept = "keep the answer" if point.answer_kept else "do not keep the answer"
    at_random = round(point.random, 2) + 0.0  # no -0.00
    return (
        f"The {point.num:,} strongest of {found.num_candidates:,} nodes {kept}: faithfulness {point.faithfulness:.2f} (n = 0: "
        f"{found.faithfulness[0].faithfulness:.2f}, random {point.num:,}: {at_random:.2f})."
    )


def _describe_chain(trace: Trace, chain: Chain) -> str:
    steps = " → ".join(f"#{step.features[0][2]} ({_layers(*step.layers)})" for step in chain.steps)
    measured = "not measured" if chain.measured is None else f"measured {chain.measured:+.2g}"
    together = "" if chain.measured_together is None else f"; all off: measured {chain.measured_together:+.2g}"
    said = show_token(trace.targets[chain.target].text)
    return f"Chain to “{said}”: {steps}; predicted {chain.predicted:+.2g}, {measured}{together}."


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}-{last}"
