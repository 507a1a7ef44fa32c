"""Kill a training at random moments, resume it until it is done, and compare its files with those of an undisturbed one.

    python benchmarks/kill_resume.py --kills 20

Every run is `throughline train STUDY --resume` as a user starts it: two layers of a bundled model, one trained by compiled kernels
and one by autograd, three chunks in two epochs, a checkpoint after each. A kill is SIGKILL at a moment drawn evenly from what is
left of the training by the undisturbed one's time, from its first report of progress on. When a training is done its files are
compared and the next begins, until there have been enough kills.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from throughline.run_dir import RunDir

MODEL = "zoo/pythia"
STUDY: dict[str, Any] = {
    "name": "kills",
    "models": [{"path": MODEL, "layers": [1, 4]}],
    "data": {"path": "zoo/arithmetic", "context": 64},
    "dictionary": {"d_sae": 256, "k": 8, "per_layer": {4: {"architecture": "gated", "l1": 0.5}}},
    "training": {"tokens": 80_000, "epochs": 2, "batch_tokens": 256, "checkpoint_minutes": 0},
}

NUM_STEPS = 160_000 // 256


def start(study: Path, out: Path) -> subprocess.Popen:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "throughline", "train", study, "--out", out, "--device", "cpu", "--resume"]
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([str(part) for part in command], env=os.environ | {"HF_HUB_OFFLINE": "1"}, **silent)


def hash_of(out: Path) -> str:
    """One hash of all weights of a run, and of their names."""
    digest = sha256()
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def checkpoint_of(out: Path) -> Path:
    """Where a run keeps its checkpoint."""
    return RunDir(out).checkpoint_folder(MODEL, STUDY["models"][0]["layers"]) / "state.safetensors"


def step_of(out: Path) -> int:
    """The step that a run will go on from; 0 if from the beginning."""
    state = checkpoint_of(out)
    if not state.exists():
        return 0
    with safe_open(state, "pt") as file:
        return json.loads(file.metadata()["throughline"])["step"]


def is_finished(out: Path) -> bool:
    """True if all dictionaries are saved: a kill came between that and the end of the process."""
    return RunDir(out).trained_layers(MODEL) == STUDY["models"][0]["layers"]


def wait_for_progress(process: subprocess.Popen, out: Path, started: float) -> bool:
    """True when the process has reported progress, within the first second of its training; False if it has ended."""
    while process.poll() is None:
        if any(state.step and state.at > started for state in RunDir(out).jobs()):
            return True
        time.sleep(0.02)
    return False


def main() -> None:
    """Print a line for each kill and each finished training; exit code 1 if any hash differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder to work in; default a temporary one")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="kill_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump(STUDY))
    process, started = start(study, folder / "undisturbed"), time.time()
    wait_for_progress(process, folder / "undisturbed", started)
    clock = time.perf_counter()
    if process.wait() != 0:
        sys.exit(f"the undisturbed training failed; see `throughline train {study}`")
    seconds, expected = time.perf_counter() - clock, hash_of(folder / "undisturbed")
    print(f"undisturbed: {seconds:.1f} s of training, hash {expected}\n")
    print(f"{'kill':>4}  {'training':>8}  {'after s':>7}  {'resumes from step':>17}")
    rng, kills, saving, wrong, number = random.Random(args.seed), 0, 0, 0, 1
    out = folder / "killed_1"
    while True:
        process, started = start(study, out), time.time()
        delay = rng.uniform(0, seconds * (1 - step_of(out) / NUM_STEPS))
        try:
            wait_for_progress(process, out, started)
            code = process.wait(None if kills >= args.kills else delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if is_finished(out):
                continue
            kills, half = kills + 1, any(checkpoint_of(out).parent.glob(".*.tmp"))
            saving += half
            print(f"{kills:>4}  {number:>8}  {delay:>7.2f}  {step_of(out):>17}{'  (saving)' * half}", flush=True)
            continue
        found = hash_of(out)
        same = code == 0 and found == expected
        wrong += not same
        print(f"training {number} is done: hash {found}, {'identical' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(out)
        if kills >= args.kills or code != 0:
            break
        number += 1
        out = folder / f"killed_{number}"
    print(f"\n{kills} kills, {saving} of them while a checkpoint was being written; {number} trainings finished")
    print("all hashes are identical" if not wrong else f"{wrong} hashes differ from the undisturbed one")
    if not args.out:
        shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
