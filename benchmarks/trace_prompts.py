"""Many prompts traced in one model of a run, verified: a row of figures each, and a computed paragraph.

    python benchmarks/trace_prompts.py RUN --prompts benchmarks/studies/prompts.txt --write trace-smollm2

A line `PROMPT | right answer` gives the word that the prompt asks for. Seconds are of the trace alone, model and dictionaries open.
`--write NAME` puts it between the marks of that name in docs/real-models.md.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from pages import hardware_and_date, write_between

from throughline.pipeline import look, trace_options
from throughline.records import ActiveFeature, Trace
from throughline.run_dir import RunDir
from throughline.session import Session

PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--write", default="")
    parser.add_argument("--heading", default="")
    asked = parser.parse_args()
    session = Session(RunDir.open(asked.run), say=print)
    name = session.study.model(asked.model).name
    traces: list[tuple[Trace, str, float]] = []
    for line in filter(None, asked.prompts.read_text().splitlines()):
        prompt, _, right = (part.strip() for part in line.partition("|"))
        begin = time.perf_counter()
        found = look(session, prompt, name, trace_options(session.study))
        traces.append((found, right, time.perf_counter() - begin))
        print(row(*traces[-1]), flush=True)
        if asked.write:
            write_between(
                PAGE,
                asked.write,
                describe(traces, session.study.name, asked.prompts.name),
                asked.heading or asked.write,
            )


def describe(traces: list[tuple[Trace, str, float]], study: str, prompts: str) -> list[str]:
    """The table and the paragraphs."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pairs = [(f.predicted_effect, f.effect) for found, *_ in traces for f in found.features if f.effect is not None]
    return [
        f"`python benchmarks/trace_prompts.py RUN --prompts {prompts}`, RUN of the study `{study}`; {hardware_and_date()}. "
        f"{len(traces)} prompts, peak memory {memory:.1f} GiB. Over all {len(pairs):,} shown features the predicted effect agrees "
        f"with the measured one with r {np.corrcoef(np.array(pairs).T)[0, 1]:.2f}.",
        "",
        "| prompt | tokens | explained | p | right | lead | s | r shown | r random | r edges within | r edges across | "
        "features alone keep |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(*one) for one in traces),
        "",
        *(text for found, *_ in traces for text in (paragraph(found), "")),
    ]


def row(found: Trace, right: str, seconds: float) -> str:
    """Figures of one trace."""
    checked = found.verification
    assert checked is not None
    r = [
        "–" if a.pearson is None else f"{a.pearson:.2f}"
        for a in (checked.nodes, checked.controls, checked.within, checked.across)
    ]
    curve = checked.faithfulness  # none where the answer leads no more than with everything off
    faithful = f"{curve[-1].faithfulness:.2f} ({curve[-1].num:,})" if curve else "–"
    is_right = "–" if not right else "yes" if found.reply.strip().startswith(right) else "no"
    return (
        f"| {code(found.prompt)} | {found.num_prompt_tokens} | {code(found.answer)} | {found.answer_probability:.2f} | "
        f"{is_right} | {found.score:+.2f} | {seconds:.0f} | {' | '.join(r)} | {faithful} |"
    )


def paragraph(found: Trace) -> str:
    """What the trace found, in sentences that are computed."""
    target = found.targets[0]
    said = [f for f in found.features if f.effect is not None]
    strongest = sorted(said, key=lambda f: -abs(f.effect or 0))[:3]
    first = next((layer.layer for layer in found.layers if any(is_felt(f, found) for f in layer.features)), None)
    at_last = sum(f.position == found.num_prompt_tokens - 1 for f in said)
    flipped = [f for f in said if f.answer_if_off is not None and f.answer_if_off != found.answer]
    words = [
        f"**{found.prompt}** The model says {code(found.reply)}; explained is {code(found.answer)}, which leads "
        f"{code(target.against)} by {found.score:.2f} logits (p {found.answer_probability:.2f}).",
        "Switching off one feature at one token matters most for " + "; ".join(name(f, found) for f in strongest) + ".",
        f"{at_last} of the {len(said)} shown features lie at the prompt's last token.",
    ]
    if first is not None:
        words.append(f"The first layer with a shown feature that moves the lead by a tenth of it or more is {first}.")
    words.append(
        f"{len(flipped)} of them change what the model says when off"
        + (f", such as {name(flipped[0], found)}, to {code(flipped[0].answer_if_off or '')}." if flipped else ".")
    )
    return " ".join(words)


def is_felt(feature: ActiveFeature, found: Trace) -> bool:
    return abs(feature.effect or 0) >= 0.1 * abs(found.score)


def name(feature: ActiveFeature, found: Trace) -> str:
    label = f"“{feature.label.text}”" if feature.label else "fires on " + ", ".join(map(code, feature.top_tokens[:3]))
    return (
        f"feature {feature.feature} of layer {feature.layer} at {code(found.tokens[feature.position][1])} ({label}): "
        f"{feature.effect:+.2f} ({feature.predicted_effect:+.2f} predicted)"
    )


def code(text: str) -> str:
    return "`" + text.replace("\n", "↵").replace("|", "\\|").replace("`", "'") + "`"


if __name__ == "__main__":
    main()
