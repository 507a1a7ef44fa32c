"""Whether each piece of text begins with a token that says so: the tokenizer is made to do what a study asks for.

Everything that reads text asks the tokenizer, so training, evaluation and traces agree.
"""

import json
from typing import Any, Literal

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from throughline.errors import InputError

Bos = Literal["auto", "always", "never"]


def bos_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The token that a text begins with: BOS, or the end of text, which families without BOS (GPT-2, Qwen) put between texts."""
    found: Any = tokenizer.bos_token or tokenizer.eos_token
    return None if found is None else str(found)


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True if the tokenizer puts that token in front of a text."""
    token = bos_token(tokenizer)
    return token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.convert_tokens_to_ids(token)]  # type: ignore[index]


def set_bos_(tokenizer: PreTrainedTokenizerFast, bos: Bos, name: str) -> None:
    """Let the tokenizer put BOS in front of every text, or of none; `auto` leaves it as it is. InputError if there is no BOS."""
    if bos == "auto" or adds_bos(tokenizer) == (bos == "always"):
        return
    token = bos_token(tokenizer)
    if token is None:
        raise InputError(
            f"data.bos is always, but the tokenizer of {name} has neither BOS nor an end of text; set auto"
        )
    core = tokenizer.backend_tokenizer
    if bos == "always":
        template = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
        )
        # the first one may trim the spaces from what a token covers; a template works on what it leaves
        core.post_processor = processors.Sequence([core.post_processor, template]) if core.post_processor else template
        return
    tree = json.loads(core.to_str())
    tree["post_processor"] = _without_templates(tree["post_processor"])
    core.post_processor = Tokenizer.from_str(json.dumps(tree)).post_processor
    if adds_bos(tokenizer):
        raise InputError(f"data.bos is never, but the tokenizer of {name} always puts {token} in front; set auto")


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor is None or processor["type"] == "TemplateProcessing":
        return None
    if processor["type"] != "Sequence":
        return processor
    left = [one for one in map(_without_templates, processor["processors"]) if one]
    return processor | {"processors": left} if left else None
