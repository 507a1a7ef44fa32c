"""One prompt followed through every layer of a model; and many prompts read at once."""

from throughline.tracing.inputs import TraceInputs
from throughline.tracing.prompts import Prompt, check_prompts, list_prompts, read_prompts
from throughline.tracing.reading import Tell, TraceOptions, check_prompt, tell_nobody, trace_prompt

__all__ = [
    "Prompt",
    "Tell",
    "TraceInputs",
    "TraceOptions",
    "check_prompt",
    "check_prompts",
    "list_prompts",
    "read_prompts",
    "tell_nobody",
    "trace_prompt",
]
