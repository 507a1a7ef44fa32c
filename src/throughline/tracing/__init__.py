"""One prompt followed through every layer of a model."""

from throughline.tracing.reading import TraceInputs, check_prompt, trace_prompt

__all__ = ["TraceInputs", "check_prompt", "trace_prompt"]
