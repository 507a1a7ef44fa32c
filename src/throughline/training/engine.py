"""Train the dictionaries of all layers of a model from one source of activations.

    1. fill a chunk, without attention sinks; measure mean and scale of each layer on the first one; initialise
    2. every layer goes through the chunk in the same random order: centre and scale -> loss -> Adam -> unit decoder rows
    3. a checkpoint between chunks; the next chunk
    4. fold mean and scale into the weights

Layers of the same shape and architecture form a group; nothing couples them. On CPUs `compiled.py` trains what it can,
`plain.py` the rest. Twins, dictionaries of the same layers that begin otherwise, form further groups and go through the same
chunks in the same order; the layers' own dictionaries are the same to the bit with and without them. Several ranks, a device
each, may go through this together (`ranks.py`), with the same result.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from throughline.dictionaries import Dictionary
from throughline.dictionaries.auxk import AUX_TOKENS
from throughline.dictionaries.stack import Architecture, Stack
from throughline.errors import InputError, TrainingError
from throughline.registry import ARCHITECTURES
from throughline.study import DictionarySpec, TrainingSpec
from throughline.training import compiled
from throughline.training.checkpoints import Checkpoint, Checkpoints
from throughline.training.chunks import Chunk, Cursor, read_chunks
from throughline.training.compiled import CompiledTrainer
from throughline.training.filtering import SinkFilter
from throughline.training.group import Course, Group, seed_of
from throughline.training.plain import PlainTrainer
from throughline.training.precision import trains_in_bfloat16
from throughline.training.ranks import ALONE, Ranks
from throughline.training.sources import ActivationSource
from throughline.training.sparsity import SparsityController
from throughline.training.watching import MOST_SETBACKS

LR_AT_256_TOKENS_512_FEATURES = 1.3e-2
FEW_STEPS = 300
DEAD_AFTER_TOKENS = 10_000_000
DEAD_AFTER_SHARE = 0.01  # of the run, whichever is less
DEAD_AFTER_BATCHES = 8  # at least: what a few batches have no use for is not dead
REPORT_SECONDS = 1.0
SCALED_ON = 4096  # tokens, or as many as features, that dictionaries are initialised from
LENGTH_FROM = 512  # of these tokens, on which the encoder's first length is found
PIECE_TOKENS = 512  # of a chunk at a time: they stay in the cache
SPREAD_POWER = 0.5  # 0: all coordinates have one scale; 1: each has its own
SPREAD_FLOOR = 0.1  # of the median variance of coordinates
Shape = tuple[str, int, int | None]  # architecture, features, and k where it says how many are active


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
    events: list[str] = field(default_factory=list)  # setbacks so far, in words


@dataclass(frozen=True)
class Trained:
    """What a training gives: each layer's own dictionary, and by layer too each of `training.ceiling_seeds` twins, in order.

    A layer that was given up, or a twin of which was, has none.
    """

    own: dict[int, Dictionary]
    twins: list[dict[int, Dictionary]]
    failed: dict[int, str]  # layers that were given up, which have no dictionary, and why


class Trainer(Protocol):
    """What goes through a chunk: `plain.PlainTrainer` or `compiled.CompiledTrainer`."""

    def train(self, chunk: Chunk, first_step: int, num_steps: int, tick: Callable[[float], None]) -> None:
        """`num_steps` steps; `tick` hears how many are done."""
        ...


def _nothing(what: object) -> None:
    """Whoever does not listen."""


def train(
    source: ActivationSource,
    specs: dict[int, DictionarySpec],
    training: TrainingSpec,
    *,
    model: str,
    num_layers: int,
    report: Callable[[Progress], None] = _nothing,
    say: Callable[[str], None] = _nothing,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Dictionaries of the layers in `specs`, whose activations `source` has in that order, and their twins.

    `num_layers` is the model's depth (thirds of it choose the L1 coefficient). Stops when the source ends or the study's
    tokens are used, whichever is first. With `checkpoints`, goes on from the latest one if there is one.

    Each of several `ranks` calls this with the same arguments, and all get the same dictionaries. Rank 0 alone reports, says,
    loads and saves checkpoints, which do not tell how many ranks there were.

    Raises TrainingError, on every rank, if the source yields less than one batch, or activations are not finite.
    InputError if there are more ranks than a batch has tokens.
    """
    if ranks.size > min(training.step_tokens, AUX_TOKENS):
        raise InputError(
            f"{model}: {ranks.size} devices for batches of {training.step_tokens} tokens, expected no more devices than tokens "
            f"and no more than {AUX_TOKENS}; set training.batch_tokens higher or give fewer devices"
        )
    if ranks.rank:
        report, say = _nothing, _nothing
    total = training.tokens * training.epochs
    num_steps = training.num_steps
    found = ranks.load(lambda: checkpoints.load() if checkpoints else None)
    cursor, step = (found.cursor, found.step) if found else (Cursor(), 0)
    shared = ranks.divide(source)
    chunks = read_chunks(shared, training.step_tokens, total, num_layers, training.seed, cursor, training.passes)
    chunk = next(chunks, None)
    if chunk is None and found is None:
        raise TrainingError(
            f"{model}: the text has less than one batch of {training.step_tokens:,} tokens; "
            "set training.batch_tokens lower or give more text"
        )
    device = "cpu" if chunk is None else str(chunk.x_LCD.device)
    sinks = _open_filter(found, chunk, list(specs), training, model)
    if chunk is not None:
        sinks.clean_(chunk)
    groups = (
        _restore(found, specs, training, device) if found else _make_groups(chunk, specs, training, num_layers, model)
    )
    for tensor in _tensors(groups).values():
        ranks.take_(tensor, 0)
    if found:
        say(f"{model}: going on from step {step:,} of {num_steps:,}")
    bfloat16 = trains_in_bfloat16(training.precision, device)
    dead_after = max(
        DEAD_AFTER_BATCHES * training.step_tokens,
        min(DEAD_AFTER_TOKENS, DEAD_AFTER_SHARE * num_steps * training.step_tokens),
    )
    course = Course(num_steps, training.step_tokens, training.seed, dead_after, bfloat16)
    trainers = _make_trainers(groups, course, device, say, ranks)
    reporter = _Reporter([group for group in groups if not group.twin], training, model, num_steps, step, report, say)
    while chunk is not None and step < num_steps:
        steps = min(len(chunk.order_C) // training.step_tokens, num_steps - step)
        reporter.begin(step, len(trainers))
        for trainer in trainers:
            trainer.train(chunk, step, steps, reporter.tick)
            reporter.trained(steps)
        step += steps
        following = chunk.following
        if checkpoints and ranks.rank == 0 and checkpoints.is_due() and step < num_steps:
            checkpoints.save(step, following, _tensors(groups) | sinks.tensors())
        chunk = next(chunks, None) if step < num_steps else None
        if chunk is not None:
            sinks.clean_(chunk)
    reporter.finish(step)
    failed = _describe_failures(groups, training, model)
    trainers.clear()  # they hold the moments too
    trainer = None
    for group in groups:
        group.moments = {}  # the dictionaries need the memory now
    folded: list[dict[int, Dictionary]] = [{} for _ in range(1 + training.ceiling_seeds)]
    for group in groups:
        folded[group.twin] |= _fold(group, model, step, training, sinks)
    folded = [{layer: d for layer, d in of_layers.items() if layer not in failed} for of_layers in folded]
    return Trained(own=folded[0], twins=folded[1:], failed=failed)


def learning_rate(training: TrainingSpec, d_sae: int) -> float:
    """The study's learning rate, or one that suits this batch and width.

    `auto`: 1.3e-2 for batches of 256 tokens and up to 512 features, with the square root of the batch, and for more features
    the inverse square root of their number as sparsify and dictionary_learning have it. A run of fewer than 300 steps has no
    time to recover from steps so long, and takes shorter ones.
    """
    if training.lr != "auto":
        return training.lr
    few = math.sqrt(min(1.0, training.num_steps / FEW_STEPS))
    return (
        few * LR_AT_256_TOKENS_512_FEATURES * math.sqrt(min(training.step_tokens, 4096) / 256 * 512 / max(d_sae, 512))
    )


# ---- groups


def _open_filter(
    found: Checkpoint | None, chunk: Chunk | None, layers: list[int], training: TrainingSpec, model: str
) -> SinkFilter:
    """What keeps sinks out: as the checkpoint has it, or from the first chunk."""
    if found:
        remembered = found.tensors["sinks/norm"], found.tensors["sinks/left_out"]
        return SinkFilter(model, layers, training.seed, *remembered)
    assert chunk is not None
    if training.sinks == "keep":
        nowhere_L = torch.full((len(layers),), math.inf, dtype=torch.float64)
        return SinkFilter(model, layers, training.seed, nowhere_L)
    return SinkFilter.from_chunk(chunk, model, layers, training.seed)


def _make_groups(
    chunk: Chunk | None, specs: dict[int, DictionarySpec], training: TrainingSpec, num_layers: int, model: str
) -> list[Group]:
    """Layers by shape, then their twins, initialised from the first chunk."""
    assert chunk is not None
    first_LND, groups = chunk.x_LCD, []
    mean_LD = torch.stack([_mean_of(x_ND) for x_ND in first_LND])
    scale_LD = torch.stack([_scale_of(x_ND, mean_D) for x_ND, mean_D in zip(first_LND, mean_LD, strict=True)])
    for twin, ((name, d_sae, k), layers) in _in_order(specs, first_LND.shape[2], training):
        columns = [list(specs).index(layer) for layer in layers]
        architecture = ARCHITECTURES.load(name)
        some = chunk.order_C[: max(SCALED_ON, d_sae)].to(first_LND.device)
        some_LND = torch.stack([first_LND[column, some] for column in columns]).float()
        x_LND = (some_LND - mean_LD[columns][:, None]) * scale_LD[columns][:, None]
        generators = [torch.Generator().manual_seed(seed_of(training.seed, layer, twin)) for layer in layers]
        stack = Stack.initialize(x_LND, d_sae, generators, architecture)
        controller = _control(architecture, {layer: specs[layer] for layer in layers}, num_layers, x_LND)
        _set_encoder_(stack, architecture, x_LND, k, controller)
        idle = torch.zeros(len(layers), d_sae, dtype=torch.int64, device=x_LND.device)
        groups.append(
            Group(
                **_described(name, d_sae, k, columns, layers, training),
                twin=twin,
                mean_LD=mean_LD[columns],
                scale_LD=scale_LD[columns],
                stack=stack,
                controller=controller,
                idle_tokens_LF=idle,
            )
        )
    return groups


def _described(
    name: str, d_sae: int, k: int | None, columns: list[int], layers: list[int], training: TrainingSpec
) -> dict:
    """What of a group follows from the study alone."""
    architecture = ARCHITECTURES.load(name)
    return {
        "columns": columns,
        "layers": layers,
        "architecture": architecture,
        "options": architecture.options(k=k),
        "k": k,
        "learning_rate": learning_rate(training, d_sae),
        "starved_after": (architecture.starved_after or math.inf) * d_sae / (k or d_sae),
    }


def _in_order(
    specs: dict[int, DictionarySpec], d_model: int, training: TrainingSpec
) -> Iterator[tuple[int, tuple[Shape, list[int]]]]:
    """Twin (0: the layers' own dictionary), shape and layers of each group, in the order in which checkpoints number them."""
    return product(range(1 + training.ceiling_seeds), _by_shape(specs, d_model).items())


def _by_shape(specs: dict[int, DictionarySpec], d_model: int) -> dict[Shape, list[int]]:
    """Layers by architecture, number of features and k; k is None where a penalty decides how many are active."""
    by_shape: dict[Shape, list[int]] = {}
    for layer, spec in specs.items():
        d_sae = spec.width(d_model)
        has_penalty = ARCHITECTURES.load(spec.architecture).first_penalty(1.0, d_model) is not None
        k = None if has_penalty or spec.l0 is None else min(round(spec.l0), d_sae)
        by_shape.setdefault((spec.architecture, d_sae, k), []).append(layer)
    return by_shape


def _mean_of(x_ND: Tensor) -> Tensor:
    """Mean activation, piece by piece: torch is slow at sums of bfloat16."""
    return torch.stack([piece.float().sum(0) for piece in x_ND.split(PIECE_TOKENS)]).sum(0) / len(x_ND)


def _scale_of(x_ND: Tensor, mean_D: Tensor) -> Tensor:
    """What divides each centred coordinate by the square root of its spread and brings the mean norm to sqrt(D), [D].

    The residual stream of some models has coordinates that vary a hundred times as much as others; one of 640 has 96 % of
    Gemma 3's variance after block 0. A loss in the stream's own scale is about these alone, and a step of the optimizer, which is
    as long for all, is too long for them: training diverges. Dividing by the spread itself makes all alike, which keeps as much of
    the model and costs FVU; half way there FVU is as in the stream's own scale (docs/real-models.md). SPREAD_FLOOR keeps
    coordinates that hardly vary from being blown up.
    """
    squares = torch.stack([(piece.float() - mean_D).square().sum(0) for piece in x_ND.split(PIECE_TOKENS)]).sum(0)
    variance_D = squares / len(x_ND)
    root_D = (variance_D + SPREAD_FLOOR * variance_D.median() + 1e-30).pow(SPREAD_POWER / 2)
    norms = torch.cat([((piece.float() - mean_D) / root_D).norm(dim=1) for piece in x_ND.split(PIECE_TOKENS)])
    return math.sqrt(x_ND.shape[1]) / norms.mean() / root_D


def _control(
    architecture: type[Architecture], specs: dict[int, DictionarySpec], num_layers: int, x_LND: Tensor
) -> SparsityController:
    """First penalty of each layer and, where the architecture has one, the L0 that it is to bring about."""
    first, target = [], []
    for layer, spec in specs.items():
        penalty = architecture.first_penalty(spec.l1_at(layer, num_layers), x_LND.shape[2])
        first.append(penalty or 0.0)
        target.append(math.nan if penalty is None or spec.l0 is None else spec.l0)
    return SparsityController.start(
        *(torch.tensor(v, dtype=torch.float32, device=x_LND.device) for v in (first, target))
    )


@torch.no_grad()
def _set_encoder_(
    stack: Stack, architecture: type[Architecture], x_LND: Tensor, k: int | None, controller: SparsityController
) -> None:
    """Start from the architecture's first biases, and from the encoder length with the least error.

    Unit rows overshoot when many of them see the same direction. Activations are positively homogeneous, so c * W_enc and
    c * b_enc give c * x_hat, and the best c = <x, x_hat> / <x_hat, x_hat>.
    """
    for index in range(len(x_LND)):
        one, x_ND = stack.single(index), x_LND[index : index + 1, :LENGTH_FROM]
        if architecture.first_bias:
            one.b_enc_LF.copy_(-architecture.first_bias * one.pre_activations(x_ND).std(1, correction=0))
        nothing_dead = torch.zeros_like(one.b_enc_LF, dtype=torch.bool)
        penalty = controller.single(index).penalty_L
        x_hat_ND = architecture.loss(one, x_ND, nothing_dead, 0.0, k=k, penalty_L=penalty).x_hat_LND
        c = (x_ND * x_hat_ND).sum() / x_hat_ND.square().sum().clamp_min(1e-12)
        one.W_enc_LFD.mul_(c.clamp(0.01, 1.0))
        one.b_enc_LF.mul_(c.clamp(0.01, 1.0))


def _restore(found: Checkpoint, specs: dict[int, DictionarySpec], training: TrainingSpec, device: str) -> list[Group]:
    """The groups of a checkpoint."""
    d_model = found.tensors["0/mean"].shape[1]
    groups = []
    for number, (twin, ((name, d_sae, k), layers)) in enumerate(_in_order(specs, d_model, training)):
        t = {n.partition("/")[2]: v.to(device) for n, v in found.tensors.items() if n.startswith(f"{number}/")}
        architecture = ARCHITECTURES.load(name)
        fresh = architecture.extra((len(layers), d_sae, d_model))
        extra = {n: t[n].requires_grad_(tensor.requires_grad) for n, tensor in fresh.items()}
        four = (t[n].requires_grad_() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
        stack = Stack(*four, extra_LF=extra)
        groups.append(
            Group(
                **_described(name, d_sae, k, [list(specs).index(layer) for layer in layers], layers, training),
                twin=twin,
                mean_LD=t["mean"],
                scale_LD=t["scale"],
                stack=stack,
                controller=SparsityController(t["target_l0"], t["penalty"], t["log_l0"]),
                idle_tokens_LF=t["idle"],
                moments={n: (t[f"{n}.m"], t[f"{n}.v"]) for n in stack.trained()},
                slowed_L=t["slowed"],
                setbacks_L=t["setbacks"],
            )
        )
    return groups


def _tensors(groups: Sequence[Group]) -> dict[str, Tensor]:
    return {f"{number}/{n}": t for number, group in enumerate(groups) for n, t in group.tensors().items()}


def _make_trainers(
    groups: Sequence[Group], course: Course, device: str, say: Callable[[str], None], ranks: Ranks
) -> list[Trainer]:
    """One trainer for all groups that have compiled kernels, on one CPU; one for each of the others.

    Compiled steps go from activations to weights and have no gradients that ranks could add up.
    """
    fast = [g for g in groups if ranks.size == 1 and compiled.can_train(g.architecture.name, device)]
    trainers: list[Trainer] = [PlainTrainer(group, course, say, ranks) for group in groups if group not in fast]
    return ([CompiledTrainer(fast, course, torch.get_num_threads())] if fast else []) + trainers


def _describe_failures(groups: Sequence[Group], training: TrainingSpec, model: str) -> dict[int, str]:
    """A sentence for each layer that was given up: the layer, the step and the likely cause."""
    failed = {}
    for group in groups:
        auto = learning_rate(training.model_copy(update={"lr": "auto"}), group.stack.W_dec_LFD.shape[1])
        for index, layer in enumerate(group.layers):
            if group.setbacks_L[index] <= MOST_SETBACKS:
                continue
            words = [said for at, said in group.events if at == layer]
            last = words[-1].removesuffix(": given up") if words else f"layer {layer} failed before training went on"
            cause = (
                f"training.lr {training.lr:.2g} is {training.lr / auto:.0f} times what auto would take ({auto:.2g})"
                if training.lr != "auto" and training.lr > 2 * auto
                else "look at the layer's activations, or set training.lr lower than "
                f"{group.learning_rate * float(group.slowed_L[index]):.2g}"
            )
            failed[layer] = f"{model} {last}, after {MOST_SETBACKS} setbacks with a lower learning rate each; {cause}"
    return failed


def _fold(group: Group, model: str, steps: int, training: TrainingSpec, sinks: SinkFilter) -> dict[int, Dictionary]:
    folded = {}
    for i, layer in enumerate(group.layers):
        metadata = {
            "model_name": model,
            "layer": layer,
            "training_tokens": steps // training.passes * training.step_tokens,
            "seed": training.seed,
            "training_architecture": group.architecture.name,
            "sink_tokens_left_out": int(sinks.left_out_L[group.columns[i]]),
            "setbacks": int(group.setbacks_L[i]),
        }
        dictionary = group.stack.fold(
            i,
            group.architecture,
            group.mean_LD[i],
            group.scale_LD[i],
            group.options,
            metadata | ({"ceiling_seed": group.twin} if group.twin else {}),
        )
        folded[layer] = replace(dictionary, sink_norm=float(sinks.norm_L[group.columns[i]]))
    return folded


# ---- progress


class _Reporter:
    """Says once a second where training is, once every layer has been measured."""

    def __init__(
        self,
        groups: Sequence[Group],
        training: TrainingSpec,
        model: str,
        num_steps: int,
        first_step: int,
        report: Callable[[Progress], None],
        say: Callable[[str], None],
    ) -> None:
        self._said, self._tell = 0, say
        self._groups, self._training, self._model, self._num_steps = groups, training, model, num_steps
        self._report, self._first_step = report, first_step
        self._started = self._reported = time.perf_counter()
        self._base, self._done, self._share = 0.0, 0.0, 1.0

    def begin(self, step: int, num_trainers: int) -> None:
        """A chunk begins at `step`; `num_trainers` go through it, one after another."""
        self._base, self._done, self._share = step, 0.0, 1 / max(1, num_trainers)

    def trained(self, steps: int) -> None:
        """A trainer is through, perhaps too soon for a tick of its own."""
        self._done += steps * self._share
        self.tick(0)

    def tick(self, steps: float) -> None:
        """The trainer at work has done so many steps."""
        now = time.perf_counter()
        if now - self._reported >= REPORT_SECONDS:
            self._say(int(self._base + self._done + steps * self._share), now)

    def finish(self, step: int) -> None:
        """The last word, after `step` steps."""
        self._say(step, time.perf_counter())

    def _say(self, step: int, now: float) -> None:
        self._reported = now
        rows: dict[int, dict[str, float]] = {}
        for group in self._groups:
            measured = {name: tensor.tolist() for name, tensor in asdict(group.latest).items()}
            rows |= {layer: {name: v[i] for name, v in measured.items()} for i, layer in enumerate(group.layers)}
        if any(math.isnan(row["l0"]) for row in rows.values()):
            return  # some layer has not begun
        tokens, seconds = (step - self._first_step) * self._training.step_tokens, now - self._started
        rate = max(tokens, 1) / max(seconds, 1e-9)
        layers, events = sorted(rows), [said for group in self._groups for _, said in group.events]
        for event in events[self._said :]:
            self._tell(f"{self._model} {event}")
        self._said = len(events)
        self._report(
            Progress(
                model=self._model,
                layers=layers,
                step=step,
                num_steps=self._num_steps,
                tokens_per_second=rate,
                eta_seconds=(self._num_steps - step) * self._training.step_tokens / rate,
                **{name: [rows[layer][name] for layer in layers] for name in ("loss", "l0", "fvu", "dead")},
                events=events,
            )
        )
