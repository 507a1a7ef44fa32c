"""One prompt followed through every layer of a model; and many prompts read at once."""

from throughline.tracing.inputs import TraceInputs
from throughline.tracing.prompts import Prompt, check_prompts, list_prompts, read_prompts
from throughline.tracing.reading import TraceOptions, check_prompt, trace_prompt

__all__ = [
    "Prompt",
    "TraceInputs",
    "TraceOptions",
    "check_prompt",
    "check_prompts",
    "list_prompts",
    "read_prompts",
    "trace_prompt",
]
