"""The stages of a run in order, each skipped when it was done from the same settings.

    train -> evaluate (and gate) -> features -> label -> transfer -> analyze -> trace and compare -> report

A stage's key is made of every setting that its result depends on, and of the key of the stage before it; so a changed
setting redoes exactly what it touches. One module a stage; a name given here is imported when it is used, so that a trace
loads nothing of training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from throughline.pipeline.checks import check_study
    from throughline.pipeline.comparisons import compare, compare_prompts
    from throughline.pipeline.evaluation import evaluate_models
    from throughline.pipeline.features import describe_models
    from throughline.pipeline.labels import label_models
    from throughline.pipeline.prompts import trace_prompts
    from throughline.pipeline.side_by_side import advance_model, advance_models
    from throughline.pipeline.traces import look, trace, trace_options
    from throughline.pipeline.training import require_layers, train_models
    from throughline.pipeline.transfer import transfer_models

__all__ = [
    "advance_model",
    "advance_models",
    "check_study",
    "compare",
    "compare_prompts",
    "describe_models",
    "evaluate_models",
    "label_models",
    "look",
    "require_layers",
    "trace",
    "trace_options",
    "trace_prompts",
    "train_models",
    "transfer_models",
]

_HOME = {
    "advance_model": "side_by_side",
    "advance_models": "side_by_side",
    "check_study": "checks",
    "compare": "comparisons",
    "compare_prompts": "comparisons",
    "describe_models": "features",
    "evaluate_models": "evaluation",
    "label_models": "labels",
    "look": "traces",
    "require_layers": "training",
    "trace": "traces",
    "trace_options": "traces",
    "trace_prompts": "prompts",
    "train_models": "training",
    "transfer_models": "transfer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
