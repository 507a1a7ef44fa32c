"""One prompt followed through every layer of a model."""

from throughline.tracing.reading import TraceInputs, TraceOptions, check_prompt, trace_prompt

__all__ = ["TraceInputs", "TraceOptions", "check_prompt", "trace_prompt"]
