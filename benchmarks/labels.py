"""Coverage of labels beside the untrained dictionary's, and the best feature of each family, over seeds, into docs/results.md.

    for seed in 0 1 2; do throughline train examples/zoo-labels.yaml --out runs/labels-$seed --set training.seed=$seed;
        throughline evaluate runs/labels-$seed; throughline label runs/labels-$seed; done
    python benchmarks/labels.py runs/labels-0 runs/labels-1 runs/labels-2 --write

The seed draws the dictionaries' first weights, the training text, the selection text and the held-out text.
"""

import argparse

import numpy as np
import polars as pl
from pages import RESULTS, hardware_and_date, write_between

from throughline.records import best_of_families
from throughline.run_dir import RunDir

COMMAND = (
    "`throughline train examples/zoo-labels.yaml --set training.seed=SEED`, `throughline evaluate` and `label` of each, "
    "`python benchmarks/labels.py RUNS --write`"
)
FAMILIES = ("units", "tens", "carry", "sum")


def show(values: list[float]) -> str:
    """Mean and range."""
    return f"{np.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def describe_coverage(runs: list[RunDir]) -> list[str]:
    """Shares of live features with a good label: trained, untrained, and their ratio, by model and layer."""
    lines = [
        "| model | layer | live | F1 > 0.7 | untrained | ratio | F1 > 0.9 | untrained | different labels | untrained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reached = places = 0
    for spec in runs[0].study().models:
        tables = [run.table(spec.name, "coverage") for run in runs]
        for layer in tables[0]["layer"].unique(maintain_order=True):
            trained, untrained = (
                [
                    t.row(by_predicate=(pl.col("layer") == layer) & (pl.col("dictionary") == name), named=True)
                    for t in tables
                ]
                for name in ("trained", "untrained")
            )
            ratios = [a["over_07"] / max(b["over_07"], 1e-9) for a, b in zip(trained, untrained, strict=True)]
            reached, places = reached + (float(np.mean(ratios)) >= 2), places + 1
            cells = [spec.name, str(layer), f"{np.mean([row['num_live'] for row in trained]):.0f}"]
            cells += [show([row["over_07"] for row in rows]) for rows in (trained, untrained)] + [show(ratios)]
            cells += [show([row["over_09"] for row in rows]) for rows in (trained, untrained)]
            cells += [f"{np.mean([row['num_labels'] for row in rows]):.0f}" for rows in (trained, untrained)]
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"At least twice the untrained dictionary's share (mean of the ratios): {reached} of {places} layers.",
        "",
    ]


def describe_families(runs: list[RunDir]) -> list[str]:
    """The best feature of each family in each model: F1 over seeds, beside the best neuron and untrained feature."""
    lines = [
        "| model | family | F1 | best neuron | best untrained | labels, by seed (layer, n) |",
        "|---|---|---|---|---|---|",
    ]
    for spec in runs[0].study().models:
        best = [best_of_families(run.table(spec.name, "families")) for run in runs]
        for family in FAMILIES:
            rows = [row for table in best for row in table.filter(pl.col("family") == family).iter_rows(named=True)]
            if not rows:
                continue
            said = "; ".join(f"{row['label']} ({row['layer']}, {row['num_positive']})" for row in rows)
            scores = [show([row[name] for row in rows]) for name in ("f1", "neuron_f1", "untrained_f1")]
            lines.append(f"| {' | '.join([spec.name, family, *scores, said])} |")
    return [*lines, ""]


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    runs = [RunDir.open(folder) for folder in options.runs]
    seeds = ", ".join(str(run.study().training.seed) for run in runs)
    lines = [
        f"{COMMAND}; seeds {seeds}: mean (range); {hardware_and_date()}.",
        "",
        "Live features whose label from `concepts` has a held-out F1 above 0.7 and 0.9, beside the same of random directions of",
        "the same shape, labelled in the same way; and how many different labels those above 0.7 have.",
        "",
        *describe_coverage(runs),
        "The best feature of each family of predicates, chosen with its layer on the selection text and scored on held-out text;",
        "n is the number of held-out tokens of which the label is true.",
        "",
        *describe_families(runs),
    ]
    print("\n".join(lines))
    if options.write:
        write_between(RESULTS, "labels", lines, "Labels: coverage beside an untrained dictionary")


if __name__ == "__main__":
    main()
