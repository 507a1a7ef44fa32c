"""Opening a model: checked before it is read, from safetensors only, without remote code, and in silence.

With `weights: random` the configuration is all that is read; the numbers are random and the model's name says so.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from throughline import gguf_models
from throughline.errors import InputError
from throughline.model_files import check_folder, check_layers, is_local
from throughline.models.bos import Bos, set_bos_
from throughline.models.families import FAMILIES
from throughline.models.gelu import fuse_gelu_
from throughline.models.language_model import LanguageModel, quiet_transformers
from throughline.models.random_weights import build_empty, build_random, byte_tokenizer
from throughline.models.unfilled import Unfilled
from throughline.study import ModelSpec
from throughline.zoo import resolve_path

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model")


def open_model(
    spec: ModelSpec, device: str = "cpu", say: Callable[[str], None] = lambda line: None, bos: Bos = "auto"
) -> LanguageModel:
    """The model of `spec` on `device`. Safetensors only, no remote code; InputError, one line, for what is missing.

    `bos` is whether its tokenizer puts BOS in front of a text. `say` is told what stands in for what with random weights, and how
    those of a GGUF file were rounded.
    """
    path, config = _find(spec)
    with _quiet():
        tokenizer = _find_tokenizer(path, spec, config)
        set_bos_(tokenizer, bos, spec.name)
        if spec.weights == "trained":
            hf = _load_weights(path, spec, str(config["model_type"]))
        else:
            hf = _make_weights(path, spec, device)
    if spec.weights == "random":
        say(f"{spec.name}: {_what_is_made_up(path)}; speed and memory are real, all that is learned from it is not")
    if rounded := gguf_models.quantization_of(Path(path)):
        say(f"{spec.name}: its weights were rounded to {rounded} before they came here")
    fuse_gelu_(hf)
    return LanguageModel(spec.name, hf, tokenizer, device)


def read_tokenizer(spec: ModelSpec, bos: Bos = "auto") -> PreTrainedTokenizerFast:
    """The tokenizer of `open_model`, without reading or making weights."""
    path, config = _find(spec)
    with _quiet():
        tokenizer = _find_tokenizer(path, spec, config)
        set_bos_(tokenizer, bos, spec.name)
    return tokenizer


def outline_model(spec: ModelSpec) -> PreTrainedModel:
    """The modules of `open_model` on the meta device, tied where its weights are: what there is to count, without weights."""
    path, _ = _find(spec)
    with _quiet():
        config = _said_in_one_line(
            path, AutoConfig.from_pretrained, path, revision=spec.revision, trust_remote_code=False
        )
        hf = build_empty(config, dtype=getattr(torch, spec.dtype))
        hf.tie_weights()
    return hf


class ModelFacts(NamedTuple):
    """What a model's configuration tells of it: number of layers, the longest text it takes, in tokens, and d_model."""

    depth: int | None
    context: int | None
    width: int | None


def check_model(spec: ModelSpec) -> ModelFacts:
    """Refuse what `open_model` would refuse for what lies there, and layers that the model has not, without reading weights."""
    path, config = _find(spec)
    known = AutoConfig.for_model(**config) if "model_type" in config else None
    depth = getattr(known, "num_hidden_layers", None)
    if isinstance(depth, int):
        check_layers(spec.name, spec.layers, depth)
    with _quiet():
        _find_tokenizer(path, spec, config)
    model_type = str(config.get("model_type"))
    family = FAMILIES.load(model_type) if model_type in FAMILIES.names() else None
    context = getattr(known, family.context if family else "max_position_embeddings", None)
    width = getattr(known and known.get_text_config(), "hidden_size", None)
    return ModelFacts(depth if isinstance(depth, int) else None, context, width if isinstance(width, int) else None)


def _find(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Where the model is, and its configuration."""
    path = gguf_models.locate(resolve_path(spec.path))
    folder = Path(path).expanduser()
    if file := gguf_models.find_file(folder):
        folder = gguf_models.unpack(file)
        path = str(folder)
    if is_local(path):
        check_folder(folder, needs_weights=spec.weights == "trained")
        path = str(folder)
    with _quiet():
        config = _said_in_one_line(path, PreTrainedConfig.get_config_dict, path, revision=spec.revision)[0]
    _check_config(path, config)
    return path, config


def _check_config(path: str, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise InputError(
            f"model {path} brings its own code (auto_map in config.json) and remote code is off; use a version without"
        )
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type or "")
    causal = any(name == own or name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    if own is None or (classes and not causal):
        found = ", ".join(classes) or f"model type {model_type!r}"
        raise InputError(f"model {path} is not a causal language model (found {found})")


def _attention(model_type: str) -> str | None:
    """The attention implementation that a family needs; None leaves it to transformers."""
    return FAMILIES.load(model_type).attn_implementation if model_type in FAMILIES.names() else None


def _make_weights(path: str, spec: ModelSpec, device: str) -> PreTrainedModel:
    config = _said_in_one_line(path, AutoConfig.from_pretrained, path, revision=spec.revision, trust_remote_code=False)
    return build_random(
        config,
        name=spec.name,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=_attention(config.model_type),
        device=device,
    )


def _load_weights(path: str, spec: ModelSpec, model_type: str) -> PreTrainedModel:
    with Unfilled(counting=model_type in FAMILIES.names()):
        hf, report = _said_in_one_line(
            path,
            AutoModelForCausalLM.from_pretrained,
            path,
            revision=spec.revision,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=_attention(model_type),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if report["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(report["missing_keys"])
        raise InputError(f"weights of model {path} lack {len(missing)} tensors, such as {missing[0]}")
    return hf


def _find_tokenizer(path: str, spec: ModelSpec, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The model's tokenizer; for random weights in a folder without one, bytes."""
    if spec.weights == "random" and _lacks_tokenizer(path):
        return byte_tokenizer(AutoConfig.for_model(**config).get_text_config().vocab_size)
    return _load_tokenizer(path, spec.revision)


def _lacks_tokenizer(path: str) -> bool:
    return Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in TOKENIZER_FILES)


def _what_is_made_up(path: str) -> str:
    """`the weights beside config.json are not read; its tokens are bytes, since no tokenizer lies there`."""
    lies_there = Path(path).is_dir() and any(Path(path).glob("*.safetensors"))
    weights = "its trained weights are not read" if lies_there else "only its architecture is read"
    return f"{weights}; its tokens are bytes, since it has no tokenizer" if _lacks_tokenizer(path) else weights


def _load_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"model {path} has no tokenizer that can be opened: {_first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made from nothing, since no file was there
        raise InputError(f"model {path} has no tokenizer (tokenizer.json)")
    if not tokenizer.is_fast:
        raise InputError(
            f"model {path} has a slow tokenizer, which knows no character offsets; expected tokenizer.json"
        )
    return tokenizer


def _said_in_one_line(path: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`load(...)`, whatever it raises turned into one line."""
    try:
        return load(*args, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, … for bad files
        hint = (
            ""
            if Path(path).is_dir()
            else " (hub ids need the network or the hub's cache; a local folder works without)"
        )
        raise InputError(f"model {path} cannot be opened: {_first_line(error)}{hint}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or retry messages of transformers and the hub's client."""
    hub, bars = logging.getLogger("huggingface_hub"), hf_logging.is_progress_bar_enabled()
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
