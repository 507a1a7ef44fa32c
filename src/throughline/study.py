"""The study file: what to do. One frozen tree; unknown keys are refused with the nearest known one.

What a field means is said here alone, in its description. `study_fields.py` makes both of the others from it: `throughline init`
writes the first sentence beside the field, docs/study.md has all of it. `examples` are shown where a default shows nothing.
"""

import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from throughline.errors import InputError
from throughline.registry import ARCHITECTURES, LABELERS, METRICS, Registry, unknown

ASKING = "llm"  # the labeler that asks a language model
# What reading YAML raises; ValueError for wrong bytes, a date that is none and an integer of thousands of digits.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
LONGEST_SHOWN = 60  # characters of a wrong value that an error repeats
SMALLEST_BATCH, LARGEST_BATCH = 64, 4096  # that training.batch_tokens takes by itself
RANDOM_WEIGHTS = " (random weights)"  # how the name of a model without training ends

# Bounds of numbers. Each is beyond what anybody has used, and a number above it is a slip that would end in a crash or never.
MOST_THREADS = 1024  # of one machine; more cannot be started on most systems
MOST_TOKENS = 10**12  # a training of years on one device; language models themselves have seen ten times as many
MOST_BATCH = 2**24  # tokens of a step, whose codes are in memory at once
MOST_EPOCHS = 10_000
MOST_FEATURES = 2**24  # of one dictionary: the widest that was published has so many
MOST_CONTEXT = 2**24  # tokens; the longest context of a model is 10 million
MOST_SEED = 2**32 - 1  # the generators of all libraries take it
MOST_LAYERS = 10_000
MOST_SHOWN = 10_000  # of anything that a person reads or a model is asked for one by one
MOST_COEFFICIENT = 1e6
MOST_PRICE = 1e9  # in any currency
MOST_MINUTES = 525_600  # a year
MOST_SECONDS = 86_400  # a day

WHOLE_K = ("topk", "batch_topk", "matryoshka")
# Which of k and l1 our architectures read; one of a third party is given both.
READ = {name: {"k"} for name in (*WHOLE_K, "jumprelu")} | {name: {"l1"} for name in ("relu", "gated")}


def _require_known(kind: str, names: list[str], registry: Registry) -> None:
    for name in names:
        if name not in registry.names() and ":" not in name:
            raise ValueError(unknown(kind, name, registry.names()))


class Section(BaseModel):
    """Part of a study: frozen, and closed to unknown keys; its numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


LayerNumber = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Coefficient = Annotated[float, Field(ge=0, le=MOST_COEFFICIENT)]


class L1Schedule(Section):
    """L1 coefficients by thirds of depth, on scaled activations."""

    early: Coefficient
    mid: Coefficient
    late: Coefficient


class DictionaryOverride(Section):
    """What one model or layer has otherwise than the study's `dictionary`."""

    architecture: str | None = None
    expansion: float | None = Field(default=None, gt=0, le=MOST_FEATURES)
    d_sae: int | None = Field(default=None, ge=1, le=MOST_FEATURES)
    k: int | None = Field(default=None, ge=1, le=MOST_FEATURES)
    l1: Coefficient | L1Schedule | None = None
    target_l0: float | None = Field(default=None, gt=0, le=MOST_FEATURES)


class ModelOverride(DictionaryOverride):
    """The same for a model, whose layers may differ again."""

    per_layer: dict[LayerNumber, DictionaryOverride] | None = None


class DictionarySpec(Section):
    """One layer's dictionary. A layer's override comes before the model's, the model's before the study's."""

    architecture: str = Field(
        default="topk", description="`topk`, `batch_topk`, `matryoshka`, `jumprelu`, `gated` or `relu`."
    )
    expansion: float = Field(default=8, gt=0, le=MOST_FEATURES, description="Features per dimension of the model.")
    d_sae: int | None = Field(
        default=None,
        ge=1,
        le=MOST_FEATURES,
        examples=[4096],
        description="Number of features, in place of `expansion`.",
    )
    k: int = Field(
        default=32,
        ge=1,
        le=MOST_FEATURES,
        description="Active features per token; on average (`batch_topk`, `matryoshka`, `jumprelu`) or of each (`topk`).",
    )
    l1: Coefficient | L1Schedule = Field(
        default=5.0,
        description="`relu`, `gated`: one coefficient, or `{early: 5, mid: 4, late: 3}` by thirds of depth. It is that of "
        "f · ‖decoder row‖ on activations scaled to mean norm √d_model.",
    )
    target_l0: float | None = Field(
        default=None,
        gt=0,
        le=MOST_FEATURES,
        examples=[32],
        description="Active features per token that every layer shall have. `relu` and `gated` move their `l1` until they have "
        "it, starting from what is given; for the others it is another word for `k`, and counts before it.",
    )
    per_layer: dict[LayerNumber, DictionaryOverride] = Field(
        default={}, examples=[{0: {"k": 16}}], description="Overrides of single layers."
    )

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
        if self.d_sae is not None:
            self.require_fit(self.d_sae)
        return self

    def require_fit(self, num_features: int) -> None:
        """ValueError unless a dictionary of so many features can be made and have `l0` of them active."""
        if not 1 <= num_features <= MOST_FEATURES:
            raise ValueError(
                f"a dictionary has 1 to {MOST_FEATURES:,} features, found {num_features:,}; change expansion or d_sae"
            )
        if self.l0 is not None and self.l0 > num_features:
            asked = "k" if self.target_l0 is None else "target_l0"
            raise ValueError(
                f"{asked} {self.l0:g} is more than the {num_features} features; lower {asked}, or raise d_sae or expansion"
            )


class ModelSpec(Section):
    """A language model: a hub id, a local folder, or zoo/NAME."""

    path: str = Field(
        examples=["zoo/pythia"],
        description="Hub id, local folder with safetensors, or `zoo/gpt2`, `zoo/phi`, `zoo/pythia`, `zoo/gemma`.",
    )
    name: str = Field(
        default="",
        examples=["my-model"],
        description="What it is called everywhere; by default the last part of the path, or `zoo/NAME`.",
    )
    layers: Literal["all"] | Annotated[list[LayerNumber], Field(min_length=1)] = Field(
        default="all",
        description="Or a list such as `[0, 3, 5]`: the residual stream after these blocks, counted from 0.",
    )
    revision: str | None = Field(default=None, examples=["main"], description="Branch, tag or commit of a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="How the model is loaded: `float32`, `bfloat16` or `float16`. Activations are float32.",
    )
    weights: Literal["trained", "random"] = Field(
        default="trained",
        description="`random`: `config.json` alone is enough, for measuring speed and memory. Only the architecture is read; the "
        "numbers are random, the same for the same name. The name of such a model ends with ` (random weights)` in every output; "
        "without a tokenizer its tokens are bytes.",
    )
    dictionary: ModelOverride | None = Field(
        default=None,
        examples=[{"expansion": 16}],
        description="What this model has otherwise than the study's `dictionary`. Keys: `architecture`, `expansion`, `d_sae`, `k`, "
        "`l1`, `target_l0` and `per_layer`.",
    )

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

    path: str = Field(
        examples=["zoo/arithmetic"],
        description="Hub id, `.txt`, `.jsonl`, `.csv` or `.parquet` file, a folder of these, or `zoo/arithmetic`. In `.txt` files "
        "blank lines part the documents.",
    )
    config: str | None = Field(default=None, examples=["main"], description="Configuration of a hub dataset.")
    split: str = Field(default="train", description="Split of a hub dataset.")
    text: str = Field(
        default="{text}",
        description="How a row becomes a text; a field named `answer` marks where the answer begins.",
    )
    context: int = Field(
        default=128,
        ge=2,
        le=MOST_CONTEXT,
        description="Longest piece of text that the model sees at once, in tokens. At most the model's own context.",
    )
    heldout: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the documents kept for evaluation. Which they are follows from their numbers alone.",
    )
    bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether each piece of text begins with BOS: `auto`: as the tokenizer has it; or `always`, `never`. Where a "
        "family has no BOS, its end of text stands there. Training, evaluation and traces do the same. BOS is an attention sink, "
        "which is then a special token and not the first word.",
    )
    keep_special_tokens: bool = Field(default=False, description="Whether activations of special tokens are used.")


class TrainingSpec(Section):
    """How long and how fast. `tokens` are those of one epoch."""

    tokens: int = Field(default=2_000_000, ge=1, le=MOST_TOKENS, description="Tokens of one epoch.")
    epochs: int = Field(default=1, ge=1, le=MOST_EPOCHS, description="Times that these tokens are seen.")
    passes: int = Field(
        default=1,
        ge=1,
        le=MOST_EPOCHS,
        description="Times that the activations at hand are trained on before the next text is read. Each time in another "
        "order. Where the model takes longer than the dictionaries, two passes cost little and are worth nearly as much as twice "
        "the text.",
    )
    batch_tokens: Annotated[int, Field(ge=1, le=MOST_BATCH)] | Literal["auto"] = Field(
        default="auto",
        description="Tokens of one step, a number or `auto`. `auto` takes about as many tokens a step as steps: the power of "
        "two that is nearest to √(tokens · epochs), from 64 to 4096. Short runs need steps, long ones even gradients.",
    )
    # without an upper bound: what is too much shows in the loss, and the layer goes back to its last good state with a lower rate
    lr: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Learning rate, a number or `auto`. `auto` is 1.3e-2 · √(min(batch, 4096) / 256) · "
        "√(512 / max(512, features)) · √(min(1, steps / 300)).",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="`auto`: products in `bfloat16` where the device multiplies it faster; or `float32`, `bfloat16`. Weights and "
        "optimizer are float32 in any case.",
    )
    sinks: Literal["leave_out", "keep"] = Field(
        default="leave_out",
        description="Attention sinks, tokens whose activations are out of all proportion: `leave_out` or `keep`. Left out, they "
        "are no part of training nor of any figure, their activations stay as they are where a dictionary is spliced in, and the "
        "quality table counts them; the limit is found for each layer and saved with its dictionary.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=MOST_SEED,
        description="Of the order of texts, of shuffling and of the first weights. Each layer draws from its own.",
    )
    ceiling_seeds: int = Field(
        default=0,
        ge=0,
        le=3,
        description="Twins of each dictionary, 0 to 3, from other first weights: what transfer reaches at most. They are "
        "trained beside it, on the same activations in the same order, and transfer is held against what they reach; with two or "
        "three a ceiling is their mean, with their range. They lie in `layer_07/seed_1`, `seed_2`, … and take the time and memory "
        "of as many further dictionaries, but no further forward pass. A layer's own dictionary is the same with and without; "
        "changing the number trains the layers again. Imported layers have none.",
    )
    checkpoint_minutes: float = Field(
        default=5,
        ge=0,
        le=MOST_MINUTES,
        description="Minutes between checkpoints; 0: as often as can be. Longer if saving takes more than 2 % of the time. "
        "Changes no result.",
    )
    activation_cache: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Activations of several epochs on disk: `on`, `off`, or `auto`: where that is cheaper. `on` keeps them until "
        "training ends, `off` computes them in each epoch, `auto` does whichever is cheaper, if the disk has room. Changes no "
        "result.",
    )

    @model_validator(mode="after")
    def _at_least_one_batch(self) -> Self:
        if self.batch_tokens != "auto" and self.batch_tokens > self.tokens * self.epochs:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is more than the {self.tokens * self.epochs} tokens of the training"
            )
        if self.tokens * self.epochs * self.passes > MOST_TOKENS:
            raise ValueError(
                f"tokens · epochs · passes is {self.tokens * self.epochs * self.passes:,}, and no training has more than "
                f"{MOST_TOKENS:,} tokens; lower one of them"
            )
        return self

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        if self.batch_tokens != "auto":
            return self.batch_tokens
        total = self.tokens * self.epochs
        nearest = 2 ** round(math.log2(total) / 2)
        return min(max(SMALLEST_BATCH, min(nearest, LARGEST_BATCH)), total)

    @property
    def num_steps(self) -> int:
        """Of the whole training."""
        return max(1, self.tokens * self.epochs // self.step_tokens) * self.passes


class GateSpec(Section):
    """What a dictionary must reach before anything is built on it."""

    max_l0_share: float = Field(
        default=0.10, description="Largest L0, as a share of the features. And never above d_model."
    )
    max_fvu: float = Field(default=0.5, description="Largest share of variance left unexplained.")
    min_ce_recovered: float = Field(default=0.8, description="Least CE recovered, against zero ablation.")
    max_dead: float = Field(default=0.30, description="Largest share of features that never fire on the held-out text.")


class EvaluationSpec(Section):
    """Held-out text for quality, features, labels and transfer."""

    tokens: int = Field(
        default=200_000,
        ge=1,
        le=MOST_TOKENS,
        description="Held-out tokens for quality, features and matching. They are counted in the first model's.",
    )
    spliced_tokens: int = Field(
        default=20_000,
        ge=1,
        le=MOST_TOKENS,
        description="Of these, for running the model with each dictionary in place.",
    )
    sample_tokens: int = Field(
        default=20_000,
        ge=1,
        le=MOST_TOKENS,
        description="Of these, for labels and reconstruction, which keep the residual stream in memory.",
    )


class LlmSpec(Section):
    """The language model that the labeler `llm` asks: at an OpenAI-compatible endpoint (base_url), or in this process (path)."""

    base_url: str | None = Field(
        default=None, description="Such as `http://localhost:8000/v1`; without user, password or query."
    )
    model: str | None = Field(default=None, description="Its name at the endpoint.")
    path: str | None = Field(
        default=None,
        description="In place of an endpoint: a hub id, a local folder with safetensors, or `zoo/NAME`; no remote code.",
    )
    api: Literal["chat", "completions"] = Field(
        default="chat",
        description="`chat`: chat completions. `completions`: plain text is continued, for a model without a chat template.",
    )
    key_variable: str | None = Field(
        default="OPENAI_API_KEY",
        description="The environment variable that holds the key, if there is one. The key itself is never written down. `null` "
        "sends none.",
    )
    features: int = Field(
        default=20, ge=1, le=MOST_FEATURES, description="Of each layer, of those that no other labeler has words for."
    )
    order: Literal["active", "influential"] = Field(
        default="active",
        description="Which come first. `active`: largest sum of activation on the selection text. `influential`: largest measured "
        "effects in the run's traces, then `active`.",
    )
    examples: int = Field(
        default=20,
        ge=1,
        le=MOST_SHOWN,
        description="Contexts of the selection text that a label is made from, at even ranks of activation.",
    )
    judged: int = Field(
        default=20,
        ge=2,
        le=MOST_SHOWN,
        description="Held-out contexts in which the feature is active, at even ranks, and as many in which it is not.",
    )
    per_call: int = Field(default=5, ge=1, le=MOST_SHOWN, description="Contexts judged in one answer.")
    context: int = Field(
        default=32,
        ge=2,
        le=MOST_CONTEXT,
        description="Tokens of a context; where documents are short and much alike, less leaves contexts in which a feature is not "
        "active.",
    )
    answer_tokens: int = Field(
        default=200,
        ge=1,
        le=MOST_CONTEXT,
        description="Longest answer, in tokens; a model that reasons aloud needs more.",
    )
    price_in: float | None = Field(
        default=None,
        ge=0,
        le=MOST_PRICE,
        description="Of a million tokens of prompts, in any currency; with `price_out` the cost is said in money.",
    )
    price_out: float | None = Field(default=None, ge=0, le=MOST_PRICE, description="Of a million tokens of answers.")
    timeout_seconds: float = Field(default=60, gt=0, le=MOST_SECONDS, description="Seconds that one try may take.")
    retries: int = Field(
        default=5,
        ge=0,
        le=MOST_SHOWN,
        description="Further tries after 429, 5xx, time-outs, lost connections and replies that are none. With growing pauses, or "
        "as long as the endpoint asks for.",
    )
    concurrency: int = Field(default=4, ge=1, le=MOST_THREADS, description="Calls at once.")

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

    contexts: int = Field(
        default=6,
        ge=1,
        le=MOST_SHOWN,
        description="Examples of each feature from the top, and as many over the quantiles of its activation.",
    )
    labelers: list[str] = Field(
        default=["concepts", "tokens"], description="Also `llm`, or `mypackage.module:Labeler`."
    )
    predicates: list[str] = Field(
        default=[],
        examples=[["mypackage.module:function"]],
        description="Functions of yours that add to the vocabulary of `concepts`. As `mypackage.module:function`.",
    )
    bar: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="F1 that a label must reach to be shown as one. Where a language model judged, its balanced accuracy too.",
    )
    llm: LlmSpec | None = Field(
        default=None,
        examples=[{"base_url": "http://localhost:8000/v1", "model": "NAME"}],
        description="Whom the labeler `llm` asks. Its fields are below.",
    )

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

    metrics: list[str] = Field(
        default=["reconstruction", "matching"],
        description="Also `similarity`, `flow`, or `mypackage.module:Metric`. See [measures.md](measures.md).",
    )
    min_count: int = Field(
        default=30, ge=1, le=MOST_TOKENS, description="Features active on fewer tokens are left out."
    )
    spliced: bool = Field(
        default=False,
        description="Reconstruction also measures `delta_ce`. The target model is run once for each pair of layers.",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        _require_known("metric", self.metrics, METRICS)
        return self


class TraceSpec(Section):
    """How prompts are traced, and which are traced by `throughline run`."""

    prompts: list[str] = Field(
        default=[], examples=[["What is 15 + 27?"]], description="Traced and compared by `throughline run`."
    )
    features: int = Field(default=6, ge=1, le=MOST_SHOWN, description="Features shown per layer, beside labelled ones.")
    answer_tokens: int = Field(default=8, ge=1, le=MOST_SHOWN, description="Longest answer, in tokens.")
    share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of each layer's influence on the answer that the graph's nodes carry together.",
    )
    nodes: int = Field(default=24, ge=1, le=MOST_SHOWN, description="Nodes of the graph in each layer, at most.")
    chains: int = Field(default=3, ge=0, le=MOST_SHOWN, description="Chains shown for each token of the answer.")


class ExecutorSpec(Section):
    """Where training runs. It changes no result, but `cpus`, `processes` and `devices` may change the last digits."""

    kind: Literal["local", "ray"] = Field(
        default="local",
        description="`local`: jobs run in this process, one by one; `ray`: on all devices of a machine or cluster. `ray` "
        "uses the blocks that `throughline plan` would make of them, and needs `throughline[cluster]`.",
    )
    address: str | None = Field(
        default=None,
        examples=["HOST:6379"],
        description="Of a Ray cluster: `auto`, `HOST:6379` or `ray://HOST:10001`. None starts Ray on this machine.",
    )
    cpus: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        examples=[2],
        description="Threads of a job. None: all of the machine (`local`), 1 (`ray`).",
    )
    processes: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        examples=[2],
        description="Models worked on side by side, each in a process of its own, with `local` on a CPU. None: one for each "
        "thread if all models are narrower than 256, else 1.",
    )
    gpus: float | None = Field(
        default=None,
        ge=0,
        le=MOST_THREADS,
        examples=[0.5],
        description="GPUs of a job, with `ray`; 0.5 puts two jobs on one. None: 1 where there are any.",
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        examples=[2],
        description="Devices that train one block together, with `ray`, each a share of every batch. None: 1, but more where GPUs "
        "outnumber the layers that are left.",
    )

    @model_validator(mode="after")
    def _no_cluster_here(self) -> Self:
        if self.kind == "local" and any(value is not None for value in (self.address, self.gpus, self.devices)):
            raise ValueError("address, gpus and devices are Ray's; set kind: ray")
        if self.kind == "ray" and self.processes is not None:
            raise ValueError("processes is for kind: local; Ray has a process for each job")
        return self


class LoggingSpec(Section):
    """Where else training's measures go; changes no result."""

    tensorboard: bool = Field(
        default=False,
        description="Scalars in `RUN/tensorboard/<model>`; needs `throughline[tensorboard]`.",
    )
    wandb: str | None = Field(
        default=None,
        examples=["my-project"],
        description="A project of Weights & Biases; needs `throughline[wandb]`. `WANDB_MODE=offline` keeps it on disk.",
    )


class Study(Section):
    """Everything a run is made from; a run is a pure function of it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        examples=["my-study"],
        description="Letters, digits, `.`, `_`, `-`; the run lies in `runs/<name>` unless `--out` says otherwise.",
    )
    models: list[ModelSpec] = Field(min_length=1, description="A list; a path alone stands for `{path: …}`.")
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
        for model in self.models:
            self._require_overrides_fit(model)
        return self

    def _require_overrides_fit(self, model: ModelSpec) -> None:
        """ValueError for what is wrong with a dictionary only once the overrides of its model and layer are applied."""
        where = f"dictionary of {model.name}"
        try:
            dictionary = self.dictionary_for(model)
            for layer in dictionary.per_layer:
                where = f"dictionary of {model.name}, layer {layer}"
                dictionary.at_layer(layer)
        except ValidationError as error:
            raise ValueError(f"{where}: {_describe_all(error)}") from None

    def model(self, name: str | None) -> ModelSpec:
        """The model called `name` (the only one, if None); InputError names the known ones."""
        names = [m.name for m in self.models]
        if name is None and len(names) == 1:
            return self.models[0]
        if name is None:
            raise InputError(f"this run has {len(names)} models; say which with --model ({', '.join(names)})")
        if name not in names:
            raise InputError(f"this run has no model {name!r}; it has {', '.join(names)}")
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
    except NOT_YAML as error:
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
    except NOT_YAML as error:
        raise InputError(f"--set {setting}: {_shorten(value)} is not YAML: {' '.join(str(error).split())}") from None
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
    found = f"{expected}, found {_shorten(fault['input'])}"
    return f"{where}: {found}" if where else found


def _expectation(message: str) -> str:
    """What pydantic says was expected, as the rest of a sentence."""
    message = message.removeprefix("Value error, ").partition(", unable to parse")[0].partition(" after validation")[0]
    if "a valid dictionary or instance of" in message:
        return "input should be keys and values"
    return message.replace("Input should", "input should").replace("List should", "list should")


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else shown[: LONGEST_SHOWN - 1] + "…"


def _is_branch(part: object) -> bool:
    """True for what pydantic adds to a location to say which alternative of a union it tried."""
    return isinstance(part, str) and (
        part in ("float", "int", "L1Schedule") or "[" in part or part.startswith("constrained-")
    )


def _keys_at(location: tuple) -> list[str]:
    section: Any = Study
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)
