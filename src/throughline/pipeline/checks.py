"""What of a study is checked before anything is written."""

from collections.abc import Callable, Mapping

from throughline.asking import check_asked
from throughline.errors import InputError
from throughline.journals import check_extras
from throughline.models import check_model, read_tokenizer
from throughline.study import ModelSpec, Study
from throughline.text import announce_hub, read_documents
from throughline.tokens import encode_prompt
from throughline.tracing import check_prompt


def check_study(study: Study, say: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """Refuse, before anything is written, what would fail later: a model, layer, text or library that is not there, a prompt
    too long. Returns the depth of each model whose configuration tells it. `say` is told before the network is asked for text."""
    check_extras(study)
    check_asked(study)
    depths = {}
    for spec in study.models:
        depth, context, width = check_model(spec)
        depths |= {spec.name: depth} if depth else {}
        if depth and width:
            _check_dictionaries(study, spec, depth, width)
        for prompt in study.trace.prompts:
            _check_prompt(study, spec, prompt, context)
    announce_hub(study.data, say)
    if len(depths) == len(study.models):
        _check_overridden_layers("dictionary", study.dictionary.per_layer, max(depths.values()))
    for split in ("train", "heldout"):
        next(read_documents(study.data, split, study.training.seed))
    return depths


def _check_dictionaries(study: Study, spec: ModelSpec, depth: int, d_model: int) -> None:
    """Refuse a dictionary that cannot be made for a model of this width."""
    if spec.dictionary is not None:
        _check_overridden_layers(f"dictionary of {spec.name}", spec.dictionary.per_layer or {}, depth)
    dictionary = study.dictionary_for(spec)
    for layer in range(depth) if spec.layers == "all" else spec.layers:
        own = dictionary.at_layer(layer)
        try:
            own.require_fit(own.width(d_model))
        except ValueError as error:
            raise InputError(f"dictionary of {spec.name}, layer {layer}, d_model {d_model}: {error}") from None


def _check_overridden_layers(where: str, per_layer: Mapping[int, object], depth: int) -> None:
    """Refuse an override of a layer that no model it is for has, which would change nothing."""
    unknown = next((layer for layer in sorted(per_layer) if layer >= depth), None)
    if unknown is not None:
        raise InputError(f"{where}: per_layer has layer {unknown}, but there are layers 0-{depth - 1}")


def _check_prompt(study: Study, spec: ModelSpec, prompt: str, context: int | None) -> None:
    check_prompt(prompt)
    num_tokens = len(encode_prompt(read_tokenizer(spec, study.data.bos), prompt))
    if context is not None and num_tokens >= context:
        raise InputError(
            f"trace.prompts: {prompt[:40]!r}… has {num_tokens} tokens; {spec.name} sees {context} and needs at least one "
            "for the answer"
        )
