"""Follow a language model's reasoning through every layer.

Every command is a function of the same name and arguments; the most used are here, all of them in `throughline.api`. Nothing
heavy is imported before a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from throughline.api import (
        compare,
        demo,
        evaluate,
        export_sae,
        import_sae,
        init,
        label,
        load_run,
        run,
        status,
        trace,
        train,
    )
    from throughline.dictionaries import load_dictionary
    from throughline.errors import ThroughlineError
    from throughline.models import open_model
    from throughline.run_dir import RunDir
    from throughline.study import Study, load_study

__version__ = "0.1.0"
__all__ = [
    "RunDir",
    "Study",
    "ThroughlineError",
    "compare",
    "demo",
    "evaluate",
    "export_sae",
    "import_sae",
    "init",
    "label",
    "load_dictionary",
    "load_run",
    "load_study",
    "open_model",
    "run",
    "status",
    "trace",
    "train",
]

_HOME = {  # features, transfer and report are modules of this package; as functions they are in throughline.api
    "RunDir": "run_dir",
    "Study": "study",
    "ThroughlineError": "errors",
    "load_dictionary": "dictionaries",
    "load_study": "study",
    "open_model": "models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
