"""Time and peak memory of opening a model at full size with random bfloat16 weights, and of one forward pass of 256 tokens.

`python benchmarks/full_size/opening.py phi-2 [--device cuda]` prints a line of JSON. One model a process: the peak is its own.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

from throughline.models import open_model
from throughline.study import ModelSpec

FOLDER = Path(__file__).parent
TOKENS = 256


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(f.parent.name for f in FOLDER.glob("*/config.json")))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    spec = ModelSpec(path=str(FOLDER / options.model), weights="random", dtype="bfloat16")
    started = time.perf_counter()
    model = open_model(spec, options.device, say=lambda line: print(line, file=sys.stderr))
    opened, peak = time.perf_counter(), peak_gb()
    inputs = model.inputs(torch.arange(TOKENS)[None])
    with torch.no_grad():
        residuals = model.run(inputs, capture=range(model.num_layers), logits=False).residuals
        scales = [float(x.float().std()) for x in residuals.values()]  # waits for the device
    measured = {
        "model": spec.name,
        "device": options.device,
        "threads": options.threads,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "open_seconds": round(opened - started, 1),
        "open_peak_gb": peak,
        "forward_seconds": round(time.perf_counter() - opened, 1),
        "forward_tokens": TOKENS,
        "peak_gb": peak_gb(),
        "first_and_last_scale": [round(scales[0], 3), round(scales[-1], 3)],
    }
    print(json.dumps(measured))


def peak_gb() -> float:
    """Largest memory of the process so far; ru_maxrss counts bytes on macOS, and thousands of them elsewhere."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


if __name__ == "__main__":
    main()
