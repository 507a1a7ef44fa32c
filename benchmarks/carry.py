"""How well the carry can be read from the residual stream at each place of an addition, into docs/results.md.

    python benchmarks/carry.py --write

A dictionary can name the carry at best as well as one direction of the residual stream can tell it. Two directions are tried at
each place and layer: a logistic regression, the best there is for telling; and the difference of the two classes' means, along
which the carry moves the stream and a dictionary that has to rebuild the stream would look. Both are fitted on training text
and scored on held-out text, at the threshold 0 (logistic) or the one with the best F1 on the training text (means).
"""

import argparse

import numpy as np
import torch
from pages import RESULTS, hardware_and_date, write_between
from torch.nn.functional import binary_cross_entropy_with_logits

from throughline.codes import Codes, encode_text
from throughline.dictionaries import Dictionary
from throughline.labelers.numbers import read_numbers
from throughline.labelers.viewing import View
from throughline.models import LanguageModel, open_model
from throughline.study import DataSpec, ModelSpec
from throughline.text import read_documents
from throughline.tokens import collect_rows, take_documents

MODELS = ("zoo/gpt2", "zoo/phi", "zoo/pythia", "zoo/gemma")
SEED, CONTEXT = 7, 64
TRAIN_TOKENS, HELDOUT_TOKENS = 150_000, 40_000
FEWEST, MOST = 1000, 4000  # tokens at a place that a probe is fitted on
PENALTIES = (
    1e-4,
    1e-2,
)  # on the square of a probe's weights; the better on held-out text is shown, in the probe's favour
ITERATIONS = 80
SHOWN = 4  # places of a model, those with the best probes


def read_text(model: LanguageModel, split: str, num_tokens: int) -> Codes:
    """A text with the residual stream of every layer; its dictionaries are empty ones."""
    data, D = DataSpec(path="zoo/arithmetic", context=CONTEXT), model.d_model
    documents = take_documents(read_documents(data, split, SEED), model.tokenizer, num_tokens, CONTEXT)
    empty = Dictionary("topk", torch.zeros(D, 1), torch.zeros(1), torch.zeros(1, D), torch.zeros(D), options={"k": 1})
    rows = collect_rows(documents, model.tokenizer, CONTEXT, False)
    return encode_text(model, dict.fromkeys(range(model.num_layers), empty), rows, documents, keep_residuals=True)


def f1(on: np.ndarray, true: np.ndarray) -> float:
    """Of a classifier that says yes where `on`."""
    return float(2 * (on & true).sum() / max(1, on.sum() + true.sum()))


def probe(x_ND: np.ndarray, true_N: np.ndarray, held_ND: np.ndarray, held_N: np.ndarray) -> float:
    """Held-out F1 of logistic regression on standardized activations, for the carry or for none, whichever is better."""
    mean, deviation = x_ND.mean(0), x_ND.std(0) + 1e-6
    x, held = (torch.from_numpy((a - mean) / deviation).float() for a in (x_ND, held_ND))
    y, scores = torch.from_numpy(true_N).float(), []
    for penalty in PENALTIES:
        weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss(weights=weights, optimizer=optimizer, penalty=penalty) -> torch.Tensor:
            optimizer.zero_grad()
            logits = x @ weights[:-1] + weights[-1]
            value = binary_cross_entropy_with_logits(logits, y) + penalty * weights[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        on = (held @ weights[:-1] + weights[-1] > 0).detach().numpy()
        scores += [f1(on, held_N), f1(~on, ~held_N)]
    return max(scores)


def along_means(x_ND: np.ndarray, true_N: np.ndarray, held_ND: np.ndarray, held_N: np.ndarray) -> float:
    """Held-out F1 of the projection on the difference of the classes' means."""
    direction = x_ND[true_N].mean(0) - x_ND[~true_N].mean(0)
    projected = x_ND @ direction
    order = np.argsort(-projected, kind="stable")
    together = np.cumsum(true_N[order])
    best = np.argmax(2 * together / (np.arange(1, len(order) + 1) + true_N.sum()))
    return f1(held_ND @ direction >= projected[order][best], held_N)


def describe(name: str) -> list[str]:
    """Rows of one model: the places of additions at which two numbers are known and a probe tells the carry best."""
    model = open_model(ModelSpec.model_validate({"path": name}), "cpu", lambda line: None)
    texts = [read_text(model, split, n) for split, n in (("train", TRAIN_TOKENS), ("heldout", HELDOUT_TOKENS))]
    numbers, N = read_numbers(View.of(texts)), texts[0].num_tokens
    division, phrases = numbers.places.divisions[-1]
    places_N, known_N = division[numbers.places.fine_N], (numbers.previous_N >= 0) & (numbers.last_N >= 0)
    carry_N = numbers.previous_N % 10 + numbers.last_N % 10 >= 10
    rows: list[tuple[float, str]] = []
    for place, phrase in enumerate(phrases):
        at = np.flatnonzero((places_N == place) & known_N)
        fit, held = at[at < N][:MOST], at[at >= N]
        if "addition" not in phrase or len(fit) < FEWEST:
            continue
        scores: dict[str, list[str]] = {"probe": [], "means": []}
        for layer in range(model.num_layers):
            fit_ND, held_ND = texts[0].residual_LND[layer, fit], texts[1].residual_LND[layer, held - N]
            fit_ND, held_ND = fit_ND - fit_ND.mean(0), held_ND - fit_ND.mean(0)  # large offsets would cost digits
            scores["probe"].append(f"{probe(fit_ND, carry_N[fit], held_ND, carry_N[held]):.2f}")
            said = [along_means(fit_ND, t[fit], held_ND, t[held]) for t in (carry_N, ~carry_N)]
            scores["means"].append(f"{max(said):.2f}")
        rate = max(carry_N[held].mean(), 1 - carry_N[held].mean())
        words = phrase.removeprefix(", ").removesuffix(", in an addition")
        cells = [name, words, str(len(fit)), str(len(held)), f"{2 * rate / (1 + rate):.2f}"]
        row = f"| {' | '.join([*cells, *(' '.join(s) for s in scores.values())])} |"
        rows.append((-max(map(float, scores["probe"])), row))
    return [row for _, row in sorted(rows)[:SHOWN]]


def main() -> None:
    """Print, and write with --write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [
        f"`python benchmarks/carry.py --write`; seed {SEED}; {hardware_and_date()}.",
        "",
        "Held-out F1 with which one direction of the residual stream tells, at one place of additions, whether the units of the",
        "last two numbers carry (or that they do not, whichever is better): a logistic probe, and the difference of the classes'",
        f"means; the {SHOWN} places of each model with the best probes. `always` says the commoner answer each time.",
        "",
        "| model | place | fitted on | n | always | probe, by layer | class means, by layer |",
        "|---|---|---|---|---|---|---|",
        *[row for name in MODELS for row in describe(name)],
        "",
    ]
    print("\n".join(lines))
    if options.write:
        write_between(RESULTS, "carry", lines, "Where the carry can be read")


if __name__ == "__main__":
    main()
