"""Quality by layer of one model of a run, its seconds by stage, and the peak memory of its training as planned.

    python benchmarks/real_run.py RUN --model smollm2 --write quality-smollm2

Rows of Markdown; `--write NAME` puts them between the marks of that name in docs/real-models.md.
"""

import argparse
from pathlib import Path

from pages import hardware_and_date, write_between

from throughline.records import LayerQuality
from throughline.run_dir import RunDir

PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--note", default="", help="a sentence beside the command, such as what was measured of the process"
    )
    parser.add_argument("--write", default="")
    parser.add_argument("--heading", default="")
    asked = parser.parse_args()
    run = RunDir.open(asked.run)
    study, qualities = run.study(), run.quality(asked.model)
    spec = study.dictionary
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in (run.info().seconds or {}).items())
    seconds += ". " * bool(seconds)
    passed = sum(quality.passed for quality in qualities)
    lines = [
        f"`throughline run benchmarks/studies/{study.name}.yaml`; {hardware_and_date()}. {study.training.tokens:,} tokens, "
        f"{spec.architecture}, {spec.expansion}x, k {spec.k}; {passed} of {len(qualities)} layers "
        f"pass the gate. {seconds}{asked.note}".rstrip(),
        "",
        "| layer | FVU | of all tokens | per coordinate | sinks | of | dead | ΔCE | KL | CE recovered | from the mean | setbacks | "
        "gate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(row, qualities),
    ]
    print("\n".join(lines))
    if asked.write:
        write_between(PAGE, asked.write, lines, asked.heading or asked.write)


def row(q: LayerQuality) -> str:
    """Of one layer."""
    return (
        f"| {q.layer} | {q.fvu:.3f} | {q.fvu_with_sinks:.3f} | {q.fvu_coordinate:.3f} | {q.num_sinks} | "
        f"{q.num_tokens + q.num_sinks:,} | {q.dead:.1%} | {q.delta_ce:+.3f} | {q.kl_div_with_sae:.3f} | "
        f"{q.ce_loss_score:.3f} | {q.ce_loss_score_mean:.3f} | {q.setbacks} | {'; '.join(q.gate) or 'pass'} |"
    )


if __name__ == "__main__":
    main()
