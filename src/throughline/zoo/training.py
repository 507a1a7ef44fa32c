"""Train a zoo model on the generator's problems, and examine it on held-out ones.

    for each step: fresh problems (a pure function of seed and step) -> loss on the answer, and a little on the prompt
                   -> AdamW, one-cycle learning rate

Stopping and resuming is exact because nothing but weights, moments and the step number carries over.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from throughline.errors import InputError
from throughline.models import open_model
from throughline.records import Document
from throughline.study import ModelSpec
from throughline.zoo import NAMES, PREFIX
from throughline.zoo.recipes import Recipe, recipe_of
from throughline.zoo.texts import TEMPLATES, Template, sample_problems
from throughline.zoo.vocabularies import build_tokenizer

CHECKPOINT_EVERY = 200
WARMUP_SHARE = 0.1
EXAM_PROMPTS = 500
IGNORED = -100


class Batch(NamedTuple):
    """Right-padded prompts. `weights_BT[b, t]` weighs the prediction of token t; 0 for padding and the first token."""

    ids_BT: Tensor
    weights_BT: Tensor


def train(name: str, workdir: Path, report: Callable[[str], None], num_steps: int | None = None) -> Path:
    """Train zoo model `name`, continuing from `workdir` if it holds a checkpoint; returns the folder with the model.

    `num_steps` takes the place of the recipe's: the learning rate runs its cycle in as many steps, so what continues must
    have begun with the same number.
    """
    tokenizer = build_tokenizer(name)
    recipe = recipe_of(name, tokenizer)
    num_steps = recipe.num_steps if num_steps is None else num_steps
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config, attn_implementation="eager").train()
    optimizers = _optimizers(model, recipe)
    workdir.mkdir(parents=True, exist_ok=True)
    step = _resume(workdir, model, optimizers)
    loss_sum, since = 0.0, step
    while step < num_steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * one_cycle(step, num_steps)
        loss_sum += _step(model, optimizers, tokenizer, recipe, step, recipe.emphasis)
        step += 1
        if step % CHECKPOINT_EVERY == 0 or step == num_steps:
            _checkpoint(workdir, model, optimizers, step)
            marks = examine(model, tokenizer, num_prompts=100)
            worst = min(marks, key=lambda template: marks[template])
            report(
                f"{name} step {step}/{num_steps}: loss {loss_sum / (step - since):.3f}, "
                f"held-out mean {sum(marks.values()) / len(marks):.3f}, worst {worst!r} {marks[worst]:.3f}"
            )
            loss_sum, since = 0.0, step
    return _publish(model, tokenizer, workdir / "model")


def one_cycle(step: int, num_steps: int) -> float:
    """Learning-rate factor: linear to 1 over the first tenth, then half a cosine to 0."""
    warmup = WARMUP_SHARE * num_steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


@torch.no_grad()
def examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_prompts: int = EXAM_PROMPTS
) -> dict[str, float]:
    """Share of held-out prompts of each template answered exactly, end-of-text included."""
    was_training, marks = model.training, {}
    model.eval()
    for template in TEMPLATES:
        documents = list(islice(sample_problems("heldout", 1, template.name), num_prompts))
        right = 0
        for batch in _batches(documents, tokenizer, prompt_weight=0.0, groups=1):
            predicted = model(batch.ids_BT).logits[:, :-1].argmax(-1)
            missed = (predicted != batch.ids_BT[:, 1:]) & (batch.weights_BT[:, 1:] > 0)
            right += int((~missed.any(1)).sum())
        marks[template.name] = right / num_prompts
    model.train(was_training)
    return marks


def check_all(num_prompts: int, say: Callable[[str], None]) -> bool:
    """Examine every bundled model, a line for each of its templates; True if all are there and reach their marks."""
    passed = True
    say(f"{'model':8}{'template':20}{'exact':>8}  n = {num_prompts}, held out")
    for name in NAMES:
        try:
            model = open_model(ModelSpec(path=PREFIX + name))
        except InputError as error:
            say(f"{name:8}{error}")
            passed = False
            continue
        marks = examine(model.hf, model.tokenizer, num_prompts)
        for template in TEMPLATES:
            share, mark = marks[template.name], mark_of(template)
            passed &= share >= mark
            say(f"{name:8}{template.name:20}{share:8.3f}" + ("" if share >= mark else f"  below {mark}"))
    return passed


def mark_of(template: Template) -> float:
    """Share of held-out prompts that a bundled model must answer exactly."""
    return 0.99 if template.operation == "add" else 0.97


def _optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which halved the steps to mastery here, and AdamW for everything else."""
    named = list(model.named_parameters())
    inner = [
        p for n, p in named if p.ndim == 2 and "emb" not in n and "wte" not in n and "wpe" not in n and "head" not in n
    ]
    chosen = {id(p) for p in inner}
    others = [p for _, p in named if id(p) not in chosen]
    lr, decay = recipe.learning_rate, recipe.weight_decay
    return [
        torch.optim.Muon(inner, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def _step(model, optimizers, tokenizer, recipe: Recipe, step: int, emphasis: Mapping[str, float]) -> float:
    problems = sample_problems("train", recipe.seed * 1_000_003 + step, emphasis=emphasis)
    documents = list(islice(problems, recipe.batch_prompts))
    batches = _batches(documents, tokenizer, recipe.prompt_weight, groups=2)
    total_weight = sum(batch.weights_BT.sum() for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(batch.ids_BT, use_cache=False).logits
        losses = cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), batch.ids_BT[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * batch.weights_BT[:, 1:].flatten()).sum() / total_weight
        loss.backward()
        loss_sum += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss_sum


def _batches(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, prompt_weight: float, groups: int
) -> list[Batch]:
    """The documents, each followed by end-of-text, in `groups` batches of similar length (less padding to compute)."""
    encoded = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    rows = []
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        assert document.answer_start is not None
        answers = [end > document.answer_start for _, end in offsets]
        weights = [1.0 if answer else prompt_weight for answer in answers]
        rows.append(([*ids, tokenizer.eos_token_id], [0.0, *weights[1:], 1.0]))
    rows.sort(key=lambda row: len(row[0]))
    cuts = [len(rows) * i // groups for i in range(groups + 1)]
    return [_pad(rows[start:stop]) for start, stop in pairwise(cuts)]


def _pad(rows: list[tuple[list[int], list[float]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    weights_BT = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows])
    return Batch(ids_BT, weights_BT)


def _checkpoint(workdir: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for which, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{which}.{index}.{key}": value for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    temporary = workdir / "state.safetensors.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(workdir / "state.safetensors")


def _resume(workdir: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> int:
    path = workdir / "state.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for which, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"moment.{which}."):
                _, _, index, part = key.split(".")
                state["state"].setdefault(int(index), {})[part] = value
        optimizer.load_state_dict(state)
    return int(tensors["step"])


def _publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write the model in half precision with its tokenizer, in silence, and readable for all as package data is."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.half().eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder
