"""Time and memory of one verified trace: `python benchmarks/trace_speed.py [--tokens 16 32] [--model gpt2-medium]`.

The model has its published size and random weights (benchmarks/full_size), the dictionaries TopK with random weights: what is
measured is the work, not what is found. One process for each row, so that memory is that row's own.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import torch
from pages import hardware_and_date

from throughline.dictionaries import Dictionary
from throughline.models import open_model
from throughline.records import LABEL_COLUMNS, NUM_ROLES
from throughline.study import ModelSpec
from throughline.tokens import encode_prompt
from throughline.tracing import TraceInputs, TraceOptions, trace_prompt

FULL_SIZE = Path(__file__).parent / "full_size"
K = 32


def make_inputs(model: str, d_sae: int) -> TraceInputs:
    """A model of full size with a random dictionary for every layer."""
    opened = open_model(ModelSpec(name=model, path=str(FULL_SIZE / model), weights="random"))
    generator = torch.Generator().manual_seed(0)
    rows_FD = torch.nn.functional.normalize(torch.randn(d_sae, opened.d_model, generator=generator), dim=1)
    dictionary = Dictionary(
        "topk", rows_FD.T.contiguous(), torch.zeros(d_sae), rows_FD, torch.zeros(opened.d_model), options={"k": K}
    )
    size = opened.num_layers * d_sae
    features = pl.DataFrame(
        {
            "layer": [layer for layer in range(opened.num_layers) for _ in range(d_sae)],
            "feature": [feature for _ in range(opened.num_layers) for feature in range(d_sae)],
            "top_tokens": [["a"]] * size,
            "role_means": [[0.0] * NUM_ROLES] * size,
        }
    )
    labels = pl.DataFrame(schema=LABEL_COLUMNS)
    return TraceInputs(opened, dict.fromkeys(range(opened.num_layers), dictionary), features, labels)


def measure(model: str, d_sae: int, num_tokens: int) -> str:
    """A row of the table: seconds of the trace alone, and the process' largest memory."""
    inputs = make_inputs(model, d_sae)
    prompt = "one two three"
    while len(encode_prompt(inputs.model.tokenizer, prompt + " a")) <= num_tokens - 1:
        prompt += " a"
    tokens = len(encode_prompt(inputs.model.tokenizer, prompt))
    start = time.perf_counter()
    trace = trace_prompt(inputs, prompt, TraceOptions(most_answer_tokens=1, off="mean"))
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert trace.verification is not None
    checked = trace.verification.nodes.num + trace.verification.controls.num
    return (
        f"| {model} | {inputs.model.num_layers} | {tokens + 1} | {d_sae:,} | {checked} | {seconds:.1f} | {memory:.1f} |"
    )


def main() -> None:
    """Print the table, one process a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gpt2-medium")
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--row", action="store_true", help="this one here, without a table")
    options = parser.parse_args()
    if options.row:
        print(measure(options.model, options.features, options.tokens[0]))
        return
    columns = ("model", "layers", "tokens", "features", "effects measured", "seconds", "GiB")
    print(f"{hardware_and_date()}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for num in options.tokens:
        command = [sys.executable, __file__, "--row", "--model", options.model, "--features", str(options.features)]
        print(
            subprocess.run([*command, "--tokens", str(num)], check=True, capture_output=True, text=True).stdout, end=""
        )


if __name__ == "__main__":
    main()
