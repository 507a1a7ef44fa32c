"""Do dictionaries find the directions that activations were made of? Ours and SAELens', on the same data.

    python benchmarks/planted.py [--tokens N] [--peer PYTHON] [--write]

One table row for each architecture and variant of planted_data.py: mean correlation coefficient (mean |cosine| of decoder rows and
true directions after Hungarian matching), FVU, L0 and dead share on 50,000 held-out tokens. Dictionaries have as many
features as there are directions and are asked for the true mean L0. `--peer` is the interpreter of an environment with sae-lens.
Each of its architectures gets the learning rate of LEARNING_RATES with the best FVU on the first variant, and where it has a
penalty coefficient, one found by search until its L0 is within 10 % (at most SEARCH trainings, of which the nearest counts);
ours are trained once, with nothing set. `--write` puts the table into docs/quality.md.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from pages import QUALITY, hardware_and_date, write_between
from planted_data import MEAN_L0, NUM_FEATURES, VARIANTS, Planted, Variant, plant
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from throughline.registry import ARCHITECTURES
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training import train
from throughline.training.sources import ArraySource

HELD_OUT, BATCH, SEED = 50_000, 1024, 0
LEARNING_RATES = (3e-3, 1e-2, 3e-2)  # SAELens' default, 3e-4, is far too low for so short a run
PENALTIES = {"relu": 15.0, "gated": 15.0, "jumprelu": 3.0}  # where the search begins
SEARCH = 5


class Row(NamedTuple):
    """What one dictionary reached."""

    variant: str
    architecture: str
    by: str
    mcc: float
    fvu: float
    l0: float
    dead: float
    setting: str

    def __str__(self) -> str:
        figures = f"{self.mcc:.3f} | {self.fvu:.3f} | {self.l0:.2f} | {self.dead:.3f}"
        return f"| {self.variant} | `{self.architecture}` | {self.by} | {figures} | {self.setting} |"


def correlation(d_FD: Tensor, W_dec_FD: Tensor) -> float:
    """Mean |cosine| of true directions and the rows matched to them one to one, in the best way there is."""
    cosine_FF = (d_FD @ torch.nn.functional.normalize(W_dec_FD).T).abs().numpy()
    rows, columns = linear_sum_assignment(-cosine_FF)
    return float(cosine_FF[rows, columns].mean())


def fvu(x_ND: Tensor, x_hat_ND: Tensor) -> float:
    """Share of the variance that is missed."""
    return float((x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum())


def ours(variant: str, architecture: str, data: Planted, seed: int) -> Row:
    """Train and measure one of this project's architectures."""
    train_ND, heldout_ND = data.x_ND[:-HELD_OUT], data.x_ND[-HELD_OUT:]
    spec = DictionarySpec(architecture=architecture, d_sae=NUM_FEATURES, target_l0=MEAN_L0)
    training = TrainingSpec(tokens=len(train_ND), batch_tokens=BATCH, seed=seed)
    one = train(ArraySource(train_ND), {0: spec}, training, model="planted", num_layers=1).own[0]
    f_NF = one.encode(heldout_ND)
    l0, dead = float((f_NF > 0).sum(1).float().mean()), float((f_NF <= 0).all(0).float().mean())
    error = fvu(heldout_ND, one.decode(f_NF))
    return Row(variant, architecture, "throughline", correlation(data.d_FD, one.W_dec), error, l0, dead, "auto")


class Peer:
    """SAELens in its own environment, on the data of one variant."""

    def __init__(self, python: str, variant: str, data: Planted, folder: Path) -> None:
        self._python, self._variant, self._data, self._folder = python, variant, data, folder
        self.chosen: dict[str, tuple[float, ...]] = {}  # learning rates to try, by architecture
        tensors = {"train": data.x_ND[:-HELD_OUT], "heldout": data.x_ND[-HELD_OUT:], "d_FD": data.d_FD}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "data.safetensors")

    def best(self, architecture: str) -> Row:
        """The best of a sweep; its learning rate is chosen from then on."""
        rates = self.chosen.get(architecture, LEARNING_RATES)
        row, rate = min(((self._at_l0(architecture, lr), lr) for lr in rates), key=lambda pair: self._rank(pair[0]))
        self.chosen[architecture] = (rate,)
        return row

    @staticmethod
    def _rank(row: Row) -> float:
        """FVU; of rows whose L0 is not near what was asked for, the nearest."""
        off = abs(row.l0 / MEAN_L0 - 1)
        return row.fvu if off < 0.1 else 1 + off

    def _at_l0(self, architecture: str, lr: float) -> Row:
        if architecture not in PENALTIES:
            return self._train(architecture, f"{MEAN_L0:g}", lr)
        penalty, rows, low, high = PENALTIES[architecture], [], 0.0, float("inf")
        for _ in range(SEARCH):
            rows.append(self._train(architecture, f"penalty:{penalty:.3g}", lr))
            if abs(rows[-1].l0 / MEAN_L0 - 1) < 0.1:
                break
            low, high = (penalty, high) if rows[-1].l0 > MEAN_L0 else (low, penalty)
            penalty = 3 * low if high == float("inf") else (low * high) ** 0.5 if low else high / 3
        return min(rows, key=lambda row: abs(row.l0 / MEAN_L0 - 1))

    def _train(self, architecture: str, sparsity: str, lr: float) -> Row:
        script = Path(__file__).with_name("peers_planted.py")
        arguments = [architecture, str(self._folder), sparsity, str(BATCH), str(lr)]
        done = subprocess.run([self._python, str(script), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"SAELens {architecture} failed:\n{done.stderr[-2000:]}")
        found, heldout_ND = load_file(self._folder / "found.safetensors"), self._data.x_ND[-HELD_OUT:]
        setting = f"lr {lr:g}" + (f", {sparsity.replace(':', ' ')}" if ":" in sparsity else "")
        return Row(
            self._variant,
            architecture,
            "SAELens",
            correlation(self._data.d_FD, found["W_dec"]),
            fvu(heldout_ND, found["x_hat"]),
            float(found["l0"]),
            float((~found["fired"]).float().mean()),
            setting,
        )


def write(rows: list[Row], command: str, tokens: int) -> None:
    """Put the table between its marks in docs/quality.md."""
    table = [
        f"`{command}`; {hardware_and_date()}; one thread; n = {tokens:,} tokens of training, {HELD_OUT:,} held out, "
        f"batches of {BATCH:,}, seed {SEED}.",
        "",
        "| variant | architecture | by | MCC | FVU | L0 | dead | setting |",
        "|---|---|---|---|---|---|---|---|",
        *map(str, rows),
    ]
    write_between(QUALITY, "planted", table, "Planted directions")


def main() -> None:
    """Train everything, print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES.built_in))
    parser.add_argument("--peer", help="interpreter of an environment with sae-lens")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    chosen: dict[str, tuple[float, ...]] = {}
    for variant in a.variants:
        rows += run(variant, a.architectures, a.tokens, a.peer, chosen)
    if a.write:
        write(
            rows,
            "python benchmarks/planted.py --peer PYTHON --write" if a.peer else "python benchmarks/planted.py",
            a.tokens,
        )


def run(
    variant: Variant, architectures: list[str], tokens: int, python: str | None, chosen: dict[str, tuple[float, ...]]
) -> list[Row]:
    """All dictionaries of one variant; `chosen` learning rates of the peer are added to."""
    data, rows = plant(variant, tokens + HELD_OUT, SEED), []
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(python, variant, data, Path(folder)) if python else None
        if peer:
            peer.chosen = chosen
        for architecture in architectures:
            rows.append(ours(variant, architecture, data, SEED))
            print(rows[-1], flush=True)
            if peer:
                rows.append(peer.best(architecture))
                print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
