"""Train dictionaries on a model of full size with random weights for a few steps; print speed and peak memory as one JSON line.

    python benchmarks/full_size/training.py gpt2-medium TEXT --steps 20 [--layers 0 1 2] [--batch 1024]

TEXT is a .txt, .jsonl, .csv or .parquet file. Layers that do not fit into memory together are trained in blocks.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import yaml

import throughline
from throughline.training import Progress

HERE = Path(__file__).parent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=sorted(path.parent.name for path in HERE.glob("*/config.json")))
    parser.add_argument("text")
    parser.add_argument("--template", default="{question}\n{answer}", help="how a row becomes a text")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1024, help="tokens per step")
    parser.add_argument("--expansion", type=float, default=8)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--device")
    a = parser.parse_args()
    study = {
        "name": a.model,
        "models": [
            {
                "path": str(HERE / a.model),
                "weights": "random",
                "dtype": "bfloat16",
                "layers": a.layers or "all",
            }
        ],
        "data": {"path": str(Path(a.text).resolve()), "text": a.template},
        "dictionary": {"architecture": "topk", "expansion": a.expansion, "k": 32},
        "training": {"tokens": a.steps * a.batch, "batch_tokens": a.batch, "checkpoint_minutes": 60},
    }
    last = {}

    def note(progress: Progress) -> None:
        last.update(step=progress.step, layers=len(progress.layers), fvu=[round(v, 3) for v in progress.fvu])
        print(f"step {progress.step} of {progress.num_steps}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(study))
        started = time.perf_counter()
        throughline.train(
            path, out=Path(folder) / "run", device=a.device, say=lambda s: print(s, file=sys.stderr), progress=note
        )
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    said = {
        "model": a.model,
        "weights": "random",
        "tokens": a.steps * a.batch,
        "batch": a.batch,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(said | {"peak_gib": round(peak / 2**30, 2)} | last), flush=True)


if __name__ == "__main__":
    main()
