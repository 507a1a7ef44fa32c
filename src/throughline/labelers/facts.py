"""What a text's generator, or the user, knows of it: facts of documents, kinds of text, predicates given in the study."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from throughline.errors import InputError
from throughline.labelers.viewing import View
from throughline.labelers.vocabulary import NOWHERE, Builder, Places, ValueSet
from throughline.registry import Registry

PREDICATES = Registry("predicate", {})


def add_facts(builder: Builder, view: View, places: Places) -> None:
    """Each fact at every token that overlaps its characters, everywhere and at each place; and the kinds of text.

    A fact's bare name is said too, where a text has it once.
    """
    values, bare, kinds = _read_facts(view)
    for name, found in values.items():
        tokens = {value: np.unique(np.concatenate(parts)) for value, parts in found.items()}
        once = sum(len(at) for at in tokens.values()) == len(np.unique(np.concatenate(list(tokens.values()))))
        for values_N, sets in _disjoint(tokens, view.num_tokens, once):
            builder.add(name, values_N, sets, places, family_of(name))
        if name in bare:
            builder.add_truths({name: np.unique(np.concatenate(bare[name]))})
    builder.add_truths({f"text of kind {kind!r}": np.concatenate(parts) for kind, parts in kinds.items()})


def _disjoint(
    tokens: dict[str, np.ndarray], num_tokens: int, once: bool
) -> Iterator[tuple[np.ndarray, list[ValueSet]]]:
    """One attribute of all values, or one of each if a token can have several of them."""
    groups = [list(tokens)] if once else [[value] for value in tokens]
    for group in groups:
        values_N = np.full(num_tokens, NOWHERE)
        for i, value in enumerate(group):
            values_N[tokens[value]] = i
        yield values_N, [ValueSet(f"= {value}", [i]) for i, value in enumerate(group)]


Parts = dict[str, list[np.ndarray]]


def _read_facts(view: View) -> tuple[dict[str, Parts], Parts, Parts]:
    """Tokens of each value of each fact, of each fact that a text has once, and of each kind of text."""
    values: dict[str, Parts] = {}
    bare: Parts = {}
    kinds: Parts = {}
    for number, document in enumerate(view.documents):
        tokens = slice(*view.bounds[number : number + 2])
        names = Counter(fact.name for fact in document.facts)
        for fact in document.facts:
            at = _overlapping(view, tokens, fact.start, fact.end)
            values.setdefault(fact.name, {}).setdefault(_spell(fact.value), []).append(at)
            if names[fact.name] == 1:
                bare.setdefault(fact.name, []).append(at)
        if document.kind:
            kinds.setdefault(document.kind, []).append(np.arange(tokens.start, tokens.stop))
    return values, bare, kinds


def family_of(fact: str) -> str:
    """Which of the families that are reported by name a fact belongs to."""
    return next((f for f in ("units", "tens", "carry") if fact.endswith(f)), "other")


def _spell(value: int | str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _overlapping(view: View, tokens: slice, start: int, end: int) -> np.ndarray:
    return tokens.start + np.flatnonzero((view.starts_N[tokens] < end) & (view.ends_N[tokens] > start))


# ---- given in the study


def load_predicates(paths: Sequence[str]) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of `features.predicates`. Raises InputError for a path that leads to none."""
    found = []
    for path in paths:
        function = PREDICATES.load(path)
        if not callable(function):
            raise InputError(f"features.predicates: {path} should be a function, found {type(function).__name__}")
        found.append((path, function))
    return found


def find_given(view: View, predicates: Sequence[tuple[str, Callable[..., Any]]]) -> dict[str, np.ndarray]:
    """Tokens at which what the user's functions say holds. Raises InputError for an answer of another form."""
    found: dict[str, list[np.ndarray]] = {}
    for number, document in enumerate(view.documents):
        tokens = slice(*view.bounds[number : number + 2])
        spans = list(zip(view.starts_N[tokens].tolist(), view.ends_N[tokens].tolist(), strict=True))
        for path, function in predicates:
            try:
                said = function(document, spans)
            except Exception as error:  # somebody else's code can fail in any way
                raise InputError(
                    f"features.predicates: {path} failed on {document.text[:40]!r}: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(said, Mapping):
                raise InputError(
                    f"features.predicates: {path} should return a dict of names, found {type(said).__name__}"
                )
            for name, truth in said.items():
                found.setdefault(str(name), []).append(_tokens_of(truth, view, tokens, f"{path}, {name!r}"))
    return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


def _tokens_of(truth: Any, view: View, tokens: slice, where: str) -> np.ndarray:
    """Tokens of per-token truths, or of spans of characters."""
    num_tokens = tokens.stop - tokens.start
    items = list(truth) if isinstance(truth, Sequence | np.ndarray) and not isinstance(truth, str) else None
    if items is not None and len(items) == num_tokens and all(isinstance(t, bool | np.bool_) for t in items):
        return tokens.start + np.flatnonzero(items)
    if items is not None and all(_is_span(s) for s in items):
        parts = [_overlapping(view, tokens, int(s[0]), int(s[1])) for s in items]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])
    raise InputError(
        f"features.predicates: {where} should be a list of (start, end) characters or of {num_tokens} truths, one a token; "
        f"found {str(truth)[:60]!r}"
    )


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, Sequence)
        and len(span) == 2
        and all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in span)
    )
