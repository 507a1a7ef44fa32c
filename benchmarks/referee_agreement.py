"""Does an independent scorer find the FVU and L0 that quality.json says?

    python benchmarks/referee_agreement.py export RUN BENCH         writes BENCH/model, BENCH/heldout.npy, BENCH/saes
    (run the scorer on BENCH with --rows 100000, its JSON lines into SCORES)
    python benchmarks/referee_agreement.py compare RUN SCORES       exits with 1 if a relative difference is over 1 %

A scorer reads plain rows of tokens. Each piece of held-out text becomes one row, filled up with the end-of-text token, which
such a scorer leaves out; attention is causal, so what stands after a piece changes nothing in it.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from throughline.run_dir import RunDir

TOLERANCE = 0.01


def export(run_folder: str, bench: str) -> None:
    """Write the run's only model, its held-out tokens and its dictionaries where the scorer looks for them."""
    from throughline.session import Session

    run, out = RunDir.open(run_folder), Path(bench)
    session = Session(run)
    spec = session.study.models[0]
    rows = session.rows(spec.name, session.heldout)
    end = session.model(spec.name).tokenizer.eos_token_id
    pieces = [rows.ids[rows.pieces == number] for number in range(rows.pieces.max() + 1)]
    table = np.full((len(pieces), session.context(spec.name)), end, dtype=np.int64)
    for row, ids in zip(table, pieces, strict=True):
        row[: len(ids)] = ids
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "heldout.npy", table)
    session.model(spec.name).hf.save_pretrained(out / "model")
    session.model(spec.name).tokenizer.save_pretrained(out / "model")
    for layer in session.dictionaries(spec.name):
        folder = out / "saes" / f"layer_{layer:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("cfg.json", "sae_weights.safetensors"):
            shutil.copyfile(run.layer_folder(spec.name, layer) / name, folder / name)
    print(f"{out}: {len(table)} rows of {table.shape[1]} tokens, {rows.num_tokens:,} of them scored")


def compare(run_folder: str, scores: str) -> None:
    """Print FVU and L0 by both, and the larger relative difference of each layer."""
    run = RunDir.open(run_folder)
    ours = {q.layer: q for q in run.quality(run.study().models[0].name)}
    lines = [json.loads(line) for line in Path(scores).read_text().splitlines() if '"layer"' in line]
    worst = 0.0
    for theirs in lines:
        mine = ours[theirs["layer"]]
        difference = max(abs(theirs["fvu"] / mine.fvu - 1), abs(theirs["l0"] / mine.l0 - 1))
        worst = max(worst, difference)
        print(
            f"layer {mine.layer}: FVU {mine.fvu:.4f} / {theirs['fvu']:.4f}  L0 {mine.l0:.2f} / {theirs['l0']:.2f}  "
            f"difference {difference:.2%}"
        )
    print(f"{len(lines)} layers, largest relative difference {worst:.2%}")
    sys.exit(int(worst > TOLERANCE or len(lines) != len(ours)))


if __name__ == "__main__":
    {"export": export, "compare": compare}[sys.argv[1]](*sys.argv[2:])
