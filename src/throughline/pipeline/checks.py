"""What of a study is checked before anything is written."""

from collections.abc import Callable

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
        depth, context, _ = check_model(spec)
        depths |= {spec.name: depth} if depth else {}
        for prompt in study.trace.prompts:
            _check_prompt(study, spec, prompt, context)
    announce_hub(study.data, say)
    for split in ("train", "heldout"):
        next(read_documents(study.data, split, study.training.seed))
    return depths


def _check_prompt(study: Study, spec: ModelSpec, prompt: str, context: int | None) -> None:
    check_prompt(prompt)
    num_tokens = len(encode_prompt(read_tokenizer(spec, study.data.bos), prompt))
    if context is not None and num_tokens >= context:
        raise InputError(
            f"trace.prompts: {prompt[:40]!r}… has {num_tokens} tokens; {spec.name} sees {context} and needs at least one "
            "for the answer"
        )
