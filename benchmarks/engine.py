"""Train the dictionaries of every layer of a local model on rows of tokens, as fast as this project can; print one JSON line.

    python benchmarks/engine.py --bench DIR --tokens 65536 --k 32 --architecture topk --out DIR

DIR has `model` (a Hugging Face folder) and `train.npy` (int64 [rows, T]). The time is from the first harvest to the last step: the
language model's forward pass and the training, without start-up (imports, reading the model, loading compiled loops). The
dictionaries are saved under --out in SAELens' layout.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from throughline.dictionaries import save_dictionary
from throughline.harvesting import TextSource, tokens_of_a_pass
from throughline.models import LanguageModel, open_model
from throughline.study import DictionarySpec, ModelSpec, TrainingSpec
from throughline.tokens import TokenRows
from throughline.training import Progress, train
from throughline.training.precision import harvests_in_bfloat16
from throughline.training.sources import ArraySource


def rows_of(ids: np.ndarray, special_ids: set[int]) -> TokenRows:
    """Rows of one piece each, whose special tokens are left out."""
    special = np.isin(ids, list(special_ids))
    numbers = np.repeat(np.arange(len(ids))[:, None], ids.shape[1], axis=1)
    nothing = np.zeros(ids.shape, np.int32)
    return TokenRows(
        ids=ids,
        positions=np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        pieces=numbers.astype(np.int32),
        documents=numbers,
        starts=nothing,
        ends=nothing,
        special=special,
        answers=np.zeros(ids.shape, bool),
        kinds=np.where(special, -1, 0).astype(np.int8),
    )


def open_source(
    model: LanguageModel, layers: Sequence[int], ids: np.ndarray, precision: str, device: str
) -> TextSource:
    """Activations of these layers at these tokens."""
    config = model.hf.config
    special = {i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)}
    if harvests_in_bfloat16(precision, device, model.d_model):
        model = model.in_dtype(torch.bfloat16)

    def batches() -> Iterator[TokenRows]:
        step = max(1, tokens_of_a_pass(model) // ids.shape[1])
        for start in range(0, len(ids), step):
            yield rows_of(ids[start : start + step], special)

    return TextSource(model, layers, batches, num_tokens=ids.size)


def load_compiled(dictionary: DictionarySpec, training: TrainingSpec, probe_LND: Tensor) -> None:
    """Two steps on noise of one layer: the loops are compiled or read from their cache, which is start-up."""
    tokens = 2 * training.step_tokens
    noise_ND = torch.randn(tokens, probe_LND.shape[2]).to(probe_LND)
    short = training.model_copy(update={"tokens": tokens})
    train(ArraySource(noise_ND), {0: dictionary}, short, model="warm-up", num_layers=1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bench", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l1", type=float, default=5.0)
    parser.add_argument("--target-l0", type=float)
    parser.add_argument("--expansion", type=float, default=8)
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--batch", default="2048", help="tokens per step, or auto")
    parser.add_argument("--passes", type=int, default=1, help="times the activations at hand are trained on")
    parser.add_argument("--lr", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument(
        "--layers", default="", help="only the first so many layers, or those of a list such as 5,11,17"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    model = open_model(ModelSpec(path=str(a.bench / "model"), name="bench"), a.device)
    ids = np.load(a.bench / "train.npy")
    ids = np.tile(ids, (-(-a.tokens // ids.size), 1))[: a.tokens // ids.shape[1]]
    dictionary = DictionarySpec(
        architecture=a.architecture, expansion=a.expansion, k=a.k, l1=a.l1, target_l0=a.target_l0
    )
    training = TrainingSpec(
        tokens=ids.size,
        batch_tokens=a.batch if a.batch == "auto" else int(a.batch),
        passes=a.passes,
        lr=a.lr if a.lr == "auto" else float(a.lr),
        precision=a.precision,
        seed=a.seed,
    )
    layers = [int(layer) for layer in a.layers.split(",")] if "," in a.layers else list(range(model.num_layers))
    if a.layers.isdigit():
        layers = layers[: int(a.layers)]
    source = open_source(model, layers, ids, a.precision, a.device)
    probe = next(source.batches())[:, :16].clone()
    load_compiled(dictionary, training, probe)
    last: list[Progress] = []
    started = time.perf_counter()
    trained = train(
        source,
        dict.fromkeys(layers, dictionary),
        training,
        model="bench",
        num_layers=model.num_layers,
        report=last.append,
    )
    seconds = time.perf_counter() - started
    for layer, made in trained.own.items():
        save_dictionary(made, a.out / f"layer_{layer:02d}", probe[layers.index(layer)])
    said = {
        "peer": f"throughline-{a.architecture}",
        "tokens": a.tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(a.tokens / seconds, 1),
        "threads": torch.get_num_threads(),
        "device": a.device,
        "batch": training.step_tokens,
        "passes": a.passes,
        "l0": [round(value, 1) for value in last[-1].l0],
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
