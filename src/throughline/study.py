"""The study file: what to do. One frozen tree; unknown keys are refused with the nearest known one.

Every field's comment is its documentation; `throughline init` writes them into a commented file.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from throughline.errors import InputError
from throughline.registry import ARCHITECTURES, LABELERS, METRICS, Registry, unknown

ASKING = "llm"  # the labeler that asks a language model
LONGEST_SHOWN = 60  # characters of a wrong value that an error repeats
RANDOM_WEIGHTS = " (random weights)"  # how the name of a model without training ends

WHOLE_K = ("topk", "batch_topk", "matryoshka")
# Which of k and l1 our architectures read; one of a third party is given both.
READ = {name: {"k"} for name in (*WHOLE_K, "jumprelu")} | {name: {"l1"} for name in ("relu", "gated")}


def _require_known(kind: str, names: list[str], registry: Registry) -> None:
    for name in names:
        if name not in registry.names() and ":" not in name:
            raise ValueError(unknown(kind, name, registry.names()))


class Section(BaseModel):
    """Part of a study: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class L1Schedule(Section):
    """L1 coefficients by thirds of depth, on scaled activations."""

    early: float = Field(ge=0)
    mid: float = Field(ge=0)
    late: float = Field(ge=0)


class DictionaryOverride(Section):
    """What one model or layer has otherwise than the study's `dictionary`."""

    architecture: str | None = None
    expansion: float | None = Field(default=None, gt=0)
    d_sae: int | None = Field(default=None, ge=1)
    k: int | None = Field(default=None, ge=1)
    l1: float | L1Schedule | None = None
    target_l0: float | None = Field(default=None, gt=0)


class ModelOverride(DictionaryOverride):
    """The same for a model, whose layers may differ again."""

    per_layer: dict[int, DictionaryOverride] | None = None


class DictionarySpec(Section):
    """One layer's dictionary: `d_sae` features, or `expansion` times the model's width."""

    architecture: str = "topk"
    expansion: float = Field(default=8, gt=0)
    d_sae: int | None = Field(default=None, ge=1)
    k: int = Field(default=32, ge=1)  # active features per token (topk), on average (batch_topk, matryoshka, jumprelu)
    l1: float | L1Schedule = (
        5.0  # coefficient of |f| times decoder norm (relu, gated), activations scaled to mean norm sqrt(d)
    )
    # active features per token at every layer: relu and gated move l1 until they have it; elsewhere another word for k
    target_l0: float | None = Field(default=None, gt=0)
    per_layer: dict[int, DictionaryOverride] = {}

    def width(self, d_model: int) -> int:
        """Number of features for a model of width `d_model`."""
        return self.d_sae or round(self.expansion * d_model)

    def l1_at(self, layer: int, num_layers: int) -> float:
        """L1 coefficient at `layer` of `num_layers`."""
        if isinstance(self.l1, L1Schedule):
            return (self.l1.early, self.l1.mid, self.l1.late)[min(2, 3 * layer // num_layers)]
        return self.l1

    @property
    def l0(self) -> float | None:
        """Active features per token that are asked for; None if they come out of `l1`."""
        return self.k if self.target_l0 is None and "k" in self._read() else self.target_l0

    @property
    def ignored(self) -> list[str]:
        """Settings of `k` and `l1` that were given and that this architecture does not read."""
        read = self._read() - ({"k"} if self.target_l0 is not None else set())
        return [n for n in ("k", "l1") if n not in read and getattr(self, n) != DictionarySpec.model_fields[n].default]

    def _read(self) -> set[str]:
        return READ.get(self.architecture, {"k", "l1"})

    def at_layer(self, layer: int) -> "DictionarySpec":
        """This specification with the overrides of one layer applied."""
        return self.overridden(self.per_layer.get(layer))

    def overridden(self, override: DictionaryOverride | None) -> "DictionarySpec":
        """A copy in which every key given in `override` replaces this one's."""
        if override is None:
            return self
        given = override.model_dump(exclude_none=True)
        if "expansion" in given and "d_sae" not in given:
            given["d_sae"] = None
        if (
            "k" in given
            and "target_l0" not in given
            and "k" in READ.get(given.get("architecture", self.architecture), {})
        ):
            given["target_l0"] = None
        return DictionarySpec.model_validate(self.model_dump() | given)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.architecture not in ARCHITECTURES.names():
            raise ValueError(unknown("architecture", self.architecture, ARCHITECTURES.names()))
        if self.architecture in WHOLE_K and self.target_l0 is not None and self.target_l0 % 1:
            raise ValueError(f"{self.architecture} keeps a whole number of features, found target_l0 {self.target_l0}")
        return self


class ModelSpec(Section):
    """A language model: a hub id, a local folder, or zoo/NAME."""

    path: str
    name: str = ""  # default: the last part of the path; zoo models keep "zoo/NAME"
    layers: Literal["all"] | list[int] = "all"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal["trained", "random"] = "trained"  # random: the architecture of config.json; only its size is real
    dictionary: ModelOverride | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, dict) and isinstance(data.get("path"), str) and not data.get("name"):
            path = data["path"].rstrip("/")
            data = data | {"name": path if path.startswith("zoo/") else path.rpartition("/")[2]}
        # Every output calls a model by its name, so the name is where all of them say that the weights are random.
        if isinstance(data, dict) and data.get("weights") == "random" and isinstance(data.get("name"), str):
            data = data | {"name": data["name"].removesuffix(RANDOM_WEIGHTS) + RANDOM_WEIGHTS}
        return data

    @model_validator(mode="after")
    def _named_truly(self) -> Self:
        if self.weights == "trained" and self.name.endswith(RANDOM_WEIGHTS):
            raise ValueError(
                f"a model of trained weights is named {self.name!r}; change its name, or set weights: random"
            )
        return self


class DataSpec(Section):
    """Text: a hub dataset, a local .txt .jsonl .csv .parquet file, or zoo/arithmetic."""

    path: str
    config: str | None = None
    split: str = "train"
    text: str = "{text}"  # how a row becomes a text; a field named answer marks where the answer begins
    context: int = Field(default=128, ge=2)  # longest piece of text the model sees at once, in tokens
    heldout: float = Field(default=0.1, gt=0, lt=1)  # share of the documents kept for evaluation
    keep_special_tokens: bool = False


class TrainingSpec(Section):
    """How long and how fast. `tokens` are those of one epoch."""

    tokens: int = Field(default=2_000_000, ge=1)
    epochs: int = Field(default=1, ge=1)
    passes: int = Field(
        default=1, ge=1
    )  # through the activations at hand, in another order each time, before they are replaced
    batch_tokens: int = Field(default=4096, ge=1)
    lr: float | Literal["auto"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(default=0, ge=0)
    # further dictionaries of each layer that differ in their first weights alone: what transfer could reach at most
    ceiling_seeds: int = Field(default=0, ge=0, le=3)
    checkpoint_minutes: float = Field(default=5, ge=0)  # between checkpoints; 0: as often as can be
    # activations of several epochs are kept on disk: on, off, or auto: where reading them is cheaper than computing them again
    activation_cache: Literal["auto", "on", "off"] = "auto"

    @model_validator(mode="after")
    def _at_least_one_batch(self) -> Self:
        if self.batch_tokens > self.tokens * self.epochs:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is more than the {self.tokens * self.epochs} tokens of the training"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Of the whole training."""
        return max(1, self.tokens * self.epochs // self.batch_tokens) * self.passes


class GateSpec(Section):
    """What a dictionary must reach before anything is built on it."""

    max_l0_share: float = 0.10  # of d_sae
    max_fvu: float = 0.5
    min_ce_recovered: float = 0.8
    max_dead: float = 0.30


class EvaluationSpec(Section):
    """Held-out text for quality, features, labels and transfer."""

    tokens: int = Field(default=200_000, ge=1)
    spliced_tokens: int = Field(default=20_000, ge=1)  # for the measures that run the model several times per layer
    sample_tokens: int = Field(default=20_000, ge=1)  # for labels and reconstruction, which keep the residual stream


class LlmSpec(Section):
    """The language model that the labeler `llm` asks: at an OpenAI-compatible endpoint (base_url), or in this process (path)."""

    base_url: str | None = None  # such as http://localhost:8000/v1
    model: str | None = None  # its name there
    path: str | None = None  # a hub id, a local folder or zoo/NAME
    api: Literal["chat", "completions"] = "chat"  # completions: for a model without a chat template
    key_variable: str | None = "OPENAI_API_KEY"  # environment variable with the key; a key itself is never written down
    features: int = Field(default=20, ge=1)  # of each layer, of those that no other labeler has words for
    # influential: largest effects in the run's traces first; active: largest sum of activation first
    order: Literal["active", "influential"] = "active"
    examples: int = Field(default=20, ge=1)  # contexts of the selection text that a label is made from
    judged: int = Field(default=20, ge=2)  # held-out contexts in which the feature is active, and as many others
    per_call: int = Field(default=5, ge=1)  # contexts judged in one answer
    context: int = Field(default=32, ge=2)  # tokens of a context
    answer_tokens: int = Field(default=200, ge=1)  # longest answer; a model that reasons aloud needs more
    price_in: float | None = Field(default=None, ge=0)  # of a million tokens of prompts, in any currency
    price_out: float | None = Field(default=None, ge=0)  # of a million tokens of answers
    timeout_seconds: float = Field(default=60, gt=0)  # of one try
    retries: int = Field(default=5, ge=0)  # after 429, 5xx, time-outs and lost connections, with growing pauses
    concurrency: int = Field(default=4, ge=1)  # calls at once

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.base_url is None) == (self.path is None):
            raise ValueError("llm asks either an endpoint (base_url and model) or a local model (path)")
        if self.base_url is not None and not self.model:
            raise ValueError("an endpoint is asked for a model by name; give model beside base_url")
        # neither is repeated: what is wrong may be a key
        if self.base_url is not None and not re.fullmatch(r"https?://[^\s@?#]+", self.base_url):
            raise ValueError("base_url should be http(s)://HOST/PATH without user, password, ? and #")
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ValueError(
                "key_variable should be the name of an environment variable, such as OPENAI_API_KEY, not a key"
            )
        return self

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that change results."""
        free = {"base_url", "key_variable", "price_in", "price_out", "timeout_seconds", "retries", "concurrency"}
        return self.model_dump(exclude=free)


class FeatureSpec(Section):
    """What is kept of each feature."""

    contexts: int = Field(default=6, ge=1)  # examples from the top, and as many spread over the quantiles
    labelers: list[str] = ["concepts", "tokens"]
    predicates: list[
        str
    ] = []  # functions of the user's, mypackage.module:function, that add to the vocabulary of concepts
    bar: float = Field(default=0.7, ge=0, le=1)  # a label scored below is shown as unlabelled, with its top tokens
    llm: LlmSpec | None = None  # whom the labeler llm asks

    @model_validator(mode="after")
    def _known(self) -> Self:
        _require_known("labeler", self.labelers, LABELERS)
        if ASKING in self.labelers and self.llm is None:
            raise ValueError("labeler llm needs to know whom to ask: llm: {base_url: …, model: …} or llm: {path: …}")
        return self

    @property
    def free_labelers(self) -> list[str]:
        """Those that ask no language model."""
        return [name for name in self.labelers if name != ASKING]

    @property
    def asked(self) -> LlmSpec | None:
        """Whom the labels are asked of; None if nobody is."""
        return self.llm if ASKING in self.labelers else None


class TransferSpec(Section):
    """Which relations between dictionaries are computed."""

    metrics: list[str] = ["reconstruction", "matching"]
    min_count: int = Field(default=30, ge=1)  # features active on fewer tokens are left out
    spliced: bool = False  # reconstruction runs each target model with what it carries over, once a pair of layers

    @model_validator(mode="after")
    def _known(self) -> Self:
        _require_known("metric", self.metrics, METRICS)
        return self


class TraceSpec(Section):
    """Prompts traced and compared by `throughline run`."""

    prompts: list[str] = []
    features: int = Field(default=6, ge=1)  # shown per layer
    answer_tokens: int = Field(default=8, ge=1)  # longest answer
    share: float = Field(default=0.8, gt=0, le=1)  # of each layer's influence that the graph's nodes carry
    nodes: int = Field(default=24, ge=1)  # of the graph, per layer at most
    chains: int = Field(default=3, ge=0)  # per token of the answer


class ExecutorSpec(Section):
    """Where training runs; changes no result but for `cpus` and `devices`, whose numbers may change the last digits."""

    kind: Literal["local", "ray"] = "local"
    # of a Ray cluster (auto, HOST:6379, ray://HOST:10001); none: one is started on this machine
    address: str | None = None
    cpus: int | None = Field(default=None, ge=1)  # threads of a job; none: all (local), 1 (ray)
    # models that are worked on side by side, each in a process of its own (local, on a CPU); none: as many as there are
    # threads where all models are narrower than 256, else one
    processes: int | None = Field(default=None, ge=1)
    gpus: float | None = Field(default=None, ge=0)  # of a job (ray); none: 1 where there are any
    # that train one block together (ray); none: 1, but more where GPUs outnumber the layers that are left
    devices: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _no_cluster_here(self) -> Self:
        if self.kind == "local" and any(value is not None for value in (self.address, self.gpus, self.devices)):
            raise ValueError("address, gpus and devices are Ray's; set kind: ray")
        if self.kind == "ray" and self.processes is not None:
            raise ValueError("processes is for kind: local; Ray has a process for each job")
        return self


class LoggingSpec(Section):
    """Where else training's measures go; changes no result."""

    tensorboard: bool = False
    wandb: str | None = None  # a project


class Study(Section):
    """Everything a run is made from; a run is a pure function of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: list[ModelSpec] = Field(min_length=1)
    data: DataSpec
    dictionary: DictionarySpec = DictionarySpec()
    training: TrainingSpec = TrainingSpec()
    gate: GateSpec = GateSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    features: FeatureSpec = FeatureSpec()
    transfer: TransferSpec = TransferSpec()
    trace: TraceSpec = TraceSpec()
    executor: ExecutorSpec = ExecutorSpec()
    logging: LoggingSpec = LoggingSpec()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [m.name for m in self.models]
        nameless = next((n for n in names if not re.search(r"[A-Za-z0-9]", n)), None)
        if nameless is not None:
            raise ValueError(f"a model needs a name with a letter or digit, found {nameless!r}; give it one with name")
        folders = [folder_name(n) for n in names]
        twice = {n for n, f in zip(names, folders, strict=True) if folders.count(f) > 1}
        if twice:
            raise ValueError(
                f"models need different names (letters and digits count), found {', '.join(sorted(twice))} twice"
            )
        return self

    def model(self, name: str | None) -> ModelSpec:
        """The model called `name` (the only one, if None); InputError names the known ones."""
        names = [m.name for m in self.models]
        if name is None and len(names) == 1:
            return self.models[0]
        if name is None:
            raise InputError(f"this run has {len(names)} models; say which with --model ({', '.join(names)})")
        if name not in names:
            raise InputError(unknown("model", name, names))
        return self.models[names.index(name)]

    def dictionary_for(self, model: ModelSpec) -> DictionarySpec:
        """The dictionary specification of one model, before the overrides of its layers."""
        return self.dictionary.overridden(model.dictionary)


def load_study(path: str | Path, settings: list[str] | None = None) -> Study:
    """Read a study file and apply `a.b=value` settings. Raises InputError, one line, for anything wrong in either."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"study file {path} does not exist; `throughline init` writes one")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} should hold keys and values (name, models, data, …), found {type(tree).__name__}")
    tree = {key: value for key, value in tree.items() if value is not None or key not in Study.model_fields}
    for setting in settings or []:
        _set(tree, setting)
    study = parse_study(tree, str(path))
    return _beside(study, path.parent)


def parse_study(tree: dict, where: str = "study") -> Study:
    """The study of a tree of plain values. Raises InputError with every fault of it in one line."""
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_describe_all(error)}") from None


def dump_study(study: Study) -> str:
    """The study as YAML, every default written out."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def folder_name(name: str) -> str:
    """A name as it stands in file names; `__` is kept for what lies between two of them."""
    return re.sub(r"_{2,}", "_", re.sub(r"[^A-Za-z0-9._-]+", "-", name))


def _set(tree: dict, setting: str) -> None:
    key, separator, value = setting.partition("=")
    if not separator or not key:
        raise InputError(f"--set expects a.b=value, found {setting!r}")
    try:
        plain = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: {value!r} is not YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for i, parent in enumerate(parents):
        node = node.setdefault(parent, {}) if isinstance(node, dict) else _item(node, parent)
        if not isinstance(node, dict | list):
            raise InputError(f"--set {setting}: {'.'.join(parents[: i + 1])} holds no keys")
    if isinstance(node, dict):
        node[last] = plain
    elif _item(node, last) is not None:
        node[int(last)] = plain
    else:
        raise InputError(f"--set {setting}: {'.'.join(parents)} is a list of {len(node)}, counted from 0")


def _item(node: Any, index: str) -> Any:
    """Item `index` of a list; None if there is no such thing."""
    return node[int(index)] if isinstance(node, list) and index.isdigit() and int(index) < len(node) else None


def _beside(study: Study, folder: Path) -> Study:
    """Relative paths in a study file are relative to the file, if something is there."""

    def resolve(path: str) -> str:
        beside = folder / path
        return str(beside.resolve()) if not Path(path).is_absolute() and beside.exists() else path

    changes: dict[str, Any] = {
        "models": [m.model_copy(update={"path": resolve(m.path)}) for m in study.models],
        "data": study.data.model_copy(update={"path": resolve(study.data.path)}),
    }
    llm = study.features.llm
    if llm is not None and llm.path is not None:
        asked = llm.model_copy(update={"path": resolve(llm.path)})
        changes["features"] = study.features.model_copy(update={"llm": asked})
    return study.model_copy(update=changes)


def _describe_all(error: ValidationError) -> str:
    """Every fault; those of one place, which are the alternatives of a union, as one."""
    places: dict[str, list[Any]] = {}
    for fault in error.errors():
        places.setdefault(".".join(str(part) for part in fault["loc"] if not _is_branch(part)), []).append(fault)
    # what is wrong inside a section says more than that its union did not fit
    inner = [where for where in places if not any(other.startswith(f"{where}.") for other in places)]
    return "; ".join(_describe(where, *places[where]) for where in inner)


def _describe(where: str, fault: Any, *others: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = _keys_at(fault["loc"][:-1])
        close = get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    messages = [_expectation(f["msg"]) for f in (fault, *others)]
    expected = " or ".join([messages[0], *(m.removeprefix("input should be ") for m in messages[1:])])
    if fault["type"] == "value_error":  # our own words, which say what was found
        return f"{where}: {expected}" if where else expected
    return f"{where}: {expected}, found {_shorten(fault['input'])}"


def _expectation(message: str) -> str:
    """What pydantic says was expected, as the rest of a sentence."""
    message = message.removeprefix("Value error, ").partition(", unable to parse")[0]
    if "a valid dictionary or instance of" in message:
        return "input should be keys and values"
    return message.replace("Input should", "input should")


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else shown[: LONGEST_SHOWN - 1] + "…"


def _is_branch(part: object) -> bool:
    """True for what pydantic adds to a location to say which alternative of a union it tried."""
    return isinstance(part, str) and (part in ("float", "int", "L1Schedule") or "[" in part)


def _keys_at(location: tuple) -> list[str]:
    section: Any = Study
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)
