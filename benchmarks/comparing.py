"""What the models of a run share on one prompt and on many, into docs/results.md.

    throughline run examples/zoo-transfer.yaml --out runs/zoo-transfer
    python benchmarks/comparing.py runs/zoo-transfer --write

The prompts are NUM_PROMPTS problems of the held-out split; every number and sentence is what `throughline compare` finds.
"""

import argparse
import time
from itertools import islice

from pages import RESULTS, hardware_and_date, write_between

from throughline import api
from throughline.cli.compared import describe_chain, main_chain
from throughline.records import Comparison, ComparisonTotals, ConceptInModel, Estimate, Standings
from throughline.zoo.texts import sample_problems

PROMPT = "What is 15 + 27?"
NUM_PROMPTS, SEED = 200, 7


def heldout_prompts(num: int) -> list[str]:
    """Prompts of pairs of operands that no model was trained on."""
    return [d.text[: d.answer_start] for d in islice(sample_problems("heldout", SEED), num)]


def describe_standings(standings: dict[str, Standings]) -> list[str]:
    """A row for each model."""
    lines = [
        "| model | n | universal | shared | specific | all live: universal, shared, specific (n) | universal by chance "
        "| universal by kind of token, at most | another seed has |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, mine in standings.items():
        shares = " | ".join(describe(mine.active[s]) for s in ("universal", "shared", "specific"))
        live = ", ".join(f"{share:.0%}" for share in mine.live.values())
        ceiling = "" if mine.ceiling is None else f"{mine.ceiling:.0%}"
        lines.append(
            f"| {model} | {mine.num_active:.0f} | {shares} | {live} ({mine.num_live:,}) | {mine.chance.get('universal', 0):.1%} "
            f"| {mine.most_universal_by_kind:.1%} | {ceiling} |"
        )
    return [*lines, ""]


def describe_one(found: Comparison) -> list[str]:
    """Answers, shares, and when each concept is there."""
    answers = ", ".join(f'{m} "{found.answers[m]}" (p = {found.probabilities[m]:.2f})' for m in found.models)
    lines = [f"`{found.prompt}`: {answers}. Active features, n of them:", "", *describe_standings(found.standings)]
    lines += ["Relative depth of birth and death of each concept with values on this prompt:", ""]
    lines += [f"| concept | {' | '.join(found.models)} |", "|---" * (len(found.models) + 1) + "|"]
    for concept in found.concepts:
        if concept.valued:
            lives = (concept.lives.get(m) for m in found.models)
            cells = ["" if life is None else f"{life.birth:.2f}-{life.death:.2f}" for life in lives]
            lines.append(f"| {concept.name} | {' | '.join(cells)} |")
    lines += ["", "The chain with the largest measured effect in each model:", ""]
    for model, trace in found.traces.items():
        chain = main_chain(trace)
        lines.append(f"- {model}: {describe_chain(trace, chain) if chain else 'none'}")
    return [*lines, ""]


def describe_many(found: ComparisonTotals) -> list[str]:
    """Answers, shares over prompts, and a row for each concept with the sentences that follow from it."""
    right = ", ".join(f"{m} {describe(e)}" for m, e in found.right.items())
    lines = [f"Right answers: {right}. Means over prompts, n active features each:", ""]
    lines += [*describe_standings(found.standings), "By model: share of the n prompts on which the concept is present"]
    lines[-1] += (
        " before relative depth 0.5 (by chance; where it is known not to be true), mean relative depth of birth and death."
    )
    lines += ["", f"| concept | n | {' | '.join(found.models)} |", "|---" * (len(found.models) + 2) + "|"]
    valued = [concept for concept in found.concepts if concept.valued]
    for concept in valued:
        cells = " | ".join(describe_life(mine) for mine in concept.models.values())
        lines.append(f"| {concept.name} | {concept.num_prompts}{'' if concept.known else ' that have it'} | {cells} |")
    return [*lines, "", *(f"- {c.sentence}{'' if c.known else ' in which some model has it'}." for c in valued), ""]


def describe(found: Estimate) -> str:
    """`55% [54%, 56%]`."""
    if found.value is None:
        return ""
    return f"{found.value:.0%}" + ("" if found.low is None else f" [{found.low:.0%}, {found.high:.0%}]")


def describe_life(found: ConceptInModel) -> str:
    """`86% (36%; 0%), 0.16-0.33`."""
    if not found.present.value:
        return ""
    elsewhere = "" if found.elsewhere.value is None else f"; {found.elsewhere.value:.0%}"
    return (
        f"{found.early.value:.0%} ({found.early_by_chance:.0%}{elsewhere}), "
        f"{found.birth.value:.2f}-{found.death.value:.2f}"
    )


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--processor", default="", help="such as 'AMD EPYC'")
    options = parser.parse_args()
    started = time.perf_counter()
    totals = api.compare_prompts(options.run, heldout_prompts(NUM_PROMPTS), device="cpu")
    seconds = time.perf_counter() - started
    where = ", ".join(filter(None, [options.processor, hardware_and_date()]))
    lines = [
        f"`python benchmarks/comparing.py RUN` on a run of `examples/zoo-transfer.yaml`; {where}. {NUM_PROMPTS} prompts in "
        f"{len(totals.models)} models took {seconds:.0f} s with opening the models. Definitions: docs/measures.md.",
        "",
        *describe_one(api.compare(options.run, PROMPT, device="cpu")),
        f"### The same over {NUM_PROMPTS} held-out prompts",
        "",
        *describe_many(totals),
    ]
    print("\n".join(lines))
    if options.write:
        write_between(RESULTS, "comparing", lines, "One question in four models")


if __name__ == "__main__":
    main()
