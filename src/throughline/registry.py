"""One table a kind of thing: a built-in is a module path and a name, a third party's is an entry point of the same form.

    [project.entry-points."throughline.labelers"]
    mine = "mypackage.mymodule:MyLabeler"

Nothing is imported before it is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from throughline.errors import InputError


@dataclass(frozen=True)
class Registry:
    """Names and where their implementations are (`module:attribute`), each of which has the attributes `required`."""

    kind: str
    built_in: Mapping[str, str]
    required: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """All names, the built-in ones first."""
        return [*self.built_in, *(e.name for e in self._entry_points() if e.name not in self.built_in)]

    def load(self, name: str) -> Any:
        """The implementation called `name`, or the attribute of a `module:attribute` path; InputError if there is none."""
        path = self.built_in.get(name) or next((e.value for e in self._entry_points() if e.name == name), None)
        if path is None and ":" in name:
            path = name
        if path is None:
            raise InputError(unknown(self.kind, name, self.names()))
        module, _, attribute = path.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except Exception as error:  # a module that is somebody else's can fail in any way when it is imported
            reason = (
                str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
            )
            raise InputError(f"{self.kind} {name!r} cannot be loaded from {path}: {reason}") from error
        if missing := [wanted for wanted in self.required if not hasattr(found, wanted)]:
            raise InputError(f"{path} is no {self.kind}: it has no {', '.join(missing)}")
        return found

    def _entry_points(self) -> list[Any]:
        return _find(entry_points, f"throughline.{self.kind.replace(' ', '_')}s")


@cache
def _find(installed: Callable[..., Any], group: str) -> list[Any]:
    """Entry points of a group. All of what is installed is read for it, and it stays the same while a process lives."""
    return list(installed(group=group))


def unknown(kind: str, name: object, known: list[str]) -> str:
    """`model 'phy' is unknown; did you mean 'phi'? (gpt2, phi, pythia)`."""
    close = get_close_matches(str(name), known, n=1, cutoff=0.5)
    listed = ", ".join(known)
    hint = f"did you mean {close[0]!r}? ({listed})" if close else f"expected one of {listed}"
    return f"{kind} {name!r} is unknown; {hint}"


ARCHITECTURES = Registry(
    "architecture",
    {
        "topk": "throughline.dictionaries.topk:TopK",
        "relu": "throughline.dictionaries.relu:ReLU",
        "batch_topk": "throughline.dictionaries.batch_topk:BatchTopK",
        "jumprelu": "throughline.dictionaries.jumprelu:JumpReLU",
        "gated": "throughline.dictionaries.gated:Gated",
        "matryoshka": "throughline.dictionaries.matryoshka:Matryoshka",
    },
)
METRICS = Registry(
    "metric",
    {
        "reconstruction": "throughline.transfer.reconstruction:Reconstruction",
        "matching": "throughline.transfer.matching:Matching",
        "flow": "throughline.transfer.flow:Flow",
        "similarity": "throughline.transfer.similarity:Similarity",
    },
    required=("name", "across_models", "both_ways", "compute"),
)
LABELERS = Registry(
    "labeler",
    {
        "concepts": "throughline.labelers.concepts:Concepts",
        "tokens": "throughline.labelers.tokens:Tokens",
        "llm": "throughline.labelers.llm:LanguageModelLabels",
    },
)
FIGURES = Registry(
    "figure",
    {
        "quality": "throughline.figures.quality:draw_quality",
        "transfer": "throughline.figures.transfer:draw_transfer",
        "all_models": "throughline.figures.transfer:draw_all_models",
        "trace": "throughline.figures.trace:draw_trace",
        "divergence": "throughline.figures.curves:draw_divergence",
        "decay": "throughline.figures.curves:draw_decay",
        "persistence": "throughline.figures.curves:draw_persistence",
        "ribbon": "throughline.figures.ribbons:draw_ribbon",
        "comparison": "throughline.figures.comparison:draw_comparison",
        "best_matches": "throughline.figures.matches:draw_best_matches",
    },
)
