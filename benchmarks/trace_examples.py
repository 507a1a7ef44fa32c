"""Traces of some prompts as `throughline trace` prints them, into docs/results.md.

throughline run benchmarks/studies/stories-seeds.yaml --out runs/stories-seeds
python benchmarks/trace_examples.py runs/stories-seeds --write
"""

import argparse
import subprocess
import sys

from pages import RESULTS, hardware_and_date, write_between

PROMPTS = (
    "Once upon a time, there was a little",
    "Tom and Lily went to the park. They saw a big",
    "The dog was very sad because he lost his",
)


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [
        f"`throughline trace RUN PROMPT`, RUN of `benchmarks/studies/stories-seeds.yaml`; {hardware_and_date()}.",
        "",
    ]
    for prompt in PROMPTS:
        command = [sys.executable, "-m", "throughline", "trace", options.run, prompt]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines += ["```", *(line.rstrip() for line in said.splitlines()), "```", ""]
    print("\n".join(lines))
    if options.write:
        write_between(RESULTS, "trace-examples", lines, "Three traced prompts of stories260K")


if __name__ == "__main__":
    main()
