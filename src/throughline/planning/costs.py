"""What one model's training takes on one kind of device, layer by layer, from counts and rates; no weights are read.

Forward pass: 2 operations for each weight of a block's matrices and token, attention beside it; blocks behind the last wanted
layer are left out. Training, D wide with F features of which `a` are active, for each token and layer:

    compiled, on a CPU    2 D F for the encoder, 8 a D for codes and their gradients
    autograd              4 D F for the encoder and its gradient, then 4 a D where decoding is sparse, 6 D F where it is dense

and for each step what the optimizer and the pre-activations move through memory.
"""

from dataclasses import dataclass

from throughline.harvesting import tokens_at_once
from throughline.jobs import DISK_BYTES_PER_SECOND
from throughline.planning.blocks import Costs
from throughline.planning.shapes import ModelShape
from throughline.records import PlannedDevice
from throughline.registry import ARCHITECTURES
from throughline.study import DictionarySpec, ModelSpec, Study, TrainingSpec
from throughline.training import compiled
from throughline.training.chunks import chunk_tokens
from throughline.training.memory import LayerBytes, measure_layer
from throughline.training.precision import is_wide_enough

# Python, torch, transformers and compiled loops. Measured 0.53 to 0.58 GiB (a first run that compiles them: 0.61) on Linux; a GPU's
# context and the gaps between its tensors are assumed.
BASE_BYTES = {True: int(0.56 * 2**30), False: int(0.8 * 2**30)}  # by: is it a CPU
RANDOM_WEIGHTS_BYTES = 80 * 2**20  # the pool of normal numbers, which stays with the process
FORWARD_SHARE = 0.45  # of the rate of products, that a forward pass reaches: 183 of 399 GFLOP/s (docs/performance.md)
SPARSE_SHARE = 0.3  # of the rate of float32 products, that gathering rows of weights reaches
WEIGHTS_BYTES_PER_SECOND = 2e9  # read from disk, or made
ADAM_BYTES = {True: 48 + 4, False: 120}  # moved for each of D x F a step, by: is it compiled
PRE_ACTIVATION_PASSES = {True: 3, False: 10}  # reads and writes of each pre-activation, by: is it compiled
SECONDS_PER_STEP = (
    5e-4  # at least, on a GPU: kernels are started one by one, for all layers at once, and again for their twins
)
ACTIVE_SHARE = 0.05  # of the features, where a penalty decides
SPARSE_DECODERS = ("topk",)  # autograd reads a rows of the decoder for them; the others multiply by all of it


@dataclass(frozen=True)
class ModelCosts:
    """`costs` for placing; the rest describes its jobs. Lists are by pending layer."""

    costs: Costs
    parts: list[LayerBytes]
    forward_bytes: list[int]  # activations on their way, by layer
    fixed: dict[str, int]  # base, model, forward, buffers
    train_flops: list[float]  # with twins, as all but activations and forward pass
    forward_flops: list[float]  # an epoch, up to and with each layer
    dictionary_bytes: list[int]
    checkpoint_bytes: list[int]
    cache_bytes: list[int]


@dataclass(frozen=True)
class Setting:
    """What the costs of all layers of a model depend on, on one kind of device."""

    study: Study
    spec: ModelSpec
    shape: ModelShape
    device: PlannedDevice
    tokens: int  # of an epoch

    @property
    def training(self) -> TrainingSpec:
        """With the tokens that there are."""
        return self.study.training.model_copy(update={"tokens": self.tokens})

    @property
    def trains_in_bfloat16(self) -> bool:
        """As training/precision.py decides on such a device."""
        wanted = self.training.precision
        return self.device.bfloat16 if wanted == "auto" else wanted == "bfloat16"

    @property
    def copies_model(self) -> bool:
        """True if the forward pass runs in a copy in bfloat16."""
        wide = is_wide_enough(self.training.precision, self.shape.d_model)
        return self.spec.dtype != "bfloat16" and self.trains_in_bfloat16 and wide

    @property
    def activation_bytes(self) -> int:
        """Of a number, as the forward pass gives it."""
        return 2 if self.copies_model or self.spec.dtype != "float32" else 4

    @property
    def context(self) -> int:
        """Longest piece of text."""
        return min(self.study.data.context, self.shape.context)

    def dictionary(self, layer: int) -> DictionarySpec:
        """The layer's dictionary."""
        return self.study.dictionary_for(self.spec).at_layer(layer)


def count_costs(setting: Setting, pending: list[int]) -> ModelCosts:
    """What the pending layers of a model take on a kind of device."""
    shape, device, training = setting.shape, setting.device, setting.training
    layers = [_count_layer(setting, layer) for layer in pending]
    forward = [shape.forward_flops(layer, setting.tokens, setting.context) for layer in pending]
    rate = device.flops_per_second if setting.activation_bytes == 2 else device.float32_flops_per_second
    weights = shape.parameters * (4 if setting.spec.dtype == "float32" else 2)
    copy = shape.parameters * 2 if setting.copies_model else 0
    on_the_way = _bytes_on_the_way(setting)
    threads = device.threads if device.on_cpu else 1
    rows = tokens_at_once(shape.d_model, device.on_cpu)
    fixed = {
        "base": BASE_BYTES[device.on_cpu] + (RANDOM_WEIGHTS_BYTES if setting.spec.weights == "random" else 0),
        "model": weights + copy,
        "forward": threads * rows * (8 * shape.d_model + 2 * shape.widest) * setting.activation_bytes,
        "buffers": max((layer.shared_bytes for layer in layers), default=0),
    }
    cache = [training.tokens * shape.d_model * setting.activation_bytes] * len(pending)
    shortest = min((layer.seconds for layer in layers), default=0.0)
    at_least = (1 + training.ceiling_seeds) * training.num_steps * SECONDS_PER_STEP
    waiting = 0.0 if device.on_cpu else max(0.0, at_least - shortest)
    costs = Costs(
        layers=pending,
        train_seconds=[layer.seconds for layer in layers],
        forward_seconds=[flops / (FORWARD_SHARE * rate) for flops in forward],
        layer_bytes=[layer.parts.total + on_the_way for layer in layers],
        fixed_bytes=sum(fixed.values()),
        start_seconds=device.start_seconds + weights / WEIGHTS_BYTES_PER_SECOND + waiting,
        epochs=training.epochs,
        cache_seconds=None if training.activation_cache == "off" else _cache_seconds(cache, training.epochs),
        always_cached=training.activation_cache == "on",
    )
    return ModelCosts(
        costs=costs,
        parts=[layer.parts for layer in layers],
        forward_bytes=[on_the_way] * len(layers),
        fixed=fixed,
        train_flops=[layer.flops for layer in layers],
        forward_flops=forward,
        dictionary_bytes=[layer.parts.parameters for layer in layers],
        checkpoint_bytes=[layer.parts.parameters + layer.parts.optimizer for layer in layers],
        cache_bytes=cache,
    )


def _cache_seconds(bytes_on_disk: list[int], epochs: int) -> list[float]:
    """To write once and read in every later epoch."""
    return [epochs * size / DISK_BYTES_PER_SECOND for size in bytes_on_disk]


def _bytes_on_the_way(setting: Setting) -> int:
    """A layer's activations between forward pass and chunk: captured, copied, and where threads read ahead, waiting."""
    rows = tokens_at_once(setting.shape.d_model, setting.device.on_cpu)
    held = 2 if setting.device.threads == 1 else 2 * setting.device.threads + 2
    return held * rows * setting.shape.d_model * setting.activation_bytes


# ---- one layer


@dataclass(frozen=True)
class _Layer:
    parts: LayerBytes
    shared_bytes: int  # which the layers of a job use in turn
    flops: float
    seconds: float


def _count_layer(setting: Setting, layer: int) -> _Layer:
    spec, training, device, D = setting.dictionary(layer), setting.training, setting.device, setting.shape.d_model
    F, N = spec.width(D), training.step_tokens
    num_dictionaries = 1 + training.ceiling_seeds
    tokens_trained = num_dictionaries * training.num_steps * N
    fast = compiled.can_train(ARCHITECTURES.load(spec.architecture).name, "cpu" if device.on_cpu else "cuda")
    active = spec.l0 or ACTIVE_SHARE * F
    dense, sparse = _flops_of_a_token(spec.architecture, D, F, active, fast)
    moved = ADAM_BYTES[fast] * D * F / N + PRE_ACTIVATION_PASSES[fast] * (2 if fast else 4) * F + 40 * D
    products = device.flops_per_second if setting.trains_in_bfloat16 else device.float32_flops_per_second
    seconds = (
        dense / products + sparse / (SPARSE_SHARE * device.float32_flops_per_second) + moved / device.bytes_per_second
    )
    chunk = chunk_tokens(D, N, training.tokens * training.epochs, setting.shape.num_layers)
    number = 2 if setting.copies_model or setting.spec.dtype == "bfloat16" else 4
    parts = measure_layer(
        D, F, chunk, N, by_autograd=not fast, bytes_per_number=number, num_dictionaries=num_dictionaries
    )
    folding = 3 * 4 * D * F
    workspace = device.threads * compiled.workspace_bytes(N, D, F, spec.l0) if fast else 0
    optimizer = 20 * 2 * D * F / N  # operations of Adam
    return _Layer(parts, folding + workspace, tokens_trained * (dense + sparse + optimizer), tokens_trained * seconds)


def _flops_of_a_token(architecture: str, D: int, F: int, active: float, fast: bool) -> tuple[float, float]:
    """Operations of matrix products, and of gathered rows, for one token of training."""
    if fast:
        return 2 * D * F, 8 * active * D
    if architecture in SPARSE_DECODERS:
        return 4 * D * F, 4 * active * D
    return 10 * D * F, 0
