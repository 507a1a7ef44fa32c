"""What the analysis says of the example studies, into docs/results.md.

    throughline run examples/zoo-transfer.yaml --out runs/zoo-transfer
    throughline run benchmarks/studies/stories-seeds.yaml --out runs/stories-seeds
    python benchmarks/results.py runs/zoo-transfer runs/stories-seeds --write

Every sentence is the analysis' own (`analysis.md` of the run); beside them, of each model's layers, quality and what twins share.
"""

import argparse
from pathlib import Path

import numpy as np
from pages import RESULTS, hardware_and_date, write_between

from throughline.analyzing import write_markdown
from throughline.run_dir import RunDir


def describe_twins(run: RunDir) -> list[str]:
    """What every layer has in common with its own dictionary of another seed: the ceilings."""
    lines = [
        "### Ceilings: each layer's dictionary and one from another seed",
        "",
        "| model | layer | L0 | FVU | partner above chance | mutual | mean r | EV own | EV of the other seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for spec in run.study().models:
        matched, rebuilt = (
            run.transfer(metric, spec.name, spec.name).arrays for metric in ("matching", "reconstruction")
        )
        for place, quality in enumerate(run.quality(spec.name)):
            share = (
                f"{matched['ceiling'][place, place]:.2f} [{matched['ceiling_low'][place, place]:.2f}, "
                f"{matched['ceiling_high'][place, place]:.2f}]"
            )
            if "num_twins" in matched:
                ends = (matched[f"ceiling_{end}"][place, place] for end in ("min", "max"))
                share += " ({:.2f} to {:.2f}, {:.0f} seeds)".format(*ends, matched["num_twins"][place, place])
            numbers = [matched["ceiling_mutual"][place, place], matched["ceiling_correlation"][place, place]]
            numbers += [rebuilt["ceiling"][place, place], rebuilt["twin_ceiling"][place, place]]
            cells = [spec.name, str(quality.layer), f"{quality.l0:.1f}", f"{quality.fvu:.3f}", share]
            lines.append(f"| {' | '.join([*cells, *(f'{n:.3f}' if np.isfinite(n) else '' for n in numbers)])} |")
    return [*lines, ""]


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for folder in options.runs:
        run = RunDir.open(str(folder))
        analysis = run.analysis()
        if analysis is None:
            parser.error(f"{folder} has no analysis; `throughline report {folder}` makes it")
        name = run.study().name
        text = write_markdown(analysis, name).replace("\n## ", "\n### ").splitlines()[2:]
        lines = [f"`throughline run examples/{name}.yaml`; {hardware_and_date()}.", "", *text, *describe_twins(run)]
        print("\n".join(lines))
        if options.write:
            write_between(RESULTS, name, lines, name)


if __name__ == "__main__":
    main()
