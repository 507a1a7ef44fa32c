"""Train the dictionaries of all layers of a model from one stream of activations.

    1. fill the shuffle buffer; measure mean and scale of each layer on it
    2. for each batch: centre and scale -> loss of every layer -> Adam -> decoder rows back to unit norm
    3. fold mean and scale into the weights

Layers of the same shape and architecture form a stack and are computed together; nothing couples them.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughline.dictionaries import Dictionary
from throughline.dictionaries.stack import Stack, StepLoss
from throughline.errors import TrainingError
from throughline.registry import ARCHITECTURES
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training.buffer import ShuffleBuffer

WARM_UP_SHARE = 0.05
DECAY_FROM = 0.2  # of the run, then linear to 0
DEAD_AFTER_TOKENS = 10_000_000
DEAD_AFTER_SHARE = 0.05  # of the run, whichever is less
REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """Where a training is. Lists are by layer."""

    model: str
    layers: list[int]
    step: int
    num_steps: int
    tokens_per_second: float
    eta_seconds: float
    loss: list[float]
    l0: list[float]
    fvu: list[float]
    dead: list[float]


class _Latest(NamedTuple):
    """The latest batch of a stack: measured only when a report is due."""

    x_LND: Tensor
    losses: StepLoss
    dead_LF: Tensor

    def measure(self) -> dict[str, Tensor]:
        """Loss, L0, FVU and dead share of each layer, [L]."""
        x_LND, (loss_L, x_hat_LND, fired_LF) = self.x_LND, self.losses
        return {
            "loss": loss_L,
            "l0": fired_LF.sum(1) / x_LND.shape[1],
            "fvu": (x_LND - x_hat_LND).square().sum((1, 2)) / x_LND.square().sum((1, 2)),
            "dead": self.dead_LF.float().mean(1),
        }


@dataclass
class _Group:
    """Layers that share a stack, and what training remembers of them."""

    columns: list[int]  # where these layers stand in the harvest
    layers: list[int]
    architecture: Any
    options: dict[str, Any]
    loss_options: dict[str, Any]
    mean_LD: Tensor
    scale_L: Tensor
    stack: Stack
    optimizer: torch.optim.Optimizer
    idle_tokens_LF: Tensor
    bfloat16: bool  # products in bfloat16; weights and moments stay float32
    latest: "_Latest | None" = None


def train(
    source: Iterator[Float[Tensor, "L N D"]],
    specs: dict[int, DictionarySpec],
    training: TrainingSpec,
    *,
    model: str,
    num_layers: int,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[int, Dictionary]:
    """Dictionaries of the layers in `specs`, whose activations `source` yields in that order.

    `num_layers` is the model's depth (thirds of it choose the L1 coefficient). Stops when the source ends or the study's
    tokens are used, whichever is first. Raises TrainingError if the source yields less than one batch, or activations or a
    loss are not finite.
    """
    generator = torch.Generator().manual_seed(training.seed)
    buffer = ShuffleBuffer(source, training.batch_tokens, generator)
    first_LND = buffer.fill()
    if first_LND.shape[1] < training.batch_tokens:
        raise TrainingError(
            f"{model}: the text has {first_LND.shape[1]:,} tokens, less than one batch of {training.batch_tokens:,}; "
            "set training.batch_tokens lower or give more text"
        )
    _check_finite(first_LND, list(specs), model)
    groups = _make_groups(first_LND, specs, training, num_layers)
    num_steps = max(1, training.tokens * training.epochs // training.batch_tokens)
    done = _descend(iter(buffer), groups, training, num_steps, model, report)
    return {layer: d for group in groups for layer, d in _fold(group, model, done, training).items()}


def learning_rate(training: TrainingSpec, d_sae: int) -> float:
    """The study's learning rate, or one that suits this batch and width.

    `auto`: 8e-3 for batches of 256 tokens and 512 features, with the square root of the batch, and the inverse square
    root of the width as sparsify and dictionary_learning have it.
    """
    if training.lr != "auto":
        return training.lr
    return 8e-3 * math.sqrt(min(training.batch_tokens, 4096) / 256) * math.sqrt(512 / d_sae)


def schedule(step: int, num_steps: int) -> float:
    """Learning-rate factor: linear warm-up over 5 % of the run, then 1, then linear to 0 from 20 % on."""
    done = (step + 0.5) / num_steps
    return min(1.0, done / WARM_UP_SHARE) * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def _check_finite(x_LND: Tensor, layers: list[int], model: str) -> None:
    for layer, x_ND in zip(layers, x_LND, strict=True):
        if not x_ND.isfinite().all():
            raise TrainingError(
                f"{model} layer {layer}: its activations are not all finite; if its dtype is float16, try float32"
            )


def _make_groups(
    first_LND: Tensor, specs: dict[int, DictionarySpec], training: TrainingSpec, num_layers: int
) -> list[_Group]:
    mean_LD = first_LND.mean(1)
    scale_L = math.sqrt(first_LND.shape[2]) / (first_LND - mean_LD[:, None]).norm(dim=2).mean(1)
    by_shape: dict[tuple, list[int]] = {}
    for layer, spec in specs.items():
        d_sae = spec.width(first_LND.shape[2])
        k = min(spec.k, d_sae) if spec.architecture == "topk" else None
        by_shape.setdefault((spec.architecture, d_sae, k), []).append(layer)
    order, groups = list(specs), []
    for (name, d_sae, k), layers in by_shape.items():
        columns = [order.index(layer) for layer in layers]
        architecture = ARCHITECTURES.load(name)
        x_LND = (first_LND[columns] - mean_LD[columns][:, None]) * scale_L[columns][:, None, None]
        generators = [torch.Generator().manual_seed(training.seed * 1009 + layer) for layer in layers]
        stack = Stack.initialize(x_LND, d_sae, generators)
        l1_L = torch.tensor([specs[layer].l1_at(layer, num_layers) for layer in layers], device=x_LND.device)
        loss_options = {"k": k, "l1_L": l1_L}
        _scale_encoder_(stack, architecture, x_LND[:, : training.batch_tokens], loss_options)
        optimizer = torch.optim.Adam(stack.parameters(), lr=learning_rate(training, d_sae), fused=True)
        idle = torch.zeros(len(layers), d_sae, dtype=torch.int64, device=x_LND.device)
        groups.append(
            _Group(
                columns,
                layers,
                architecture,
                options=architecture.options(k=k),
                loss_options=loss_options,
                mean_LD=mean_LD[columns],
                scale_L=scale_L[columns],
                stack=stack,
                optimizer=optimizer,
                idle_tokens_LF=idle,
                bfloat16=training.precision == "bfloat16",
            )
        )
    return groups


@torch.no_grad()
def _scale_encoder_(stack: Stack, architecture: Any, x_LND: Tensor, loss_options: dict[str, Any]) -> None:
    """Start from the encoder length with the least error: unit rows overshoot when many of them see the same direction.

    Activations are positively homogeneous and biases are still zero, so c * W_enc gives c * x_hat, and the best
    c = <x, x_hat> / <x_hat, x_hat>.
    """
    nothing_dead = torch.zeros_like(stack.b_enc_LF, dtype=torch.bool)
    x_hat_LND = architecture.loss(stack, x_LND, dead_LF=nothing_dead, progress=0.0, **loss_options).x_hat_LND
    c_L = (x_LND * x_hat_LND).sum((1, 2)) / x_hat_LND.square().sum((1, 2)).clamp_min(1e-12)
    stack.W_enc_LDF.mul_(c_L.clamp(0.01, 1.0)[:, None, None])


def _descend(
    batches: Iterator[Tensor],
    groups: list[_Group],
    training: TrainingSpec,
    num_steps: int,
    model: str,
    report: Callable[[Progress], None],
) -> int:
    """Train until `num_steps` or the batches' end; how many steps that were."""
    dead_after = min(DEAD_AFTER_TOKENS, DEAD_AFTER_SHARE * num_steps * training.batch_tokens)
    started = reported = time.perf_counter()
    step = 0
    for batch_LND in islice(batches, num_steps):
        for group in groups:
            mine_LND = batch_LND if len(group.columns) == len(batch_LND) else batch_LND[group.columns]
            _step(group, mine_LND, schedule(step, num_steps), step / num_steps, dead_after)
        step += 1
        now = time.perf_counter()
        if now - reported >= REPORT_SECONDS and step < num_steps:
            report(_progress(groups, model, step, num_steps, training, now - started))
            reported = now
    report(_progress(groups, model, step, num_steps, training, time.perf_counter() - started))
    return step


def _step(group: _Group, batch_LND: Tensor, lr_factor: float, progress: float, dead_after: float) -> None:
    """One optimizer step of one stack."""
    x_LND = (batch_LND - group.mean_LD[:, None]) * group.scale_L[:, None, None]
    dead_LF = group.idle_tokens_LF >= dead_after
    with torch.autocast(x_LND.device.type, torch.bfloat16, enabled=group.bfloat16):
        losses = group.architecture.loss(group.stack, x_LND, dead_LF=dead_LF, progress=progress, **group.loss_options)
    losses.loss_L.sum().backward()
    group.stack.remove_parallel_gradient_()
    for parameter_group in group.optimizer.param_groups:
        parameter_group["lr"] = lr_factor * parameter_group.setdefault("full_lr", parameter_group["lr"])
    group.optimizer.step()
    group.optimizer.zero_grad()
    group.stack.normalize_()
    with torch.no_grad():
        group.idle_tokens_LF += x_LND.shape[1]
        group.idle_tokens_LF[losses.fired_LF > 0] = 0
        detached = StepLoss(losses.loss_L.detach(), losses.x_hat_LND.detach(), losses.fired_LF)
        group.latest = _Latest(x_LND, detached, dead_LF)


def _progress(
    groups: list[_Group], model: str, step: int, num_steps: int, training: TrainingSpec, seconds: float
) -> Progress:
    rate = step * training.batch_tokens / seconds
    rows: dict[int, dict[str, float]] = {}
    for group in groups:
        assert group.latest is not None
        measured = group.latest.measure()
        rows |= {layer: {name: float(v[i]) for name, v in measured.items()} for i, layer in enumerate(group.layers)}
    for layer, row in rows.items():
        if not math.isfinite(row["loss"]):
            raise TrainingError(
                f"{model} layer {layer}: the loss is {row['loss']} at step {step}; "
                f"lower training.lr (now {training.lr}) if the activations are finite"
            )
    layers = sorted(rows)
    return Progress(
        model=model,
        layers=layers,
        step=step,
        num_steps=num_steps,
        tokens_per_second=rate,
        eta_seconds=(num_steps - step) * training.batch_tokens / rate,
        **{name: [rows[layer][name] for layer in layers] for name in ("loss", "l0", "fvu", "dead")},
    )


def _fold(group: _Group, model: str, steps: int, training: TrainingSpec) -> dict[int, Dictionary]:
    folded = {}
    for i, layer in enumerate(group.layers):
        metadata = {"model_name": model, "layer": layer, "training_tokens": steps * training.batch_tokens}
        folded[layer] = group.stack.fold(
            i,
            group.architecture.name,
            group.mean_LD[i],
            float(group.scale_L[i]),
            group.options,
            metadata | {"seed": training.seed},
        )
    return folded
